"""docs/recipes.csv, the official hyper-parameters with their lines, is held to configs/imagenet.py."""

import functools
import itertools
import re
import runpy
from pathlib import Path

import pytest

PAGE = runpy.run_path(str(Path(__file__).parent.parent / "docs" / "make_recipes.py"))
MADE, ROWS = PAGE["recipes"](), PAGE["rows"]()
RECIPES = {name: list(rows) for name, rows in itertools.groupby(ROWS, key=lambda row: row["recipe"])}
ours = functools.partial(PAGE["ours"], MADE)


def test_every_recipe_has_its_rows_in_one_place():
    assert list(RECIPES) == list(MADE["RECIPES"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_table_has_what_the_recipe_has(recipe):
    """A changed config, a row without an option that the recipe sets, a difference without a reason: all found here."""
    rows = RECIPES[recipe]
    wrong = {r["key"]: (r["ours"], value) for r in rows if r["key"] and r["ours"] != (value := ours(recipe, r["key"]))}
    assert not wrong, "option: (in the table, in the config)"
    unexplained = [r["name"] for r in rows if r["ours"] != r["official"] and not r["why"]]
    assert not unexplained
    published = {f"published.{entry['protocol']}" for entry in MADE["RECIPES"][recipe]["published"]}
    wanted = {*MADE["COMMON"], *MADE["RECIPES"][recipe], *published} - {"published", "method"}
    assert wanted <= {r["key"] for r in rows}
    assert all(r["name"] and r["official"] for r in rows)


def test_every_source_is_a_line_of_a_commit_or_words():
    for commit in PAGE["COMMITS"].values():
        assert re.fullmatch(r"[\w-]+/[\w.-]+", commit[0]) and re.fullmatch(r"[0-9a-f]{40}", commit[1])
    lines = [r["source"] for r in ROWS if r["source"].partition(":")[0] in PAGE["COMMITS"]]
    assert len(lines) > 0.9 * len(ROWS)
    for source in lines:
        assert re.fullmatch(r"[\w-]+:[\w./-]+\.(py|md|rst|sh|yaml|yml):[1-9]\d*", source), source
        assert "/blob/" in PAGE["link"](source)
    words = {r["source"] for r in ROWS} - set(lines)
    assert all(re.match(r"arXiv|PyTorch|torchvision|each its own|none", source) for source in words), words


def test_a_changed_recipe_is_noticed():
    """The comparison can fail: an option of the recipe that differs from the table's, and one that has no row."""
    changed = {**MADE, "get_config": lambda name: _with(MADE["get_config"](name), "optim.lr", 0.123)}
    assert PAGE["ours"](changed, "byol", "optim.lr") == "0.123" != ours("byol", "optim.lr")
    assert "data.limit" not in {r["key"] for r in RECIPES["byol"]}


def _with(config, key, value):
    config.update_from_flattened_dict({key: value})
    return config


def test_the_page_is_up_to_date():
    assert PAGE["PAGE"].read_text() == PAGE["page"](MADE), "run: python docs/make_recipes.py"
    overview = PAGE["REPRODUCE"].read_text()
    assert overview == PAGE["with_overview"](overview, MADE), "run: python docs/make_recipes.py"
