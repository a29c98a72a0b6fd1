"""Captioned picture folders: metadata.jsonl beside the pictures, one JSON object a line with file_name
(relative to the folder), text and split. Other keys that hold texts are attributes of the picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cascade import random
from cascade.errors import InputError
from cascade.images import downsample, from_pil

METADATA = "metadata.jsonl"
KEYS = ("file_name", "text", "split")


@dataclass(frozen=True)
class Record:
    path: Path
    text: str
    split: str
    attributes: Mapping[str, str] = field(default_factory=dict)


def read_records(folder: Path) -> list[Record]:
    """Every record of a folder, in file order. Raises InputError where the list is missing or malformed."""
    path = folder / METADATA
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(
            f"{path}: {reason}; expected a data folder, {METADATA} beside its pictures"
        ) from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            values = [row[key] for key in KEYS]
            attributes = {k: v for k, v in row.items() if k not in KEYS and isinstance(v, str)}
        except (json.JSONDecodeError, KeyError, TypeError):
            values, attributes = [], {}
        if not values or not all(isinstance(value, str) for value in values):
            raise InputError(f"{path}:{number}: expected a JSON object with texts file_name, text and split")
        file_name, text, split = values
        records.append(Record(folder / file_name, text, split, attributes))
    return records


def draw(records: list[Record], split: str, count: int, seed: int) -> list[Record]:
    """`count` records of a split with different captions, uniformly at random as a function of the seed; a
    smaller draw is the beginning of a larger one. Raises InputError where there are too few."""
    pool = [record for record in records if record.split == split]
    order = torch.randperm(len(pool), generator=random.generator(seed, "draw", split)).tolist()
    distinct: dict[str, Record] = {}
    for index in order:
        distinct.setdefault(pool[index].text, pool[index])
    if len(distinct) < count:
        raise InputError(f"split {split} has {len(distinct)} different captions: expected at least {count}")
    return list(distinct.values())[:count]


def load_picture(record: Record, px: int) -> Tensor:
    """The picture, antialiased to px x px: 3 px px in [-1, 1]. Raises InputError where it cannot be read,
    is not square or is smaller than that."""
    try:
        with Image.open(record.path) as image:
            picture = from_pil(image)  # 3 H W
    except OSError as error:  # also Pillow's errors of a broken file
        raise InputError(f"cannot read {record.path}: {error.strerror or 'not a whole picture'}") from None
    height, width = picture.shape[-2:]
    if height != width or height < px:
        raise InputError(f"{record.path}: expected a square of at least {px} px, got {width}x{height}")
    return downsample(picture, px)
