"""The pages for readers: links lead somewhere, lines fit a screen, named files exist, and the site lists each page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page for glob in ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "benchmarks/*.md") for page in ROOT.glob(glob)
)
GENERATED = {
    "docs/configuration.md",
    "docs/recipes.md",
    "docs/reproduce.md",
    "benchmarks/scale.md",
}  # their tables are written by scripts
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def prose(text: str) -> str:
    """The text without code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site write them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE)
    plain = (re.sub(r"[`*]|\]\(.*?\)|\[", "", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_resolve(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_line_is_wider_than_120_characters(page):
    lines = enumerate(page.read_text().splitlines(), 1)
    generated = page.relative_to(ROOT).as_posix() in GENERATED
    wide = [number for number, line in lines if len(line) > 120 and not (generated and line.startswith("|"))]
    assert not wide, f"lines {wide}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_a_page_names_exist(page):
    for path in re.findall(r"`((?:tests|docs|configs|benchmarks|launch|scripts|ssl_jax)/[\w./*-]+)`", page.read_text()):
        assert list(ROOT.glob(path)), path


def test_the_site_lists_every_page():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [name for name in NAMES if name not in navigation] == []
