"""data.include: only the listed images are trained on; and the part of a TFDS data set that is tested on."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ssl_jax.config import Data
from ssl_jax.data import open_source, tfds
from ssl_jax.data.exclude import wanted
from ssl_jax.errors import UserError
from ssl_jax.settings import data_of


@pytest.fixture
def folder(tmp_path):
    """Six training images of two classes and two test images, named as ImageNet's."""
    for part, count in (("train", 3), ("val", 1)):
        for name in ("n01", "n02"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(count):
                image = np.full((8, 8, 3), 20 * i, np.uint8)
                Image.fromarray(image).save(tmp_path / "images" / part / name / f"{name}_{part}{i}.png")
    return tmp_path


def opened(folder, include, split="train", **changes):
    return open_source(Data(name="folder", path=str(folder / "images"), size=8, include=str(include), **changes), split)


def test_a_list_of_file_names_as_simclr_s(folder, caplog):
    """google-research/simclr, imagenet_subsets/1percent.txt: one name a line, without folder or header."""
    (folder / "1percent.txt").write_text("n02_train1.png\nn01_train0.png\n\nn09_train7.png\n")
    source = opened(folder, folder / "1percent.txt")
    assert [name.rpartition("/")[2] for name in source.names] == ["n01_train0.png", "n02_train1.png"]
    assert list(source.classes) == ["n01", "n02"] and list(source.labels) == [0, 1]
    (line,) = [r.getMessage() for r in caplog.records if "config.data.include" in r.getMessage()]
    assert "2 images are used; 1 of those listed are not there, such as 'n09_train7.png'" in line


def test_test_images_are_all_used(folder):
    (folder / "few.txt").write_text("n02_train1.png\nn01_train0.png\n")
    assert len(opened(folder, folder / "few.txt", "test")) == 2
    like = Data(include=str(folder / "few.txt"))
    assert data_of(str(folder), "--data", like).include and not data_of(str(folder), "--test", like).include
    assert not data_of(str(folder), "--unlabelled", like).include


def test_a_table_lists_names_or_files(folder):
    source = opened(folder, "")
    (folder / "names.csv").write_text("path,label\n" + f"{source.names[4]},x\n{source.paths[0]},y\n")
    assert list(opened(folder, folder / "names.csv").names) == [source.names[0], source.names[4]]
    (folder / "out.csv").write_text(f"path\n{source.names[4]}\n")
    left = opened(folder, folder / "names.csv", exclude=str(folder / "out.csv"))
    assert list(left.names) == [source.names[0]]


def test_what_cannot_be_used_is_one_line(folder, tmp_path):
    (folder / "none.txt").write_text("n07.png\nn08.png\n")
    with pytest.raises(UserError, match="config.data.include='.*none.txt': none of the 2 listed images is in"):
        opened(folder, folder / "none.txt")
    with pytest.raises(UserError, match="config.data.include='.*no.txt': No such file"):
        opened(folder, folder / "no.txt")
    (tmp_path / "some.txt").write_text("1.png\n")
    data = Data(name="folder", path="x", include=str(tmp_path / "some.txt"))
    with pytest.raises(UserError, match="'1.png': the name of 2 images; allowed: a part of their paths"):
        wanted(data, ["a/1.png", "b/1.png"], ["x/a/1.png", "x/b/1.png"])
    (tmp_path / "some.txt").write_text("b/1.png\n")
    assert wanted(data, ["a/1.png", "b/1.png"], ["x/a/1.png", "x/b/1.png"]) == [1]


@pytest.mark.parametrize(
    ("parts", "used"),
    [
        ({"train": 0, "validation": 3}, "validation"),
        ({"train": 0, "validation": 3, "test": -1}, "validation"),  # ImageNet's labels of the test images are secret
        ({"train": 0, "validation": 3, "test": 5}, "test"),
        ({"train": 0, "test": -1}, "test"),
        ({"train": 0}, ""),
    ],
)
def test_tfds_is_tested_on_a_part_with_labels(parts, used, monkeypatch):
    def read(part, decoders):
        return [{"image": b"", "label": parts[part]}]

    monkeypatch.setattr(tfds, "_features", lambda info, where: ("image", "label"))
    builder = SimpleNamespace(name="imagenet2012", as_data_source=read)
    assert tfds._test_part(builder, SimpleNamespace(splits=dict.fromkeys(parts)), "label") == used
