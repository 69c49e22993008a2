"""Data as flags name them."""

import pytest

from ssl_jax.config import Data
from ssl_jax.errors import UserError
from ssl_jax.settings import data_of

LIKE = Data(name="csv", path="old.csv", split="all", size=64, window="percentile", limit=5, pairs="patient")


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        ("fashion_mnist", "fashion_mnist", ""),
        ("tfds:cifar10", "tfds", "cifar10"),
        ("tfds:cifar10:1.0.0", "tfds", "cifar10:1.0.0"),
        ("synthetic:n=4,classes=2", "synthetic", "n=4,classes=2"),
        ("mypackage.mysource:place", "mypackage.mysource", "place"),
        ("photos", "folder", "photos"),
        ("scans", "chexpert", "scans"),
        ("synthetic", "folder", "synthetic"),  # what is there is meant, not the source of that name
        ("a.CSV", "csv", "a.CSV"),
        ("a.tsv", "csv", "a.tsv"),
        ("a.npz", "npz", "a.npz"),
    ],
)
def test_what_a_flag_names(text, name, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "scans", "synthetic"):
        (tmp_path / folder).mkdir()
    (tmp_path / "scans" / "train.csv").write_text("Path,Frontal/Lateral\n")
    (tmp_path / "photos" / "train.csv").write_text("Path,label\n")
    for file in ("a.CSV", "a.tsv", "a.npz"):
        (tmp_path / file).touch()
    data = data_of(text, "--data", LIKE)
    assert data == Data(name=name, path=path, split="train", size=64, window="percentile")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere", "--data=nowhere: not found; allowed: a folder, a .csv, .tsv, .npz, .tar or .parquet file"),
        ("my.photos", "--data=my.photos: not found"),
        ("a.txt", "--data=a.txt: unknown ending '.txt'"),
    ],
)
def test_mistakes_are_one_line(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError) as caught:
        data_of(text, "--data", LIKE)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
