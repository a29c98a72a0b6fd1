"""Small sets of captioned pictures, the same in every form that training reads."""

from __future__ import annotations

import csv
import io
import json
import struct
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.data import DataConfig

KINDS = ("folder", "csv", "parquet", "webdataset")


@dataclass
class Item:
    """A picture file, its caption and more columns."""

    name: str
    data: bytes
    text: str
    more: dict[str, Any] = field(default_factory=dict)


def noise(seed: int, width: int = 40, height: int = 40, kind: str = "PNG", **save: Any) -> bytes:
    """A picture file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **save)
    return buffer.getvalue()


def bomb(side: int = 10_000) -> bytes:
    """A PNG of a few hundred bytes whose header promises side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def items(count: int, **more: Any) -> list[Item]:
    return [Item(f"p{i:03d}.png", noise(i, **more), f"picture number {i}") for i in range(count)]


def write(folder: Path, kind: str, rows: list[Item], shards: int = 2) -> DataConfig:
    """The items as a set of this kind in `folder`, and what a recipe says of it."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [list(part) for part in np.array_split(np.array(rows, dtype=object), shards)]
    common: dict[str, Any] = {"folder": str(folder), "heldout": 0.0}
    if kind in ("folder", "csv"):
        _write_folder(folder, kind, rows)
        return DataConfig(name="folder", **common)
    if kind == "parquet":
        for number, part in enumerate(parts):
            _write_parquet(folder / f"{number}.parquet", part)
        return DataConfig(name="parquet", files=(f"{folder}/*.parquet",), **common)
    for number, part in enumerate(parts):
        _write_tar(folder / f"{number:05d}.tar", part)
    return DataConfig(name="webdataset", files=(f"{folder}/{{00000..{shards - 1:05d}}}.tar",), **common)


def _write_folder(folder: Path, kind: str, rows: list[Item]) -> None:
    for row in rows:
        (folder / row.name).write_bytes(row.data)
    lines = [{"file_name": row.name, "text": row.text, **row.more} for row in rows]
    if kind == "folder":
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metadata.jsonl").write_text(text)
        return
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def _write_parquet(path: Path, rows: list[Item]) -> None:
    import pyarrow
    import pyarrow.parquet

    lines = [{"image": {"bytes": r.data, "path": r.name}, "text": r.text, **r.more} for r in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), path)


def _write_tar(path: Path, rows: list[Item]) -> None:
    """As img2dataset writes them."""
    with tarfile.open(path, "w") as tar:
        for row in rows:
            stem, extension = row.name.split(".")
            files = {extension: row.data, "txt": row.text.encode(), "json": json.dumps(row.more).encode()}
            for name, data in files.items():
                info = tarfile.TarInfo(f"{stem}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
