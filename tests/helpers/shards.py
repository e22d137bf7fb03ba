"""Packed datasets for tests of the read side, written by a second, independent writer of the shard format."""

import io
import json
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from shards.format import fingerprint, index_schema


def picture(seed, width=24, height=32, kind="jpg"):
    """A small random image file with low and high frequencies."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    pixels = np.asarray(small, np.int16) + rng.integers(-20, 20, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(
        file, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[kind]
    )
    return file.getvalue()


def write_shards(folder, splits, *, images_per_shard=40, make=picture, kinds=("jpg",), **facts):
    """Write a packed dataset.

    splits: {name: {identity: number of images, or list of cameras, one per image}}. An identity never straddles
    two shards in any split. make(seed, kind=...) gives the bytes of the image at index row `seed`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, counts = [], {}
    for split, identities in splits.items():
        labels = {name: n for n, name in enumerate(sorted(identities))} if split == "train" else {}
        number, tar, in_shard = -1, None, 0
        for name in sorted(identities):
            cameras = identities[name]
            cameras = [i % 3 for i in range(cameras)] if isinstance(cameras, int) else cameras
            if tar is None or in_shard >= images_per_shard:
                if tar:
                    tar.close()
                number, in_shard = number + 1, 0
                shard = f"{split}-{number:06d}.tar"
                tar = tarfile.open(folder / shard, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
            for camera in cameras:
                kind = kinds[len(rows) % len(kinds)]
                data, key = make(len(rows), kind=kind), f"{name}_{len(rows):05d}"
                offset = tar.offset + 512
                _add(tar, f"{key}.{kind}", data)
                label = labels.get(name, -1)
                _add(tar, f"{key}.json", json.dumps({"identity": name, "label": label}).encode())
                values = (
                    split,
                    shard,
                    key,
                    offset,
                    len(data),
                    zlib.crc32(data),
                    name,
                    label,
                    camera,
                    camera % 2,
                    "",
                    "",
                )
                rows.append(dict(zip(index_schema().names, (*values, 0, 0), strict=True)))
                in_shard += 1
        tar.close()
        images = sum(n if isinstance(n, int) else len(n) for n in identities.values())
        counts[split] = {"images": images, "identities": len(identities), "shards": number + 1}
    return write_index(folder, rows, counts, **facts)


def write_index(folder, rows, counts, *, name="tiny", cameras=3, views=2, table=None):
    """dataset.json and index.parquet for rows that are given as dictionaries, or as a table."""
    table = pa.Table.from_pylist(rows, schema=index_schema()) if table is None else table
    pq.write_table(table, folder / "index.parquet")
    facts = {"format_version": 1, "name": name, "noun": "thing", "cameras": cameras, "views": views, "splits": counts}
    facts["fingerprint"] = fingerprint([name, "thing", cameras, views], table)
    files = {path.name: path.read_bytes() for path in [*sorted(folder.glob("*.tar")), folder / "index.parquet"]}
    facts["files"] = {name: {"bytes": len(data), "crc32": zlib.crc32(data)} for name, data in files.items()}
    (folder / "dataset.json").write_text(json.dumps(facts | {"options": {}}))
    return str(folder)


def _add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
