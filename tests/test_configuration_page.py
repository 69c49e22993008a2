"""docs/configuration.md says what the sources say, and what it claims about flags is true."""

import re
import runpy
from pathlib import Path

import pytest

from ssl_jax import config as configs
from ssl_jax.config_file import override

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "configuration.md").read_text()


def test_page_is_up_to_date():
    made = runpy.run_path(str(DOCS / "make_configuration.py"))["page"]()
    assert made == PAGE, "run: python docs/make_configuration.py"


def test_every_key_is_there_with_a_meaning():
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \| `(.*)` \| (.*) \|$", PAGE, flags=re.M)
    assert not [row for row in rows if not all(cell.strip() for cell in row)]
    found = {key for key, *_ in rows}
    for method in configs.method_names():
        made = configs.default(method).to_dict()
        top = {key for key, value in made.items() if not isinstance(value, dict)}
        wanted = top | {f"{section}.{key}" for section in made.keys() - top for key in made[section]}
        assert wanted - found == {"method.name", "augment.second", "augment.local"}
        assert top == set(configs.TOP_LEVEL)


@pytest.mark.parametrize("example", re.findall(r"`(--config\.\S+?=(?:\"[^\"]*\"|[^\s`]+))`", PAGE))
def test_flags_of_the_page_work(example):
    flag = example.replace('"', "")
    key = flag.removeprefix("--config.").split("=")[0]
    before = configs.resolve(configs.default("byol"))
    after = configs.resolve(override(configs.default("byol"), [flag]))
    sections = configs.to_json(after)
    changed = configs.differences(configs.to_json(before), sections, sections)
    assert [line.split(": ")[0] for line in changed] == [f"config.{key}"]


def test_config_file_of_the_page_works():
    code = re.search(r"```python\n(.*?)```", PAGE, flags=re.S)
    assert code
    space: dict = {}
    exec(code[1], space)
    made = configs.resolve(space["get_config"]("simclr"))
    assert (made.method_name, made.train.duration) == ("simclr", "50 epochs")
    assert made.data.path == str(Path("scans").absolute())
