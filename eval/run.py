"""A run folder: what was asked of which models, and every picture that was drawn.

    run.json             the `Plan`: suite, models, settings, pictures a prompt, seed
    manifest.jsonl       one finished work item (`Item`) a line, in the order of `Plan.keys`
    manifest-RANK.jsonl  the same, appended to by one process while it draws; merged into manifest.jsonl
    pictures/MODEL/SETTING/STAGE/PROMPT-K.png

Paths in the manifest are relative to the folder, so that a run can be moved.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cascade import random
from cascade.checkpoint import write_json
from cascade.config import from_dict, read_mapping, to_dict
from cascade.errors import InputError, unknown
from eval.suites.suite import Suite

RUN, MANIFEST, PICTURES = "run.json", "manifest.jsonl", "pictures"
UNFINISHED = f".{RUN}.tmp"  # run.json while it is written
DEFAULT = "default"  # id of the setting in which nothing is changed
Picture = tuple[int, int]  # prompt, k
Key = tuple[str, str, int, int]  # model, setting, prompt, k


@dataclass(frozen=True, kw_only=True)
class Model:
    """One side of a comparison: a model folder, or pictures that were made elsewhere."""

    name: str
    path: str  # as it was given
    sha256: str  # of its files
    kind: Literal["cascade", "pictures"]
    stages: dict[str, int]  # name -> px of its pictures, in the order of drawing; the last one is the result
    config: dict[str, Any] = field(default_factory=dict)  # default sampling settings by stage, text encoder
    device: str = ""  # kind and number format that it drew with: pictures of two kinds are not the same bits
    dtype: str = ""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How pictures are drawn. `study` names the cascade-only measure that asked for it ("" for none) and
    `label` what it shows there."""

    id: str = DEFAULT
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)  # by stage, as in Cascade.__call__
    embed: Literal["prior", "text", "none"] = "prior"  # where the image embedding comes from
    lowres: Literal["generated", "real"] = "generated"  # input of the first super-resolution stage
    study: str = ""
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides which pictures a run holds."""

    suite: Suite
    models: dict[str, Model]  # "A", and "B" where two are compared
    settings: tuple[Setting, ...]
    per_prompt: int
    seed: int
    batch: int  # pictures drawn together; fixed, so that a picture does not depend on the process count
    stop_at: str | None = None
    references: str | None = None  # folder of the prompts' real pictures
    code: str = ""  # version of the program that began the run
    command: str = ""  # that makes it again

    def keys(self) -> Iterator[Key]:
        """Every work item, in the order of the manifest."""
        for model in self.models:
            for setting in self.settings:
                for prompt in range(len(self.suite.prompts)):
                    for k in range(self.per_prompt):
                        yield model, setting.id, prompt, k


@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt drawn once: a line of the manifest."""

    model: str
    setting: str
    prompt: int  # index into the suite
    k: int
    text: str
    category: str
    seed: int
    files: dict[str, str]  # stage -> picture
    sha256: dict[str, str]  # stage -> of the file
    overrides: dict[str, dict[str, Any]]
    model_sha256: str
    code: str

    @property
    def key(self) -> Key:
        return self.model, self.setting, self.prompt, self.k


@dataclass(frozen=True)
class Run:
    """A finished run. Items are in the order of `Plan.keys`: by model, setting, prompt and k."""

    folder: Path
    plan: Plan
    items: tuple[Item, ...]

    @property
    def suite(self) -> Suite:
        return self.plan.suite

    @property
    def models(self) -> dict[str, Model]:
        return self.plan.models

    @property
    def settings(self) -> tuple[Setting, ...]:
        return self.plan.settings

    def select(self, model: str | None = None, setting: str | None = None) -> list[Item]:
        """The items of one model, one setting or both, in order."""
        if model is not None and model not in self.models:
            raise unknown("model", model, self.models, where=str(self.folder))
        if setting is not None and setting not in [s.id for s in self.settings]:
            raise unknown("setting", setting, [s.id for s in self.settings], where=str(self.folder))
        return [i for i in self.items if model in (None, i.model) and setting in (None, i.setting)]

    def stage(self, model: str, wanted: str | None = None) -> str:
        """The stage whose pictures stand for `model`: `wanted`, or its last. Pictures made elsewhere have one
        stage, which stands for any. Raises InputError where the model lacks the stage."""
        info = self.models[model]
        if wanted is None or info.kind == "pictures":
            return next(reversed(info.stages))
        if wanted not in info.stages:
            raise unknown("stage", wanted, info.stages, where=f"model {model} ({info.name})")
        return wanted

    def path(self, item: Item, stage: str | None = None) -> Path:
        """The picture of an item at a stage (see `stage`)."""
        return self.folder / item.files[self.stage(item.model, stage)]

    def reference(self, prompt: int) -> Path | None:
        """The real picture of a prompt, where the suite names one and its folder was given."""
        name = self.suite.prompts[prompt].reference
        return None if name is None or self.plan.references is None else Path(self.plan.references) / name


