"""Plans on fake tensors against the real networks: parameters, FLOPs, and what a forward pass keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cascade.nn.unet import UNet
from prior.clip import CLIP
from prior.diffusion import PriorNet
from tests.conftest import EMBED, LENGTH, WIDTH
from train.plan import _measure, _network, make_plan
from train.recipe import Recipe
from train.tasks import make_task

Tiny = Callable[..., Recipe]


def real(recipe: Recipe, stage: str) -> tuple[nn.Module, float]:
    """The stage's network, and the FLOPs of one image's forward pass counted as it really runs, attention as
    matrix products."""
    network, _, learn = _network(recipe, stage)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        learn(2)
    return network, counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("stage", "kind"),
    [("clip", CLIP), ("prior", PriorNet), ("base", UNet), ("sr256", UNet), ("sr1024", UNet)],
)
def test_a_plan_is_that_of_the_real_network(tiny: Tiny, stage: str, kind: type) -> None:
    plan = make_plan(tiny(), stage)
    network, flops = real(tiny(), stage)
    assert isinstance(network, kind)
    assert plan.parameters == sum(p.numel() for p in network.parameters())
    assert plan.flops == pytest.approx(flops)
    assert plan.activations > 0 and plan.casts == 0  # precision fp32


def test_a_step_costs_what_the_task_computes(
    tiny: Tiny, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a guess on two pictures an image, and a fine network, for which the base looks once more."""
    monkeypatch.setattr("train.plan.TEXT_LENGTH", LENGTH)
    settings = ["patch=4", "fine_channels=[8, 8]", "position_grid=4", "guess_width=8"]
    recipe = tiny(*(f"base.stage.unet.{s}" for s in settings), "base.train.guess_batch=16")
    plan, task = make_plan(recipe, "base"), make_task(recipe, trained, "base")
    batch = task.make([0, 1], [0, 1])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        task(batch)
    assert plan.flops + plan.looks == pytest.approx(counter.get_total_flops() / 2)
    assert plan.step_flops == 3 * plan.flops + plan.looks
    assert 0 < plan.looks < plan.flops


def test_the_guess_of_a_prior_is_counted_for_its_own_batch(tiny: Tiny) -> None:
    """Three dense layers, on two texts an image more."""
    flops = [
        make_plan(tiny("prior.model.guess_width=8", f"prior.train.guess_batch={count}"), "prior").flops
        for count in (8, 24)
    ]
    assert flops[1] - flops[0] == 2 * 2 * 8 * (WIDTH + 8 + EMBED)


def test_a_linear_layer_keeps_its_input_and_its_cast_weight() -> None:
    layer = nn.Linear(8, 32, bias=False)
    rows = torch.ones(3, 8)
    assert _measure(lambda n: layer(rows[:n]), layer, 3, None) == (2 * 3 * 8 * 32, 3 * 8 * 4)
    _, kept = _measure(lambda n: layer(rows[:n]).float() * 1, layer, 3, torch.bfloat16)
    assert (
        kept == 3 * 8 * 2
    )  # the weight's cast is kept for the gradient of the input, which is not asked for
    _, kept = _measure(lambda n: layer(rows[:n].requires_grad_()), layer, 3, torch.bfloat16)
    assert kept == 3 * 8 * 2 + 8 * 32 * 2


def test_activations_grow_with_the_crop(tiny: Tiny) -> None:
    """Fourfold, less what the text costs."""
    local = "sr1024.stage.unet.self_attention=[false, false]"
    small = make_plan(tiny(local), "sr1024")
    large = make_plan(tiny(local, "sr1024.train.crop_px=64"), "sr1024")
    assert large.parameters == small.parameters
    assert 3.9 < large.flops / small.flops < 4
    assert 3.8 < large.activations / small.activations < 4


def test_checkpointing_keeps_the_inputs_of_the_blocks(tiny: Tiny) -> None:
    setting = "base.train.gradient_checkpointing=true"
    full, less = make_plan(tiny(), "base"), make_plan(tiny(setting), "base")
    assert less.flops == full.flops
    block_inputs = 4 * 16 * (16 * 16 + 8 * 8 + 8 * 8 + 2 * 16 * 16)  # two levels down, two up: float32
    assert block_inputs < less.activations < 0.6 * full.activations


def test_bf16_halves_activations_and_adds_casts(tiny: Tiny) -> None:
    full, half = make_plan(tiny(), "sr256"), make_plan(tiny("sr256.train.precision=bf16"), "sr256")
    assert half.flops == full.flops
    assert half.activations < full.activations
    assert half.parameters < half.casts < 2 * half.parameters  # most weights are cast, norms are not
