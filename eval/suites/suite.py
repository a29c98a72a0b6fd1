"""A suite: prompts by category, where they came from, and a hash of what was read."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Prompt:
    text: str
    category: str = "all"
    rendered: str | None = None  # the words that the picture should show, where the prompt asks for some
    reference: str | None = None  # file of a real picture of this prompt, relative to the run's references
    meta: dict[str, Any] = field(default_factory=dict)  # what else the suite says of it, in the suite's words


@dataclass(frozen=True, kw_only=True)
class Suite:
    name: str
    source: str  # the file or data set it was read from, or "own"
    sha256: str  # of the normalised list: see `list_sha256`
    prompts: tuple[Prompt, ...]
    warnings: tuple[str, ...] = ()

    @property
    def categories(self) -> tuple[str, ...]:
        """In the order of their first prompt."""
        return tuple(dict.fromkeys(prompt.category for prompt in self.prompts))


def make_suite(name: str, source: str, prompts: Iterable[Prompt], warnings: Iterable[str] = ()) -> Suite:
    prompts = tuple(prompts)
    return Suite(
        name=name, source=source, sha256=list_sha256(prompts), prompts=prompts, warnings=tuple(warnings)
    )


def normalise(text: str) -> str:
    """Unicode NFC, every run of white space one space, none at the ends, no byte order mark: what public
    copies of one list differ in."""
    return " ".join(unicodedata.normalize("NFC", text.replace("\ufeff", "")).split())


def list_sha256(prompts: Iterable[Prompt]) -> str:
    """Of the lines CATEGORY, tab, TEXT: the same for two copies that hold the same prompts in the same
    order, whatever their format."""
    lines = (f"{normalise(prompt.category)}\t{normalise(prompt.text)}\n" for prompt in prompts)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
