"""Completion of commands and flags in the shell: `ssl-jax completion bash` prints a script for it."""

from pathlib import Path

from ssl_jax.cli import COMMANDS, POSITIONAL, flags_of
from ssl_jax.errors import unknown

ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"  # with it, zsh reads scripts for bash
# What the function leaves open, such as the file after --workdir=, the shell completes by itself (-o default).
BASH = """\
_ssl_jax() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} flags= words=
  case ${{COMP_WORDS[1]}} in
{cases}
  esac
  if ((COMP_CWORD == 1)); then words="{commands} help"; fi
  if [[ $word == -* ]]; then words=$flags; elif ((COMP_CWORD > 2)); then words=; fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  if [[ ${{COMPREPLY[*]}} == *= ]]; then compopt -o nospace 2>/dev/null; fi
}}
complete -o default -F _ssl_jax ssl-jax"""


def script(shell: str) -> str:
    """The script for a shell, bash or zsh, from the table of commands. Raises UserError for another shell."""
    if shell not in ("bash", "zsh"):
        raise unknown("--shell", shell, ("bash", "zsh"))
    commands = " ".join(COMMANDS)
    cases = [f'    help) words="{commands}" ;;', *map(_case, COMMANDS)]
    return ZSH * (shell == "zsh") + BASH.format(commands=commands, cases="\n".join(cases))


def _case(command: str) -> str:
    flags = [f"--{name}" if default is False else f"--{name}=" for name, (default, _) in flags_of(command).items()]
    first = POSITIONAL.get(command, ("",))[0]
    words = _methods() if first == "method" else ["bash", "zsh"] if first == "shell" else []
    return f'    {command}) flags="{" ".join([*flags, "--help"])}" words="{" ".join(words)}" ;;'


def _methods() -> list[str]:
    """The methods that come with this package, without importing them: shells run this when they start."""
    names = {path.stem for path in (Path(__file__).parent / "methods").glob("*.py")}
    return sorted(names - {"__init__", "base"})
