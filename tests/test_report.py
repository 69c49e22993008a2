"""The report of run folders and study folders, whole or with parts missing."""

import base64
import html
import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from ssl_jax import config as configs
from ssl_jax.errors import UserError
from ssl_jax.evaluate.scores import metrics
from ssl_jax.files import write_json
from ssl_jax.plotting import GAIN, SCORE, limits
from ssl_jax.report import figures, plots, tables, words
from ssl_jax.report.html import read_run, write_report
from ssl_jax.report.images import Sample, embedding_map, neighbours
from ssl_jax.report.training import health
from ssl_jax.run_folder import RunFolder

CLASSES = ["bag & <b>belt</b>", "cost $5", "coat"]


def make_run(folder, *, labels=True, std=0.9, path="no/such/folder", **data):
    """A run folder as training leaves it, without its encoder."""
    config = configs.default("byol")
    config.data.name, config.data.path, config.optim.lr = data.get("name", "folder"), path, 0.123
    config.model.name = "resnet18"
    config.augment.second.blur = 0.77
    write_json(folder / "config.json", configs.to_json(configs.resolve(config)))
    lines = []
    for i in range(1, 41):
        line = {"step": 10 * i, "epoch": i / 10, "loss": 4 / i, "grad_norm": 1.0, "embedding_std": std, "lr": 0.1}
        lines.append({**line, "probe_accuracy": i / 80} if labels else line)
        if labels and i % 10 == 0:
            lines.append({"step": 10 * i, "knn_accuracy": 0.7 + i / 400})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    timing = [{"step": 10 * i, "images_per_s": 400.0 + i, "waiting": 0.01} for i in range(1, 41)]
    (folder / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timing))
    command = {"time": "2025-01-01T10:00:00+00:00", "argv": ["/bin/ssl-jax", "pretrain", "--workdir=a b"]}
    environment = {"packages": {"jax": "9.8.7"}, "python": "3.12.0", "devices": ["cpu", "cpu"], "commands": [command]}
    write_json(folder / "environment.json", environment)
    Image.new("RGB", (60, 20), (200, 30, 30)).save(folder / "views.png")
    return folder


def add_evaluation(folder, stem="linear-30", seeds=2, classes=CLASSES, n=30):
    """As `evaluate` writes it, of scores under which the third class is taken for the first one."""
    labels = np.arange(n) % len(classes)
    each = metrics(np.eye(len(classes))[np.where(labels == 2, 0, labels)], labels, classes)
    made = {
        "protocol": stem.split("-")[0],
        "labels": 30,
        "seeds": seeds,
        "classes": classes,
        "test": "test split",
        "per_seed": [each] * seeds,
        "mean": {"top1": 0.6612345, "macro_auc": None},
        "interval": {"top1": 0.02 if seeds > 1 else None, "macro_auc": None},
    }
    write_json(folder / "evaluation" / f"{stem}.json", made)


def text_of(path):
    """What a reader sees, without pictures and tags."""
    page = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", path.read_text(), flags=re.S)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))


def assert_nothing_from_elsewhere(markup):
    assert not re.findall(r"<script|<link|@import|(?:src|href)=\"(?!data:|#)|url\((?!#|data:)", markup)


def captions(path):
    return [html.unescape(c) for c in re.findall(r"<figcaption>(.*?)</figcaption>", path.read_text())]


def sections(path):
    return [html.unescape(h) for h in re.findall(r"<h2>(.*?)</h2>", path.read_text())]


