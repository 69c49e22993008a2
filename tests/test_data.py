"""open_source for arrays, TFDS and synthetic data; the order of images; both engines give the same batches."""

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_jax import registry
from ssl_jax.config import Data
from ssl_jax.data import Source, batches, fashion_mnist, open_source, order
from ssl_jax.errors import UserError

TFDS = Path(__file__).parent / "data" / "tfds"


def fails(data: Data, *words: str, split: str | None = None) -> None:
    """Opening fails with one line that holds all these words."""
    with pytest.raises(UserError) as error:
        open_source(data, split)
    line = str(error.value)
    assert "\n" not in line
    for word in words:
        assert word in line, f"{word!r} not in: {line}"


@pytest.fixture
def numbered(tmp_path):
    """A folder of 23 lossless images, each of one colour that is its number."""
    for i in range(23):
        Image.new("RGB", (9, 8), (i, 2 * i, 255 - i)).save(tmp_path / f"{i:02}.png")
    return tmp_path


def test_import_is_light():
    code = "import sys, ssl_jax.data; print([m for m in ('PIL', 'grain', 'tensorflow_datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_unknown_source_and_split():
    fails(Data(name="foldr"), "config.data.name='foldr'", "did you mean 'folder'", *registry.names("source"))
    fails(Data(name="synthetic", split="tset"), "config.data.split='tset'", "available: all, test, train")


# Order


def test_order_is_a_permutation_each_epoch():
    steps = [order(3, 23, 5, step) for step in range(8)]
    first, second = np.concatenate(steps[:4]), np.concatenate(steps[4:])
    assert first.dtype == np.int64 and steps[0].shape == (5,)
    assert len(set(first)) == len(set(second)) == 20
    assert set(first) <= set(range(23))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.concatenate([order(4, 23, 5, step) for step in range(4)]))


def test_order_is_pure():
    before = order(0, 100, 10, 37).copy()
    for step in (3, 99, 0, 55, 71, 12):  # other epochs, so that the cached ones go
        order(0, 100, 10, step)
    np.testing.assert_array_equal(order(0, 100, 10, 37), before)
    assert order(-1, 10, 10, 0).sum() == 45


def test_order_batch_too_large():
    with pytest.raises(UserError, match=r"config.train.batch=11: larger than the data set \(10 images\)"):
        order(0, 10, 11, 0)


# Both engines


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_from_disk_equal_memory(numbered, workers):
    source = open_source(Data(name="folder", path=str(numbered), size=8))
    images = source.arrays()
    start, stop = 2, 11  # from the middle of an epoch of 4 steps, over two of its ends
    decoded = list(batches(source, batch=5, seed=7, start=start, stop=stop, workers=workers))
    assert len(decoded) == stop - start
    for step, batch in zip(range(start, stop), decoded):
        index = order(7, 23, 5, step)
        np.testing.assert_array_equal(batch["index"], index)
        np.testing.assert_array_equal(batch["image"], images[index])
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], index)
        assert batch["image"].dtype == np.uint8 and batch["index"].dtype == np.int32 and "label" not in batch


def test_batches_have_labels_and_stop_early():
    source = open_source(Data(name="synthetic", path="classes=3,n=40", size=8))
    endless = batches(source, batch=4, seed=0, start=5, stop=1_000_000, workers=2)
    batch = next(endless)
    endless.close()
    np.testing.assert_array_equal(batch["label"], batch["index"] % 3)
    assert batch["label"].dtype == np.int32


def test_batches_report_a_user_error_from_its_threads(numbered):
    source = open_source(Data(name="folder", path=str(numbered)))
    (numbered / "04.png").unlink()
    with pytest.raises(UserError, match=r"04.png': No such file or directory; it was readable at the start"):
        list(batches(source, batch=23, seed=0, start=0, stop=1, workers=2))


def test_batches_larger_than_the_data(numbered):
    source = open_source(Data(name="folder", path=str(numbered)))
    with pytest.raises(UserError, match=r"config.train.batch=24"):
        next(iter(batches(source, batch=24, seed=0, start=0, stop=1, workers=2)))


def test_take():
    source = open_source(Data(name="synthetic", path="n=20", size=8))
    part = source.take(np.array([5, 2]))
    assert len(part) == 2 and part.names == ["train/5", "train/2"] and part.labels.tolist() == [1, 2]
    np.testing.assert_array_equal(part.arrays(), source.arrays()[[5, 2]])
    np.testing.assert_array_equal(source.take([5, 2]).load(1), part.load(1))  # after arrays() and before: the same


