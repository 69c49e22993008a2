"""The page of `ssl-jax check`: how many problems of each kind, and pictures of the first of them."""

from collections.abc import Sequence
from html import escape

from ssl_jax.check.problems import PROBLEMS, Images, Row
from ssl_jax.report.page import note, page, table
from ssl_jax.report.tiles import STYLE, grid, pairs, tile

SHOWN = 60  # of each problem; the table holds all


def write(images: Images, rows: Sequence[Row], title: str, skipped: str, file: str) -> str:
    """HTML. skipped: what was not looked for, and why; file: the path of the table."""
    found = {problem: [row for row in rows if row.problem == problem] for problem in PROBLEMS}
    counts = "".join(f"<div><b>{len(each):,}</b>{escape(problem)}</div>" for problem, each in found.items() if each)
    tests = int(images.is_test.sum())
    what = f"{len(images.names) - tests:,} images" + (f" and {tests:,} test images" if tests else "")
    text = f"{what} looked at. {skipped} check.csv lists every problem. To leave out the images that it lists, give a "
    text += f"command --exclude={file}; first remove the lines of the images that you want to keep."
    verdict = f'{STYLE}{note(text)}<div class="tiles">{counts or "<div><b>0</b>problems found</div>"}</div>'
    sections = [(problem.capitalize(), _section(images, problem, each)) for problem, each in found.items()]
    return page(title, "ssl-jax check", verdict, sections, by="check")


def _section(images: Images, problem: str, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    text = PROBLEMS[problem]
    if len(rows) > SHOWN:
        text += f" The first {SHOWN} of {len(rows):,}."
    shown = rows[:SHOWN]
    if rows[0].image < 0:
        head = ["file", "reason"] if problem == "unreadable" else ["classes"]
        return note(text) + table(head, [[row.path, row.note][-len(head) :] for row in shown])
    if rows[0].other >= 0:
        return note(text) + pairs(_pair(images, row) for row in shown)
    return note(text) + grid(tile(images.load(row.image), images.names[row.image], row.note) for row in shown)


def _pair(images: Images, row: Row) -> list[str]:
    score = "" if row.score is None else f" ({row.score:.3f})"
    part = "in the test set" if images.is_test[row.other] else "stays"
    return [
        tile(images.load(row.image), images.names[row.image], row.note + score),
        tile(images.load(row.other), images.names[row.other], part),
    ]
