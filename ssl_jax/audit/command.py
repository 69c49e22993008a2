"""`ssl-jax audit`: reads the data, runs an audit, writes its table and figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ssl_jax import files
from ssl_jax.config import Config, Data
from ssl_jax.data import Source, open_source, phantom
from ssl_jax.encoder import Encoder, load_encoder, published_encoder, random_encoder
from ssl_jax.errors import UserError
from ssl_jax.run_folder import RunFolder
from ssl_jax.settings import data_of, settings_of

MIN_IMAGES = 8  # for the audit of an encoder
Row = dict[str, Any]


def kind(data: Data) -> str:
    """ "phantom " for drawn radiographs, as every figure made from them has to say; otherwise nothing."""
    return "phantom " if phantom(data) else ""


def lesions(config: Config, masks: str, out: str, images: int) -> list[Row]:
    """Writes out/lesions.csv and out/lesions.png, prints the table and the verdict, and returns the rows."""
    from ssl_jax.audit.figures import lesion_curves
    from ssl_jax.audit.lesions import audit, verdict
    from ssl_jax.audit.masks import find_lesions, open_masks
    from ssl_jax.augment import preset_of, resolve_views

    folder = _folder(out)
    source = open_source(config.data)
    views = resolve_views(config.augment, 2, min(source.shape[:2]))
    seed = config.train.seed
    found, outside = find_lesions(source, open_masks(masks, source, config.data), images, seed)
    count = len({lesion.image for lesion in found})
    console = Console(stderr=True)
    console.print(f"{len(found)} lesions in {count} of {len(source)} images", highlight=False)
    if outside:
        console.print(f"{outside} more lie outside the square that is cut from their image", highlight=False)
    indices, places = np.unique([lesion.image for lesion in found], return_inverse=True)
    with console.status("") as status:
        rows = audit(source.load_many(indices)[places], found, views, seed, status.update)
    changes = ", ".join(f"{key}={value}" for key, value in config.augment.changes().items())
    name = preset_of(config.augment.preset, min(source.shape[:2])) + (f" with {changes}" if changes else "")
    title = f"What transforms do to {len(found)} {kind(config.data)}lesions. Config ({name}) {verdict(rows)}"
    _write(folder / "lesions.csv", rows)
    lesion_curves(rows, folder / "lesions.png", title)
    _print_lesions(rows)
    print(f"{name}: {verdict(rows)}\ntable: {folder / 'lesions.csv'}\nfigure: {folder / 'lesions.png'}")
    return rows


def invariance(config: Config | None, workdir: str, data: str, out: str, images: int) -> list[Row]:
    """Writes out/invariance.csv and out/invariance.png, prints the table, and returns the rows."""
    from ssl_jax.audit.figures import profile
    from ssl_jax.audit.invariance import audit

    folder = _folder(out)
    encoder, source, name = _subject(config, workdir, data)
    if min(images, len(source)) < MIN_IMAGES:
        raise UserError(f"--images={images} of {len(source)}: allowed: {MIN_IMAGES} or more")
    sample = np.sort(np.random.default_rng(0).permutation(len(source))[:images])
    loaded = source.load_many(sample)
    with Console(stderr=True).status("") as status:
        rows = audit(encoder, loaded, log=status.update)
    _write(folder / "invariance.csv", rows)
    profile(rows, folder / "invariance.png", f"{name} ({len(loaded)})")
    _print_invariance(rows)
    print(f"table: {folder / 'invariance.csv'}\nfigure: {folder / 'invariance.png'}")
    return rows


def _subject(config: Config | None, workdir: str, data: str) -> tuple[Encoder, Source, str]:
    """(encoder, images, description): of a run folder; with a config alone, with random or imported weights."""
    if workdir:
        encoder, folder = load_encoder(workdir), Path(workdir)
        settings = config or settings_of(folder, ())
        if not config and not data:
            RunFolder(folder).read_config()  # fails without a run, as nothing else says which images
        images = data_of(data, "--data", settings.data) if data else settings.data
        name = f"{encoder.about.get('method', 'encoder')} ({folder.name})"
        return encoder, open_source(encoder.data(images)), f"{name}, on {kind(images)}images"
    if config is None:
        raise UserError("--workdir: missing; use a run folder, or --config for random or imported weights")
    images = data_of(data, "--data", config.data) if data else config.data
    source = open_source(images)
    size, channels = config.augment.override.get("size") or min(source.shape[:2]), source.shape[2]
    if config.model.init:
        encoder, name = published_encoder(config.model, size, channels), Path(config.model.init).name
    else:
        encoder = random_encoder(config.model, size, channels, config.train.seed)
        name = f"{encoder.about['model']['name']} with random weights"
    return encoder, source, f"{name}, on {kind(images)}images"


def _folder(out: str) -> Path:
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out={out}: is a file; allowed: a folder")
    return folder


def _write(path: Path, rows: Sequence[Row]) -> None:
    shown = [[f"{v:.5g}" if isinstance(v, float) else v for v in map(row.get, rows[0])] for row in rows]
    files.write_csv(path, list(rows[0]), shown)


def _print_lesions(rows: Sequence[Row]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("transform", "strength", "measure", "lost", "worst class", "lost there", "disagree"):
        is_text = column in ("transform", "measure", "worst class")
        width = None if column == "worst class" else len(column) + 2  # long names are cut on a narrow terminal
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True, min_width=width)
    for row in (r for r in rows if r["class"] == "all"):
        same = ("transform", "strength", "measure")
        classes = [r for r in rows if r["class"] != "all" and all(r[k] == row[k] for k in same)]
        worst = max(classes, key=lambda r: r["lost"])
        strength = "" if row["strength"] is None else f"{row['strength']:g}" + " *" * row["configured"]
        shares = f"{row['lost']:.1%}", escape(worst["class"]), f"{worst['lost']:.1%}", f"{row['disagree']:.1%}"
        table.add_row(row["transform"], strength, row["measure"], *shares)
    Console().print(table)
    print("lost: views that keep less than half of a lesion's area or contrast; disagree: pairs in which one view does")
    print("*: strength of the config")


def _print_invariance(rows: Sequence[Row]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("transform", "strength", "moved", "readable"):
        table.add_column(column, justify="left" if column == "transform" else "right")
    for row in rows:
        moved = f"{row['moved']:.3f} ± {row['half']:.3f}"
        table.add_row(row["transform"], f"{row['strength']:g}", moved, f"{row['readable']:.2f}")
    Console().print(table)
    print("moved: 0 ignored, 1 as far as to another image; readable: 0 not at all, 1 exactly")
