"""Tensors by name on disk: what frozen encoders say of captions and pictures, encoded once.

    cache.json             what the rows are (`about`), the shards; written last, so a folder with it is whole
    index.npy              hash of a name -> shard and row, sorted; memory-mapped
    000000.safetensors     rows of several tensors, ragged along their first axis, one after another:
                           FIELD (the rows), FIELD.ends, and of each row the hash of its name and of its bytes

Rows are parts of the mapped files, so memory does not grow with the cache, and each is checked against its
hash when a process first reads it: a damaged one is found before it is used, without a look at the rest.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cascade.checkpoint import write_json
from cascade.config import read_mapping
from cascade.errors import InputError
from train.files import whole_file

Row = dict[str, Tensor]  # field -> tensor, of any length along its first axis
MANIFEST, INDEX = "cache.json", "index.npy"
ENTRY = np.dtype([("name", "<u8"), ("check", "<u8"), ("shard", "<i4"), ("row", "<i4")])


class Cache:
    """The rows of a whole cache folder. Safe to use after a fork and, pickled, in another process."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError where the folder is not readable."""
        manifest = read_mapping(folder / MANIFEST)
        try:
            self.about: dict[str, Any] = manifest["about"]
            self.sources: dict[str, str | None] = dict(manifest["shards"])
            self._shards = [folder / name for name in self.sources]
            self._index = np.load(folder / INDEX, mmap_mode="r").view(np.ndarray)  # memmap's own is slow
            if self._index.dtype != ENTRY:
                raise ValueError("other columns")
            self._names = self._index["name"]
        except Exception as error:  # numpy parses a damaged header as Python, with all that may raise
            raise _damaged(folder, error) from None
        self.folder = folder
        self._open: dict[int, _Shard] = {}

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, name: str) -> bool:
        return self._find(name_hash(name)) is not None

    def get(self, name: str) -> Row | None:
        """The row of a name, not to be written to; None: it is not in the cache. Raises InputError where it
        is damaged."""
        hashed = name_hash(name)
        place = self._find(hashed)
        return None if place is None else self._shard(place[0]).read(place[1], hashed)

    def verify(self) -> None:
        """Read every row. Raises InputError, with the shard's name, where one is damaged."""
        for number in range(len(self._shards)):
            shard = self._shard(number)
            for row in range(len(shard)):
                shard.check(row)

    def _find(self, hashed: tuple[int, int]) -> tuple[int, int] | None:
        """Shard and row of a name."""
        at = bisect_left(self._names, hashed[0])
        if at == len(self._index):
            return None
        first, second, shard, row = self._index[at].item()
        # of two names with equal first halves one is not found here, which is no harm: it is encoded anew
        return (shard, row) if (first, second) == hashed else None

    def _shard(self, number: int) -> _Shard:
        if number not in self._open:
            if not 0 <= number < len(self._shards):
                raise _damaged(self.folder / INDEX, "no such shard")
            self._open[number] = _Shard(self._shards[number])
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


class _Shard:
    """One file of rows, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            file = safe_open(path, "pt")
            self._hashes = file.get_tensor("hashes").numpy().view(np.uint64)  # N 3
            fields = sorted(t.removesuffix(".ends") for t in file.keys() if t.endswith(".ends"))
            self._ends = {f: file.get_tensor(f"{f}.ends").tolist() for f in fields}
            self._rows = {f: file.get_tensor(f) for f in fields}  # mapped, not read
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
        self._checked = np.zeros(len(self._hashes), bool)

    def __len__(self) -> int:
        return len(self._hashes)

    def read(self, row: int, hashed: tuple[int, int]) -> Row:
        """The row of a name. Raises InputError where the bytes, or the name, are not those written."""
        if not 0 <= row < len(self) or tuple(self._hashes[row, :2].tolist()) != hashed:
            raise _damaged(self.path, f"row {row} is another's")
        if not self._checked[row]:
            self.check(row)
        return self._row(row)

    def check(self, row: int) -> None:
        """Raises InputError where the bytes are not those that were written."""
        if self._hashes[row, 2] != row_hash(self._row(row)):
            raise _damaged(self.path, f"the hash of row {row} differs")
        self._checked[row] = True

    def _row(self, row: int) -> Row:
        try:
            return {
                field: self._rows[field][(ends[row - 1] if row else 0) : ends[row]]
                for field, ends in self._ends.items()
            }
        except (IndexError, RuntimeError) as error:
            raise _damaged(self.path, error) from None


def write_shard(path: Path, source: str, names: Sequence[str], rows: Sequence[Row]) -> None:
    """Write rows of the same fields. `source` tells what they were made from (`list_hash`). The file appears
    whole or not at all."""
    hashes = np.array([(*name_hash(n), row_hash(r)) for n, r in zip(names, rows, strict=True)], np.uint64)
    tensors = {"hashes": torch.from_numpy(hashes.reshape(-1, 3).view(np.int64))}
    for field in rows[0] if rows else ():
        parts = [row[field] for row in rows]
        tensors[field] = torch.cat(parts)
        tensors[f"{field}.ends"] = torch.tensor([len(part) for part in parts]).cumsum(0)
    with whole_file(path) as part:
        save_file(tensors, part, metadata={"made_from": source})


def made_from(path: Path) -> str | None:
    """What a shard was made from; None: there is no whole shard."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("made_from")
    except (OSError, SafetensorError):
        return None


def finish(folder: Path, shards: Sequence[str], about: dict[str, Any]) -> None:
    """Write index and manifest of a folder whose shards are all there."""
    parts = []
    for number, shard in enumerate(shards):
        with safe_open(folder / shard, "pt") as file:
            hashes = file.get_tensor("hashes").numpy().view(np.uint64)
        entries = np.zeros(len(hashes), ENTRY)
        entries["name"], entries["check"], entries["shard"] = hashes[:, 0], hashes[:, 1], number
        entries["row"] = np.arange(len(hashes))
        parts.append(entries)
    index = np.concatenate([*parts, np.zeros(0, ENTRY)])
    with whole_file(folder / INDEX) as part, part.open("wb") as file:
        np.save(file, index[np.argsort(index["name"], kind="stable")])
    with whole_file(folder / MANIFEST) as part:
        write_json(part, {"about": about, "shards": {name: made_from(folder / name) for name in shards}})


def name_hash(name: str) -> tuple[int, int]:
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def row_hash(row: Row) -> int:
    state = hashlib.blake2b(digest_size=8)
    for field in sorted(row):
        state.update(row[field].contiguous().view(torch.uint8).numpy().data)
    return int.from_bytes(state.digest(), "little")


def list_hash(about: dict[str, Any], names: Iterable[str] = ()) -> str:
    """A hash of what rows are, and of the names of some of them."""
    state = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16)
    for name in names:
        state.update(hashlib.blake2b(name.encode(), digest_size=16).digest())
    return state.hexdigest()


def _damaged(path: Path, why: object) -> InputError:
    line = next(iter(str(why).splitlines()), "")
    return InputError(f"{path} is damaged ({line}): delete it and run python -m train.embed again")