def test_arrays_reports_progress():
    source = open_source(Data(name="synthetic", path="n=130", size=4))
    seen = []
    source.arrays(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(64, 130), (128, 130), (130, 130)]
    assert source.nbytes == source.arrays().nbytes


# .npz


@pytest.fixture
def save(tmp_path):
    def write(**arrays) -> Data:
        np.savez(tmp_path / "a.npz", **arrays)
        return Data(name="npz", path=str(tmp_path / "a.npz"))

    return write


GRAY = np.arange(5 * 4 * 6, dtype=np.uint8).reshape(5, 4, 6)


def test_npz_images_and_labels(save):
    source = open_source(save(images=GRAY, labels=np.array([[0], [2], [1], [0], [2]], np.uint8)))
    assert source.shape == (4, 6, 1) and source.classes == ["0", "1", "2"] and source.names[4] == "4"
    assert source.labels.tolist() == [0, 2, 1, 0, 2] and source.labels.dtype == np.int32
    np.testing.assert_array_equal(source.arrays(), GRAY[..., None])
    np.testing.assert_array_equal(source.load(3), GRAY[3][..., None])


def test_npz_without_labels_has_no_test_part(save):
    data = save(images=GRAY)
    assert open_source(data).labels is None and open_source(data).classes == []
    assert len(open_source(data, "all")) == 5
    fails(data, "a.npz'", "no test part", "available: train, all", split="test")


@pytest.mark.parametrize("image,label", [("{}_images", "{}_labels"), ("x_{}", "y_{}")])
def test_npz_parts(save, image, label):
    arrays = {}
    for i, part in enumerate(("train", "val", "test")):
        arrays[image.format(part)] = GRAY[: 3 - i]
        arrays[label.format(part)] = np.full(3 - i, i)
    data = save(**arrays)
    sizes = {split: len(open_source(data, split)) for split in ("train", "val", "test", "all")}
    assert sizes == {"train": 3, "val": 2, "test": 1, "all": 6}
    assert open_source(data, "test").labels.tolist() == [2]
    assert open_source(data, "all").labels.tolist() == [0, 0, 0, 1, 1, 2]


def test_val_stands_for_a_missing_test_part(save):
    assert len(open_source(save(x_train=GRAY, x_val=GRAY[:2]), "test")) == 2


def test_arrays_are_resized_converted_and_limited(save):
    data = save(images=GRAY)
    source = open_source(Data(name="npz", path=data.path, size=8, channels=3, limit=2))
    assert source.arrays().shape == (2, 8, 8, 3)
    expected = np.asarray(Image.fromarray(GRAY[1]).resize((8, 8), Image.Resampling.BILINEAR, box=(1, 0, 5, 4)))
    np.testing.assert_array_equal(source.load(1), np.stack([expected] * 3, -1))
    five = open_source(Data(name="npz", path=save(images=np.stack([GRAY] * 5, -1)).path, size=8))
    np.testing.assert_array_equal(five.load(1), np.stack([expected] * 5, -1))
    colour = save(images=np.full((2, 4, 4, 3), (255, 0, 0), np.uint8))
    assert open_source(Data(name="npz", path=colour.path, channels=1)).load(0).tolist() == [[[76]] * 4] * 4
    fails(Data(name="npz", path=save(images=np.zeros((2, 4, 4, 5), np.uint8)).path, channels=3), "has 5", "0 or 5")


@pytest.mark.parametrize(
    "arrays,words",
    [
        ({"pictures": GRAY}, ["keys are pictures", "train_images"]),
        ({"images": GRAY.astype(np.float32)}, ["images is float32 [5, 4, 6]", "uint8 [N,H,W]"]),
        ({"images": GRAY[0]}, ["uint8 [4, 6]", "[N,H,W]"]),
        ({"images": np.uint8(3)}, ["uint8 []"]),
        ({"images": np.zeros((2, 3, 32, 32), np.uint8)}, ["[2, 3, 32, 32]", "channels first"]),
        ({"images": GRAY, "labels": np.zeros(4, int)}, ["4 labels for 5 images"]),
        ({"images": GRAY, "labels": np.zeros(5)}, ["labels: float64 [5]", "integers"]),
        ({"images": GRAY, "labels": np.full(5, -2)}, ["-1 (unknown) or more"]),
        ({"images": GRAY[:0]}, ["no images"]),
        ({"images": np.array([{}], object)}, ["not a .npz file of plain arrays"]),
    ],
)
def test_npz_errors(save, arrays, words):
    fails(save(**arrays), "a.npz", *words)


