"""What a call of the pipeline asks for, checked as a whole before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from fractions import Fraction
from inspect import signature
from typing import Any, get_type_hints

import torch
from PIL.Image import Image
from torch import Tensor

from cascade.config import from_dict
from cascade.errors import InputError, unknown
from cascade.images import from_pil
from cascade.inpaint import Known, Pictures, known_part
from cascade.random import seed_list
from cascade.stage import Stage, resolve_settings

MAX_PROMPT = 10_000  # characters; a prompt of this length or more is refused
PRIOR = "prior"
MICRO_BATCH = "micro_batch"  # of Stage.sample: not a sampling setting, but given with them
RESERVED = ("self", "text", "seed", "seeds", "negative", "on_step")  # of the prior's sample: not settings


@dataclass(frozen=True)
class StageRun:
    """One stage that will run."""

    stage: Stage
    settings: dict[str, Any]
    size: tuple[int, int]  # H, W
    known: Known | None  # of each picture to draw, for a network that inpaints


@dataclass(frozen=True)
class Request:
    """A checked call. Pictures come prompt by prompt."""

    prompts: list[str]
    negatives: list[str] | None  # one a prompt
    num_images: int  # of each prompt
    seeds: list[int]  # one a picture
    prior: dict[str, Any] | None  # settings of the prior; None: it does not run
    runs: list[StageRun]
    images: Tensor | None  # B 3 h w, the input of the first stage
    image_embed: Tensor | None  # B D


def make_request(
    stages: Mapping[str, Stage],
    prior: Any,
    prompts: str | Sequence[str],
    /,  # `prior` is also the name of a stage's settings
    *,
    seed: int | Sequence[int] = 0,
    num_images: int = 1,
    negative: str | Sequence[str] | None = None,
    stop_at: str | None = None,
    start_at: str | None = None,
    images: Tensor | Sequence[Image] | None = None,
    image_embed: Tensor | None = None,
    inpaint: tuple[Pictures, Pictures] | None = None,
    size: tuple[int, int] | None = None,
    **settings: Mapping[str, Any],
) -> Request:
    """Check the arguments of `Cascade.__call__` (documented there). Raises InputError, one line."""
    prompts = _prompts(prompts)
    if isinstance(num_images, bool) or not isinstance(num_images, int) or num_images < 1:
        raise InputError(f"num_images {num_images!r}: expected an integer of at least 1")
    count = len(prompts) * num_images
    names = _stages_to_run(list(stages), prior is not None, start_at, stop_at)
    if start_at is None and images is not None:
        raise InputError("images=: expected start_at=, the stage that takes them")
    pictures = None if images is None else _pictures(images, len(prompts), num_images)
    first = stages[names[0]] if names else None
    if first is not None and first.config.lowres_px is not None and pictures is None:
        raise InputError(f"stage {names[0]} does not start from noise: expected images=, its input")
    if first is not None and first.config.lowres_px is None and pictures is not None:
        raise InputError(f"stage {names[0]} starts from noise: expected no images=")
    if image_embed is not None and (image_embed.ndim != 2 or len(image_embed) != count):
        raise InputError(f"image_embed: expected shape ({count}, D), got {tuple(image_embed.shape)}")
    resolved = _settings(stages, prior, settings)
    used = [stages[name] for name in names]
    sizes = _sizes(used, size, None if pictures is None else (pictures.shape[-2], pictures.shape[-1]))
    known = [None] * len(used) if inpaint is None else _known(inpaint, used, sizes, len(prompts), num_images)
    wanted = stop_at == PRIOR or any(stage.config.unet.image_embed_dim for stage in used)
    return Request(
        prompts=prompts,
        negatives=None if negative is None else _negatives(negative, len(prompts)),
        num_images=num_images,
        seeds=_seeds(seed, len(prompts), num_images),
        prior=resolved[PRIOR] if prior is not None and wanted and image_embed is None else None,
        runs=[
            StageRun(stage, resolved[stage.config.name], hw, part)
            for stage, hw, part in zip(used, sizes, known, strict=True)
        ],
        images=pictures,
        image_embed=image_embed,
    )


def _prompts(prompts: str | Sequence[str], what: str = "prompt") -> list[str]:
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise InputError(f"expected at least one {what}")
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"{what}: expected text, got {text!r}")
        if not text.strip():
            raise InputError(f"empty {what}: expected a description of a picture")
        if len(text) >= MAX_PROMPT:
            raise InputError(f"{what} of {len(text)} characters: expected fewer than {MAX_PROMPT}")
    return texts


def _negatives(negative: str | Sequence[str], count: int) -> list[str]:
    texts = _prompts(negative, "negative prompt")
    if len(texts) not in (1, count):
        raise InputError(f"negative: expected 1 or {count} texts, one a prompt, got {len(texts)}")
    return texts * count if len(texts) == 1 else texts


def _seeds(seed: int | Sequence[int], prompts: int, num_images: int) -> list[int]:
    """One a picture: seed + k for picture k of any prompt, or as given."""
    if isinstance(seed, Sequence):
        return seed_list(seed, prompts * num_images)
    return seed_list(seed, num_images) * prompts


def _stages_to_run(names: list[str], has_prior: bool, start_at: str | None, stop_at: str | None) -> list[str]:
    """Names of the stages from start_at to stop_at; none at all when it stops at the prior."""
    known = [PRIOR, *names] if has_prior else names
    for what in (start_at, stop_at):
        if what is not None and what not in known:
            raise unknown("stage", what, known)
    begin = 0 if start_at in (None, PRIOR) else names.index(start_at)
    end = len(names) if stop_at is None else 0 if stop_at == PRIOR else names.index(stop_at) + 1
    if start_at not in (None, PRIOR) and begin >= end:
        raise InputError(f"start_at {start_at!r} comes after stop_at {stop_at!r}")
    return names[begin:end]


def _settings(
    stages: Mapping[str, Stage], prior: Any, settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Settings by stage, each checked, also those of stages that will not run."""
    known = [*([PRIOR] if prior is not None else []), *stages]
    result: dict[str, dict[str, Any]] = {name: {} for name in known}
    for name, given in settings.items():
        if name not in known:
            raise unknown("stage", name, known)
        if not isinstance(given, Mapping):
            raise InputError(f"{name}={given!r}: expected settings of the stage, as in {name}=dict(steps=25)")
        if name == PRIOR:
            _check_prior(prior, given)
        else:
            _check_stage(stages[name], dict(given))
        result[name] = dict(given)
    return result