def test_page_holds_what_the_run_did_and_needs_nothing_else(tmp_path):
    folder = make_run(tmp_path / "run")
    add_evaluation(folder)
    page = write_report(folder)
    assert page == folder / "report.html"
    markup, text = page.read_text(), text_of(page)
    assert "trained for 4 epochs (400 steps with a batch of 256)" in text and "The run has not reached its" in text
    assert "loss 0.1 " not in text and "0.1 loss 4 at the start" in text
    assert "80.0 % kNN accuracy" in text and "The embedding is healthy" in text
    assert markup.count("<svg") == 7
    assert "config.optim.lr 0.123 0.45" in text and "config.augment.second.blur 0.77" in text
    assert "2 × cpu" in text and "jax 9.8.7" in text and "ssl-jax pretrain '--workdir=a b'" in text
    assert_nothing_from_elsewhere(markup)
    assert "prefers-color-scheme: dark" in markup and "width=device-width" in markup
    assert write_report(folder, tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_a_run_starts_with_what_it_is_a_line_and_pictures(tmp_path):
    folder = make_run(tmp_path)
    add_evaluation(folder)
    beside(folder, "linear-30", 0.7)
    page = write_report(folder)
    header, rest = page.read_text().split("<nav>")
    verdict = re.search(r'<p class="verdict weak">(.*?)</p>', header)[1]
    assert verdict == "The encoder has not helped yet: it does not beat raw pixels."
    assert header.index("byol with a resnet18") < header.index(verdict) and "with 30 labels" not in header
    assert sections(page)[0] == "Views" and rest.index("<img") < rest.index("with 30 labels")
    shown = captions(page)
    assert "kNN accuracy" in shown and "Linear probe accuracy" in shown and "Accuracy" not in shown


def test_every_number_is_explained_where_it_stands(tmp_path):
    folder = make_run(tmp_path)
    lines = [{"step": 10, "epoch": 1, "loss": 2.0, "embedding_std": 0.9, "chance": 0.5, "positive_rank": 3.0, "x_y": 1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    markup = write_report(folder).read_text()
    shown = dict(re.findall(r"<figcaption>([^<]*)</figcaption><svg.*?</svg>\s*<small>(.*?)</small>", markup, re.S))
    assert list(shown) == ["Loss", "Embedding std", "Loss relative to chance", "Positive rank", "X y", "Images / s"]
    assert "guessing (chance)" in shown["Loss relative to chance"] and "0 is best" in shown["Positive rank"]
    add_evaluation(folder)
    text = text_of(write_report(folder))
    for score in ("Top-1 accuracy", "Macro ROC AUC", "recall", "precision", "F1", "ROC AUC"):
        assert f"{score}: " in text, score


def test_confusion_is_that_of_the_newest_evaluation(tmp_path):
    folder = make_run(tmp_path)
    add_evaluation(folder, "knn-30", seeds=1)
    add_evaluation(folder)
    os.utime(folder / "evaluation" / "knn-30.json", (1, 1))
    text = text_of(write_report(folder))
    assert "0.6612 ± 0.0200" in text and "sum over 2 draws of labels." in text
    # Class, test images, recall, precision, F1, mistaken for: class 2 is always predicted as class 0, whose precision
    # is halved.
    assert "bag & <b>belt</b> 10 100.0 % 50.0 % 66.7 % 0.7500 –" in text
    assert "coat 10 0.0 % – 0.0 % 0.5000 bag & <b>belt</b> (100.0 %)" in text


def test_several_labels_an_image_have_a_table_instead(tmp_path):
    folder = make_run(tmp_path)
    add_evaluation(folder)
    path = folder / "evaluation" / "linear-30.json"
    labels = np.array([[1, 0, 0], [0, 1, np.nan], [1, np.nan, 0]])
    each = metrics(np.array([[2.0, 0, 0], [0, 1, 0], [-1, 0, 0]]), labels, CLASSES)
    write_json(path, {**json.loads(path.read_text()), "per_seed": [each] * 2, "mean": {"macro_auc": 0.75}})
    page = write_report(folder)
    assert "Classes" in sections(page) and "Confusion" not in sections(page)
    # Class, labelled, positive, AUC, average precision: of two positives one is above the only negative.
    assert "bag & <b>belt</b> 3 2 0.5000 0.8333 cost $5 2 1 1.0000 1.0000 coat 2 0 – –" in text_of(page)


def beside(folder, stem, pixels, **more):
    """Adds to an evaluation what costs nothing, and what it was made on."""
    path = folder / "evaluation" / f"{stem}.json"
    made = json.loads(path.read_text())
    means = {"majority class": 0.34, "raw pixels, linear": pixels, "raw pixels, kNN": pixels - 0.1}
    made["references"] = {name: {"mean": {"top1": v}, "interval": {"top1": None}} for name, v in means.items()}
    made |= {"metric": "top1", "conditions": {"data": {"path": "/x/<scans>.csv", "name": "csv"}}, **more}
    write_json(path, made)


def test_an_encoder_below_raw_pixels_is_not_called_healthy(tmp_path):
    folder = make_run(tmp_path)
    add_evaluation(folder)
    beside(folder, "linear-30", 0.6)
    text = text_of(write_report(folder))
    assert "0.3400 0.6000 –" in text and "/x/<scans>.csv" in text and "The embedding is healthy" in text
    beside(folder, "linear-30", 0.7)
    text = text_of(write_report(folder))
    assert "healthy" not in text
    assert "with 30 labels of /x/<scans>.csv, linear_quick reaches 66.1 %, raw pixels 70.0 %." in text
    add_evaluation(folder, "finetune-30")  # another protocol beats them on the same labels
    beside(folder, "finetune-30", 0.7, mean={"top1": 0.71})
    assert "The embedding is healthy" in text_of(write_report(folder))


def test_neighbours_stand_beside_those_of_raw_pixels(tmp_path):
    shares = {"embedding": 0.5, "raw pixels": 0.6, "random encoder": 0.4, "chance": 0.33}
    markup = neighbours(sample()._replace(shares=shares))
    assert "60% if the raw pixels are compared, 40% with a random encoder" in markup
    assert "33% by chance (neighbours drawn at random)." in markup
    run = read_run(RunFolder(make_run(tmp_path)))
    assert "50.0 % of its neighbours share the class, of theirs 60.0 %" in health(run, shares).detail
    assert health(run, {**shares, "embedding": 0.7}).state == "healthy"


def test_runs_evaluations_and_classifiers_of_a_folder_all_appear(tmp_path):
    for name in ("a", "deep/b"):
        run = make_run(tmp_path / name)
        for stem in ("knn-all", "knn-all-scans-12ab34"):
            add_evaluation(run, stem)
            beside(run, stem, 0.6)
    about = {"classes": CLASSES, "data": "labelled.csv", "chosen": {"lr": 0.001, "validation": 0.75}}
    for sorter in ("a/sorter", "deep/b/sorter"):
        write_json(tmp_path / sorter / "classifier.json", {**about, "test": {"top1": 0.8125}})
    text = text_of(write_report(tmp_path / "a"))
    assert text.count("knn 30 2 /x/<scans>.csv test split") == 2
    assert "sorter labelled.csv – 3 lr 0.001 0.7500 Top-1 accuracy 0.8125" in text
    page = write_report(tmp_path)
    assert sections(page) == ["Runs", "Evaluation", "Classifiers"]
    text = text_of(page)
    assert "a byol resnet18" in text and "deep/b byol resnet18" in text and "a/sorter labelled.csv" in text
    assert "deep/b/sorter labelled.csv" in text and "weak: not better than raw pixels" in text
    assert text.count("deep/b knn 30 2") == 2


def test_names_are_escaped(tmp_path):
    folder = make_run(tmp_path, path="<i>x</i> & y")
    add_evaluation(folder)
    markup = write_report(folder).read_text()
    assert "<b>belt" not in markup and "<i>x" not in markup and "&lt;i&gt;x&lt;/i&gt; &amp; y" in markup


def test_collapse_and_broken_losses_are_stated(tmp_path):
    assert "The embedding has collapsed" in text_of(write_report(make_run(tmp_path / "a", std=0.001)))
    assert "The embedding is narrow" in text_of(write_report(make_run(tmp_path / "c", std=0.05)))
    folder = make_run(tmp_path / "b")
    with (folder / "metrics.jsonl").open("a") as file:
        line = {"step": 410, "epoch": 4.1, "loss": None, "grad_norm": None, "embedding_std": 0.03, "lr": 0.1}
        file.write(json.dumps(line) + "\n")
    assert "not a finite number" in text_of(write_report(folder))


def test_missing_inputs_leave_their_sections_out(tmp_path):
    write_json(tmp_path / "config.json", configs.to_json(configs.resolve(configs.default("simclr"))))
    page = write_report(tmp_path)
    assert sections(page) == ["Training", "Evaluation", "Configuration"]
    assert text_of(page).count("No step has been logged yet") == 2
    unlabelled = write_report(make_run(tmp_path / "b", labels=False))
    assert not [caption for caption in captions(unlabelled) if "accuracy" in caption]
    with pytest.raises(UserError, match=r"no config\.json"):
        write_report(tmp_path / "nothing")


def test_many_classes_become_a_picture(tmp_path):
    folder = make_run(tmp_path)
    add_evaluation(folder, classes=[f"class {i}" for i in range(25)], n=100)
    markup = write_report(folder).read_text()
    assert 'class="heat"' in markup and 'class="matrix"' not in markup
    assert "class 24" in markup


def test_finished_run_shows_its_images_as_long_as_they_are_there(tmp_path):
    from ssl_jax.encoder import encoder_metadata, export, random_encoder

    settings = configs.default("simclr")
    settings.data.name, settings.data.path, settings.data.size = "synthetic", "classes=3,n=30", 16
    settings.model.name, settings.model.width = "resnet_thin", 0.25
    config = configs.resolve(settings)
    encoder = random_encoder(config.model, 16, 3, seed=0)
    export(tmp_path / "encoder", encoder._replace(about=encoder_metadata(config, 16, 3, 10)))
    write_json(tmp_path / "config.json", configs.to_json(config))
    page = write_report(tmp_path)
    assert [s for s in sections(page) if s != "Views"][:2] == ["Nearest neighbours", "Embedding map"]
    assert page.read_text().count('class="strip"') == 3 and "one of 30 training images" in text_of(page)
    assert_nothing_from_elsewhere(page.read_text())
    assert "30 images of classes=3" in text_of(page)

    settings.data.name, settings.data.path = "folder", str(tmp_path / "gone")
    write_json(tmp_path / "config.json", configs.to_json(configs.resolve(settings)))
    page = write_report(tmp_path)
    assert "Not shown, nor is the embedding map" in text_of(page) and str(tmp_path / "gone") in text_of(page)
    assert "Embedding map" not in sections(page)


def sample(n=40, labels=True, size=20, channels=1):
    rng = np.random.default_rng(0)
    kind = np.arange(n) % 3
    features = np.eye(3)[kind] + 0.01 * rng.normal(size=(n, 3))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    images = rng.integers(0, 255, (n, size, size, channels), np.uint8)
    return Sample(images, features, [f"a<{i}>.png" for i in range(n)], kind if labels else None, CLASSES, n)


@pytest.mark.parametrize(("labels", "channels", "size"), [(True, 1, 20), (False, 3, 120), (True, 5, 20)])
def test_neighbours_are_the_nearest(labels, channels, size):
    markup = neighbours(sample(labels=labels, channels=channels, size=size))
    rows = markup.count('class="strip"')
    assert rows == (3 if labels else 8)
    assert markup.count("<img") == 7 * rows
    assert "a&lt;0&gt;.png" in markup
    if labels:
        assert "100% of the neighbours are of the same class" in markup
        assert markup.count('class="same"') == 18 and 'class="other"' not in markup


def test_too_few_images():
    assert "too few" in neighbours(sample(n=3)) and "too few" in embedding_map(sample(n=2))


@pytest.mark.parametrize(("channels", "size"), [(1, 20), (3, 120), (5, 20)])
def test_each_point_of_the_map_has_its_own_image_and_name(channels, size):
    """The place of an image in the sprite is read back from the style of its point."""
    shown = sample(n=40, channels=channels, size=size)
    shown.images[:] = np.arange(0, 240, 6, dtype=np.uint8)[:, None, None, None]
    shown.names[7] = "odd\x1b\n名.png"
    markup = embedding_map(shown._replace(labels=np.where(np.arange(40) == 3, -1, shown.labels)))
    assert "bag &amp; &lt;b&gt;belt" in markup and "cost $5" in markup and "odd\\x1b\\n名.png" in markup
    uri = re.search(r"url\(data:image/jpeg;base64,([^)]*)\)", markup)[1]
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))).convert("L"))
    first = markup.split("UMAP")[0]  # if umap is installed, there is a second map
    dots = re.findall(r"--b:-?(\d+)px -?(\d+)px\"><input type=\"radio\" name=\"Principal\"><b>(.*?)</b>", first)
    assert len(dots) == 40
    for x, y, text in dots:
        column, row = int(x) // 96, int(y) // 96
        number = 7 if "odd" in text else int(re.search(r"a&lt;(\d+)", text)[1])
        value = sheet[48 * row + 24, 48 * column + 24]
        assert abs(int(value) - 6 * number) <= 3
        assert ("<br>" in text) == (number != 3)  # the class, if it is known


