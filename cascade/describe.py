"""What `cascade info` says of a model: its parts, what each expects, what is missing and what is not used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cascade.config import StageConfig
from cascade.pretrained.model import Model, Part


def describe(model: Model) -> Iterator[tuple[str, str]]:
    """Lines (label, text). Reads the shapes of all tensors, and so checks them against the configuration."""
    yield "model", str(model.folder)
    yield "family", model.family
    if model.licence is not None:
        yield "licence", model.licence.name
    for text in model.text:
        shown = {k: v for k, v in text.reference.items() if isinstance(v, str | int | float) and v != ""}
        yield "text encoder", ", ".join(f"{name} {value}" for name, value in shown.items())
    for name, part in model.parts.items():
        yield name, describe_part(part)
    for need in model.missing:
        yield "missing", need
    if model.unused:
        yield "not used", ", ".join(model.unused)


def describe_part(part: Part) -> str:
    """One line on a part: class, size, formats, and what it expects."""
    tensors = part.read("meta")
    count = sum(t.numel() for t in tensors.values())
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    line = f"{part.class_name}, {count / 1e6:.1f}M parameters in {' and '.join(dtypes)} ({_size(size)})"
    stage = part.stage
    if stage is None:
        return line + _prior_line(part.config)
    return line + _stage_line(stage)


def _stage_line(stage: StageConfig) -> str:
    sampling, unet = stage.sampling, stage.unet
    source = f"{stage.lowres_px} px" if stage.lowres_px else "noise"
    steps = sampling.respacing or f"{sampling.steps} steps"
    guidance = f"guidance {sampling.guidance:g}{', inpaints' if unet.inpaint_channels else ''}"
    widths = () if unet.text_transformer else unet.text_dims
    return f", {source} -> {stage.image_px} px, {sampling.sampler} {steps}, {guidance}" + _expects(
        widths, unet.text_embed_dim, unet.image_embed_dim
    )


def _prior_line(config: dict[str, Any]) -> str:
    if "text_dim" not in config:
        return ""
    return _expects((config["text_dim"],), config.get("embed_dim"), None)


def _expects(text: Sequence[int], pooled: int | None, image: int | None) -> str:
    given = [f"text tokens {width} wide" for width in text]
    given += [f"CLIP text embedding of {pooled}"] if pooled else []
    given += [f"image embedding of {image}"] if image else []
    return f", expects {', '.join(given)}" if given else ""


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
