"""WebDataset tar shards as img2dataset writes them: NAME.jpg (or .png, .webp), NAME.txt and NAME.json side by
side, with a parquet file of more columns beside the shard if there is one.

The `webdataset` package reads shards in turn and cannot resume where it stopped (its shuffle has no state to
save), so the order of a run would depend on the number of processes and on interruptions. Here each shard is
read through once and an index written: where each picture lies, its size, its captions and scores. From then
on the set is a table, and any position of any epoch is one read at a known place.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
from filelock import FileLock

from cascade.errors import InputError
from cascade.progress import tracked
from train.data.config import DataConfig
from train.data.decode import BadPicture, size_of
from train.data.order import Order, Shuffled, Streamed
from train.data.table import SIDES, TablePictures, expand, one_line
from train.files import whole_file

if TYPE_CHECKING:
    from datasets import Dataset

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
OPEN_SHARDS = 16  # a process keeps that many files open
TRIES = 4  # to fetch a URL
PAUSE, TIMEOUT = 2.0, 60.0  # seconds before the second try, then twice as long; of silence before one ends


class TarPictures(TablePictures):
    """Pictures in tar shards. Those of a URL are copied to FOLDER/cache/shards when they are needed; the
    copies that were not used for longest go when they fill `cache_gb`."""

    def __init__(self, cfg: DataConfig) -> None:
        self.shards = Shards(expand(cfg.files), Path(cfg.folder) / "cache" / "shards", cfg.cache_gb)
        table, counts = _index(cfg, self.shards)
        self._ends = np.cumsum(counts)
        self._places = table.select_columns(["id", "offset", "size"])
        super().__init__(cfg, table)

    def name(self, index: int) -> str:
        return self._places[index]["id"]

    def encoded(self, index: int) -> bytes:
        row = self._places[index]
        shard = int(np.searchsorted(self._ends, index, side="right"))
        data = self.shards.read(shard, row["offset"], row["size"])
        if len(data) < row["size"]:
            raise BadPicture(row["id"], "the shard ends before it")
        return data

    def order(self, seed: int, min_px: int = 1) -> Order:
        if not self.cfg.streaming:
            return Shuffled(self.fit(min_px), seed)
        return Streamed(self.fit(min_px), self._ends, seed, self.cfg.window, self.cfg.lanes)


class Shards:
    """Tar files by number, local or at URLs."""

    def __init__(self, sources: list[str], folder: Path, cache_gb: float) -> None:
        self.sources, self.folder, self._cache_gb = sources, folder, cache_gb
        self._open: dict[int, BinaryIO] = {}  # the one used last is the last
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return Shards, (self.sources, self.folder, self._cache_gb)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that are open; what is read next opens its own again."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard, fewer where it ends before. Raises InputError."""
        with self._lock:
            file = self._open.pop(shard, None) or self.open(shard)
            self._open[shard] = file
            if len(self._open) > OPEN_SHARDS:
                self._open.pop(next(iter(self._open))).close()
            return os.pread(file.fileno(), size, offset)  # moves no position that processes would share

    def open(self, shard: int) -> BinaryIO:
        """The shard's file, fetched where it is a URL that is not here yet. Raises InputError."""
        source = self.sources[shard]
        try:
            if "://" not in source:
                return Path(source).open("rb")
            path = self.folder / f"{digest(source)}.tar"
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):  # one process fetches, the others wait
                if not path.exists():
                    self._make_room()
                    _fetch(source, path)
                os.utime(path)
                return path.open("rb")
        except OSError as error:
            raise InputError(f"cannot read {source}: {error.strerror or error}") from None

    def _make_room(self) -> None:
        """Remove the copies used least recently, until another of the largest's size fits. A process that
        has one open reads on from it."""
        copies = sorted(self.folder.glob("*.tar"), key=lambda p: p.stat().st_mtime)
        sizes = {p: p.stat().st_size for p in copies}
        for path in copies:
            if sum(sizes.values()) + max(sizes.values(), default=0) <= self._cache_gb * 1e9:
                break
            path.unlink(missing_ok=True)
            del sizes[path]


def digest(text: str) -> str:
    """A short name of any text, the same everywhere."""
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _fetch(url: str, path: Path) -> None:
    """Copy a URL to a file, whole or not at all."""
    reason = ""
    for attempt in range(TRIES):
        try:
            with whole_file(path) as part, part.open("wb") as file, _remote(url) as remote:
                shutil.copyfileobj(remote, file, 2**20)
            return
        except (FileNotFoundError, ImportError, InputError) as error:
            raise InputError(f"cannot fetch {url}: {_line(error)}") from None
        except Exception as error:  # each protocol has classes of its own
            reason = _line(error)
        time.sleep(PAUSE * 2**attempt)
    raise InputError(f"cannot fetch {url} in {TRIES} tries: {reason}")


