"""Low-rank adapters: merged weights against the sum written out, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cascade import Cascade, InputError
from cascade.adapter import Adapter, AdapterConfig, load_adapter

WEIGHTS = "diffusion_pytorch_model.safetensors"


def make(layers: dict[str, tuple[int, ...]], component: str = "base", rank: int = 2) -> Adapter:
    """An adapter of random halves for layers of these weight shapes."""
    tensors = {}
    for seed, (name, (out, *rest)) in enumerate(layers.items()):
        generator = torch.Generator().manual_seed(seed)
        tensors[f"{name}.lora_A"] = torch.randn(rank, *rest, generator=generator)
        tensors[f"{name}.lora_B"] = torch.randn(out, rank, *(1 for _ in rest[1:]), generator=generator)
    return Adapter(AdapterConfig(component=component, base="a model", rank=rank, alpha=6.0), tensors)


def test_a_merged_linear_layer_is_the_layer_beside_its_adapter() -> None:
    """W x + alpha / r B (A x), of three and of four numbers."""
    layer, adapter = nn.Linear(4, 3), make({"layer": (3, 4)})
    a, b = adapter.tensors["layer.lora_A"], adapter.tensors["layer.lora_B"]
    x = torch.randn(5, 4)
    expected = layer(x) + 3.0 * (x @ a.T @ b.T)
    adapter.merge(nn.ModuleDict({"layer": layer}).state_dict())
    torch.testing.assert_close(layer(x), expected)


def test_a_merged_convolution_is_the_two_convolutions_beside_it() -> None:
    conv, adapter = nn.Conv2d(4, 3, 3, padding=1), make({"conv": (3, 4, 3, 3)})
    x = torch.randn(2, 4, 8, 8)
    low = nn.functional.conv2d(x, adapter.tensors["conv.lora_A"], padding=1)
    expected = conv(x) + 3.0 * nn.functional.conv2d(low, adapter.tensors["conv.lora_B"])
    adapter.merge(nn.ModuleDict({"conv": conv}).state_dict())
    torch.testing.assert_close(conv(x), expected, rtol=1e-5, atol=1e-5)


def test_a_scale_scales_and_its_negative_takes_away() -> None:
    adapter = make({"w": (3, 4)})
    start = torch.randn(3, 4)
    whole, half = {"w.weight": start.clone()}, {"w.weight": start.clone()}
    adapter.merge(whole)
    adapter.merge(half, 0.5)
    torch.testing.assert_close(half["w.weight"], (start + whole["w.weight"]) / 2)
    adapter.merge(half, -0.5)
    torch.testing.assert_close(half["w.weight"], start, rtol=0, atol=1e-5)


def test_halves_are_added_in_float32() -> None:
    """Rounded once: the sum, not the change before it."""
    adapter = make({"w": (3, 4)})
    start = torch.randn(3, 4, dtype=torch.bfloat16)
    weights, exact = {"w.weight": start.clone()}, {"w.weight": start.float()}
    adapter.merge(weights)
    adapter.merge(exact)
    assert torch.equal(weights["w.weight"], exact["w.weight"].bfloat16())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"w": (3, 4), "v": (3, 4)}, "adapter of base: the model has no v.weight: expected one like a model"),
        ({"w": (3, 5)}, r"adapter of base: w.weight is \[3, 5\]: expected \[3, 4\], as in the model"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_merged(
    layers: dict[str, tuple[int, ...]], message: str
) -> None:
    weights = {"w.weight": torch.ones(3, 4)}
    with pytest.raises(InputError, match=message):
        make(layers).merge(weights)
    assert torch.equal(weights["w.weight"], torch.ones(3, 4))


def test_a_folder_holds_it_all(tmp_path: Path) -> None:
    adapter = make({"w": (3, 4), "c": (3, 4, 3, 3)})
    adapter.save(tmp_path / "lora")
    found = load_adapter(tmp_path / "lora")
    assert found.config == adapter.config
    assert found.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(found.tensors[name], t) for name, t in adapter.tensors.items())


def test_damaged_and_other_folders_are_refused(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(InputError, match="expected class LoRA, found 'Stage'"):
        load_adapter(model_folder / "base")
    make({"w": (3, 4)}).save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["w.lora_B"]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="expected lora_A and lora_B of rank 2 for each layer"):
        load_adapter(tmp_path)


def test_a_model_takes_one_and_gives_it_back(model_folder: Path, tmp_path: Path) -> None:
    pipe = Cascade.from_pretrained(model_folder, dtype=torch.float32)
    layers = {"down.1.attentions.0.q": (32, 32), "stem": (32, 3, 3, 3)}
    make(layers).save(tmp_path / "lora")

    def draw() -> torch.Tensor:
        return pipe("a cat", seed=1, stop_at="base").stages["base"]

    plain = draw()
    assert pipe.load_adapter(tmp_path / "lora") is pipe
    changed = draw()
    assert (changed - plain).abs().max() > 0.01
    pipe.load_adapter(tmp_path / "lora", scale=-1)
    torch.testing.assert_close(draw(), plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("component", ["sr256", "prior"])
def test_every_component_can_take_one(model_folder: Path, tmp_path: Path, component: str) -> None:
    pipe = Cascade.from_pretrained(model_folder, dtype=torch.float32)
    part: Any = pipe.prior if component == "prior" else pipe.stages[component].unet
    name = next(n for n, m in part.named_modules() if isinstance(m, nn.Linear))
    before = part.get_submodule(name).weight.clone()
    make({name: tuple(before.shape)}, component).save(tmp_path / "lora")
    pipe.load_adapter(tmp_path / "lora")
    assert not torch.equal(part.get_submodule(name).weight, before)


def test_an_adapter_of_a_part_the_model_lacks(model_folder: Path, tmp_path: Path) -> None:
    make({"w": (3, 4)}, "sr265").save(tmp_path / "lora")
    with pytest.raises(InputError, match="unknown component 'sr265' in .*did you mean 'sr256'"):
        Cascade.from_pretrained(model_folder).load_adapter(tmp_path / "lora")
