"""Drawing a run: work items shared among processes, resumable after any kill.

A picture is a function of the model, the setting, the prompt's text and k alone: its seed is keyed by
(seed, text, k), and it is always drawn in the same batch, whose place in the list decides which process
draws it. So neither the number of processes nor a restart changes a byte.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade import Cascade
from cascade.checkpoint import sha256
from cascade.config import to_dict
from cascade.errors import InputError
from cascade.images import save_png, to_pil
from cascade.pipeline import PRIOR
from eval.pictures import load_square
from eval.run import (
    PICTURES,
    RUN,
    UNFINISHED,
    Item,
    Key,
    Picture,
    Plan,
    Run,
    Setting,
    append_items,
    picture_seeds,
    read_items,
    read_plan,
    read_run,
    write_manifest,
    write_plan,
)

LOCK = ".lock"
BEGINNINGS = {LOCK, UNFINISHED}  # all that a run has if it dies before it has a plan
Drawn = dict[str, tuple[Tensor, Tensor | None]]  # pictures and image embeddings, by what they depend on


@contextmanager
def run_folder(folder: Path, plan: Plan) -> Iterator[Plan]:
    """The run folder of `plan`, made or taken up, and locked while the block lasts; the plan it holds.

    Only items whose pictures are there with the hashes of the manifest stay in it. Raises InputError, one
    line, where the folder holds a run of something else or anything but a run, or where another command draws
    in it; nothing in it is changed then."""
    old = read_plan(folder) if (folder / RUN).exists() else None
    if old is not None:
        _check_same(folder, old, plan)
        plan = replace(plan, code=old.code)
    try:
        if old is None and folder.exists() and any(path.name not in BEGINNINGS for path in folder.iterdir()):
            raise InputError(f"{folder} is no run and not empty: expected a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{folder} is in use by another command: expected it to end first") from None
        write_plan(folder, plan)
        whole = {item.key: item for item in read_items(folder) if _whole(folder, item)}
        write_manifest(folder, [whole[key] for key in plan.keys() if key in whole])
        yield plan


def draw_share(
    folder: Path,
    plan: Plan,
    pipes: Mapping[str, Cascade],
    code: str,
    rank: int = 0,
    world: int = 1,
    report: Callable[[], None] = lambda: None,
) -> None:
    """Draw what is missing of this process's share: every `world`-th batch from `rank` on. pipes: the models
    that draw, by their name in the plan. report: called after every batch."""
    artist = _Artist(folder, plan, pipes, code)
    done = {item.key for item in read_items(folder)}
    pictures = [(prompt, k) for prompt in range(len(plan.suite.prompts)) for k in range(plan.per_prompt)]
    batches = [pictures[start : start + plan.batch] for start in range(0, len(pictures), plan.batch)]
    works = [(model, batch) for model in pipes for batch in batches]
    for model, batch in works[rank::world]:
        drawn: Drawn = {}
        for setting in plan.settings:
            keys = [(model, setting.id, prompt, k) for prompt, k in batch]
            if done.issuperset(keys):
                continue
            stages = artist.draw(model, setting, batch, drawn)
            rows = [{name: x[row] for name, x in stages.items()} for row in range(len(batch))]
            items = [artist.save(key, setting, row) for key, row in zip(keys, rows, strict=True)]
            append_items(folder, rank, items)
            report()


def finish(folder: Path, plan: Plan) -> Run:
    """One manifest of all shares, in the order of the plan, once every share is drawn."""
    found = {item.key: item for item in read_items(folder)}
    write_manifest(folder, [found[key] for key in plan.keys() if key in found])
    for leftover in (folder / PICTURES).rglob(".*.tmp"):  # of a process that was killed while it wrote
        leftover.unlink()
    return read_run(folder)


class _Artist:
    """Draws and saves the pictures of a plan."""

    def __init__(self, folder: Path, plan: Plan, pipes: Mapping[str, Cascade], code: str) -> None:
        self.folder, self.plan, self.pipes, self.code = folder, plan, pipes, code
        self.seeds = picture_seeds(plan)

    def draw(self, model: str, setting: Setting, batch: list[Picture], drawn: Drawn) -> dict[str, Tensor]:
        """A batch at one setting: by stage, B 3 H W in [-1, 1]. drawn: what this batch has at other settings;
        a stage that two settings share is drawn once."""
        texts = [self.plan.suite.prompts[prompt].text for prompt, _ in batch]
        seeds = [self.seeds[picture] for picture in batch]
        pipe = self.pipes[model]
        source = pipe if setting.embed == "prior" else _without_prior(pipe)
        embed = pipe.encode(texts).pooled if setting.embed == "text" else None
        stages: dict[str, Tensor] = {}
        for name in self.plan.models[model].stages:
            depends = _depends(setting, [*stages, name])
            if depends in drawn:
                pass
            elif not stages and setting.lowres == "real":
                drawn[depends] = self._real(batch, pipe.stages[name].config.image_px), embed
            else:
                start: dict[str, Any] = dict(start_at=name, images=[*stages.values()][-1]) if stages else {}
                call: dict[str, Any] = dict(
                    seed=seeds, stop_at=name, image_embed=embed, **start, **setting.overrides
                )
                output = source(texts, **call)
                drawn[depends] = output.stages[name], output.image_embed
            stages[name], embed = drawn[depends]
        return stages

    def save(self, key: Key, setting: Setting, stages: Mapping[str, Tensor]) -> Item:
        """Write an item's pictures, each 3 H W; the item with their hashes. The files do not name the
        setting: a picture that two settings share has one hash, and is measured once."""
        model, _, index, k = key
        prompt, model_sha256 = self.plan.suite.prompts[index], self.plan.models[model].sha256
        chunks = {"prompt": prompt.text, "seed": self.seeds[index, k], "model": model_sha256}
        files, digests = {}, {}
        for name, picture in stages.items():
            files[name] = f"{PICTURES}/{model}/{setting.id}/{name}/{index:04d}-{k}.png"
            image = to_pil(picture[None])[0]
            path = save_png(image, self.folder / files[name], chunks | {"stage": name})
            digests[name] = sha256(path)
        return Item(
            model=model,
            setting=setting.id,
            prompt=index,
            k=k,
            text=prompt.text,
            category=prompt.category,
            seed=self.seeds[index, k],
            files=files,
            sha256=digests,
            overrides=setting.overrides,
            model_sha256=model_sha256,
            code=self.code,
        )

    def _real(self, batch: list[Picture], px: int) -> Tensor:
        """The prompts' real pictures, B 3 px px."""
        folder = Path(self.plan.references or "")  # check_settings saw to it that there are some
        files = [folder / str(self.plan.suite.prompts[prompt].reference) for prompt, _ in batch]
        return torch.stack([load_square(file, px) for file in files])


