"""Tables with several labels per image, groups and parts; CheXpert's own layout; MedMNIST's arrays."""

import csv
import dataclasses
import hashlib

import numpy as np
import pytest
from PIL import Image
from scipy.stats import kstest

from ssl_jax.config import Data
from ssl_jax.data import open_source
from ssl_jax.data.chexpert import OBSERVATIONS, STUDY
from ssl_jax.data.table import _uniform
from ssl_jax.errors import UserError

HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *OBSERVATIONS]


def fails(data, *words):
    with pytest.raises(UserError) as error:
        open_source(data)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.fixture
def table(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("L", (8, 8), 10 * i).save(tmp_path / "images" / f"{i}.png")

    def write(text, **changes):
        (tmp_path / "table.csv").write_bytes(text.encode())
        return Data(name="csv", path=str(tmp_path / "table.csv"), size=8, channels=1, **changes)

    return write


SEVERAL = (
    "path,Edema,Mass,who\nimages/0.png,1.0,0,b\nimages/1.png,,-1,a\nimages/2.png,0.25,nan,b\nimages/3.png,-1.0,1,c\n"
)


def test_several_labels(table):
    source = open_source(table(SEVERAL, labels=("Edema", "mass"), group="WHO"))
    nan = np.nan
    assert source.multilabel and source.classes == ["Edema", "mass"] and source.labels.dtype == np.float32
    np.testing.assert_array_equal(source.labels, [[1, 0], [nan, nan], [0.25, nan], [nan, 1]])
    assert source.groups.tolist() == [1, 0, 1, 2]
    assert source.take([2, 3]).groups.tolist() == [1, 2]
    other = open_source(table(SEVERAL, labels=("Mass", "Edema"), uncertain="ones", blank="zeros"))
    np.testing.assert_array_equal(other.labels, [[0, 1], [1, 0], [0, 0.25], [1, 1]])
    smooth = table(SEVERAL, labels=("Mass", "Edema"), uncertain="smooth_ones")
    first, again = open_source(smooth).labels, open_source(smooth).labels
    np.testing.assert_array_equal(first, again)  # drawn once for ever
    assert 0.55 <= first[1, 0] <= 0.85 and 0.55 <= first[3, 1] <= 0.85 and first[1, 0] != first[3, 1]


def test_smoothed_labels_depend_on_path_and_name_alone(table):
    lines = [f"images/{i}.png,-1,-1\n" for i in range(4)]
    header, changes = "path,Edema,Mass\n", {"labels": ("Edema", "Mass"), "uncertain": "smooth_zeros"}
    source = open_source(table(header + "".join(lines), **changes))
    digest = hashlib.blake2b(b"Mass\nimages/2.png", digest_size=8).digest()
    assert source.labels[2, 1] == pytest.approx(0.3 * int.from_bytes(digest, "big") / 2**64, abs=1e-7)
    assert len(np.unique(source.labels)) == 8
    turned = open_source(table(header + "".join(lines[::-1]), **{**changes, "labels": ("Mass", "Edema")}))
    np.testing.assert_array_equal(turned.labels[::-1, ::-1], source.labels)


def test_smoothed_labels_are_uniform():
    places = [_uniform("Edema", f"patient{i}/view1.jpg") for i in range(4000)]
    others = [_uniform("Mass", f"patient{i}/view1.jpg") for i in range(4000)]
    assert kstest(places, "uniform").pvalue > 0.01 and kstest(others, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(places, others)[0, 1]) < 0.05


def test_one_label_column_by_name_and_windows_paths(table):
    text = 'kind,PATH\n"a, b",images\\0.png\nc,images\\1.png\n'
    source = open_source(table(text, labels=("kind",)))
    assert source.classes == ["a, b", "c"] and source.labels.tolist() == [0, 1] and not source.multilabel
    assert source.names == ["images/0.png", "images/1.png"] and source.arrays()[1, 0, 0, 0] == 10


def test_numbers_of_patients_stay(table):
    text = "path,patient\nimages/0.png,20\nimages/1.png,3\n"
    assert open_source(table(text, group="patient")).groups.tolist() == [20, 3]
    # 07 and 7 are two patients: such texts are numbered instead.
    assert open_source(table(text.replace("20", "07").replace("3\n", "7\n"), group="patient")).groups.tolist() == [0, 1]


def test_a_header_with_commas_in_quotes(table):
    source = open_source(
        table('"Lung, left";"Lung, right";path\n1;0;images/0.png\n', labels=("Lung, left", "Lung, right"))
    )
    assert source.labels.tolist() == [[1, 0]]


@pytest.mark.parametrize(
    "text,changes,words",
    [
        (SEVERAL, {"labels": ("Edema", "Fracture")}, ["config.data.labels='Fracture'", "Mass"]),
        (SEVERAL, {"group": "patient"}, ["config.data.group='patient'", "who"]),
        (SEVERAL.replace("0.25", "7"), {"labels": ("Edema", "Mass")}, ["(line 4): Edema='7'; allowed: 0 to 1"]),
        (SEVERAL, {"labels": ("Edema", "Mass"), "blank": "zero"}, ["config.data.blank='zero'", "'zeros'"]),
        (SEVERAL, {"labels": ("Edema", "Mass"), "uncertain": "one"}, ["config.data.uncertain='one'", "'ones'"]),
        (SEVERAL.replace(",b\n", ",\n"), {"group": "who"}, ["(line 2): who is empty"]),
        (
            "path,split,who\nimages/0.png,train,a\nimages/1.png,test,b\nimages/2.png,val,a\n",
            {"group": "who"},
            ["(line 4): who 'a' is in val, but (line 2) in train"],
        ),
    ],
)
def test_errors_name_the_line(table, text, changes, words):
    fails(table(text, **changes), "table.csv'" if "config" not in words[0] else "config", *words)


def chexpert(root, name, rows):
    """rows: (patient, view, frontal?, {observation: text})"""
    with (root / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for patient, view, frontal, found in rows:
            path = f"{name}/patient{patient:05d}/study1/view{view}_{'frontal' if frontal else 'lateral'}.jpg"
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (20, 16), patient).save(root / path)
            labels = [found.get(observation, "") for observation in OBSERVATIONS]
            kind = ["Frontal", "AP"] if frontal else ["Lateral", ""]
            writer.writerow([f"CheXpert-v1.0-small/{path}", "Male", 60, *kind, *labels])
    return Data(name="chexpert", path=str(root), size=8)


TRAIN = [
    (1, 1, True, {"Edema": "1.0", "Fracture": "-1.0"}),
    (1, 2, False, {"Edema": "1.0"}),
    (7, 1, True, {"No Finding": "1.0", "Edema": "0.0"}),
]


def test_chexpert(tmp_path):
    chexpert(tmp_path, "valid", [(9, 1, True, dict.fromkeys(OBSERVATIONS, "0.0") | {"Edema": "1.0"})])
    data = chexpert(tmp_path, "train", TRAIN)
    source = open_source(data)
    assert source.names == [f"train/patient0000{p}/study1/view1_frontal.jpg" for p in (1, 7)]
    assert source.shape == (8, 8, 1) and source.groups.tolist() == [1, 7]
    assert source.arrays()[:, 4, 4, 0].tolist() == [1, 7]
    assert source.classes == list(OBSERVATIONS) and source.labels.shape == (2, 14)
    edema, fracture = source.labels[:, 5], source.labels[:, 12]
    assert edema.tolist() == [1, 0] and np.isnan(fracture[0]) and fracture[1] == 0  # blank is 0, -1 not known
    assert len(open_source(data, "all")) == 3 and open_source(data, "test").groups.tolist() == [9]
    assert open_source(data, "val").names == open_source(data, "test").names


@pytest.mark.parametrize(
    "changes,names,value",
    [
        ({"labels": ("study",), "uncertain": "ones"}, STUDY, 1.0),
        ({"labels": ("competition",), "uncertain": "zeros"}, None, None),
        ({"labels": ("Fracture", "Edema"), "uncertain": "zeros", "blank": "ignore"}, ("Fracture", "Edema"), 0.0),
    ],
)
def test_chexpert_policies(tmp_path, changes, names, value):
    chexpert(tmp_path, "train", TRAIN)
    source = open_source(Data(name="chexpert", path=str(tmp_path), size=8, frontal="all", **changes))
    assert len(source) == 3 and len(source.classes) == source.labels.shape[1]
    if names:
        assert source.classes == list(names)
        assert source.labels[0, source.classes.index("Fracture")] == value
        assert np.isnan(source.labels[1, source.classes.index("Fracture")]) == (changes.get("blank") == "ignore")


def test_chexpert_views_and_pairs(tmp_path):
    chexpert(tmp_path, "train", TRAIN)
    source = open_source(Data(name="chexpert", path=str(tmp_path), size=8, frontal="lateral"))
    assert source.names == ["train/patient00001/study1/view2_lateral.jpg"]
    source = open_source(Data(name="chexpert", path=str(tmp_path), size=8, frontal="all", pairs="patient"))
    assert source.objects.tolist() == [0, 0, 1]


def test_chexpert_list_of_test_images(tmp_path):
    """It goes round without the folder of the download in its paths, and without the column of the views."""
    chexpert(tmp_path, "valid", [(9, 1, True, {})])
    data = chexpert(tmp_path, "train", TRAIN)
    chexpert(tmp_path, "test", [(64741, 1, True, {"Edema": "1.0"}), (64741, 2, False, {})])
    lines = [line.split(",") for line in (tmp_path / "test.csv").read_text().splitlines()]
    kept = [",".join([line[0].removeprefix("CheXpert-v1.0-small/"), *line[5:]]) for line in lines]
    (tmp_path / "test.csv").write_text("\n".join(kept))
    source = open_source(data, "test")
    assert source.names == ["test/patient64741/study1/view1_frontal.jpg"] and source.groups.tolist() == [64741]
    assert source.load(0).shape == (8, 8, 1) and source.labels[0, 5] == 1
    assert open_source(data, "val").groups.tolist() == [9]


def test_chexpert_errors(tmp_path):
    fails(Data(name="chexpert"), "config.data.path=''")
    fails(Data(name="chexpert", path=str(tmp_path)), "contains no train.csv")
    data = chexpert(tmp_path, "train", TRAIN)
    with pytest.raises(UserError, match="no test part; available: train"):
        open_source(data, "test")
    chexpert(tmp_path, "valid", [(8, 1, True, {}), (7, 1, True, {})])
    fails(data, "patient 7 is in train.csv (line 4) and in valid.csv (line 3)")
    with pytest.raises(UserError, match="patient 7 is in train.csv"):  # whatever the part that is asked for
        open_source(data, "test")
    fails(
        dataclasses.replace(data, labels=("Oedema",)), "config.data.labels='Oedema'", "did you mean 'Edema'?", "study"
    )
    fails(dataclasses.replace(data, frontal="front"), "config.data.frontal='front'", "lateral")
    text = (tmp_path / "train.csv").read_text()
    (tmp_path / "valid.csv").unlink()
    (tmp_path / "train.csv").write_text(text.replace("-1.0", "7"))
    fails(data, "train.csv (line 2): Fracture='7'; allowed: 0 to 1, -1")
    (tmp_path / "train.csv").write_text(text.replace("patient00007", "person7"))
    fails(data, "train.csv (line 4): Path=", "names no patient")
    (tmp_path / "train.csv").write_text(text.replace(",Lateral,", ",Frontal,"))
    fails(dataclasses.replace(data, frontal="lateral"), "config.data.frontal='lateral'", "has no such images")
    (tmp_path / "train.csv").write_text(text.replace("Path,", "Place,"))
    fails(data, "train.csv: no column Path")
    (tmp_path / "train.csv").write_text(text.replace("view1", "view9", 1))
    fails(data, "1 of 2 files", "view9_frontal.jpg' (line 2): No such file")


def test_of_a_large_table_no_header_is_read_but_all_files_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setattr("ssl_jax.data.folder.MAX_HEADERS", 2)
    data = dataclasses.replace(
        chexpert(tmp_path, "train", [(i, 1, True, {}) for i in range(1, 6)]), max_bad_share=0.4, labels=("Edema",)
    )
    path = "train/patient0000{}/study1/view1_frontal.jpg"
    (tmp_path / path.format(2)).unlink()
    (tmp_path / path.format(4)).write_text("no image")
    source = open_source(data)
    assert source.skipped == [f"{path.format(2)!r} (line 3): No such file or directory"]
    assert source.groups.tolist() == [1, 3, 4, 5] and source.labels.shape == (4, 1)
    assert source.load(2)[4, 4, 0] == 5 and source.replaced == {2: 3}
    assert source.skipped[1:] == [f"{path.format(4)!r}: not an image"]
    (tmp_path / path.format(5)).unlink()
    with pytest.raises(UserError, match="view1_frontal.jpg': No such file or directory; it was readable at the start"):
        source.load(3)
    (tmp_path / path.format(1)).unlink()
    (tmp_path / path.format(1)).mkdir()
    fails(data, "3 of 5 files unreadable", f"{path.format(1)!r} (line 2): not a file", "(line 3)", "(line 6)")


def test_a_damaged_image_is_replaced_by_the_one_most_like_it_in_labels(tmp_path):
    """Among smoothed labels, or fourteen of them, hardly any other image has just the same."""
    rows = [
        (1, 1, True, {"Edema": "-1.0", "Fracture": "1.0"}),
        (2, 1, True, {"Edema": "0.0", "Fracture": "1.0"}),
        (3, 1, True, {"Edema": "1.0", "Fracture": "1.0"}),
        (4, 1, True, {"Edema": "1.0", "Fracture": "0.0"}),
    ]
    data = chexpert(tmp_path, "train", rows)
    damaged = tmp_path / "train/patient00001/study1/view1_frontal.jpg"
    Image.effect_noise((64, 64), 60).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:1500])  # its header is sound
    source = open_source(
        dataclasses.replace(data, labels=("Edema", "Fracture"), uncertain="smooth_ones", max_bad_share=0.5)
    )
    assert source.load(0)[4, 4, 0] == 3 and source.replaced == {0: 2}


