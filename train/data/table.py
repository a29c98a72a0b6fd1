"""Pictures that a table lists: a folder with metadata, parquet files, the hub; tar shards are in shards.py.

The table is a `datasets.Dataset`, memory-mapped from Arrow files, so memory does not grow with the set, and
any row can be read at any time. `datasets` streams too, but cannot resume a shuffled stream where it stopped
(its buffer is not restored), and aborts at the first picture that cannot be decoded: pictures are therefore
taken from it as files and decoded here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cascade import random
from cascade.errors import InputError, unknown
from cascade.progress import tracked
from train.data.config import DataConfig
from train.data.decode import BadPicture, read_file, size_of
from train.data.order import Order, Shuffled, mix
from train.data.pictures import PictureSet, weighted
from train.files import whole_file

if TYPE_CHECKING:
    from datasets import Dataset

SIDES = (("width", "height"), ("WIDTH", "HEIGHT"))  # columns that tell sizes, in the order of preference


class TablePictures(PictureSet):
    """A picture a row. Subclasses say what the table is and where a row's picture file is."""

    def __init__(self, cfg: DataConfig, table: Dataset) -> None:
        super().__init__(cfg)
        if not len(table):
            raise InputError(f"{self.folder}: expected at least one picture, found none")
        for column in (*cfg.captions, *cfg.ranges):
            if column not in table.column_names:
                raise unknown("column", column, table.column_names, where=f"the table of {self.folder}")
        self.table = table
        self._texts = table.select_columns(list(cfg.captions))
        chosen = np.flatnonzero(self._chosen())
        kept = self._heldout(chosen)
        self.train, self.heldout = chosen[~kept], chosen[kept]

    def __len__(self) -> int:
        return len(self.table)

    def captions(self, index: int) -> list[str]:
        """Those of all columns, in the order of the recipe; tags as one caption."""
        return [text for texts in self._forms(index).values() for text in texts] or [""]

    def caption(self, index: int, seed: int) -> str:
        """First a column is drawn, among those that say something, then one of its captions."""
        forms = self._forms(index)
        if not forms:
            return ""
        column = list(forms)[weighted([self.cfg.captions[c] for c in forms], seed)]
        if column in self.cfg.tags and self.cfg.tag_drop:
            return self._some_tags(forms[column][0].split(", "), seed)
        texts = forms[column]
        return texts[random.key(seed, "text") % len(texts)]

    def order(self, seed: int, min_px: int = 1) -> Order:
        return Shuffled(self.fit(min_px), seed)

    def fit(self, min_px: int) -> np.ndarray:
        """The training pictures of at least `min_px` on their shorter side, or of unknown size."""
        short = self.sizes[self.train].min(1)
        fit = self.train[(short == 0) | (short >= min_px)]
        if not len(fit):
            raise InputError(f"{self.folder}: no training picture has {min_px} px on its shorter side")
        return fit

    @cached_property
    def sizes(self) -> np.ndarray:
        """Width and height of every picture, N 2, int32; 0 where they are not known, as the header cannot be
        read. From columns of the table, or read once from the files."""
        names = set(self.table.column_names)
        for columns in SIDES:
            if names.issuperset(columns):
                sides = [np.nan_to_num(self._numbers(c)) for c in columns]
                return np.stack(sides, axis=1).astype(np.int32)
        path = self.folder / "cache" / f"sizes-{self.table._fingerprint}.npy"
        if not path.exists():
            with whole_file(path) as part, part.open("wb") as file:
                np.save(file, self._read_sizes())
        return np.load(path, mmap_mode="r")

    def _forms(self, index: int) -> dict[str, list[str]]:
        """Column -> its captions, without those that are empty or have no weight."""
        row = self._texts[index]
        forms = {}
        for column in (c for c, weight in self.cfg.captions.items() if weight):
            texts = row[column] if isinstance(row[column], list) else [row[column]]
            texts = [t.strip() for t in texts if isinstance(t, str) and t.strip()]
            if column in self.cfg.tags:
                tags = [tag.strip() for text in texts for tag in text.split(",")]
                texts = [", ".join(tag for tag in tags if tag)]
            if any(texts):
                forms[column] = texts
        return forms

    def _some_tags(self, tags: list[str], seed: int) -> str:
        """Each tag stays with probability 1 - tag_drop; one at least."""
        draws = random.uniform([seed], "tags", count=len(tags))[0].tolist()
        kept = [tag for tag, u in zip(tags, draws, strict=True) if u >= self.cfg.tag_drop]
        return ", ".join(kept or [tags[int(np.argmax(draws))]])

    def _chosen(self) -> np.ndarray:
        """Which pictures take part: N, bool. What is not known of a picture's size does not keep it out."""
        cfg, chosen = self.cfg, np.ones(len(self), dtype=bool)
        for column, (least, most) in cfg.ranges.items():
            values = self._numbers(column)  # not a number: nothing is known, which is not in a range
            chosen &= values >= (-np.inf if least is None else least)
            chosen &= values <= (np.inf if most is None else most)
        short, long = self.sizes.min(1), self.sizes.max(1)
        chosen &= (short == 0) | ((short >= cfg.min_px) & (long <= cfg.max_aspect * np.maximum(short, 1)))
        if not chosen.any():
            raise InputError(f"{self.folder}: none of {len(self)} pictures passes the filters of data")
        return chosen

    def _heldout(self, chosen: np.ndarray) -> np.ndarray:
        """Which of the chosen are kept from training: by their numbers, whatever else is chosen."""
        kept = mix(chosen.astype(np.uint64)) < self.cfg.heldout * 2**64
        return kept & ~kept.all()  # of a few pictures, one at least is for training

    def _numbers(self, column: str) -> np.ndarray:
        import pyarrow
        import pyarrow.compute

        values = self.table.data.column(column)
        try:
            return pyarrow.compute.cast(values, pyarrow.float64()).to_numpy(zero_copy_only=False)
        except pyarrow.ArrowInvalid:
            found = f"expected numbers, got {values.type}"
            raise InputError(f"column {column} of {self.folder}: {found}") from None

    def _read_sizes(self) -> np.ndarray:
        sizes = np.zeros((len(self), 2), np.int32)

        def read(i: int) -> None:
            try:
                sizes[i] = size_of(self.name(i), self.encoded(i), self.cfg.max_pixels)
            except BadPicture:
                pass  # stays 0: training finds it, lists it, and takes another

        with ThreadPoolExecutor() as pool:
            for _ in tracked(pool.map(read, range(len(self))), "sizes", len(self)):
                pass
        return sizes


