"""Pictures of the letters A to J, drawn with the fonts of Debian, in train/ and test/: no family of fonts is in both.

python benchmarks/letters.py DIR        needs apt-get and dpkg; a minute, 60 MB of downloads
"""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from colour_folders import debian
from PIL import Image, ImageDraw, ImageFont

LETTERS = "ABCDEFGHIJ"
SIDE, HEIGHT = 28, 22  # px: of a picture, and of the longer side of a letter
PER_FAMILY = 2  # fonts
# Of the packages whose names begin with fonts-, those with three or more families that no other of them has.
NAMES = (
    "3270 adf-accanthis adf-romande adf-verana aenigma alee arabeyes arkpandora arundina beng-extra beteckna "
    "bpg-georgian bwht cegui clear-sans cmu courier-prime croscore dejavu-extra deva-extra dseg dustin "
    "ebgaramond-extra eurofurence freefont-otf georgewilliams go gotico-antiqua gujr-extra horai-umefont "
    "johnsmith-induni katex khmeros kiloji levien-museum liberation linex linuxlibertine lmodern lyx migmix misaki "
    "monlam"
)


def fonts(out: Path) -> Iterator[tuple[str, Path]]:
    """(family, file) of PER_FAMILY fonts of each family that draws ten different letters."""
    counts: dict[str, int] = {}
    for name in NAMES.split():
        for path in sorted(debian(out / "packages", f"fonts-{name}").rglob("*")):
            if path.suffix.lower() not in (".ttf", ".otf") or path.is_symlink():
                continue
            try:
                family = str(ImageFont.truetype(str(path), 64).getname()[0])
                drawn = {letter(path, each).tobytes() for each in LETTERS}
            except (OSError, ValueError):  # a damaged font, or one without these letters
                continue
            if len(drawn) == len(LETTERS) and counts.setdefault(family, 0) < PER_FAMILY:
                counts[family] += 1
                yield family, path


def letter(path: Path, text: str) -> Image.Image:
    """The letter in white on black, in the middle. ValueError if the font draws nothing."""
    font = ImageFont.truetype(str(path), 96)
    left, top, right, bottom = font.getbbox(text)
    if right <= left or bottom <= top:
        raise ValueError(text)
    drawn = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(drawn).text((-left, -top), text, fill=255, font=font)
    if not drawn.getbbox():
        raise ValueError(text)
    drawn = drawn.crop(drawn.getbbox())
    scale = HEIGHT / max(drawn.size)
    drawn = drawn.resize([max(1, round(scale * side)) for side in drawn.size], Image.Resampling.LANCZOS)
    picture = Image.new("L", (SIDE, SIDE))
    picture.paste(drawn, ((SIDE - drawn.width) // 2, (SIDE - drawn.height) // 2))
    return picture


def build(out: Path) -> None:
    (out / "packages").mkdir(parents=True, exist_ok=True)
    seen, counts = set(), {"train": 0, "test": 0}
    for number, (family, path) in enumerate(fonts(out)):
        # By the first word, so that Lato and Lato Light are in the same part.
        part = "train" if hashlib.sha256(family.split()[0].lower().encode()).digest()[0] % 2 else "test"
        for each in LETTERS:
            picture = letter(path, each)
            if (content := hashlib.sha256(picture.tobytes()).digest()) in seen:
                continue
            seen.add(content)
            place = out / "letters" / part / each / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            picture.save(place)
            counts[part] += 1
    print(f"{counts['train']} + {counts['test']} pictures")


if __name__ == "__main__":
    build(Path(sys.argv[1]).absolute())
