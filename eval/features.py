"""Rows of numbers that extractors gave, kept in the run so that every measure and every restart shares them.

A file holds the rows of one list of pictures in its order, with the extractor's fingerprint and the hash of
each picture. Rows are computed in whole batches from the start of the list, so that a file that a killed
process left is the beginning of the whole one, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cascade.errors import InputError
from eval.extractors.base import Extractor, JointExtractor
from eval.pictures import load_picture

SAVE_EVERY = 64  # batches


@dataclass(frozen=True)
class Picture:
    path: Path
    sha256: str
    text: str = ""  # that it was drawn for


def picture_rows(extractor: Extractor, pictures: Sequence[Picture], file: Path) -> Tensor:
    """The row of each picture, N D float32, from `file` as far as it has them, which is brought up to date.
    Raises InputError where a picture cannot be read."""
    texts = [picture.text if extractor.reads_text else "" for picture in pictures]
    keys = [f"{picture.sha256} {text}" for picture, text in zip(pictures, texts, strict=True)]
    with ThreadPoolExecutor(torch.get_num_threads()) as readers:

        def compute(part: slice) -> Tensor:
            paths = [picture.path for picture in pictures[part]]
            prepared = readers.map(lambda path: extractor.prepare(load_picture(path)), paths)
            return extractor.encode(list(prepared), texts[part])

        return _kept(file, extractor, keys, compute, extractor.batch)


def text_rows(extractor: JointExtractor, texts: Sequence[str], file: Path) -> Tensor:
    """The row of each text, N D float32, likewise."""
    return _kept(file, extractor, texts, lambda part: extractor.encode_text(texts[part]), extractor.batch)


def _kept(
    file: Path,
    extractor: Extractor,
    keys: Sequence[str],
    compute: Callable[[slice], Tensor],
    batch: int,
) -> Tensor:
    hashes = [hashlib.sha256(key.encode()).hexdigest()[:32] for key in keys]
    label = {"fingerprint": extractor.fingerprint(), "network": extractor.network, "resize": extractor.resize}
    parts = _read(file, label["fingerprint"], hashes, batch)
    done = sum(map(len, parts))
    console = Console(stderr=True)
    starts = range(done, len(keys), batch)
    for start in track(
        starts, f"{file.stem}", console=console, disable=not console.is_terminal, transient=True
    ):
        parts.append(compute(slice(start, start + batch)))
        end = min(start + batch, len(keys))
        if end == len(keys) or (start // batch + 1) % SAVE_EVERY == 0:
            _write(file, torch.cat(parts), {**label, "rows": json.dumps(hashes[:end])})
    return torch.cat(parts)


def _read(file: Path, fingerprint: str, hashes: Sequence[str], batch: int) -> list[Tensor]:
    """The rows in `file` that are of this network and of the first pictures of the list, in whole batches:
    the last one of a shorter list was computed in other company."""
    try:
        with safe_open(file, framework="pt") as stored:
            label = stored.metadata() or {}
            if label.get("fingerprint") != fingerprint:
                return []
            found = json.loads(label["rows"])
            rows = stored.get_tensor("rows")
    except (OSError, SafetensorError, KeyError, ValueError):  # none, or not one of ours: computed anew
        return []
    same = len(os.path.commonprefix([found, list(hashes)]))
    usable = same if same == len(hashes) == len(found) else same - same % batch
    return [rows[:usable]] if usable else []


def _write(file: Path, rows: Tensor, label: dict[str, str]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"rows": rows.contiguous()}, temporary, metadata=label)
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {file}: {error}") from None
