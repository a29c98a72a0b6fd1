"""One stage of the cascade: a U-Net, its diffusion process, and `sample`.

A base stage draws pictures from text and image embedding; a super-resolution stage also takes the picture
of the stage before, corrupted to an augmentation level (Imagen 2.4). Noise is keyed by (seed, purpose, stage
name, step), so a picture does not change with the batch it is drawn in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from cascade import random
from cascade.augment import Lowres, residual_base, told_level
from cascade.conditioning import Conditioning, TextEmbedding
from cascade.config import SamplingConfig, StageConfig, from_dict, to_dict
from cascade.diffusion.denoiser import Denoiser
from cascade.diffusion.guidance import GuidedDenoiser
from cascade.diffusion.prediction import levels
from cascade.diffusion.samplers import SAMPLERS, Denoise
from cascade.diffusion.schedule import DiscreteSchedule, Schedule, section_indices
from cascade.errors import InputError, unknown
from cascade.flatten import flattened
from cascade.inpaint import Known, known_part
from cascade.nn.context import Context
from cascade.nn.unet import UNet
from cascade.random import seed_list

MAX_STEPS = 10_000
PIXELS_A_FORWARD = 4 * 1024 * 1024  # of one micro-batch on an accelerator

# on_step(step, total, x0_hat, rows): step counts from 1 to total over micro-batches; x0_hat is the current
# estimate (b 3 H W) of the pictures `rows`.
OnStep = Callable[[int, int, Tensor, range], None]


class Stage(nn.Module):
    """A U-Net with the diffusion process it was trained for. Build one from a config, or load one with
    `Cascade.from_pretrained`. The networks are given when they were built beforehand (on the meta device).
    `last` is the denoiser of the last step where that has a network of its own, which is not trained here."""

    def __init__(self, config: StageConfig, unet: UNet | None = None, last: UNet | None = None) -> None:
        super().__init__()
        self.config = config
        self.denoiser = Denoiser(unet if unet is not None else UNet(config.unet), config.diffusion)
        self.schedule: Schedule = self.denoiser.schedule
        self.last: Denoiser | None = None
        if config.last_unet is not None:
            self.last = Denoiser(last if last is not None else UNet(config.last_unet), config.diffusion)

    @property
    def unet(self) -> UNet:
        return cast(UNet, self.denoiser.net)

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    def extra_repr(self) -> str:
        config = self.config
        return f"{config.name}, {config.lowres_px or 'noise'} -> {config.image_px} px"

    @torch.no_grad()
    def sample(
        self,
        text: TextEmbedding | None = None,
        *,
        image_embed: Tensor | None = None,
        lowres: Tensor | None = None,
        inpaint: tuple[Tensor, Tensor] | None = None,
        seed: int | Sequence[int] = 0,
        negative: TextEmbedding | None = None,
        size: tuple[int, int] | None = None,
        micro_batch: int | None = None,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Tensor:
        """Draw pictures: float32, B 3 H W, in [-1, 1].

        text: encoded prompts, one row a picture; None, or a network without text, draws without.
        image_embed: B D, CLIP image embeddings; a network that takes none ignores them.
        lowres: B 3 h w in [-1, 1], required by a super-resolution stage and refused by a base stage.
        inpaint: (picture, mask), for a network with inpaint channels: B 3 H W in [-1, 1] of the size that is
            drawn, and B 1 H W, 1 where the picture is kept and 0 where it is drawn anew; one row of either
            serves all. The result holds the kept part as it was given.
        seed: one integer (picture i then draws from seed + i) or one a picture. Initial and low-resolution
            noise is drawn on the CPU, so that deterministic samplers agree between devices.
        negative: encoded negative prompts (one row, or one a picture) that take the place of the null text
            in the unconditional half of guidance.
        size: (H, W) in px; default the stage's own, or `lowres` times the stage's factor.
        micro_batch: pictures in one forward. Default: 1 on the CPU, where kernels round differently for
            different batch sizes, so that a picture is the same bits in any batch; on accelerators what fits
            4 Mpx.
        settings: any field of `SamplingConfig`, in place of the stage's default.
        Raises InputError on an unknown or impossible setting, size, seed, or shape.
        """
        chosen = resolve_settings(self.config, settings)
        known = None if inpaint is None else self._accept_inpaint(inpaint)
        count = self._count(text, image_embed, lowres, known, seed)
        seeds = seed_list(seed, count)
        height, width = self.output_size(size, None if lowres is None else lowres.shape[-2:])
        text, negative = self._accept_text(text, "text"), self._accept_text(negative, "negative prompt")
        if negative is not None and len(negative) not in (1, count):
            raise InputError(f"negative prompt: expected 1 or {count} rows, got {len(negative)}")
        image_embed = self._accept_embed(image_embed)
        known = None if known is None else known.fitted(count, (height, width))

        per_forward = micro_batch if micro_batch is not None else self._micro_batch(height, width)
        if per_forward < 1:
            raise InputError(f"micro_batch: expected at least 1, got {per_forward}")
        chunks = [range(i, min(i + per_forward, count)) for i in range(0, count, per_forward)]

        was_training = self.training
        self.eval()  # no dropout
        try:
            pictures = []
            for number, rows in enumerate(chunks):
                part = slice(rows.start, rows.stop)
                pictures.append(
                    self._sample_rows(
                        chosen,
                        None if text is None else text[part],
                        _rows_or_all(negative, part),
                        None if image_embed is None else image_embed[part],
                        None if lowres is None else lowres[part],
                        None if known is None else known[part].to(self.device),
                        seeds[part],
                        (height, width),
                        _count_steps(on_step, number, len(chunks), rows),
                    )
                )
        finally:
            self.train(was_training)
        return torch.cat(pictures)  # B 3 H W

    def output_size(
        self, size: tuple[int, int] | None = None, lowres_size: Sequence[int] | None = None
    ) -> tuple[int, int]:
        """(H, W) of the pictures this stage draws, from the wanted size or that of its input."""
        config = self.config
        if size is None:
            if lowres_size is None or config.lowres_px is None:
                size = (config.image_px, config.image_px)
            else:
                factor = config.image_px / config.lowres_px
                size = (round(lowres_size[0] * factor), round(lowres_size[1] * factor))
        multiple = self.unet.size_multiple
        for name, length in zip(("height", "width"), size, strict=True):
            if isinstance(length, bool) or not isinstance(length, int) or length < 1 or length % multiple:
                near = (
                    max(multiple, round(length / multiple) * multiple)
                    if isinstance(length, (int, float))
                    else multiple
                )
                raise InputError(
                    f"{name} {length!r} in stage {config.name}: expected a positive multiple of {multiple}, "
                    f"the nearest is {near}"
                )
        return size

    def _sample_rows(
        self,
        settings: SamplingConfig,
        text: TextEmbedding | None,
        negative: TextEmbedding | None,
        image_embed: Tensor | None,
        lowres: Tensor | None,
        known: Known | None,
        seeds: list[int],
        size: tuple[int, int],
        on_step: Callable[[int, int, Tensor], None] | None,
    ) -> Tensor:
        name, device = self.config.name, self.device
        shape = (self.config.unet.in_channels, *size)
        if text is None and image_embed is None:
            settings = replace(settings, guidance=1.0)  # nothing to guide by
        if settings.guidance != 1 and negative is None and text is not None:
            if not self.config.unet.learned_null:
                raise InputError(
                    f"stage {name} has no learned null text: guidance needs negative=, the encoded ''"
                )
        given = None if lowres is None else self._lowres(lowres, settings.aug_level, seeds, size)
        conditioning = self._condition(text, image_embed, given, known)
        redraw = given if settings.lowres_noise == "step" else None
        guided = self._guided(self.denoiser, settings, conditioning, negative, len(seeds), redraw)
        grid, denoise = self._grid(settings), guided
        if self.last is not None:
            last = self._guided(self.last, settings, conditioning, negative, len(seeds), redraw)
            denoise = _last_by(guided, last, float(grid[-2]))

        def step_noise(step: int) -> Tensor:
            return random.normal(shape, seeds, "step", name, step, device=device)

        base = self._residual_base(conditioning)
        if known is not None:
            denoise = known.kept_by(denoise, base)
        if settings.noise_free_steps > 0:
            denoise = _noise_free(denoise, float(grid[max(-1 - settings.noise_free_steps, -len(grid))]))

        def report(step: int, total: int, x0: Tensor) -> None:
            if on_step is not None:
                on_step(step, total, x0 if base is None else x0 + base)

        x = random.normal(shape, seeds, "init", name).to(device).contiguous(memory_format=torch.channels_last)
        if settings.temperature != 1:
            x = settings.temperature * x
        sampler = SAMPLERS[settings.sampler]
        x0 = sampler(denoise, x, grid, noise=step_noise, on_step=report, eta=settings.eta)
        x0 = (x0 if base is None else x0 + base).float().clamp(-1, 1)
        if settings.flatten > 0:
            x0 = flattened(x0, settings.flatten, settings.flatten_rounds)
            x0 = x0 if known is None else known.over(x0)
        return x0.contiguous()

    def _grid(self, settings: SamplingConfig) -> Tensor:
        if settings.respacing is None:
            return self.schedule.grid(settings.steps, settings.spacing)
        assert isinstance(self.schedule, DiscreteSchedule)  # `resolve_settings` refuses others
        return self.schedule.respaced(settings.respacing)

    def _guided(
        self,
        denoiser: Denoiser,
        settings: SamplingConfig,
        conditioning: Conditioning,
        negative: TextEmbedding | None,
        count: int,
        redraw: Lowres | None,
    ) -> GuidedDenoiser:
        """One of the stage's networks with the conditions of `count` pictures. `redraw` is the low-resolution
        picture where each evaluation and half of guidance noises it anew."""
        unet = cast(UNet, denoiser.net)
        cond, pair = unet.prepare(conditioning, count), None
        if settings.guidance != 1:
            null = conditioning.with_(text=negative, image_embed=None)
            pair = cond.cat([cond, unet.prepare(null, count)])
        if self.device.type == "cpu" and self.dtype != torch.float32:
            # the attention kernel is up to twice as fast where the number of keys is a multiple of this
            cond, pair = cond.aligned(16), None if pair is None else pair.aligned(16)
        if redraw is None:
            return GuidedDenoiser(denoiser, cond, pair, settings, self.schedule)

        def anew(context: Context, *halves: str) -> Callable[[int], Context]:
            def at(step: int) -> Context:
                return replace(context, lowres=torch.cat([redraw.noised(half, step) for half in halves]))

            return at

        both = None if pair is None else anew(pair, "cond", "null")
        return GuidedDenoiser(denoiser, anew(cond, "cond"), both, settings, self.schedule)

    def _lowres(self, picture: Tensor, level: float, seeds: list[int], size: tuple[int, int]) -> Lowres:
        augment = self.config.augment
        if augment is None:
            raise InputError(
                f"stage {self.config.name} takes a low-resolution picture but has no augment config"
            )
        levels = torch.full((len(seeds),), level, device=self.device)  # B
        return Lowres(
            picture.to(self.device).float(), levels, seeds, size, augment, self.config.name, self.dtype
        )

    def _residual_base(self, conditioning: Conditioning) -> Tensor | None:
        """What is added to the result of a stage that diffuses the residual of its input."""
        augment = self.config.augment
        if augment is None or not augment.residual:
            return None
        assert conditioning.lowres is not None and conditioning.aug_level is not None
        return residual_base(conditioning.lowres.float(), conditioning.aug_level, augment)

    def _condition(
        self,
        text: TextEmbedding | None,
        image_embed: Tensor | None,
        lowres: Lowres | None,
        known: Known | None,
    ) -> Conditioning:
        """The network's conditioning, with the low-resolution picture at the stage's size and noise level."""
        inpaint = None if known is None else known.channels().to(self.dtype)
        told = Conditioning(text=text, image_embed=image_embed, inpaint=inpaint)
        if lowres is None:
            return told
        level = told_level(lowres.level, lowres.augment.schedule)
        return told.with_(lowres=lowres.noised(), aug_level=level)

    def _micro_batch(self, height: int, width: int) -> int:
        return 1 if self.device.type == "cpu" else max(1, PIXELS_A_FORWARD // (height * width))

    def _count(
        self,
        text: TextEmbedding | None,
        image_embed: Tensor | None,
        lowres: Tensor | None,
        known: Known | None,
        seed: int | Sequence[int],
    ) -> int:
        """Number of pictures; everything given must agree on it."""
        name, takes = self.config.name, self.config.lowres_px is not None
        if text is not None and not isinstance(text, TextEmbedding):
            raise InputError(f"stage {name}: expected encoded prompts, from Cascade.encode, got {text!r:.60}")
        if takes and lowres is None:
            raise InputError(
                f"stage {name} needs lowres=, a picture of about {self.config.lowres_px} px in [-1, 1]"
            )
        if lowres is not None:
            if not takes:
                raise InputError(f"stage {name} starts from noise: expected no lowres=")
            if lowres.ndim != 4 or lowres.shape[1] != 3:
                raise InputError(
                    f"lowres of stage {name}: expected shape (B, 3, H, W), got {tuple(lowres.shape)}"
                )
        counts = {
            "text": None if text is None else len(text),
            "image_embed": None if image_embed is None else len(image_embed),
            "lowres": None if lowres is None else len(lowres),
            "inpaint": None if known is None or len(known) == 1 else len(known),
            "seed": len(seed) if isinstance(seed, Sequence) else None,
        }
        given = {key: value for key, value in counts.items() if value is not None}
        if len(set(given.values())) > 1:
            raise InputError(f"stage {name}: rows differ: {', '.join(f'{k} {v}' for k, v in given.items())}")
        return next(iter(given.values()), 1)

    def _accept_inpaint(self, inpaint: tuple[Tensor, Tensor]) -> Known:
        if not self.config.unet.inpaint_channels:
            expected = "no inpaint=, or a network that has them, as GLIDE's inpaint variants"
            raise InputError(f"stage {self.config.name} has no inpaint channels: expected {expected}")
        return known_part(inpaint)

    def _accept_text(self, text: TextEmbedding | None, what: str) -> TextEmbedding | None:
        """The text on this stage's device, its widths checked; None for a network without text."""
        dims = self.config.unet.text_dims
        if text is None or not dims:
            return None
        text = text.select(self.config.text_sequences)
        widths = tuple(s.states.shape[-1] for s in text.sequences)
        if widths != dims:
            raise InputError(
                f"{what}: stage {self.config.name} was trained on token widths {list(dims)}, "
                f"the text encoder gives {list(widths)}"
            )
        return text.to(self.device, self.dtype)

    def _accept_embed(self, image_embed: Tensor | None) -> Tensor | None:
        dim = self.config.unet.image_embed_dim
        if image_embed is None or dim is None:
            return None
        if image_embed.ndim != 2 or image_embed.shape[1] != dim:
            raise InputError(
                f"image_embed of stage {self.config.name}: expected shape (B, {dim}), "
                f"got {tuple(image_embed.shape)}"
            )
        return image_embed.to(self.device, self.dtype)


