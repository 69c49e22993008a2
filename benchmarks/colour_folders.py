"""Builds small folders of colour pictures with classes, from packages of Debian and npm, to try few labels on.

    python benchmarks/colour_folders.py /tmp/colour          needs apt-get, dpkg and npm; a minute, 600 MB of downloads

Each folder has the parts train/ and test/, about half of the pictures each. Pictures of one name (an icon in several
themes, a stamp and its mirror image) are in the same part. Exact copies are left out.
"""

import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

SMALLEST = 25  # pictures: smaller classes are left out
CONTEXTS = "actions", "apps", "categories", "devices", "emblems", "emotes", "mimetypes", "places", "status"
CONTEXT_OF = {"applications": "apps", "mimes": "mimetypes"}  # what some themes call them
THEMES = "oxygen-icon-theme", "gnome-icon-theme", "tango-icon-theme", "mate-icon-theme", "faenza-icon-theme"
THEMES += "elementary-xfce-icon-theme", "gnome-icon-theme-nuovo"
Picture = tuple[str, str, Path]  # class, name, file


def main(out: Path) -> None:
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
        made = subprocess.run(["npm", "pack", "--silent", name], cwd=packages, check=True, capture_output=True, text=True)
        archive = packages / made.stdout.strip().splitlines()[-1]
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
            folders = path.parts[-3:-1]
            context = next((CONTEXT_OF.get(name, name) for name in folders if CONTEXT_OF.get(name, name) in CONTEXTS), "")
            if context and {"48", "48x48"} & set(folders) and not path.is_symlink():
                yield context, path.stem, path


def clipart(package: Path) -> Iterator[Picture]:
    """Drawings by subject."""
    root = package / "usr/share/openclipart/png"
    for path in sorted(root.rglob("*.png")):
        if path.relative_to(root).parts[0] != "unsorted" and not path.is_symlink():
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


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
