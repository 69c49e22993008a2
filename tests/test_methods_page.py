"""docs/methods.md: every method is there, as docs/make_methods.py writes it from the docstrings and the programs."""

import re
import runpy
from pathlib import Path

import pytest

from ssl_jax.config import method_names

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "methods.md").read_text()


def test_every_method_has_its_section_and_its_picture():
    sections = re.split(r"^### (\w+)$", PAGE, flags=re.M)[1:]
    assert sorted(sections[::2]) == sorted(method_names()), "run: python docs/make_methods.py"
    for name, text in zip(sections[::2], sections[1::2], strict=True):
        assert "```mermaid\nflowchart LR\n" in text and "https://" in text, name


@pytest.mark.slow
def test_the_page_is_up_to_date():
    assert runpy.run_path(str(DOCS / "make_methods.py"))["page"](PAGE) == PAGE, "run: python docs/make_methods.py"
