"""The blind page: people compare two sets of pictures a prompt without knowing whose they are.

The protocol is Imagen's for DrawBench (arXiv:2205.11487, appendix C): two sets of up to 8 pictures that were
not picked, two questions (which is of higher quality, which matches the caption better), prefer one, prefer
the other, or indifferent. Where there is one set alone it is Imagen's question of section 3: does the caption
accurately describe the pictures, yes, somewhat or no. Control trials among the others, in which one answer
is right, tell whether a rater looks.

    blind.html      all that a rater needs: one file, no network. Nothing in it tells the sets apart: pictures
                    are encoded anew, and trials have names of their own
    blind.key.json  what belongs to whom, for `python -m eval tally`; not for raters
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageOps

from cascade import random
from cascade.checkpoint import write_json
from cascade.config import from_dict, read_mapping, to_dict
from cascade.errors import InputError, unknown
from eval.pages import affordable_px, data_uri, environment, open_picture, write_text
from eval.run import Item, Run

HTML, KEY = "blind.html", "blind.key.json"
SET = 8  # pictures of a set
PROMPTS = 400  # more than anyone rates; DrawBench has 200
CONTROLS = 0.1  # control trials, as a share of the others
LEAST_CONTROLS = 4  # six questions: one slip is no failure yet
BUDGET = 240_000_000  # pixels of all pictures: two sets of 8 for 200 prompts at 256 px, of 2 at 512 px
SIZES = (1024, 512, 384, 256, 192, 128)
NOISE_PX = 32  # a decoy without any content: coarse, so that it stays small

Kind = Literal["rated", "noise", "mismatch"]


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    answers: tuple[tuple[str, str], ...]  # value in the votes, words on the page; from one end to the other


PREFERENCES = (("first", "Prefer set 1"), ("same", "Indifferent"), ("second", "Prefer set 2"))
COMPARE = (
    Question("quality", "Which set of pictures is of higher quality?", PREFERENCES),
    Question("alignment", "Which set matches the caption better?", PREFERENCES),
)
RATE = (
    Question(
        "alignment",
        "Does the caption accurately describe the pictures?",
        (("yes", "Yes"), ("somewhat", "Somewhat"), ("no", "No")),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Whose pictures a set holds."""

    model: str
    setting: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a rater is shown at once. `swapped`: the first set is that of the second arm or, in a control
    trial, the decoy."""

    id: str
    kind: Kind
    prompt: int
    category: str
    swapped: bool = False


@dataclass(frozen=True, kw_only=True)
class Key:
    """The contents of blind.key.json."""

    run: str  # `run_hash`
    seed: int
    arms: tuple[Arm, ...]  # two that are compared, or one
    trials: tuple[Trial, ...]

    @property
    def questions(self) -> tuple[Question, ...]:
        return COMPARE if len(self.arms) == 2 else RATE

    @property
    def page(self) -> str:
        """Name of the page that this key belongs to."""
        return hashlib.sha256(json.dumps(to_dict(self), sort_keys=True).encode()).hexdigest()[:32]


def write_blind(
    run: Run,
    *,
    seed: int | None = None,
    setting: str | None = None,
    against: str | None = None,
    stage: str | None = None,
) -> Path:
    """Write blind.html and blind.key.json into the run folder and return the page.

    Model A at `setting` (None: the first) is compared with model B at `against` (None: the same) or, where
    there is no B, with A at `against` (None: it is rated alone). The seed decides sides and order: None is
    that of the key already there, or a random one, which nobody can guess. Raises InputError where a key of
    another page is there: the votes of that page could be assigned no more.
    """
    arms = _arms(run, setting, against)
    path = run.folder / KEY
    old = read_key(run.folder) if path.is_file() else None
    if seed is None:
        seed = secrets.randbelow(random.MAX_SEED) if old is None else old.seed
    key = make_key(run, arms, seed, stage)
    if old is not None and old != key:
        raise InputError(
            f"{path} belongs to another page, whose votes need it: give its seed and settings again, "
            "or move it away"
        )
    html = render(run, key, stage)
    temporary = path.with_name(f".{KEY}.tmp")
    write_json(temporary, to_dict(key))
    temporary.replace(path)
    return write_text(run.folder / HTML, html)


def read_key(folder: Path) -> Key:
    """Raises InputError where it is missing or malformed."""
    return from_dict(Key, read_mapping(folder / KEY), where=str(folder / KEY))


def make_key(run: Run, arms: Sequence[Arm], seed: int, stage: str | None) -> Key:
    """Every prompt once (of a large suite, PROMPTS at random) and, for each ten, a control trial, in random
    order: a function of the seed."""
    prompts = run.suite.prompts
    rated = torch.randperm(len(prompts), generator=random.generator(seed, "rated")).tolist()[:PROMPTS]
    kinds: tuple[Kind, ...] = ("noise", "mismatch") if _others(run, 0) else ("noise",)
    controls = max(LEAST_CONTROLS, round(CONTROLS * len(rated)))
    drawn: list[tuple[Kind, int]] = []
    drawn.extend(("rated", prompt) for prompt in rated)
    drawn.extend((kinds[i % len(kinds)], rated[i % len(rated)]) for i in range(controls))
    order = torch.randperm(len(drawn), generator=random.generator(seed, "order")).tolist()
    trials = tuple(
        Trial(
            id=f"{random.key(seed, 'trial', index):016x}",
            kind=drawn[index][0],
            prompt=drawn[index][1],
            category=prompts[drawn[index][1]].category,
            swapped=_coin(seed, "side", index),
        )
        for index in order
    )
    return Key(run=run_hash(run, arms, stage), seed=seed, arms=tuple(arms), trials=trials)


def run_hash(run: Run, arms: Sequence[Arm], stage: str | None) -> str:
    """Of the prompts and pictures that are shown."""
    lines = [run.suite.sha256]
    for arm in arms:
        name = run.stage(arm.model, stage)
        lines += [item.sha256[name] for item in run.select(arm.model, arm.setting)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def render(run: Run, key: Key, stage: str | None) -> str:
    """The page of a key."""
    page = {
        "page": key.page,
        "run": key.run,
        "questions": [to_dict(question) for question in key.questions],
        "sets": len(key.arms),
    }
    pictures = _Pictures(run, key, stage)
    return environment().get_template("blind.html").render(
        page=page,
        trials=[
            {"id": each.id, "text": run.suite.prompts[each.prompt].text, "sets": pictures.sets(each)}
            for each in key.trials
        ],
    )  # fmt: skip


class _Pictures:
    """The sets of a trial, as URIs. Sets of a page have one count and one size, whatever was drawn."""

    def __init__(self, run: Run, key: Key, stage: str | None) -> None:
        self.run, self.key, self.stage = run, key, stage
        self.count = min(SET, run.plan.per_prompt)
        own = max(run.models[arm.model].stages[run.stage(arm.model, stage)] for arm in key.arms)
        shown = len(key.trials) * len(key.arms) * self.count
        self.px = min(own, affordable_px(shown, BUDGET, SIZES))
        self._items: dict[tuple[str, str, int], list[Item]] = {}
        for arm in key.arms:
            for item in run.select(arm.model, arm.setting):
                self._items.setdefault((arm.model, arm.setting, item.prompt), []).append(item)

    def sets(self, trial: Trial) -> list[list[str]]:
        arms = list(self.key.arms)
        if trial.kind == "rated":
            sets = [self._drawn(arm, trial.prompt) for arm in arms]
        else:
            arm = arms[_coin(self.key.seed, "arm", trial.id) % len(arms)]
            decoy = self._decoy(arm, trial)
            sets = [decoy] if len(arms) == 1 else [self._drawn(arm, trial.prompt), decoy]
        return sets[::-1] if trial.swapped else sets

    def _drawn(self, arm: Arm, prompt: int) -> list[str]:
        items = self._items[arm.model, arm.setting, prompt][: self.count]
        name = self.run.stage(arm.model, self.stage)
        drawn = [open_picture(self.run.path(item, name)) for item in items]
        size = (self.px, self.px)  # to be fitted into, also by smaller ones: their size would tell a model
        fitted = [ImageOps.contain(image, size, Image.Resampling.LANCZOS) for image in drawn]
        return [data_uri(image, self.px) for image in fitted]

    def _decoy(self, arm: Arm, trial: Trial) -> list[str]:
        if trial.kind == "mismatch":
            others = _others(self.run, trial.prompt)
            return self._drawn(arm, others[random.key(self.key.seed, "other", trial.id) % len(others)])
        seeds = [random.key(self.key.seed, "noise", k) for k in range(self.count)]
        noise = random.normal((NOISE_PX, NOISE_PX, 3), seeds, trial.id)
        pixels = (128 + 64 * noise).clamp(0, 255).to(torch.uint8).numpy()  # N H W 3
        size = (self.px, self.px)
        coarse = [Image.fromarray(each).resize(size, Image.Resampling.NEAREST) for each in pixels]
        return [data_uri(image, self.px) for image in coarse]


def _arms(run: Run, setting: str | None, against: str | None) -> list[Arm]:
    settings = [each.id for each in run.settings]
    for name in filter(None, (setting, against)):
        if name not in settings:
            raise unknown("setting", name, settings, where=str(run.folder))
    first = setting or settings[0]
    pairs = [("A", first)]
    if len(run.models) == 2:
        pairs.append(("B", against or first))
    elif against is not None:
        if against == first:
            raise InputError(f"blind page: expected two settings to compare, got {first} twice")
        pairs.append(("A", against))
    return [Arm(model=model, setting=name, name=f"{run.models[model].name}, {name}") for model, name in pairs]


def _others(run: Run, prompt: int) -> list[int]:
    """Prompts whose pictures cannot pass for those of `prompt`: of other categories where there are any."""
    prompts = run.suite.prompts
    different = [i for i, other in enumerate(prompts) if other.text != prompts[prompt].text]
    apart = [i for i in different if prompts[i].category != prompts[prompt].category]
    return apart or different


def _coin(seed: int, *parts: str | int) -> bool:
    return bool(random.key(seed, *parts) & 1)