def _check_stage(stage: Stage, settings: dict[str, Any]) -> None:
    size = settings.pop(MICRO_BATCH, 1)
    if not isinstance(size, int) or size < 1:
        raise InputError(
            f"stage {stage.config.name}.{MICRO_BATCH}: expected a positive integer, got {size!r}"
        )
    resolve_settings(stage.config, settings)


def _check_prior(prior: Any, settings: Mapping[str, Any]) -> None:
    """Names and types of the prior's settings are those of its `sample`; it checks ranges itself."""
    hints = get_type_hints(type(prior).sample)
    allowed = {
        name: hints.get(name, Any) for name in signature(prior.sample).parameters if name not in RESERVED
    }
    for name in settings:
        if name not in allowed:
            raise unknown("setting", name, allowed, where=PRIOR)
    fields = [(name, hint, field(default=None)) for name, hint in allowed.items()]
    from_dict(make_dataclass(PRIOR, fields), dict(settings), where=PRIOR)


def _sizes(
    stages: list[Stage], size: tuple[int, int] | None, given: tuple[int, int] | None
) -> list[tuple[int, int]]:
    """(H, W) of each stage's pictures so that the last one's are `size`.

    A stage multiplies height and width by its own factor, so the last stage's size must be a multiple of what
    every stage's network needs, brought to the last stage's scale."""
    if not stages:
        return []
    if size is None:
        sizes = []
        for stage in stages:
            given = stage.output_size(None, given)
            sizes.append(given)
        return sizes
    if not isinstance(size, Sequence) or len(size) != 2:
        raise InputError(f"size {size!r}: expected (height, width) in px")
    last = stages[-1].config.image_px
    scales = [Fraction(stage.config.image_px, last) for stage in stages]
    multiple = math.lcm(
        *((stage.unet.size_multiple / scale).numerator for stage, scale in zip(stages, scales, strict=True)),
        *(scale.denominator for scale in scales),
    )
    for name, length in zip(("height", "width"), size, strict=True):
        if isinstance(length, bool) or not isinstance(length, int) or length < 1 or length % multiple:
            near = (
                multiple * max(1, round(length / multiple)) if isinstance(length, (int, float)) else multiple
            )
            raise InputError(
                f"size: {name} {length!r}: expected a positive multiple of {multiple} px for stages "
                f"{', '.join(s.config.name for s in stages)}; the nearest is {near}"
            )
    if given is not None and given[0] * size[1] != given[1] * size[0]:
        raise InputError(f"size {tuple(size)}: expected the proportions of images, {given[0]} x {given[1]}")
    return [(int(size[0] * scale), int(size[1] * scale)) for scale in scales]


def _pictures(images: Tensor | Sequence[Image], prompts: int, num_images: int) -> Tensor:
    """Given pictures as B 3 h w with one row a picture to draw."""
    if not isinstance(images, Tensor):
        if len({image.size for image in images}) != 1:
            raise InputError("images: expected at least one picture, all of one size")
        images = torch.stack([from_pil(image) for image in images])
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise InputError(
            f"images: expected float B 3 h w in [-1, 1], got {images.dtype} {tuple(images.shape)}"
        )
    return images.float().repeat_interleave(_repeats("images", len(images), prompts, num_images), dim=0)


def _repeats(what: str, rows: int, prompts: int, num_images: int) -> int:
    """How often each of `rows` is used in a row: they are one, one a prompt or one a picture to draw."""
    count = prompts * num_images
    if rows not in (1, prompts, count):
        raise InputError(
            f"{what}: expected 1, {prompts} (one a prompt) or {count} (one a picture), got {rows}"
        )
    return count // rows


def _known(
    inpaint: tuple[Pictures, Pictures],
    stages: list[Stage],
    sizes: list[tuple[int, int]],
    prompts: int,
    num_images: int,
) -> list[Known | None]:
    """The known part at the size of each stage that inpaints."""
    if not any(stage.config.unet.inpaint_channels for stage in stages):
        names = ", ".join(stage.config.name for stage in stages) or PRIOR
        raise InputError(
            f"inpaint: {names}: no network has inpaint channels: expected a model that has, as GLIDE's "
            "base-inpaint and upsample-inpaint"
        )
    known = known_part(inpaint)
    (height, width), (rows, columns) = known.picture.shape[-2:], sizes[-1]
    if height * columns != width * rows or height < rows:
        raise InputError(
            f"inpaint: a picture of {height} x {width}: expected the proportions of the pictures that are "
            f"drawn, and at least their size, {rows} x {columns}"
        )
    known = known.repeat(_repeats("inpaint", len(known), prompts, num_images))
    return [
        known.resized(size) if stage.config.unet.inpaint_channels else None
        for stage, size in zip(stages, sizes, strict=True)
    ]
