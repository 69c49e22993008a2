"""Docstrings are plain text; this griffe extension makes Markdown of them for the API pages.

Shapes such as [B, D] and products such as a * b are no links and no emphasis, doctests are code, and the fields that a
class docstring explains line by line become a list.
"""

import re

import griffe


class PlainDocstrings(griffe.Extension):
    def on_package(self, *, pkg, **kwargs):
        convert(pkg)


def convert(obj) -> None:
    if obj.is_alias:
        return
    if obj.docstring:
        fields = list(obj.members) if obj.is_class else []
        obj.docstring.value = markdown(obj.docstring.value, fields)
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
        blocks.append("".join(part if part.startswith("`") else escape(part) for part in re.split(r"(`[^`]*`)", block)))
    return "\n\n".join(blocks)


def escape(text: str) -> str:
    for char in "[<*":
        text = text.replace(char, f"&#{ord(char)};")
    return text