def resolve_settings(config: StageConfig, settings: dict[str, Any]) -> SamplingConfig:
    """The stage's sampling settings with `settings` in place of its defaults.

    Raises InputError on an unknown name (with the nearest), a wrong type, nan, or a value out of range."""
    place = f"stage {config.name}"
    known = to_dict(config.sampling)
    for name in settings:
        if name not in known:
            raise unknown("setting", name, known, where=place)
    chosen = from_dict(SamplingConfig, {**known, **settings}, where=place)

    def check(name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"{place}.{name}: expected {expected}, got {getattr(chosen, name)!r}")

    low, high = chosen.guidance_interval
    discrete = config.diffusion.schedule.name.startswith("discrete")
    most = 1000 if discrete else MAX_STEPS
    check("steps", 1 <= chosen.steps <= most, f"an integer from 1 to {most}")
    check("spacing", discrete or chosen.spacing in ("t", "logsnr", "edm"), "t, logsnr or edm")
    if chosen.respacing is not None:
        check("respacing", discrete, "null, as this stage's schedule is not discrete")
        section_indices(chosen.respacing)
    check("temperature", 0 < chosen.temperature <= 2, "a number above 0, at most 2")
    residual = config.augment is not None and config.augment.residual
    check("lowres_noise", chosen.lowres_noise == "once" or not residual, "once, as this stage adds its input")
    check("eta", 0 <= chosen.eta <= 1, "a number from 0 to 1")
    check("guidance", math.isfinite(chosen.guidance), "a finite number")
    check("guidance_interval", 0 <= low < high <= 1, "[low, high] with 0 <= low < high <= 1")
    check("guidance_rescale", 0 <= chosen.guidance_rescale <= 1, "a number from 0 to 1")
    check("threshold_percentile", 0 < chosen.threshold_percentile <= 1, "a number above 0, at most 1")
    check("threshold_cap", chosen.threshold_cap >= 1, "a number of at least 1")
    check("noise_free_steps", chosen.noise_free_steps >= 0, "an integer of at least 0")
    check("flatten", 0 <= chosen.flatten <= 1, "a number from 0 to 1")
    check("flatten_rounds", chosen.flatten_rounds >= 1, "an integer of at least 1")
    check("aug_level", 0 <= chosen.aug_level <= 1, "a number from 0 to 1")
    if config.lowres_px is None:
        check("aug_level", chosen.aug_level == 0, "0, as this stage takes no low-resolution picture")
    return chosen


