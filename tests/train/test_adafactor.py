"""Adafactor: the paper's update, over the axes that optax factors; resumed bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from train.__main__ import main
from train.adafactor import Adafactor


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor) -> list[dict[str, Tensor]]:
    """The weights after a step on each input."""
    found = []
    for x in inputs:
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: p.detach().clone() for name, p in net.named_parameters()})
    return found


def test_a_matrix_and_a_vector_are_updated_as_transformers_updates_them() -> None:
    from transformers.optimization import Adafactor as Other

    torch.manual_seed(0)
    net, inputs = nn.Linear(24, 40), torch.randn(20, 8, 24)
    other = copy.deepcopy(net)
    found = steps(net, Adafactor(net.parameters(), 1e-2, 0.0), inputs)
    fixed = Other(other.parameters(), lr=1e-2, scale_parameter=True, relative_step=False)
    for a, b in zip(found, steps(other, fixed, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_kernel_is_factored_over_its_channels() -> None:
    """Algorithm 4 written out, at each place of the kernel, in float64; RMS and clipping over all of it."""
    torch.manual_seed(0)
    net = nn.Conv2d(6, 10, 3, bias=False).to(memory_format=torch.channels_last)
    optimizer, lr = Adafactor(net.parameters(), 0.02, 0.1), 0.02
    weight = net.weight.detach().double()
    rows, columns = torch.zeros(10, 3, 3).double(), torch.zeros(6, 3, 3).double()  # R, C
    for t in range(1, 6):
        net(torch.randn(2, 6, 8, 8) / t).square().mean().backward()
        assert net.weight.grad is not None
        g = net.weight.grad.double()
        decay = 1 - t**-0.8
        rows = decay * rows + (1 - decay) * (g**2 + 1e-30).sum(1)
        columns = decay * columns + (1 - decay) * (g**2 + 1e-30).sum(0)
        update = g / (rows[:, None] * columns[None] / rows.sum(0)).sqrt()
        update /= max(1.0, float(update.square().mean().sqrt()))
        scale = max(1e-3, float(weight.square().mean().sqrt()))
        weight = weight * (1 - lr * 0.1) - lr * scale * update
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(net.weight.detach().double(), weight, rtol=1e-5, atol=1e-7)
    slots = optimizer.state[net.weight]
    assert slots["row_var"].numel() == 9 * 6 and slots["col_var"].numel() == 9 * 10
    assert net.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_weight_without_gradient_stays() -> None:
    used, unused = nn.Parameter(torch.ones(4, 4, 3, 3)), nn.Parameter(torch.ones(4, 5, 3, 3))
    used.grad = torch.ones_like(used)
    optimizer = Adafactor([used, unused], 0.1, 0.0)
    optimizer.step()
    assert unused not in optimizer.state and unused.grad is None and bool((unused == 1).all())
    torch.testing.assert_close(used.detach(), torch.full((4, 4, 3, 3), 0.9))  # lr x RMS 1, in full
    assert used.grad.shape == used.shape


def test_a_stage_is_trained_with_it_and_resumed_to_the_last_bit(recipe_file: Path, tmp_path: Path) -> None:
    settings = ("optimizer=adafactor", "lr=0.02", "warmup_images=0")
    for out, parts in ((tmp_path / "whole", [48]), (tmp_path / "parts", [16, 48])):
        for images in parts:
            argv = [str(recipe_file), "--stage", "sr256", "--out", str(out)]
            for setting in (*settings, f"images={images}"):
                argv += ["--set", f"sr256.train.{setting}"]
            assert main(argv) == 0
    folders = [tmp_path / name / "sr256-training" for name in ("whole", "parts")]
    for name in ("network", "ema", "optimizer"):
        whole, parts = (load_file(folder / "state-0000000048" / f"{name}.safetensors") for folder in folders)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole), name
    assert {key.rsplit("/", 1)[1] for key in whole} == {"step", "row_var", "col_var", "variance"}
