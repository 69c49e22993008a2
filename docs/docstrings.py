"""Docstrings are plain text; this griffe extension makes Markdown of them for the API pages.

Shapes such as [B, D] and products such as a * b are no links and no emphasis, doctests are code, and the fields of a
class become a list: those that its docstring explains line by line, else those with a comment or the help of an option.
"""

import ast
import re
import textwrap

import griffe


class PlainDocstrings(griffe.Extension):
    def on_package(self, *, pkg, **kwargs):
        convert(pkg)


def convert(obj) -> None:
    if obj.is_alias:
        return
    text = markdown(obj.docstring.value, list(obj.members) if obj.is_class else []) if obj.docstring else ""
    if obj.is_class and "- `" not in text:
        text = f"{text}\n\n{comments(obj)}".strip()
    if text:
        obj.docstring = griffe.Docstring(text, parent=obj)
    for member in list(obj.members.values()):
        convert(member)


def markdown(text: str, fields: list[str]) -> str:
    blocks = []
    for block in re.split(r"\n\n+", text):
        if block.lstrip().startswith(">>>"):
            blocks.append(f"```pycon\n{block}\n```")
            continue
        field = re.compile(rf"^({'|'.join(fields)}):\s+", re.M) if fields else None
        if field and field.search(block):
            block = re.sub(r"\n\s+", "\n  ", field.sub(r"- `\1`: ", block))
            start = block.index("- `")
            block = f"{block[:start]}\n{block[start:]}" if start else block
        blocks.append(escape(block))
    return "\n\n".join(blocks)


def escape(text: str) -> str:
    """Text whose brackets, angles and stars mean themselves; what is in backticks stays."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"[\[<*]", lambda m: f"&#{ord(m[0])};", part) for part in parts
    )


def comments(obj) -> str:
    """A list of the fields of a class with the comment behind each, or the help of `option(default, help)`."""
    lines = []
    for node in ast.parse(textwrap.dedent(obj.source)).body[0].body:
        if isinstance(node, ast.AnnAssign):
            call = node.value if isinstance(node.value, ast.Call) else None
            if call and ast.unparse(call.func) == "option" and len(call.args) > 1:
                text = ast.literal_eval(call.args[1])
            else:
                text = obj.source.splitlines()[node.end_lineno - 1].partition("  # ")[2]
            if text and not text.startswith("type: ignore"):
                lines.append(f"- `{ast.unparse(node.target)}`: {escape(text)}")
    return "\n".join(lines)