def test_npz_parts_of_unequal_shape(save):
    fails(save(x_train=GRAY, x_test=GRAY[:, :2]), "x_test is uint8 [5, 2, 6]", "[4, 6] as in x_train", split="all")


def test_npz_unreadable(tmp_path):
    fails(Data(name="npz"), "config.data.path=''")
    fails(Data(name="npz", path=str(tmp_path / "none.npz")), "none.npz'", "No such file")
    (tmp_path / "text.npz").write_text("hello")
    fails(Data(name="npz", path=str(tmp_path / "text.npz")), "text.npz'", "not a .npz file")
    np.save(tmp_path / "one.npy", GRAY)
    fails(Data(name="npz", path=str(tmp_path / "one.npy")), "one.npy'", "not a .npz file")


# Fashion-MNIST


def write_idx(folder: Path, prefix: str, count: int) -> np.ndarray:
    images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
        head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return images


def test_fashion_mnist(tmp_path):
    train, test = write_idx(tmp_path, "train", 12), write_idx(tmp_path, "t10k", 3)
    data = Data(name="fashion_mnist", path=str(tmp_path))
    source = open_source(data)
    assert source.shape == (28, 28, 1) and source.labels.tolist() == [*range(10), 0, 1]
    assert len(source.classes) == 10 and source.classes[9] == "ankle boot"
    np.testing.assert_array_equal(source.arrays()[..., 0], train)
    np.testing.assert_array_equal(open_source(data, "test").arrays()[..., 0], test)
    assert len(open_source(data, "all")) == 15


def test_fashion_mnist_damaged(tmp_path):
    write_idx(tmp_path, "train", 12)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    fails(Data(name="fashion_mnist", path=str(tmp_path)), "train-images-idx3-ubyte.gz", "damaged")
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    fails(Data(name="fashion_mnist", path=str(tmp_path)), "train-images-idx3-ubyte.gz", "cut off")
    path.write_bytes(whole)
    fails(Data(name="fashion_mnist", path=str(tmp_path)), "t10k-images-idx3-ubyte.gz", "no such file", split="test")
    fails(Data(name="fashion_mnist", path=str(tmp_path / "none")), "none'", "contains no train-images-idx3-ubyte.gz")


def test_fashion_mnist_absent_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "FOLDERS", (str(tmp_path),))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    what_to_do = "sudo apt-get install dataset-fashion-mnist", "tfds build fashion_mnist --file_format=array_record"
    fails(Data(name="fashion_mnist"), *what_to_do)


# TFDS: data sets that TFDS itself wrote, see data/tfds/README.md


def numbers(images: np.ndarray) -> np.ndarray:
    """Which of tiny_squares each image is: TFDS shuffles when it writes. The whole image is checked."""
    found = (images.max(axis=(1, 2, 3)).astype(int) - 100) // 10
    expected = np.zeros((len(images), 12, 16, 3), np.uint8)
    for image, i in zip(expected, found):
        image[2:10, 4:12, i % 3] = 100 + 10 * i
    np.testing.assert_array_equal(images, expected)
    return found


def test_tfds_needs_no_tensorflow():
    code = "import sys; from ssl_jax.config import Data; import ssl_jax.data as d; "
    code += "print(d.open_source(Data(name='tfds', path=sys.argv[1])).arrays().shape, 'tensorflow' in sys.modules)"
    path = str(TFDS / "tiny_squares" / "1.0.0")
    made = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert made.stdout == "(9, 12, 16, 3) False\n", made.stderr


def test_tfds_folder_with_labels():
    data = Data(name="tfds", path=str(TFDS / "tiny_squares" / "1.0.0"))
    source = open_source(data)
    assert source.shape == (12, 16, 3) and source.classes == ["red", "green", "blue"]
    found = numbers(source.arrays())
    assert sorted(found) == list(range(9)) and source.labels.dtype == np.int32
    np.testing.assert_array_equal(source.labels, found % 3)
    assert sorted(numbers(open_source(data, "test").arrays())) == [9, 10, 11]
    assert len(open_source(data, "all")) == 12
    assert len(open_source(data, "train[:4]")) == 4
    assert open_source(Data(name="tfds", path=data.path, size=8, channels=1, limit=5)).arrays().shape == (5, 8, 8, 1)