def test_a_map_of_a_thousand_images_stays_small():
    noise = sample(n=1000, channels=3, size=64)
    assert len(embedding_map(noise)) < 3e6


@pytest.mark.parametrize(
    ("values", "least", "top"),
    [([20.5, 18.5], None, np.inf), ([20.5, 18.5], SCORE, 100), ([99.9, 98], SCORE, 100), ([0.1, 1.1], SCORE, 100),
     ([4.2, 3.9, np.nan], None, np.inf), ([0, -0.3], GAIN, np.inf), ([5, 5], None, np.inf), ([2, 100.5], SCORE, 100)],
)  # fmt: skip
def test_small_changes_look_small(values, least, top):
    low, high = limits(values, least, top)
    finite = np.array(values)[np.isfinite(values)]
    span = least or np.abs(finite).max() / 2
    assert low < finite.min() and finite.max() < high and high - low >= span
    slack = 0.06 * (high - low)
    assert high <= max(top, finite.max()) + slack
    if finite.min() >= 0:
        assert low >= -slack


def test_limits_of_nothing():
    assert limits([]) == limits([np.nan]) == (0, 1)
    low, high = limits([0.0, 0.0])
    assert low < 0 < high


def drawn(patch, plot, *args, **options):
    """The figure that a function of `report.figures` saves."""
    saved = []
    patch.setattr(figures, "save", lambda figure, path: (saved.append(figure), figure.savefig(io.BytesIO())))
    plot(*args, **options)
    return saved[0]


