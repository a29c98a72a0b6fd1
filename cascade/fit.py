"""Which stages, prior and text encoder belong together, and why others do not."""

from __future__ import annotations

from collections.abc import Sequence

from cascade.config import StageConfig
from cascade.errors import InputError


def check_fit(
    stages: Sequence[StageConfig], text_dims: Sequence[int], prior_embed_dim: int | None = None
) -> None:
    """Raise InputError, one line, unless the stages (in order of size) make one cascade.

    text_dims: widths of the text encoder's token sequences. prior_embed_dim: width of the prior's result."""
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names):
        raise InputError(f"stages: expected different names, got {names}")
    for before, stage in zip(stages, stages[1:], strict=False):
        if stage.lowres_px is None:
            raise InputError(
                f"stages {before.name} and {stage.name} both start from noise: expected one base stage"
            )
        if stage.lowres_px != before.image_px:
            raise InputError(
                f"stage {stage.name} takes pictures of {stage.lowres_px} px: expected {before.image_px}, "
                f"what stage {before.name} draws"
            )
    for stage in stages:
        _check_text(stage, tuple(text_dims))
        width = stage.unet.image_embed_dim
        if width is not None and prior_embed_dim is not None and width != prior_embed_dim:
            raise InputError(
                f"stage {stage.name} takes image embeddings of width {width}, the prior gives "
                f"{prior_embed_dim}"
            )


def _check_text(stage: StageConfig, given: tuple[int, ...]) -> None:
    dims = stage.unet.text_dims
    chosen = range(len(given)) if stage.text_sequences is None else stage.text_sequences
    if any(i not in range(len(given)) for i in chosen):
        raise InputError(
            f"stage {stage.name}: text_sequences {list(chosen)}: the text encoder gives {len(given)}"
        )
    widths = tuple(given[i] for i in chosen)
    if dims and dims != widths:
        raise InputError(
            f"stage {stage.name} was trained on token widths {list(dims)}, "
            f"the text encoder gives {list(widths)}"
        )
