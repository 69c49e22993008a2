"""Phantom radiographs: reproducible, in CheXpert's layout, with findings that can't be read off something else."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from ssl_jax import cli
from ssl_jax.errors import UserError
from ssl_jax.phantom import OBSERVATIONS, draw, make_patient, write
from ssl_jax.phantom.anatomy import PERSON, draw_range
from ssl_jax.phantom.canvas import Canvas
from ssl_jax.phantom.patients import DRAWN

TRAIN, VALID = 0, 1


def rows(folder, part):
    with (folder / f"{part}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantom")
    write(out, patients=12, seed=3, size=48, test=20)
    return out


@pytest.fixture(scope="module")
def many():
    """Exams of 4,000 patients, not drawn."""
    return [exam for n in range(4000) for exam in make_patient(0, TRAIN, n).exams]


@pytest.fixture(scope="module")
def drawn():
    """Images at 64 px of 700 exams that are as good as independent, with what is there (0 or 1) [700, 14]."""
    patients = [make_patient(5, VALID, n) for n in range(700)]
    images = np.stack([draw(p, p.exams[0], 1, 64).image for p in patients])
    return images, np.array([[p.exams[0].truth[name] for name in OBSERVATIONS] for p in patients])


# Layout


def test_layout_is_chexperts(folder):
    assert {p.name for p in folder.iterdir()} == {"train", "valid", "masks", "train.csv", "valid.csv", "phantom.json"}
    assert (
        json.loads((folder / "phantom.json").read_text()).items()
        >= {"phantom": True, "seed": 3, "patients": 12}.items()
    )
    for part in ("train", "valid"):
        header, *lines = (folder / f"{part}.csv").read_text().splitlines()
        assert header == "Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(OBSERVATIONS)
        listed = {row["Path"].partition("/")[2] for row in rows(folder, part)}
        assert len(listed) == len(lines)
        assert listed == {str(p.relative_to(folder)) for p in (folder / part).rglob("*.jpg")}
        for row in rows(folder, part):
            _, _, patient, exam, view = row["Path"].split("/")
            assert patient[:7] == "patient" and len(patient) == 12 and exam[:5] == "study" and view[:4] == "view"
            assert (
                row["Frontal/Lateral"] == "Frontal"
                and row["AP/PA"] in ("AP", "PA")
                and row["Sex"] in ("Male", "Female")
            )
            assert {row[name] for name in OBSERVATIONS} <= (
                {"1.0", "0.0", "-1.0", ""} if part == "train" else {"1.0", "0.0"}
            )


def test_test_images_are_of_other_patients_and_as_many_as_asked_for(folder):
    patients = [{row["Path"].split("/")[2] for row in rows(folder, part)} for part in ("train", "valid")]
    assert len(patients[0]) == 12 and not patients[0] & patients[1]
    assert len(rows(folder, "valid")) == 20


def test_every_lesion_has_a_mask_of_the_images_size(folder):
    for row in rows(folder, "valid"):
        place = Path(row["Path"].partition("/")[2]).with_suffix("")
        masks = {p.stem: np.asarray(Image.open(p)) for p in (folder / "masks" / place).glob("*.png")}
        there = {name for name in OBSERVATIONS if row[name] == "1.0"} - {"No Finding"}
        assert set(masks) <= there
        # Something can be seen of nearly all; a fluid rim or a nodule may hide behind heart or diaphragm.
        assert {"Cardiomegaly", "Support Devices", "Edema", "Consolidation"} & there <= set(masks)
        for mask in masks.values():
            assert mask.shape == (48, 48) and set(np.unique(mask)) == {0, 255}


def test_second_call_finishes_and_changes_nothing(folder, tmp_path):
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*.jpg")}
    victim = next(iter(before))
    victim.unlink()
    (folder / "train.csv").unlink()
    write(folder, patients=12, seed=3, size=48, test=20)
    assert victim.read_bytes() == before[victim][0]
    assert all(p.stat().st_mtime_ns == time for p, (_, time) in before.items() if p != victim)
    assert (folder / "train.csv").is_file()


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"patients": 0}, "--patients=0: allowed: 1 to 90000"),
        ({"seed": -1}, "--seed=-1"),
        ({"size": 8}, "--size=8"),
        ({"test": 0}, "--test=0"),
        ({"seed": 4}, "holds phantoms with seed=3"),
    ],
)
def test_wrong_numbers(folder, changes, words):
    with pytest.raises(UserError, match=words):
        write(folder, **{"patients": 12, "seed": 3, "size": 48, "test": 20, **changes})


def test_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        write(tmp_path, patients=1)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_command_with_processes_gives_the_same_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    out = tmp_path / "again"
    assert cli.main(["phantom", f"--out={out}", "--patients=2", "--seed=3", "--size=48", "--test=2"]) == 0
    images = sorted(p.relative_to(out) for p in out.rglob("*.jpg"))
    assert images and all((out / p).read_bytes() == (folder / p).read_bytes() for p in images)


# Reproducible by (seed, index)


def test_a_patient_does_not_depend_on_the_others():
    patient = make_patient(7, TRAIN, 123)
    image = draw(patient, patient.exams[0], 1, 64).image
    make_patient(7, TRAIN, 5)
    again = make_patient(7, TRAIN, 123)
    np.testing.assert_array_equal(image, draw(again, again.exams[0], 1, 64).image)
    for other in (make_patient(8, TRAIN, 123), make_patient(7, VALID, 123), make_patient(7, TRAIN, 124)):
        assert (draw(other, other.exams[0], 1, 64).image != image).mean() > 0.5


def test_images_of_a_patient_are_alike_but_not_equal():
    patient = next(p for p in (make_patient(0, TRAIN, n) for n in range(50)) if len(p.exams) > 1)
    a, b = (draw(patient, exam, 1, 64).image.astype(float) for exam in patient.exams[:2])
    others = [make_patient(0, TRAIN, n) for n in range(100, 130)]
    strange = [draw(p, p.exams[0], 1, 64).image.astype(float) for p in others]
    between = np.median([np.corrcoef(a.ravel(), s.ravel())[0, 1] for s in strange])
    assert (a != b).any() and np.corrcoef(a.ravel(), b.ravel())[0, 1] > between


def test_size_changes_resolution_alone():
    patient = make_patient(2, TRAIN, 1)
    small, large = (draw(patient, patient.exams[0], 1, size).image.astype(float) for size in (64, 128))
    halved = large.reshape(64, 2, 64, 2).mean((1, 3))
    assert np.corrcoef(small.ravel(), halved.ravel())[0, 1] > 0.97


# As common, as correlated, as noisy as in life


def test_frequencies_are_as_told(many):
    for name, (share, _) in DRAWN.items():
        found = np.mean([exam.margin[name] > 0 for exam in many])
        assert abs(found - share) < 0.025, name


def test_labels_have_chexperts_shares(many):
    """Positive and uncertain reports, % of exams: https://arxiv.org/abs/1901.07031, table 1."""
    table = {
        "Enlarged Cardiomediastinum": (4.8, 5.4),
        "Cardiomegaly": (12.3, 3.5),
        "Lung Opacity": (49.4, 2.3),
        "Lung Lesion": (3.7, 0.6),
        "Edema": (26.1, 6.2),
        "Consolidation": (6.8, 12.8),
        "Pneumonia": (2.4, 8.3),
        "Atelectasis": (15.6, 15.7),
        "Pneumothorax": (9.2, 1.4),
        "Pleural Effusion": (40.3, 5.0),
        "Pleural Other": (1.3, 0.9),
        "Fracture": (3.9, 0.3),
        "Support Devices": (56.4, 0.5),
    }
    for name, shares in table.items():
        labels = np.array([exam.labels[name] for exam in many])
        for value, share in zip((1, -1), shares, strict=True):
            assert abs((labels == value).mean() * 100 - share) < 2.5, (name, value)
        assert np.isnan(labels).mean() > 0.25 and (labels == 0).any()