class HuggingFacePictures(TablePictures):
    """A table of `datasets` whose rows hold the picture files: parquet files, or a set of the hub."""

    def __init__(self, cfg: DataConfig) -> None:
        table, where = _load(cfg), cfg.hub or cfg.folder
        if cfg.image not in table.column_names:
            raise unknown("column", cfg.image, table.column_names, where=f"the table of {where}")
        self._images = _undecoded(table, cfg.image).select_columns([cfg.image])
        super().__init__(cfg, table)

    def name(self, index: int) -> str:
        """The file's name where the row holds one, else the row's number."""
        return Path(self._image(index).get("path") or f"row {index}").name

    def encoded(self, index: int) -> bytes:
        image = self._image(index)
        if image.get("bytes") is not None:
            return image["bytes"]
        if not image.get("path"):
            raise BadPicture(self.name(index), "the row holds no picture")
        return read_file(self.name(index), Path(image["path"]))

    def _image(self, index: int) -> dict[str, Any]:
        value = self._images[index][self.cfg.image]
        return value if isinstance(value, dict) else {"bytes": value, "path": None}


class FolderPictures(TablePictures):
    """Picture files in a folder, and a metadata.jsonl or metadata.csv with a `file_name` a line, the layout
    of image folders on the hub."""

    def __init__(self, cfg: DataConfig) -> None:
        table = _load(cfg)
        if "file_name" not in table.column_names:
            raise unknown("column", "file_name", table.column_names, where=f"the metadata of {cfg.folder}")
        self._names = table.select_columns(["file_name"])
        super().__init__(cfg, table)

    def name(self, index: int) -> str:
        return str(self._names[index]["file_name"])

    def encoded(self, index: int) -> bytes:
        return read_file(self.name(index), self.folder / self.name(index))


def _load(cfg: DataConfig) -> Dataset:
    """The table. Raises InputError in one line, whatever `datasets` has to say."""
    from datasets import load_dataset

    source: dict[str, Any]
    if cfg.name == "hub":
        source = {"path": cfg.hub, "name": cfg.subset, "revision": cfg.revision, "split": cfg.split}
    elif cfg.name == "parquet":
        source = {"path": "parquet", "data_files": expand(cfg.files), "split": "train"}
    else:
        metadata = _metadata(Path(cfg.folder))
        kind = "csv" if metadata.suffix == ".csv" else "json"
        source = {"path": kind, "data_files": str(metadata), "split": "train"}
    with one_line(cfg.hub or cfg.folder):
        table: Any = load_dataset(**source, cache_dir=str(Path(cfg.folder) / "cache" / "datasets"))
    return table


def _metadata(folder: Path) -> Path:
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"no pictures in {folder}: expected them there, and a metadata.jsonl or metadata.csv")


def _undecoded(table: Dataset, column: str) -> Dataset:
    """Pictures as the files they are: decoding one that is broken would raise from within `datasets`."""
    from datasets import Image

    return (
        table.cast_column(column, Image(decode=False)) if isinstance(table.features[column], Image) else table
    )


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Errors of `datasets`, of many classes, as one InputError; its progress bars and notices stay silent."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        text = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"cannot read data set {what}: {text}") from None


def expand(files: tuple[str, ...]) -> list[str]:
    """Paths and URLs of `files`: {000..123} counted out, * matched in paths. Raises InputError where a path
    matches nothing."""
    found = []
    for pattern in files:
        for file in _counted(pattern):
            if "://" in file:
                found.append(file)
                continue
            path = Path(file)
            matches = sorted(path.parent.glob(path.name))
            if not matches:
                raise InputError(f"data.files {file!r}: no such file")
            found += [str(match) for match in matches]
    return found


def _counted(pattern: str) -> list[str]:
    """`a-{00..12}.tar` as a-00.tar to a-12.tar, with as many digits as the first number has."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match[1], match[2]
    numbers = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [f for n in numbers for f in _counted(pattern[: match.start()] + n + pattern[match.end() :])]