def _remote(source: str) -> Any:
    """A path or URL, open for reading: http(s) by the standard library, other protocols by fsspec and its
    plugins. Raises FileNotFoundError where there is nothing."""
    if source.startswith(("http://", "https://")):
        try:
            return urlopen(source, timeout=TIMEOUT)
        except HTTPError as error:
            error.close()
            if error.code in (404, 410):
                raise FileNotFoundError(f"{error.code} {error.reason}") from None
            raise OSError(f"{error.code} {error.reason}") from None
    import fsspec

    return fsspec.open(source, "rb")


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# -- index ---------------------------------------------------------------------------------------------------


def _index(cfg: DataConfig, shards: Shards) -> tuple[Dataset, list[int]]:
    """The table of all shards, and how many pictures each holds. A shard's part of the index is made once,
    and again when the file or the columns that the recipe asks for are others."""
    from datasets import Dataset, concatenate_datasets

    columns, parts = (tuple(cfg.captions), tuple(cfg.ranges)), []
    for number, source in tracked(list(enumerate(shards.sources)), "index"):
        path = Path(cfg.folder) / "cache" / "index" / f"{digest(repr((_version(source), columns)))}.arrow"
        if not path.exists():
            _write(path, _rows(shards, number, cfg), cfg)
        parts.append(Dataset.from_file(str(path)))
    return concatenate_datasets(parts), [len(part) for part in parts]


def _version(source: str) -> tuple[str, int, int]:
    """What tells one state of a shard from another; a URL is taken to mean the same file for ever."""
    if "://" in source:
        return source, 0, 0
    stat = os.stat(source)
    return source, stat.st_size, stat.st_mtime_ns


def _write(path: Path, rows: list[dict[str, Any]], cfg: DataConfig) -> None:
    import pyarrow

    fields: dict[str, Any] = {"id": pyarrow.string(), "offset": pyarrow.int64(), "size": pyarrow.int64()}
    fields |= dict.fromkeys(SIDES[0], pyarrow.float64()) | dict.fromkeys(cfg.ranges, pyarrow.float64())
    schema = pyarrow.schema(fields | dict.fromkeys(cfg.captions, pyarrow.list_(pyarrow.string())))
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    with whole_file(path) as part, pyarrow.ipc.new_stream(part, schema) as writer:
        writer.write_table(table)


def _rows(shards: Shards, number: int, cfg: DataConfig) -> list[dict[str, Any]]:
    """A shard's pictures in the order in which they lie there."""
    source, rows = shards.sources[number], {}
    more = _beside(source)
    with shards.open(number) as file:
        try:
            for key, members in _samples(file):
                picture = next((members[e] for e in PICTURES if e in members), None)
                if picture is None:
                    continue
                known = {"text": _text(file, members.get(".txt"))} | _json(file, members.get(".json"))
                known |= more.get(key, {})
                name = f"{Path(source).stem}/{key}"
                row = {"id": name, "offset": picture.offset_data, "size": picture.size}
                row |= _size(known, name, lambda p=picture: _bytes(file, p), cfg.max_pixels)
                row |= {column: _number(known.get(column)) for column in cfg.ranges}
                rows[key] = row | {column: _strings(known.get(column)) for column in cfg.captions}
        except (tarfile.TarError, OSError) as error:
            raise InputError(f"{source}: not a whole tar file ({error}); fetch it again") from None
    if not rows:
        raise InputError(f"{source}: expected pictures ({', '.join(PICTURES)}), found none")
    return list(rows.values())


def _samples(file: BinaryIO) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Key -> files by extension. A key is the name up to the first dot; files of one key lie side by side."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for key, group in groupby((m for m in tar if m.isfile()), lambda m: _split(m.name)[0]):
            yield key, {_split(member.name)[1]: member for member in group}


def _split(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, (dot + extension).lower()


def _bytes(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    return os.pread(file.fileno(), member.size, member.offset_data)


def _text(file: BinaryIO, member: tarfile.TarInfo | None) -> str | None:
    return None if member is None else _bytes(file, member).decode(errors="replace").strip()


def _json(file: BinaryIO, member: tarfile.TarInfo | None) -> dict[str, Any]:
    """The .json beside a picture; one that cannot be read tells nothing."""
    try:
        data = json.loads(_text(file, member) or "{}")
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _beside(source: str) -> dict[str, dict[str, Any]]:
    """Columns of the parquet file beside a shard, by key."""
    import pyarrow.parquet

    path = source.removesuffix(".tar") + ".parquet"
    try:
        with _remote(path) as file:
            data = file.read()
    except FileNotFoundError:
        return {}
    except Exception as error:  # each protocol has classes of its own
        raise InputError(f"cannot read {path}: {_line(error)}") from None
    with one_line(path):
        rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    return {row.pop("key"): row for row in rows if "key" in row}


def _size(known: dict[str, Any], name: str, read: Callable[[], bytes], max_pixels: int) -> dict[str, float]:
    width, height = (_number(known.get(side)) for side in SIDES[0])
    if not (width and height):
        with suppress(BadPicture):  # else training finds it, lists it, and takes another
            width, height = size_of(name, read(), max_pixels)
    return {"width": width or 0.0, "height": height or 0.0}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _strings(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, str)]