def test_labels_are_noisy_and_hedge_near_the_threshold(many):
    for name in ("Edema", "Consolidation", "Pneumothorax"):
        margin, label = (np.array([getattr(s, what)[name] for s in many]) for what in ("margin", "labels"))
        assert 0.005 < (label[margin <= 0] == 1).mean() < 0.05
        assert 0.5 < (label[margin > 0] == 1).mean() < 0.95
        assert abs(margin[label == -1]).mean() < 0.7 * abs(margin).mean()


def test_findings_go_together_as_they_do_in_life(many):
    found = {name: np.array([exam.truth[name] for exam in many]) for name in OBSERVATIONS}

    def risk(a, b):
        return found[a][found[b] == 1].mean() / found[a][found[b] == 0].mean()

    assert risk("Edema", "Cardiomegaly") > 1.5 and risk("Pneumonia", "Consolidation") > 3
    assert risk("Fracture", "Pneumothorax") > 2 and risk("Support Devices", "Edema") > 1.2
    opaque = np.max([found[n] for n in ("Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis")], axis=0)
    assert (found["Lung Opacity"] >= opaque).all()
    ill = np.max([found[n] for n in OBSERVATIONS if n not in ("No Finding", "Support Devices")], axis=0)
    np.testing.assert_array_equal(found["No Finding"], 1 - ill)


# Not to be read off something else


