"""Small folders of colour pictures in classes, built from packages of Debian and npm; and what few labels give there.

    python benchmarks/colour_folders.py build DIR            needs apt-get, dpkg and npm; a minute, 600 MB of downloads
    python benchmarks/colour_folders.py measure RUN          what the encoder of a run gives at 50 and 200 labels;
                                                             --config.finetune.KEY=VALUE may follow
    python benchmarks/colour_folders.py chosen RUN           the same on labels that `ssl-jax select` chooses, by seed

Each folder has the parts train/ and test/, about half of the pictures each. Pictures of one name (an emoji in two
styles, an icon in several themes) are in the same part. Exact copies are left out.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax.data import open_source
from ssl_jax.encoder import model_of, random_encoder
from ssl_jax.evaluate import finetune, interval, linear_probe, nested_subset, paired, pixels
from ssl_jax.load import load_with_settings
from ssl_jax.selection import select

SMALLEST = 25  # pictures: smaller classes are left out
LARGEST = 100_000  # bytes: larger files are left out
CONTEXTS = "actions", "apps", "categories", "devices", "emblems", "emotes", "mimetypes", "places", "status"
CONTEXT_OF = {"applications": "apps", "mimes": "mimetypes"}  # what some themes call them
THEMES = "oxygen-icon-theme", "gnome-icon-theme", "tango-icon-theme", "mate-icon-theme", "faenza-icon-theme"
THEMES += "elementary-xfce-icon-theme", "gnome-icon-theme-nuovo"
Picture = tuple[str, str, Path]  # class, name, file


def build(out: Path) -> None:
    packages = out / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    styles = {style: npm(packages, f"emoji-datasource-{style}") for style in ("google", "twitter")}
    write(out / "emoji", itertools.chain.from_iterable(emoji(folder, style) for style, folder in styles.items()))
    write(out / "icons", icons([debian(packages, theme) for theme in THEMES]))
    write(out / "clipart", clipart(debian(packages, "openclipart-png")))


def npm(packages: Path, name: str) -> Path:
    """The folder of a package of npm, downloaded once."""
    folder = packages / name
    if not folder.exists():
        subprocess.run(["npm", "pack", "--silent", name], cwd=packages, check=True, stdout=subprocess.DEVNULL)
        [archive] = packages.glob(f"{name}-*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, [m for m in tar if "/64/" in m.name or m.name.endswith("emoji.json")], filter="data")
        archive.unlink()
    return folder / "package"


def debian(packages: Path, name: str) -> Path:
    """The files of a package of Debian, downloaded once."""
    folder = packages / name
    if not folder.exists():
        subprocess.run(["apt-get", "download", "-q", name], cwd=packages, check=True, stdout=subprocess.DEVNULL)
        [archive] = packages.glob(f"{name}_*.deb")
        subprocess.run(["dpkg", "-x", archive, folder], check=True)
        archive.unlink()
    return folder


def emoji(package: Path, style: str) -> Iterator[Picture]:
    """Emoji by category; not their variants with other skin tones, which would be near copies."""
    for entry in json.loads((package / "emoji.json").read_text()):
        if entry[f"has_img_{style}"] and entry["category"] != "Component":
            yield entry["category"], entry["unified"], package / "img" / style / "64" / entry["image"]


def icons(themes: list[Path]) -> Iterator[Picture]:
    """Icons of 48 px by context."""
    for theme in themes:
        for path in sorted(theme.glob("usr/share/icons/**/*.png")):
            folders = [CONTEXT_OF.get(name, name) for name in path.parts[-3:-1]]
            context = next((name for name in folders if name in CONTEXTS), "")
            if context and {"48", "48x48"} & set(folders) and not path.is_symlink():
                yield context, path.stem, path


def clipart(package: Path) -> Iterator[Picture]:
    """Drawings by subject; not those of which a few take more memory than all others."""
    root = package / "usr/share/openclipart/png"
    for path in sorted(root.rglob("*.png")):
        small = path.stat().st_size < LARGEST and not path.is_symlink()
        if path.relative_to(root).parts[0] != "unsorted" and small:
            yield path.relative_to(root).parts[0], path.stem, path


def write(folder: Path, pictures: Iterator[Picture]) -> None:
    """folder/{train,test}/CLASS/NUMBER-NAME.png"""
    seen, classes = set(), dict[str, list[tuple[str, Path]]]()
    for kind, name, path in pictures:
        if not path.is_file() or (content := hashlib.sha256(path.read_bytes()).digest()) in seen:
            continue
        seen.add(content)
        classes.setdefault(kind, []).append((name, path))
    shutil.rmtree(folder, ignore_errors=True)
    counts = {"train": 0, "test": 0}
    for kind, found in sorted(classes.items()):
        if len(found) < SMALLEST:
            continue
        for number, (name, path) in enumerate(found):
            part = "train" if hashlib.sha256(name.encode()).digest()[0] % 2 else "test"
            place = folder / part / kind.replace(" & ", "-") / f"{number}-{name}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
            counts[part] += 1
    kept = sorted({path.name for path in folder.glob("*/*")})
    print(f"{folder.name}: {counts['train']} + {counts['test']} pictures, {len(kept)} classes: {', '.join(kept)}")


def measure(run: Path, *overrides: str, chosen: bool = False, draws: int = 5) -> None:
    """Prints top-1 on the test part, in %, and the paired difference to raw pixels: means and halves of the 95 %
    intervals over draws of labels from the training part, stratified or as `ssl-jax select` chooses them."""
    encoder, config = load_with_settings(str(run), "", overrides)
    train, test = open_source(config.data), open_source(config.data, "test")
    images, labels, shown = train.arrays(), np.asarray(train.labels), test.arrays()
    untrained = random_encoder(model_of(encoder.about), encoder.size, encoder.channels, 0)
    random, own = ([each.embed(x) for x in (images, shown)] for each in (untrained, encoder))
    settings = dataclasses.replace(config.finetune, pixels=True)
    for count in (50, 200):
        hits: dict[str, list[float]] = {}
        for seed in range(draws):
            rows = select(own[0], count, seed=seed) if chosen else nested_subset(labels, count, seed)
            options: Any = {"classes": len(train.classes), "seed": seed}
            made = finetune(encoder, images[rows], labels[rows], settings=settings, **options)
            raw = made.pixels.scores(pixels(shown))
            nothing, probe = (linear_probe(a[rows], labels[rows], **options).scores(b) for a, b in (random, own))
            logits = {
                "raw pixels": raw,
                "random encoder, linear": nothing,
                "encoder, linear": probe,
                "encoder and pixels, linear": probe + raw,
                "fine-tuned": made._replace(pixels=None).logits(shown),
                "fine-tuned, with pixels": made.logits(shown),
            }
            for name, each in logits.items():
                hits.setdefault(name, []).append(100 * float((each.argmax(axis=1) == test.labels).mean()))
        print(f"{run}, {count} labels")
        for name, each in hits.items():
            (mean, half), (gain, spread) = interval(each), paired(each, hits["raw pixels"])
            print(f"  {name:28} {mean:.1f} ± {half:.1f}   {gain:+.1f} ± {spread:.1f}", flush=True)


if __name__ == "__main__":
    commands = {"build": build, "measure": measure, "chosen": functools.partial(measure, chosen=True)}
    commands[sys.argv[1]](Path(sys.argv[2]).absolute(), *sys.argv[3:])
