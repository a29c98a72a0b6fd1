"""The list of pictures that cannot be used: one line of JSON each, with id and reason, by many writers."""

from __future__ import annotations

import json
from pathlib import Path

from filelock import FileLock

from cascade.errors import InputError
from train.data.decode import BadPicture


class Quarantine:
    """A file to which every process adds what it finds, each picture once. `most` pictures are borne."""

    def __init__(self, path: Path, most: float, total: int) -> None:
        self.path, self.most, self.total = path, most, total
        self._read, self._names = 0, set[str]()

    def names(self) -> set[str]:
        """Of the pictures listed so far, by any process."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._read)
                for line in file:
                    if not line.endswith(b"\n"):  # being written, or its writer was killed
                        break
                    self._names.add(_name(self.path, line))
                    self._read += len(line)
        return self._names

    def add(self, bad: BadPicture) -> None:
        """List one more. Raises InputError where more are listed than are borne."""
        if bad.name in self._names:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            if bad.name not in self.names():
                line = json.dumps({"id": bad.name, "reason": bad.reason}, ensure_ascii=False) + "\n"
                with self.path.open("r+b" if self.path.exists() else "xb") as file:
                    file.truncate(self._read)
                    file.seek(self._read)
                    file.write(line.encode())
        count = len(self.names())
        if count > self.most * self.total:
            raise InputError(
                f"{count} of {self.total} pictures cannot be used, more than data.max_bad {self.most:g}: "
                f"see {self.path}; the last is {bad.name}: {bad.reason}"
            )


def _name(path: Path, line: bytes) -> str:
    try:
        return json.loads(line)["id"]
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path}: expected a JSON object with an id a line; delete the file") from None
