"""Bad input: one exception class, one line, the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave is wrong. `str(error)` is one line that says what was wrong, what was
    expected and, where there is one, the nearest valid choice. Command lines print it and exit with 2."""


def unknown(kind: str, name: object, choices: Iterable[str], where: str = "") -> InputError:
    """The error for a name outside a fixed set, with the nearest valid name when one is close."""
    names = [str(choice) for choice in choices]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    place = f" in {where}" if where else ""
    return InputError(f"unknown {kind} {name!r}{place}: expected one of {', '.join(names)}{hint}")