def _rows_or_all(negative: TextEmbedding | None, part: slice) -> TextEmbedding | None:
    """Rows of a negative prompt; a single row stands for every picture."""
    if negative is None:
        return None
    return negative.repeat(part.stop - part.start) if len(negative) == 1 else negative[part]


def _last_by(denoise: Denoise, last: Denoise, level: float) -> Denoise:
    """`denoise`, but `last` at the cleanest log-SNR of a grid."""
    return lambda x, logsnr: (last if float(logsnr[0]) == level else denoise)(x, logsnr)


def _noise_free(denoise: Denoise, level: float) -> Denoise:
    """`denoise`, but from the log-SNR `level` on it is shown alpha times its own estimate before.

    What a network leaves uneven in an estimate hides in the noise that is added to it, and stays. Told of
    noise where there is none it takes the unevenness away. Over many steps colours would fade to the mean."""
    last: Tensor | None = None

    def shown(x: Tensor, logsnr: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        nonlocal last
        if last is not None and float(logsnr[0]) >= level:
            x = levels(logsnr, last)[0] * last
        found = denoise(x, logsnr)
        last = found[0] if isinstance(found, tuple) else found
        return found

    return shown


def _count_steps(
    on_step: OnStep | None, chunk: int, chunks: int, rows: range
) -> Callable[[int, int, Tensor], None] | None:
    """A sampler's callback (step from 0, within one micro-batch) that counts over all micro-batches."""
    if on_step is None:
        return None

    def report(step: int, total: int, x0_hat: Tensor) -> None:
        on_step(chunk * total + step + 1, chunks * total, x0_hat, rows)

    return report
