"""A cascade of random weights that draws in milliseconds: 16 -> 32 -> 64 px, prior, CLIP, toy encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from cascade import random
from cascade.conditioning import TextEmbedding, Tokens
from cascade.config import AugmentConfig, SamplingConfig, StageConfig, UNetConfig
from cascade.pipeline import Cascade
from cascade.stage import Stage

WIDTH, LENGTH, EMBED = 24, 6, 16


class ToyEncoder:
    """One random vector a word, padded to LENGTH: enough for prompts to differ, nothing to load."""

    max_length = LENGTH

    def __init__(self, width: int = WIDTH) -> None:
        self.dims = (width,)

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding:
        states, mask = (
            torch.zeros(len(prompts), LENGTH, self.dims[0]),
            torch.zeros(len(prompts), LENGTH).bool(),
        )
        for row, prompt in enumerate(prompts):
            for place, word in enumerate(["<start>", *prompt.split()][:LENGTH]):
                states[row, place] = random.normal(self.dims, [0], word)[0]
                mask[row, place] = True
        return TextEmbedding((Tokens(states, mask),))

    def to(self, device: torch.device | str) -> ToyEncoder:
        return self

    def reference(self) -> dict[str, Any]:
        return {"kind": "toy", "width": self.dims[0]}


def tiny_stage(name: str, image_px: int, lowres_px: int | None = None, **unet: Any) -> Stage:
    """A stage of two levels whose output layer is not zero, so that every input shows in the picture."""
    conditions: dict[str, Any] = dict(
        text_dims=(WIDTH,), text_attention=(False, True), self_attention=(False, True)
    )
    if lowres_px is None:
        conditions |= dict(image_embed_dim=EMBED)
    else:
        conditions |= dict(lowres_channels=3)
    network = UNetConfig(
        **{
            **dict(channels=(32, 32), blocks=(1, 1), strides=(1, 2), head_channels=16, pool_heads=4),
            **conditions,
            **unet,
        }
    )
    stage = Stage(
        StageConfig(
            name=name,
            image_px=image_px,
            lowres_px=lowres_px,
            unet=network,
            augment=None if lowres_px is None else AugmentConfig(),
            sampling=SamplingConfig(steps=2, guidance=2.0, aug_level=0.0 if lowres_px is None else 0.1),
        )
    )
    _randomise(stage)
    return stage


def _randomise(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.05)


def tiny_prior() -> tuple[nn.Module, nn.Module]:
    """(prior, clip), of the real classes."""
    from prior import CLIP, ClipConfig, DiffusionPrior, PriorConfig

    prior = DiffusionPrior(
        PriorConfig(width=16, layers=1, heads=2, text_dim=WIDTH, text_length=LENGTH, embed_dim=EMBED, steps=2)
    )
    sizes: dict[str, int] = dict(image_px=16, patch=8, width=16, layers=1, heads=2)
    text: dict[str, int] = dict(text_dim=WIDTH, text_width=16, text_layers=1, text_heads=2)
    clip = CLIP(ClipConfig(embed_dim=EMBED, **sizes, **text))
    _randomise(prior)
    return prior, clip


@pytest.fixture(scope="session")
def tiny_cascade() -> Cascade:
    """Shared by all tests: do not change it."""
    torch.manual_seed(0)
    stages = [tiny_stage("base", 16), tiny_stage("sr256", 32, 16), tiny_stage("sr1024", 64, 32)]
    prior, clip = tiny_prior()
    return Cascade(stages, ToyEncoder(), prior, clip, name="tiny").to("cpu")  # type: ignore[arg-type]


@pytest.fixture
def toy_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Model folders load a `ToyEncoder`."""
    monkeypatch.setattr(
        "cascade.loading.load_text_encoder", lambda reference, folder, device: ToyEncoder(reference["width"])
    )


@pytest.fixture
def model_folder(tiny_cascade: Cascade, toy_encoders: None, tmp_path) -> Any:
    """The tiny cascade as a model folder."""
    tiny_cascade.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
