"""`ssl-jax embed --features`: feature maps, and folders that are written part by part."""

import numpy as np
import pytest

from ssl_jax import cli, embedding
from ssl_jax.config import Model
from ssl_jax.encoder import export, random_encoder
from ssl_jax.errors import UnreadableError, UserError
from ssl_jax.files import read_json
from ssl_jax.testing.tiny import Images


@pytest.fixture(scope="module")
def encoder():
    return random_encoder(Model(name="ssl_jax.testing.model"), 8, 1, seed=0)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(embedding, "CHUNK", 4)
    monkeypatch.setattr(embedding, "PART_BYTES", 8 * 4 * 12)


class Damaged(Images):
    """Images of which number 5, and all of the third part, cannot be read."""

    def __init__(self, bad=(5, *range(16, 24))):
        super().__init__(30)
        self.labels, read = None, self._load

        def load(i):
            if i in bad:
                raise UnreadableError("broken")
            return read(i)

        self._load = load


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(tmp_path, encoder, monkeypatch):
    opened = Images(30), np.arange(30) % 3
    whole = tmp_path / "whole"
    embedding.write_folder(whole, encoder, opened, "cls")
    parts = sorted(path for path in whole.iterdir() if path.suffix == ".npz")
    assert [len(np.load(path)["path"]) for path in parts] == [8, 8, 8, 6]
    found = np.concatenate([np.load(path)["embeddings"] for path in parts])
    np.testing.assert_allclose(found, encoder.embed(opened[0].arrays()), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.concatenate([np.load(path)["labels"] for path in parts]), opened[1])

    write = embedding.files.write_bytes

    def killed(path, content):
        if path.name == "part-00002.npz":
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embedding.files, "write_bytes", killed)
        embedding.write_folder(tmp_path / "killed", encoder, opened, "cls")
    assert sorted(contents(tmp_path / "killed")) == ["index.json", "part-00000.npz", "part-00001.npz"]
    kept = (tmp_path / "killed" / "part-00000.npz").stat().st_mtime_ns
    embedding.write_folder(tmp_path / "killed", encoder, opened, "cls")
    assert contents(tmp_path / "killed") == contents(whole)
    assert (tmp_path / "killed" / "part-00000.npz").stat().st_mtime_ns == kept
    embedding.write_folder(whole, encoder, opened, "cls")  # nothing is left to do
    assert contents(tmp_path / "killed") == contents(whole)


def test_images_that_cannot_be_read_are_left_out_and_named(tmp_path, encoder):
    told = embedding.write_folder(tmp_path / "out", encoder, (Damaged(), None), "cls")
    parts = [np.load(tmp_path / "out" / f"part-0000{i}.npz") for i in range(4)]
    assert [part["path"].tolist() for part in parts[2:]] == [[], [str(i) for i in range(24, 30)]]
    assert "5" not in parts[0]["path"] and len(parts[0]["embeddings"]) == 7
    assert parts[2]["embeddings"].shape == (0, 12)
    index = read_json(tmp_path / "out" / "index.json")
    assert len(index["unreadable"]) == 9 and index["unreadable"]["5"] == "broken" and index["complete"]
    assert "21 embeddings of 12 dimensions, 9 unreadable left out" in told


def test_feature_maps_are_those_of_the_network(tmp_path, encoder):
    images = Images(5).arrays()
    found = embedding.features_of(encoder, images, "both")
    own = encoder.network.apply(encoder.params, encoder.stats, images / np.float32(255), train=False, dense=True)[0]
    np.testing.assert_allclose(found["patches"], own[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["embedding"], own[0], rtol=1e-5, atol=1e-6)
    assert list(embedding.features_of(encoder, images, "patch")) == ["patches"]
    assert embedding.features_of(encoder, images[:0], "patch")["patches"].shape == (0, 2, 2, 12)
    embedding.write_file(tmp_path / "e.npz", encoder, (Images(5), None), "both")
    with np.load(tmp_path / "e.npz") as file:
        assert set(file) == {"embeddings", "patches", "path"} and file["patches"].shape == (5, 2, 2, 12)


def test_a_folder_of_something_else_is_refused(tmp_path, encoder):
    opened = Images(5), None
    embedding.write_folder(tmp_path / "out", encoder, opened, "cls")
    other = random_encoder(Model(name="ssl_jax.testing.model"), 8, 1, seed=1)
    for made, images, which, key in (
        (other, opened, "cls", "encoder"),
        (encoder, (Images(6), None), "cls", "images"),
        (encoder, opened, "both", "features"),
    ):
        with pytest.raises(UserError, match=f"holds features of other {key}; allowed: a new folder"):
            embedding.write_folder(tmp_path / "out", made, images, which)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="holds something else; allowed: a new folder"):
        embedding.write_folder(tmp_path / "mine", encoder, opened, "cls")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out=e.npy"], "--out=e.npy: unknown ending '.npy'; allowed: .npz, .csv, .parquet, or a folder"),
        (["--out=e.csv", "--features=patch"], "--out=e.csv: unknown ending '.csv'; allowed: .npz, or a folder"),
        (["--out=e.npz", "--features=patches"], "--features='patches': unknown; did you mean 'patch'?"),
    ],
)
def test_mistakes_are_one_line(flags, message, capsys):
    assert cli.main(["embed", "W", ".", *flags]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith(f"ssl-jax: {message}"), told


def test_the_command_writes_a_folder(tmp_path, encoder):
    export(tmp_path / "encoder", encoder)
    np.savez(tmp_path / "images.npz", images=Images(10).arrays(), labels=np.arange(10) % 3)
    flags = [f"--workdir={tmp_path / 'encoder'}", f"--data={tmp_path / 'images.npz'}", f"--out={tmp_path / 'out'}"]
    assert cli.main(["embed", *flags, "--features=patch"]) == 0
    with np.load(tmp_path / "out" / "part-00001.npz") as part:
        assert part["patches"].shape[1:] == (2, 2, 12) and set(part) == {"patches", "path", "labels", "classes"}
