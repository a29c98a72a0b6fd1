"""How well a picture shows the words that it was to show, from what a reader of text saw in it."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of a character from one to the other (Levenshtein)."""
    above = list(range(len(b) + 1))
    for row, left in enumerate(a, start=1):
        line = [row]
        for column, right in enumerate(b, start=1):
            substitute = above[column - 1] + (left != right)
            line.append(min(substitute, above[column] + 1, line[-1] + 1))
        above = line
    return above[-1]


def plain(text: str) -> str:
    """Letters and digits alone, without case or accents' encoding: readers lose spaces, and signs of
    punctuation are too small to blame a picture for."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in text if character.isalnum())


def similarity(wanted: str, seen: Sequence[str]) -> float:
    """1 - edit distance / length of the longer, between the wanted words and the best of what was seen: one
    line of it or all lines in order. 0 where nothing was seen, 1 where the words stand there."""
    target = plain(wanted)
    candidates = [plain(text) for text in [*seen, "".join(seen)]]
    return max(1 - edit_distance(target, c) / max(len(target), len(c), 1) for c in candidates)


def shown(wanted: str, seen: Sequence[str]) -> bool:
    """Whether the wanted words stand, whole, somewhere in what was seen."""
    return plain(wanted) in plain("".join(seen))