def test_tfds_by_name_without_labels(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(TFDS))
    source = open_source(Data(name="tfds", path="tiny_photos", size=16))
    assert source.labels is None and source.classes == []
    images = source.arrays()
    assert sorted(images[:, 0, 0, 0].tolist()) == [0, 60, 120, 180]
    np.testing.assert_array_equal(images, np.broadcast_to(images[:, :1, :1, :1], (4, 16, 16, 3)))
    assert open_source(Data(name="tfds", path="tiny_photos:1.0.0")).shape == (224, 224, 3)


def test_tfds_batches():
    source = open_source(Data(name="tfds", path=str(TFDS / "tiny_squares" / "1.0.0")))
    for batch in batches(source, batch=3, seed=0, start=1, stop=5, workers=2):
        np.testing.assert_array_equal(batch["image"], source.arrays()[batch["index"]])
        np.testing.assert_array_equal(batch["label"], numbers(batch["image"]) % 3)


def test_tfds_errors(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    fails(Data(name="tfds"), "config.data.path=''")
    build = "pip install tensorflow && tfds build cifar10 --file_format=array_record"
    fails(Data(name="tfds", path="cifar10"), "config.data.path='cifar10': not prepared", str(tmp_path), build)
    fails(Data(name="tfds", path="no_such"), "config.data.path='no_such'", "knows no data set")
    fails(Data(name="tfds", path="/no/such"), "config.data.path='/no/such'")
    squares = str(TFDS / "tiny_squares" / "1.0.0")
    fails(Data(name="tfds", path=squares, split="nope"), "config.data.split='nope'", "train, test, all")
    fails(Data(name="tfds", path=squares, split="train[:1%]"), "config.data.split='train[:1%]': no images")
    fails(Data(name="tfds", path=str(TFDS / "tiny_photos" / "1.0.0"), split="test"), "no test part", "train, all")
    old = str(TFDS / "tfrecord" / "tiny_squares" / "1.0.0")
    fails(Data(name="tfds", path=old), "prepared as tfrecord", "--file_format=array_record --overwrite")


def test_tfds_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    fails(Data(name="tfds", path="cifar10"), "config.data.name='tfds'", "pip install tensorflow-datasets")


# Synthetic


def test_synthetic_depends_on_seed_part_and_index():
    data = Data(name="synthetic", path="classes=8,n=16,test=8", size=16)
    images = open_source(data).arrays()
    np.testing.assert_array_equal(images, open_source(data).arrays())
    np.testing.assert_array_equal(
        images[:5], open_source(Data(name="synthetic", path="classes=8,n=5", size=16)).arrays()
    )
    others = (
        open_source(data, "test").arrays(),
        open_source(Data(name="synthetic", path="classes=8,n=8,seed=1", size=16)).arrays(),
    )
    assert not any(np.array_equal(images[i], other[i]) for other in others for i in range(8))


def test_synthetic_defaults_and_shapes():
    source = open_source(Data(name="synthetic"))
    assert len(source) == 1024 and source.shape == source.load(0).shape == (32, 32, 3)
    assert source.labels.tolist() == [i % 4 for i in range(1024)] and len(source.classes) == 4
    assert open_source(Data(name="synthetic", path="n=4", channels=1)).arrays().shape == (4, 32, 32, 1)
    assert len(open_source(Data(name="synthetic", path="n=4,test=2"), "all")) == 6


def test_synthetic_errors():
    fails(Data(name="synthetic", path="n=4,color=2"), "'color=2'", 'allowed: "classes=4,n=1024,test=256,seed=0"')
    fails(Data(name="synthetic", path="classes=9"), "classes from 1 to 8")
    fails(Data(name="synthetic", path="n=0"), "no images in split 'train'")


def test_every_source_module_is_listed():
    folder = Path(fashion_mnist.__file__).parent
    modules = {path.stem for path in folder.glob("*.py") if "\ndef read(data: Data) -> Source:" in path.read_text()}
    assert modules == set(registry.own_names("source"))
    assert isinstance(open_source(Data(name="synthetic")), Source)