def study_rows(arms=("scratch", "byol $1 $"), counts=(50, 100), start=0.205, step=-0.02):
    rows = []
    for i, arm in enumerate(arms):
        for j, count in enumerate(counts):
            mean = start + j * step + 0.002 * i
            row = {"arm": arm, "labels": count, "metric": "top1", "seeds": 3, "mean": mean, "half": 0.01}
            gain = (0.002, 0.001) if i else (None, None)
            rows.append(row | dict(zip(("difference", "difference_half"), gain, strict=True)))
    return rows


@pytest.mark.parametrize("arms", [2, 5])
def test_legends_of_a_study_lie_outside_of_the_axes(monkeypatch, arms):
    names = ["scratch", *(f"byol_with_a_long_name $ {i} $" for i in range(arms - 1))]
    figure = drawn(monkeypatch, figures.curve, study_rows(names), "x", baseline="scratch", metric="top1")
    gains = [
        {"arm": arm, "labels": 50, "class": name, "gain": 0.001, "half": 0.002} for arm in names[1:] for name in CLASSES
    ]
    options = {"baseline": "scratch", "metric": "recall", "share": dict.fromkeys(CLASSES, 1 / 3)}
    for shown in (figure, drawn(monkeypatch, figures.gain_by_class, gains, "x", **options)):
        boxes = [axes.get_tightbbox() for axes in shown.axes]
        for legend in shown.legends:
            box = legend.get_window_extent()
            assert not any(box.overlaps(each) for each in boxes)
            assert shown.bbox.x0 <= box.x0 and box.x1 <= shown.bbox.x1
    assert len(figure.legends) == 1