def _depends(setting: Setting, names: list[str]) -> str:
    """What the pictures of the last of `names` depend on, of a setting."""
    overrides = {name: setting.overrides.get(name, {}) for name in (PRIOR, *names)}
    return json.dumps([setting.embed, setting.lowres, overrides], sort_keys=True)


def _without_prior(pipe: Cascade) -> Cascade:
    """The same model, of which nothing makes an image embedding."""
    return Cascade(pipe.stages.values(), pipe.text_encoder, None, pipe.clip, pipe.name)


def _whole(folder: Path, item: Item) -> bool:
    """Whether every picture of an item is there and as it was written."""
    paths = {stage: folder / name for stage, name in item.files.items()}
    return all(path.is_file() and sha256(path) == item.sha256[stage] for stage, path in paths.items())


def _check_same(folder: Path, old: Plan, plan: Plan) -> None:
    """Raises InputError where the run in `folder` is of pictures that differ from those of `plan`."""
    was, now = _identity(old), _identity(plan)
    differing = next((name for name in {**was, **now} if was.get(name) != now.get(name)), None)
    if differing is not None:
        what = f"{differing} {was.get(differing, 'absent')}, not {now.get(differing, 'absent')}"
        raise InputError(f"{folder} holds a run of {what}: expected its own command, or another --out")


def _identity(plan: Plan) -> dict[str, Any]:
    """What decides which pictures a run holds, in words that tell one from another."""
    models = {
        f"model {side}": " ".join([m.name, m.sha256[:12], *m.stages, m.device, m.dtype]).strip()
        for side, m in plan.models.items()
    }
    settings = {
        f"setting {setting.id}": json.dumps(
            [to_dict(setting.overrides), setting.embed, setting.lowres], sort_keys=True
        )
        for setting in plan.settings
    }
    real = any(setting.lowres == "real" for setting in plan.settings)
    return {
        "suite": f"{plan.suite.name} {plan.suite.sha256[:12]}",
        **models,
        **settings,
        "per-prompt": plan.per_prompt,
        "seed": plan.seed,
        "batch": plan.batch,
        "references": plan.references if real else None,
    }
