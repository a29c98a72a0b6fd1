"""What `cascade info` says of a model: its parts, what each expects, what is missing and what is not used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cascade.config import StageConfig
from cascade.pretrained.model import Model, Part, TextFiles

READS = {  # what a text encoder's reference may ask for
    "clean": "captions cleaned",
    "projection": "with its projection",
    "int8": "in 8 bits",
}


def describe(model: Model) -> Iterator[tuple[str, str]]:
    """Lines (label, text). Reads the shapes of all tensors, and so checks them against the configuration."""
    yield "model", str(model.folder)
    yield "family", model.family
    if model.licence is not None:
        yield "licence", model.licence.name
    for text in model.text:
        yield "text encoder", _text_line(text)
    for name, part in model.parts.items():
        yield name, describe_part(part)
    for need in model.missing:
        yield "missing", need
    if names := unused(model):
        yield "not used", ", ".join(names)


def unused(model: Model) -> list[str]:
    """What of a model has no use: components that are read by nothing here, a prior that no stage asks."""
    stages = [stage for part in model.parts.values() if (stage := part.stage) is not None]
    names = list(model.unused)
    if stages and "prior" in model.parts and not any(stage.unet.image_embed_dim for stage in stages):
        names.append("prior (no stage takes image embeddings)")
    return names


def describe_part(part: Part) -> str:
    """One line on a part: class, size, formats, and what it expects."""
    tensors = part.read("meta")
    count = sum(t.numel() for t in tensors.values())
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    line = f"{part.class_name}, {count / 1e6:.1f}M parameters in {' and '.join(dtypes)} ({_size(size)})"
    stage = part.stage
    if stage is None:
        return line + _prior_line(part)
    return line + _stage_line(stage)


def _text_line(text: TextFiles) -> str:
    """Where a text encoder comes from, and how it is used."""
    told = text.reference
    if told.get("kind") == "missing":
        return f"none: expected {told['expected']}"
    name = "in the model's folder" if text.folders else f"{told.get('name')}"
    words = [f"{told.get('kind')}, {name}"]
    words += [f"at most {told['max_length']} tokens"] if "max_length" in told else []
    words += [words_of for key, words_of in READS.items() if told.get(key)]
    return ", ".join(words)


def _stage_line(stage: StageConfig) -> str:
    sampling, unet = stage.sampling, stage.unet
    source = f"{stage.lowres_px} px" if stage.lowres_px else "noise"
    steps = sampling.respacing or f"{sampling.steps} steps"
    steps += ", the last by a network of its own" if stage.last_unet is not None else ""
    steps += f", the last {sampling.noise_free_steps} without noise" if sampling.noise_free_steps else ""
    level = f", aug level {sampling.aug_level:g}" if sampling.aug_level else ""
    level += f", flattened by {sampling.flatten:g}" if sampling.flatten else ""
    guidance = f"guidance {sampling.guidance:g}{', inpaints' if unet.inpaint_channels else ''}"
    widths = () if unet.text_transformer else unet.text_dims
    return f", {source} -> {stage.image_px} px, {sampling.sampler} {steps}, {guidance}{level}" + _expects(
        widths, unet.text_embed_dim, unet.image_embed_dim
    )


def _prior_line(part: Part) -> str:
    config = part.config
    if "text_dim" not in config:
        return ""
    width = config.get("embed_dim")
    if part.class_name == "CLIP":
        return f"{_expects((config['text_dim'],), None, None)}, gives embeddings of {width}"
    return f"{_expects((config['text_dim'],), width, None)}, gives image embeddings of {width}"


def _expects(text: Sequence[int], pooled: int | None, image: int | None) -> str:
    given = [f"text tokens {width} wide" for width in text]
    given += [f"CLIP text embedding of {pooled}"] if pooled else []
    given += [f"image embedding of {image}"] if image else []
    return f", expects {', '.join(given)}" if given else ""


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