def test_a_study_draws_small_changes_small_and_names_its_metric(monkeypatch):
    left, right = drawn(monkeypatch, figures.curve, study_rows(), "x", baseline="scratch", metric="top1").axes
    assert np.ptp(left.get_ylim()) >= SCORE and np.ptp(right.get_ylim()) >= GAIN
    assert left.get_ylabel() == "Top-1 accuracy, %" and right.get_ylabel() == "Top-1 accuracy: points above scratch"


def test_gains_by_class_split_the_metric_of_the_table():
    """Classes of unequal size: their gains in recall have the difference of the balanced accuracy as their mean."""
    rng, labels = np.random.default_rng(0), np.repeat([0, 1, 2], [60, 25, 15])
    cells = []
    for arm, skill in (("scratch", 0.5), ("byol", 1.5)):
        for seed in range(2):
            scores = metrics(rng.normal(size=(100, 3)) + skill * np.eye(3)[labels], labels, CLASSES)
            cells.append({"arm": arm, "labels": 50, "seed": seed, "scores": scores})
    metric = tables.main_metric(cells)
    assert metric == "balanced_accuracy"
    (row,) = [r for r in tables.summarise(cells, "scratch") if (r["arm"], r["metric"]) == ("byol", metric)]
    gains = tables.class_gains(cells, "scratch", tables.class_metric(metric))
    assert np.mean([gain["gain"] for gain in gains]) == pytest.approx(row["difference"])