def picture_seeds(plan: Plan) -> dict[Picture, int]:
    """The seed of every picture: a function of the run's seed, the prompt's text and k. A text that stands in
    the suite more than once draws other pictures each time."""
    seeds: dict[Picture, int] = {}
    seen: Counter[str] = Counter()
    for index, prompt in enumerate(plan.suite.prompts):
        again = [seen[prompt.text]] if seen[prompt.text] else []
        seen[prompt.text] += 1
        for k in range(plan.per_prompt):
            seeds[index, k] = random.key(plan.seed, prompt.text, k, *again)
    return seeds


def read_run(folder: str | Path) -> Run:
    """A finished run. Raises InputError, one line, where the folder is none, is damaged or unfinished."""
    folder = Path(folder)
    plan = read_plan(folder)
    found = {item.key: item for item in read_items(folder)}
    keys = list(plan.keys())
    missing = [key for key in keys if key not in found]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(keys)} pictures: draw the rest with the command that "
            "began it"
        )
    items = tuple(found[key] for key in keys)
    for item in items:
        lacking = [name for name in item.files.values() if not (folder / name).is_file()]
        if lacking:
            raise InputError(f"missing picture {folder / lacking[0]}, which {MANIFEST} lists")
    return Run(folder, plan, items)


def read_plan(folder: Path) -> Plan:
    if not (folder / RUN).is_file():
        raise InputError(f"{folder} is no run folder: expected {RUN} in it")
    return from_dict(Plan, read_mapping(folder / RUN), where=str(folder / RUN))


def write_plan(folder: Path, plan: Plan) -> None:
    """Write run.json; the file appears whole or not at all."""
    temporary = folder / UNFINISHED
    write_json(temporary, to_dict(plan))
    temporary.replace(folder / RUN)


def read_items(folder: Path) -> list[Item]:
    """Every finished item, of manifest.jsonl first and then of the processes' own. The line that a process
    was writing when it was killed is no JSON: its item counts as not drawn."""
    items = []
    for path in [folder / MANIFEST, *rank_manifests(folder)]:
        if path.is_file():
            for number, line in enumerate(path.read_bytes().splitlines(), start=1):
                try:
                    row = json.loads(line)
                except ValueError:  # not JSON, or not UTF-8
                    continue
                items.append(from_dict(Item, row, where=f"{path}:{number}"))
    return items


def rank_manifests(folder: Path) -> list[Path]:
    return sorted(folder.glob("manifest-*.jsonl"))


def append_items(folder: Path, rank: int, items: Iterable[Item]) -> None:
    """Add items to what the process `rank` has drawn."""
    with (folder / f"manifest-{rank}.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(map(_line, items)))


def _line(item: Item) -> str:
    return json.dumps(to_dict(item), ensure_ascii=False, sort_keys=True) + "\n"


def write_manifest(folder: Path, items: Sequence[Item]) -> None:
    """manifest.jsonl of a finished run; the processes' own files go after it is in place."""
    temporary = folder / f".{MANIFEST}.tmp"
    temporary.write_text("".join(map(_line, items)), encoding="utf-8")
    temporary.replace(folder / MANIFEST)
    for path in rank_manifests(folder):
        path.unlink()