def test_nothing_can_be_read_off_brightness_or_contrast(drawn):
    """An AUC of chance has a standard error of 0.04 at 60 of 700 positives, 0.06 at 20."""
    images, truth = drawn
    for j, name in enumerate(OBSERVATIONS):
        for value in (images.mean((1, 2)), images.std((1, 2))):
            auc = roc_auc_score(truth[:, j], value)
            assert abs(auc - 0.5) < 0.1 + 0.5 / np.sqrt(truth[:, j].sum()), name


def test_nothing_can_be_read_off_order_or_name(many):
    """Neighbours in the table know no more of each other than chance: the first exam of each patient, by number."""
    first = [make_patient(0, TRAIN, n).exams[0] for n in range(2000)]
    for name in OBSERVATIONS:
        found = np.array([exam.truth[name] for exam in first])
        assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.1
        assert abs(roc_auc_score(found, np.arange(len(found))) - 0.5) < 0.06 + 0.4 / np.sqrt(found.sum())


def test_all_images_have_one_size_and_mode(folder):
    assert {(i.size, i.mode) for i in map(Image.open, folder.rglob("*.jpg"))} == {((48, 48), "L")}


def test_raw_pixels_are_far_from_enough(drawn):
    """A linear model of 16 px images; 0.95 is what a ResNet must stay below."""
    images, truth = drawn
    pixels = images.reshape(700, 16, 4, 16, 4).mean((2, 4)).reshape(700, -1) / 255 - 0.5
    aucs = []
    for j in range(len(OBSERVATIONS)):
        model = LogisticRegression(C=0.01, max_iter=300).fit(pixels[:450], truth[:450, j])
        aucs.append(roc_auc_score(truth[450:, j], model.decision_function(pixels[450:])))
    assert 0.5 < np.mean(aucs) < 0.75


def with_and_without(name, size):
    """A patient with this finding alone, plainly, and without any: what each image shows, before noise."""
    patient = make_patient(1, VALID, 17)
    none = dataclasses.replace(patient.exams[0], margin=dict.fromkeys(DRAWN, -3.0))
    one = dataclasses.replace(none, margin={**none.margin, name: 1.0})
    return draw(patient, one, 1, size), draw(patient, none, 1, size)


@pytest.mark.parametrize("name", [name for name in DRAWN if name != "haze"])
def test_a_finding_is_where_its_mask_says(name):
    """The same image with and without it: what differs lies in the mask, or near it."""
    made, empty = with_and_without(name, 96)
    assert not empty.masks and name in made.masks
    change = abs(made.image.astype(float) - empty.image)
    mask = made.masks[name]
    assert 0.0005 < mask.mean() < 0.6
    assert change[mask].mean() > 2 * change[~mask].mean()


@pytest.mark.parametrize(
    "name,small,fine",
    [
        ("Lung Lesion", True, False),
        ("Fracture", True, False),
        ("Atelectasis", True, True),
        ("Support Devices", True, True),
        ("Cardiomegaly", False, False),
        ("Edema", False, False),
    ],
)
def test_kinds_of_findings(name, small, fine):
    """A crop can cut out what is small; a blur (3 px of 128) takes most of what is fine, and little of the rest."""
    made, empty = with_and_without(name, 128)
    mask = made.masks[name]
    assert (mask.mean() < 0.03) == small
    change = made.image.astype(float) - empty.image
    kept = np.sqrt((gaussian_filter(change, 3)[mask] ** 2).mean() / (change[mask] ** 2).mean())
    assert (kept < 0.45) == fine and (fine or kept > 0.55)


# The canvas


def test_a_line_lies_where_it_should_and_is_as_dense():
    canvas = Canvas(64, turn=0, scale=1.0, stretch=1.0, shift=(0.0, 0.0))
    y = (40 + 0.5) / 64 * 2 - 1  # the middle of row 40
    sigma = 1.625  # px
    image = canvas.lines([(np.array([-0.8, 0.8]), np.array([y, y]), 0.7)], sigma / 32)
    expected = 0.7 * np.exp(-((np.arange(64) - 40) ** 2) / (2 * sigma**2))
    np.testing.assert_allclose(image[:, 32], expected, atol=1e-4)
    assert image[:, :3].max() < 0.02


def test_coordinates_turn_with_the_pose():
    canvas = Canvas(64, turn=90, scale=0.5, stretch=1.0, shift=(0.0, 0.0))
    # A quarter turn: what lies to the body's left lies at the bottom of the image.
    assert canvas.x[-1, 32] > 1.9 and abs(canvas.y[-1, 32]) < 0.1


def test_ranges_are_drawn_from():
    drawn = draw_range(np.random.default_rng(0), PERSON)
    assert all(low <= drawn[name] <= high for name, (low, high) in PERSON.items())
