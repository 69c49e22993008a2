"""Completion of commands and flags in the shell: `ssl-jax completion bash` prints a script for it."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from ssl_jax.errors import unknown

ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"  # with it, zsh reads scripts for bash
# zsh has no compopt: there each word brings its own space, unless more follows. Nor does it look for files behind "=".
ENDS = {
    "bash": "if [[ ${COMPREPLY[*]} == *= ]]; then compopt -o nospace 2>/dev/null; fi",
    "zsh": """\
if [[ $word == *=* ]]; then
    setopt localoptions nullglob
    for file in ${~${word#*=}}*; do
      if [[ -d $file ]]; then COMPREPLY+=("${word%%=*}=$file/"); else COMPREPLY+=("${word%%=*}=$file "); fi
    done
  else
    COMPREPLY=("${COMPREPLY[@]/%/ }"); COMPREPLY=("${COMPREPLY[@]/%= /=}")
  fi""",
}
# What the function leaves open, such as the file after --workdir=, the shell completes by itself (-o default).
BASH = """\
_ssl_jax() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} flags= words= file=
  case ${{COMP_WORDS[1]}} in
{cases}
  esac
  if ((COMP_CWORD == 1)); then words="{commands} help"; fi
  if [[ $word == -* ]]; then words=$flags; elif ((COMP_CWORD > 2)); then words=; fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  {end}
}}
complete -o default{options} -F _ssl_jax ssl-jax"""


def script(shell: str, flags: Mapping[str, Iterable[str]], words: Mapping[str, str]) -> str:
    """The script for a shell, bash or zsh. Raises UserError for another shell.

    flags: of each command, such as "--size=". words: what the first word after a command is, such as "method".
    """
    choices = {"method": _methods(), "shell": ["bash", "zsh"], "command": list(flags)}
    if shell not in choices["shell"]:
        raise unknown("--shell", shell, choices["shell"])
    cases = [
        f'    {command}) flags="{" ".join([*flags.get(command, ()), "--help"])}" '
        f'words="{" ".join(choices.get(words.get(command, ""), []))}" ;;'
        for command in ("help", *flags)
    ]
    of_zsh = shell == "zsh"
    parts = {"end": ENDS[shell], "options": " -o nospace" * of_zsh}
    return ZSH * of_zsh + BASH.format(commands=" ".join(flags), cases="\n".join(cases), **parts)


def _methods() -> list[str]:
    """The methods that come with this package, without importing them: shells run this when they start."""
    modules = (Path(__file__).parent / "methods").glob("*.py")
    return sorted(path.stem for path in modules if "\ndef make(" in path.read_text())
