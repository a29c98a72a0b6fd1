"""Prompt suites: the own ones, and readers of the published ones.

skills.csv  220 prompts, 20 for each of eleven skills, the skills of DrawBench.
emoji.csv   240 captions of the embedded default's kind: things and people, seen in training and held out
            (pairs of thing and style; combinations of skin tone, gender and profession), 20 of each style
            and kind, each with the file name of its picture in the emoji data set's images/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cascade.errors import InputError, unknown
from eval.suites.drawbench import read_drawbench
from eval.suites.published import (
    COCO_FID,
    read_coco,
    read_compbench,
    read_dpg,
    read_geneval,
    read_parti,
    read_prompts,
)
from eval.suites.published import COCO_PX as COCO_PX
from eval.suites.suite import Prompt as Prompt
from eval.suites.suite import Suite as Suite
from eval.suites.suite import make_suite

OWN = ("skills", "emoji")
READERS: dict[str, Callable[[str], Suite]] = {
    "drawbench": read_drawbench,
    "parti": read_parti,
    "geneval": read_geneval,
    "compbench": read_compbench,
    "dpg": read_dpg,
    "coco": read_coco,
    "prompts": read_prompts,
}


def load_suite(name: str, source: str | None = None, *, count: int | None = None, seed: int = 0) -> Suite:
    """A suite by name, its list from `source` (a path or a hub data set), which an own suite does not need;
    a path in place of a name is any prompt list. count, seed: of the captions drawn from COCO's.
    Raises InputError, one line."""
    if count is not None and (name != "coco" or count < 1):
        raise InputError(f"count {count} of suite {name}: expected one of at least 1, for coco only")
    if name in OWN:
        if source is not None:
            raise InputError(f"suite {name} needs no list: expected no {source!r}")
        return replace(read_prompts(str(Path(__file__).parent / f"{name}.csv")), source="own")
    if name not in READERS:
        if source is not None or not Path(name).exists():
            raise unknown("suite", name, (*OWN, *READERS, "a path"))
        return read_prompts(name)
    if name == "drawbench":
        return read_drawbench(source)
    if source is None:
        raise InputError(f"suite {name}: expected its list, as in {name} PATH")
    if name == "coco":
        return read_coco(source, count or COCO_FID, seed)
    return READERS[name](source)


def first(suite: Suite, count: int) -> Suite:
    """The first `count` prompts of every category, for a look before a long run."""
    if count < 1:
        raise InputError(f"limit {count}: expected at least 1 prompt of each category")
    taken: dict[str, int] = {}
    prompts = []
    for prompt in suite.prompts:
        taken[prompt.category] = taken.get(prompt.category, 0) + 1
        if taken[prompt.category] <= count:
            prompts.append(prompt)
    note = f"only the first {f'{count} prompts' if count > 1 else 'prompt'} of each category"
    return make_suite(suite.name, suite.source, prompts, (*suite.warnings, note))