def test_words_for_every_metric():
    assert words.of("loss_colour").meaning.startswith("The part of the loss")
    assert words.of("angle_error").title == "Angle error" and words.of("mine").title == "Mine"
    assert all(word.meaning[-1] == "." for word in (words.COMMON | words.OWN).values())


def test_projection_is_principal_components():
    from sklearn.decomposition import PCA

    features = np.random.default_rng(1).normal(size=(50, 8)) * np.arange(1, 9)
    points, names = plots.project(features)
    wanted = PCA(2)
    theirs = wanted.fit_transform(features)
    np.testing.assert_allclose(np.abs(points), np.abs(theirs), atol=1e-9)
    assert f"{wanted.explained_variance_ratio_[0]:.0%}" in names[0]


def test_long_curves_are_averaged_in_blocks():
    x, y = plots._thin(np.arange(1000.0), np.tile([0.0, 2.0], 500)[:1000])
    assert len(x) <= plots.MAX_POINTS
    np.testing.assert_allclose(y[:-1].mean(), 1.0, atol=0.4)
    np.testing.assert_allclose(x[0], 1.0)


def test_study_folder(tmp_path):
    make_run(tmp_path / "pretrain" / "byol")
    assert "No results yet" in text_of(write_report(tmp_path))
    config = configs.to_json(configs.resolve(configs.default("byol")))
    config["study"]["arms"] = {"byol": {"optim": {"lr": 0.1}}, "scratch": {}}
    config["study"]["test"]["split"] = "val"
    config["data"]["name"] = "fashion_mnist"
    write_json(tmp_path / "config.json", config)
    about = {"train_images": 1200, "test_images": 300, "phantom": {"seed": 3}}
    write_json(tmp_path / "study.json", about)
    (tmp_path / "summary.csv").write_text("arm,labels,mean\n<byol>,50,0.7012345\nscratch,50,0.65\n")
    table = "| arm | 50 labels | 1,000 labels |\n|---|---|---|\n| <byol> | 70.1 ± 0.5 | – |"
    (tmp_path / "summary.md").write_text(f"# Study\n\nTop-1 & <more>.\n\n{table}\n\nbyol: better.\n")
    below = {"arm": "byol", "labels": 50, "score": 0.42, "pixels": 0.47, "by": "raw pixels, linear"}
    write_json(tmp_path / "cautions.json", {"not_above_pixels": [below]})
    for name in ("curve", "gain_by_class"):
        Image.new("RGB", (60, 20)).save(tmp_path / f"{name}.png")
    page = write_report(tmp_path)
    pictures = ["Score by number of labels", "Gain by class"]
    assert sections(page) == [pictures[0], "Result", pictures[1], "All metrics", "Pretraining of byol", "Configuration"]
    text = text_of(page)
    assert "byol, scratch: finetune with 50, 100, 250, 1,000 labels of fashion_mnist (train), 5 draws each" in text
    assert "tested on fashion_mnist (val). 1,200 training and 300 test images." in text
    assert "with 50 labels, the study has 42.0 %, raw pixels 47.0 %" in text and "healthy" not in text
    assert "Label-efficiency study on phantom images" in text and text.count("Phantoms: ") == 2
    assert "Top-1 & <more>. arm 50 labels 1,000 labels <byol> 70.1 ± 0.5 – byol: better." in text
    assert (
        "<byol> 50 0.7012" in text and "byol with a resnet18" in text and "config.study.arms.byol.optim.lr 0.1" in text
    )
    assert page.read_text().count("data:image/png") == 2
