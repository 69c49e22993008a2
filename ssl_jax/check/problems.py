"""The problems of a data set, as rows of a table: which image, what is wrong, with which other image, how sure."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ssl_jax.check import copies, labels
from ssl_jax.check.scan import Scan
from ssl_jax.config import Data
from ssl_jax.data.labelled import labelled_indices
from ssl_jax.neighbours import nearest_others

# What each problem means, in the order of the table and of the page.
PROBLEMS = {
    "unreadable": "The file cannot be decoded, so no command uses it.",
    "blank": "All pixels have one colour.",
    "tiny": "The shorter side is less than a quarter of what is usual here, so the image is mostly invented pixels.",
    "odd shape": "More than twice as long, for its width, as usual here; only its central square is used.",
    "odd kind": "Of a kind that fewer than 5 % of the images have.",
    "duplicate": "All pixels are those of another image, which stays.",
    "near duplicate": "Closer to another image, which stays, than chance brings images of this data: probably a copy.",
    "leak": "A training image that is a copy of a test image: a test score counts what the training has seen.",
    "patient in both": "A training image of a patient, or another group, who is in the test set, too.",
    "outlier": "Far from every other image in the embedding; look whether it belongs here.",
    "label": "Models that were trained on the other images hold the label for improbable.",
    "classes alike": "Models that were trained on other images often take one class for the other.",
}
TINY = 1 / 4  # of the median of the shorter sides
LONG = 2  # times the median ratio of longer to shorter side
RARE = 0.05  # share of the images that a kind needs, to be no oddity
FENCE = 3  # interquartile ranges above the third quartile: Tukey's outer fence


class Row(NamedTuple):
    """One line of check.csv. image, other: places among all images, -1 for none. score: None if there is none."""

    problem: str
    image: int
    other: int
    score: float | None
    note: str
    path: str = ""  # of an image that cannot be read
    file: str = ""


class Images(NamedTuple):
    """The images of the training set and then those of the test set, N in all.

    is_test: bool [N]. labels: int [N], -1 where unknown, or float [N, K], NaN where unknown; None without labels.
    groups: the patient, or another group, of each image as text; None if the data do not say.
    """

    scans: list[Scan]
    is_test: np.ndarray
    names: list[str]
    keys: list[str]
    features: np.ndarray | None
    labels: np.ndarray | None
    classes: list[str]
    groups: list[str] | None

    def load(self, image: int) -> np.ndarray:
        """uint8 [H, W, C]."""
        first = len(self.scans[0].names)
        scan, place = (self.scans[1], image - first) if image >= first else (self.scans[0], image)
        return scan.source.load(int(scan.places[place]))

    def joined(self, field: str) -> np.ndarray:
        return np.concatenate([getattr(scan, field) for scan in self.scans])


def find(images: Images, data: Data) -> list[Row]:
    """All problems, in the order of PROBLEMS, the clearest first. data: how the training set was read."""
    blank = images.joined("blank")
    rows = [*_unreadable(images), *(Row("blank", i, -1, None, "") for i in np.flatnonzero(blank).tolist())]
    rows += _odd(images)
    copied, distinct = _copies(images, blank, data)
    rows += copied + _patients(images)
    if images.features is not None:
        kept = np.flatnonzero(distinct & ~blank)
        rows += _outliers(images.features, kept)
        if images.labels is not None:
            rows += _labels(images, kept)
    order = list(PROBLEMS)
    return sorted(rows, key=lambda row: order.index(row.problem))


def _unreadable(images: Images) -> list[Row]:
    found = []
    for scan, test in zip(images.scans, ("", "test set: ")):
        found += [
            Row("unreadable", -1, -1, None, test + reason, name, key) for name, (key, reason) in scan.unreadable.items()
        ]
    return found


def _odd(images: Images) -> list[Row]:
    sizes, kinds = images.joined("sizes"), [kind for scan in images.scans for kind in scan.kinds]
    known = np.flatnonzero(sizes.min(axis=1) > 0)
    rows = []
    if len(known):
        short, ratio = sizes.min(axis=1), sizes.max(axis=1) / np.maximum(sizes.min(axis=1), 1)
        usual, usual_ratio = np.median(short[known]), np.median(ratio[known])
        for i in known.tolist():
            size = f"{sizes[i, 0]} x {sizes[i, 1]} px"
            if short[i] < TINY * usual:
                note = f"{size}; the median of the shorter sides is {usual:g} px"
                rows.append(Row("tiny", i, -1, float(short[i]), note))
            if ratio[i] > LONG * usual_ratio:
                rows.append(Row("odd shape", i, -1, float(ratio[i]), f"{size}; usually {usual_ratio:.3g} to 1"))
    counts = Counter(kinds)
    usual_kind = max(counts, key=lambda kind: (counts[kind], kind), default="")
    for i, kind in enumerate(kinds):
        if counts[kind] < RARE * len(kinds):
            share = counts[usual_kind] / len(kinds)
            rows.append(Row("odd kind", i, -1, None, f"{kind}; {share:.0%} are {usual_kind}"))
    return sorted(rows, key=lambda row: (row.score or 0) * (1 if row.problem == "tiny" else -1))


def _copies(images: Images, blank: np.ndarray, data: Data) -> tuple[list[Row], np.ndarray]:
    """(rows, bool [N]: not equal to an earlier image). Blank images are equal to each other, which says nothing."""
    usable = np.flatnonzero(~blank)
    digests = [digest for scan in images.scans for digest in scan.digests]
    files = [scan.source.files[i] if scan.source.paths else () for scan in images.scans for i in scan.places.tolist()]
    read = dataclasses.replace(data, channels=images.scans[0].source.shape[2])
    pairs = copies.equal([digests[i] for i in usable], [files[i] for i in usable], read)
    exact = [(int(usable[a]), int(usable[b]), 1.0) for a, b in pairs]
    distinct = np.ones(len(blank), bool)
    distinct[[b for _, b, _ in exact]] = False
    kept = np.flatnonzero(distinct & ~blank)
    features = None if images.features is None else images.features[kept]
    close = copies.near(images.joined("small")[kept], features)
    near = [(int(kept[a]), int(kept[b]), cosine) for a, b, cosine in close]
    rows = _rows_of_pairs(images, exact, "duplicate", "equal in every pixel")
    listed = {row.image for row in rows}
    rows += [row for row in _rows_of_pairs(images, near, "near duplicate", "similar") if row.image not in listed]
    return rows, distinct


def _rows_of_pairs(images: Images, pairs: Sequence[copies.Pair], problem: str, note: str) -> list[Row]:
    """A row for each image that could go: of a training and a test image the training one, else the later one."""
    rows: dict[int, Row] = {}
    for first, second, score in pairs:
        leak = bool(images.is_test[second] and not images.is_test[first])
        image, other = (first, second) if leak else (second, first)
        test = "; both are in the test set" * bool(images.is_test[first])
        labels = _differ(images, first, second)
        row = Row("leak" if leak else problem, image, other, score, f"{note}{test}{labels}")
        if image not in rows or (leak and rows[image].problem != "leak"):
            rows[image] = row
    return sorted(rows.values(), key=lambda row: (-(row.score or 0), row.image))


def _differ(images: Images, a: int, b: int) -> str:
    """What two copies are labelled, if they are labelled differently."""
    if images.labels is None:
        return ""
    if images.labels.ndim == 1:
        first, second = images.labels[a], images.labels[b]
        if min(first, second) < 0 or first == second:
            return ""
        return f"; labelled {images.classes[first]} and {images.classes[second]}"
    other = images.labels[a] != images.labels[b]
    other &= ~np.isnan(images.labels[a]) & ~np.isnan(images.labels[b])
    return f"; with other labels: {', '.join(images.classes[c] for c in np.flatnonzero(other))}" if other.any() else ""


def _patients(images: Images) -> list[Row]:
    if images.groups is None or not images.is_test.any():
        return []
    of_test = {group: i for i, group in reversed(list(enumerate(images.groups))) if images.is_test[i]}
    return [
        Row("patient in both", i, of_test[group], None, f"group {group}")
        for i, group in enumerate(images.groups)
        if not images.is_test[i] and group in of_test
    ]


def _outliers(features: np.ndarray, kept: np.ndarray) -> list[Row]:
    count = min(copies.NEIGHBOURS, len(kept) - 1)
    if count < 3:
        return []
    distance = 1 - nearest_others(features[kept], count)[1].mean(axis=1)
    logs = np.log(np.maximum(distance, 1e-9))
    low, high = np.percentile(logs, (25, 75))
    far = np.flatnonzero(logs > high + FENCE * (high - low))
    usual = np.median(distance)
    note = f"mean cosine distance to its {count} nearest images; the median is {usual:.3g}"
    return [
        Row("outlier", int(kept[i]), -1, float(distance[i]), note)
        for i in far[np.argsort(-distance[far], kind="stable")]
    ]


def _labels(images: Images, kept: np.ndarray) -> list[Row]:
    given = np.asarray(images.labels)
    judged = kept[np.isin(kept, labelled_indices(given))]
    features = np.asarray(images.features)[judged]
    groups = None if images.groups is None else np.unique(np.array(images.groups)[judged], return_inverse=True)[1]
    names = images.classes
    if given.ndim == 2:
        return [
            Row(
                "label",
                int(judged[doubt.image]),
                -1,
                doubt.probability,
                f"{names[doubt.column]}: labelled {doubt.given}, looks like {doubt.guess} ({doubt.guessed:.0%})",
            )
            for doubt in labels.doubts_of_several(features, given[judged], groups)
        ]
    own = given[judged].astype(int)
    probabilities = labels.out_of_fold(features, own, groups)
    rows = [
        Row(
            "label",
            int(judged[doubt.image]),
            -1,
            doubt.probability,
            f"labelled {names[doubt.given]}, looks like {names[doubt.guess]} ({doubt.guessed:.0%})",
        )
        for doubt in labels.doubts(probabilities, own)
    ]
    for a, b, error in labels.alike(probabilities, own):
        note = f"{names[a]} and {names[b]}: {error:.0%} of their images are taken for the other class"
        rows.append(Row("classes alike", -1, -1, error, note))
    return rows


def table(images: Images, rows: Sequence[Row]) -> list[list[str]]:
    """The lines of check.csv, under the columns path, problem, other path, score, note, file."""
    lines = []
    for row in rows:
        path, file = (images.names[row.image], images.keys[row.image]) if row.image >= 0 else (row.path, row.file)
        other = images.names[row.other] if row.other >= 0 else ""
        lines.append([path, row.problem, other, "" if row.score is None else f"{row.score:.6g}", row.note, file])
    return lines
