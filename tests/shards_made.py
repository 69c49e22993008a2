"""The same small images as a folder of classes, as tars in WebDataset's layout, and as Parquet files."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog")


def encoded(seed, kind="PNG", side=16):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def images(count, first=0):
    """[(path, label, content)] in the order of their paths: half of them cats."""
    return [
        (f"{CLASSES[i * 2 // count]}/{first + i:06d}.png", CLASSES[i * 2 // count], encoded(first + i))
        for i in range(count)
    ]


def folder(root, images):
    for path, _, content in images:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


def tars(root, images, each, part="train", labels=None):
    """labels: as text, instead of those of the images."""
    root.mkdir(exist_ok=True, parents=True)
    for number in range(-(-len(images) // each)):
        with tarfile.open(root / f"{part}-{number:06d}.tar", "w") as tar:
            for i in range(number * each, min((number + 1) * each, len(images))):
                path, label, content = images[i]
                text = (labels[i] if labels else label).encode()
                for name, data in ((path, content), (path.replace(".png", ".cls"), text)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def parquets(root, images, each, rows):
    """rows: of a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(exist_ok=True, parents=True)
    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    for number in range(-(-len(images) // each)):
        part = images[number * each : (number + 1) * each]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        values = pa.array([{"bytes": content, "path": path} for path, _, content in part], kind)
        table = pa.table({"image": values, "label": pa.array([CLASSES.index(label) for _, label, _ in part])})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, root / f"train-{number}.parquet", row_group_size=rows)
