"""Prompt lists as rows: CSV, TSV, JSON lines, one prompt a line, or a data set of the hub.

Copies of one list differ in byte order marks, line ends, spaces at the end of a field and in the name of a
column. None of that reaches a prompt.
"""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from cascade.errors import InputError, unknown
from eval.suites.suite import normalise

TEXT_COLUMNS = ("prompt", "prompts", "text", "caption", "captions")
CATEGORY_COLUMNS = ("category", "categories", "tag", "skill")
Row = dict[str, Any]


def read_text(path: Path) -> str:
    """A text file, its byte order mark and carriage returns taken off."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: expected UTF-8 text") from None


def read_rows(path: Path) -> list[Row]:
    """The rows of a file by its ending: .csv, .tsv, .jsonl; any other is one prompt a line, as "prompt".
    Keys are lower case. Raises InputError where a row is malformed or there are none."""
    text, ending = read_text(path), path.suffix.lower()
    if ending == ".csv":
        rows = _table(path, csv.DictReader(io.StringIO(text, newline="")))
    elif ending == ".tsv":  # as spreadsheets and PartiPrompts write it: a quote is a quote
        lines = io.StringIO(text, newline="")
        rows = _table(path, csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    elif ending == ".jsonl":
        rows = [_json_row(path, number, line) for number, line in _lines(text)]
    else:
        rows = [{"prompt": line} for _, line in _lines(text)]
    if not rows:
        raise InputError(f"{path} is empty: expected prompts")
    return rows


def hub_rows(name: str) -> list[Row]:
    """The rows of a hub data set OWNER/NAME, of its only split or of the one named OWNER/NAME:SPLIT. A class
    label becomes its name."""
    name, _, split = name.partition(":")
    import datasets  # takes a second, and only a hub id needs it

    try:
        data: Any = datasets.load_dataset(name)
        splits = {str(key): table for key, table in data.items()}
    except Exception as error:  # offline, unknown, a script: many classes, one meaning
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"no file {name!r}, and no such data set can be had from the hub ({reason})"
        ) from None
    if split and split not in splits:
        raise unknown("split", split, splits, where=name)
    if not split and len(splits) > 1:
        raise InputError(f"data set {name} has splits {', '.join(splits)}: expected {name}:SPLIT")
    table = splits[split or next(iter(splits))]
    labels = {
        key: kind for key, kind in dict(table.features).items() if isinstance(kind, datasets.ClassLabel)
    }
    return [
        {key.lower(): labels[key].int2str(value) if key in labels else value for key, value in row.items()}
        for row in table
    ]


def is_hub_id(source: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:\w+)?", source) is not None


def column(rows: list[Row], names: tuple[str, ...], where: str, *, required: bool = True) -> str | None:
    """The first of `names` that the rows have. Raises InputError where none is there and one must be."""
    found = next((name for name in names if name in rows[0]), None)
    if found is None and required:
        raise InputError(f"{where}: expected a column {names[0]!r}, found {', '.join(rows[0])}")
    return found


def texts(rows: list[Row], name: str, where: str) -> list[str]:
    """One column, normalised. Raises InputError at an empty cell."""
    values = [normalise(str(row.get(name) or "")) for row in rows]
    empty = next((number for number, value in enumerate(values, start=1) if not value), None)
    if empty is not None:
        raise InputError(f"{where}: row {empty} has no {name}")
    return values


def quoted(text: str) -> str | None:
    """The words in quotes, that a picture of `text` should show: several, joined by a space. An apostrophe
    within a word is no quote."""
    marks = "'\"\u2018\u2019\u201c\u201d"
    found = re.findall(rf"(?<!\w)[{marks}](\w.*?)[{marks}](?!\w)", text)
    return " ".join(found) or None


def _lines(text: str) -> list[tuple[int, str]]:
    """(number, line) of the lines that are not empty. Only line ends divide, not U+2028 and its like."""
    return [(n, line.strip()) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _table(path: Path, reader: csv.DictReader[str]) -> list[Row]:
    rows = []
    try:
        names = [normalise(name or "").lower() for name in reader.fieldnames or []]
        if len(set(names)) < len(names):
            raise InputError(f"{path}: expected different column names, found {', '.join(names)}")
        reader.fieldnames = names
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{path}:{reader.line_num}: expected {len(names)} fields, as in the header")
            rows.append(dict(row))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: {error}") from None
    return rows


def _json_row(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict):
        raise InputError(f"{path}:{number}: expected a JSON object")
    return {str(key).lower(): value for key, value in row.items()}
