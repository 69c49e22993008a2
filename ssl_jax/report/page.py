"""Building blocks of the report in HTML: the page, its style, tables and pictures. They escape their text."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ssl_jax.report.plots import data_uri

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #5b6470; --line: #d5dae1; --card: #f5f7f9; --back: #fff;
  --accent: #2563eb; --good: #15803d; --bad: #b91c1c; --mark: #fef3c7; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7eb; --soft: #9aa4b1; --line: #38404b; --card: #1c2128; --back: #13161b;
    --accent: #7aa7ff; --good: #4ade80; --bad: #f87171; --mark: #3d3413; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.1rem 3rem; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: .1rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
section { border-top: 1px solid var(--line); margin-top: 2rem; padding-top: 1.3rem; }
small, .note, footer { color: var(--soft); font-size: .87rem; }
.note { margin: 0 0 .9rem; max-width: 75ch; overflow-wrap: anywhere; }
footer { margin-top: 2.5rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin-top: 1.2rem; font-size: .9rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.verdict { padding: .6rem .9rem; border-left: 4px solid var(--good); background: var(--card); border-radius: 3px; }
.verdict.narrow, .verdict.weak { border-color: #d97706; }
.verdict.collapsed, .verdict.broken { border-color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .7rem; margin: 1rem 0; }
.tiles div { background: var(--card); border-radius: 8px; padding: .75rem .9rem; font-size: .9rem; }
.tiles b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles small { display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 1.2rem; }
figure { margin: 0; }
figcaption { font-size: .9rem; font-weight: 600; margin-bottom: .3rem; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: inherit !important; }
figure > small { display: block; line-height: 1.4; }
.map { max-width: 760px; }
.map figure { margin-bottom: 1.2rem; }
.map .none { float: right; font-size: .8rem; color: var(--soft); }
.dots { position: relative; height: clamp(320px, 60vw, 520px); border: solid var(--line); border-width: 0 0 1px 1px;
  margin: .2rem 0; clear: both; }
.dots label { position: absolute; left: calc(1.5% + var(--x) * .97%); bottom: calc(1.5% + var(--y) * .97%);
  width: 10px; height: 10px; margin: 0 0 -5px -5px; border-radius: 50%; background: var(--k); opacity: .8; }
.dots input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: pointer; }
.dots b { position: absolute; top: 14px; left: 50%; transform: translateX(calc(var(--x) * -1%)); opacity: 0;
  pointer-events: none; max-height: 9rem; overflow: hidden; border-radius: 5px; box-shadow: 0 0 0 1px var(--text);
  background-repeat: no-repeat; font: 11px/1.25 sans-serif; text-align: center; overflow-wrap: anywhere; }
.dots .low b { top: auto; bottom: 14px; }
.dots label:hover, .dots label:has(:checked) { opacity: 1; z-index: 1; outline: 2px solid var(--text); }
.dots label:hover { z-index: 2; }
.dots label:hover b, .dots :checked + b { opacity: 1; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .87rem; margin: 0 0 .9rem; }
.key span::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 50%;
  background: var(--k); margin-right: .35rem; }
.sheet { max-width: max(100%, 900px); height: auto; border-radius: 6px; background: #fff; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .32rem .8rem .32rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
.n, [style="text-align:right"] { text-align: right; white-space: nowrap; padding-left: .8rem; }
th.n { white-space: normal; }
tr.marked td { background: var(--mark); }
table.matrix { border-spacing: 2px; border-collapse: separate; margin-bottom: 1.2rem; }
.matrix th, .matrix td { border: 0; padding: .3rem .4rem; }
.matrix td { width: 2.6rem; min-width: 2.2rem; text-align: center; border-radius: 3px;
  background: rgb(37 99 235 / var(--v)); }
.matrix td.deep { color: #fff; }
.matrix th span { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 9rem; overflow: hidden; }
.matrix th { vertical-align: bottom; white-space: nowrap; }
.heat { width: min(100%, 640px); image-rendering: pixelated; border: 1px solid var(--line); margin-bottom: 1rem; }
.strips { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(470px, 100%), 1fr)); gap: .9rem 2.2rem; }
.strips + .note, .wide + .note { margin-top: .8rem; }
.strip { display: grid; grid-template-columns: repeat(7, minmax(0, 96px)); gap: .5rem; }
.strip img { width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 5px; border: 2px solid var(--line);
  display: block; image-rendering: auto; }
.strip figcaption { font-size: .74rem; font-weight: 400; line-height: 1.25; margin: .15rem 0 0;
  overflow-wrap: anywhere; }
.strip small { display: block; font-size: .72rem; }
.strip .query figcaption { font-weight: 600; }
.strip .same img { border-color: var(--good); }
.strip .other img { border-color: var(--bad); }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--accent); margin-bottom: .5rem; }
pre { background: var(--card); padding: .8rem; border-radius: 6px; font-size: .82rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
@media (max-width: 600px) {
  main { padding: 1.1rem .8rem; } h1 { font-size: 1.3rem; } .strip { gap: .3rem; }
  .strip figcaption, .strip small { font-size: .64rem; }
  nav { flex-wrap: nowrap; overflow-x: auto; white-space: nowrap; }
  .wide:has(.sheet)::before { content: "swipe →"; color: var(--soft); font-size: .8rem; }
  .tiles { grid-template-columns: 1fr 1fr; } }
@media print { nav { display: none; } section { break-inside: avoid-page; } }
"""


def page(title: str, subtitle: str, verdict: str, sections: Sequence[tuple[str, str]], by: str = "report") -> str:
    """by: the command that writes the page."""
    present = [(f"s{i}", name, body) for i, (name, body) in enumerate(sections) if body]
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in present)
    bodies = "".join(f'<section id="{a}"><h2>{escape(name)}</h2>{body}</section>' for a, name, body in present)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><small>{escape(subtitle)}</small><h1>{escape(title)}</h1>{verdict}<nav>{links}</nav></header>"
        f"{bodies}<footer>Created by ssl-jax {by}.</footer></main></body></html>\n"
    )


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def markdown(text: str) -> str:
    """Tables, lists and paragraphs of Markdown as escaped HTML, without the title, which the page has already."""
    from markdown_it import MarkdownIt

    body = text.split("\n", 1)[-1] if text.startswith("# ") else text
    rendered = MarkdownIt("zero").enable(["table", "list"]).render(body)  # "zero": names are never read as markup
    return rendered.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")


def picture(path: Path, caption: str) -> str:
    if not path.is_file():
        return ""
    uri = data_uri(path.read_bytes(), "png")
    return f'{note(caption)}<div class="wide"><img class="sheet" alt="{escape(caption)}" src="{uri}"></div>'


def fold(title: str, body: str, folded: bool = True) -> str:
    if not body:
        return ""
    return f"<details{'' if folded else ' open'}><summary>{escape(title)}</summary>{body}</details>"


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], first_number: int = 99, marked: Iterable[str] = ()
) -> str:
    """Columns from `first_number` on are right-aligned; rows whose first cell is in `marked` are highlighted."""

    def row(cells, tag):
        kinds = (' class="n"' if i >= first_number else "" for i in range(len(cells)))
        return "".join(f"<{tag}{kind}>{escape(str(cell))}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "".join(f"<tr{' class=marked' if r[0] in marked else ''}>{row(r, 'td')}</tr>" for r in rows)
    return f'<div class="wide"><table><tr>{row(head, "th")}</tr>{body}</table></div>'


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