@pytest.mark.parametrize("size,channels", [(28, 3), (64, 1), (224, 3)])
def test_medmnist_of_one_label_in_other_sizes(tmp_path, size, channels):
    """PathMNIST and the like: [N, 1] labels, 28 to 224 px, gray or colours."""
    rng, shape = np.random.default_rng(0), (size, size, channels)[: 3 if channels == 3 else 2]
    arrays = {f"{part}_images": rng.integers(0, 255, (3, *shape), np.uint8) for part in ("train", "val", "test")}
    np.savez(
        tmp_path / "a.npz", **arrays, **{f"{p}_labels": np.uint8([[8], [0], [3]]) for p in ("train", "val", "test")}
    )
    source = open_source(Data(name="npz", path=str(tmp_path / "a.npz")), "val")
    assert source.shape == (size, size, channels) and source.labels.tolist() == [8, 0, 3] and not source.multilabel
    np.testing.assert_array_equal(source.load(1), arrays["val_images"][1].reshape(size, size, channels))


def test_medmnist(tmp_path):
    path, rng = tmp_path / "chestmnist.npz", np.random.default_rng(0)
    parts = {
        f"{p}_images": rng.integers(0, 255, (n, 28, 28), np.uint8) for p, n in (("train", 5), ("val", 2), ("test", 3))
    }
    labels = {f"{p}_labels": rng.integers(0, 2, (n, 14)) for p, n in (("train", 5), ("val", 2), ("test", 3))}
    labels["train_labels"][0, 3] = -1
    np.savez(path, **parts, **labels)
    source = open_source(Data(name="npz", path=str(path)))
    assert source.multilabel and source.labels.shape == (5, 14) and len(source.classes) == 14
    assert np.isnan(source.labels[0, 3]) and np.isnan(source.labels).sum() == 1
    assert open_source(Data(name="npz", path=str(path), split="all")).labels.shape == (10, 14)
    np.savez(path, **parts, **{k: v + 2 for k, v in labels.items()})
    fails(Data(name="npz", path=str(path)), "train_labels", "for image 0; allowed: 0, 1 or -1")
