"""docs/methods.md: every method is there, with the picture that its program gives."""

import re
import runpy
from pathlib import Path

import pytest

from ssl_jax.config import method_names

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "methods.md").read_text()


def test_every_method_has_its_section():
    assert sorted(re.findall(r"^### (\w+)$", PAGE, flags=re.M)) == sorted(method_names())
    assert sorted(re.findall(r"^<!-- flow: (\w+) -->$", PAGE, flags=re.M)) == sorted(method_names())


@pytest.mark.slow
def test_pictures_are_up_to_date():
    assert runpy.run_path(str(DOCS / "make_methods.py"))["page"](PAGE) == PAGE, "run: python docs/make_methods.py"
