"""Stages that start from another model, and adapters: what they change, what they leave, what they weigh."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cascade import Cascade, Stage
from cascade.adapter import load_adapter
from cascade.checkpoint import WEIGHTS
from cascade.errors import InputError
from train.__main__ import main
from train.components import assemble, component_folder, load_stage
from train.recipe import Recipe
from train.tasks import Task, make_task

Tiny = Callable[..., Recipe]


def adapted(tiny: Tiny, trained: Path, stage: str = "base", *settings: str) -> Task:
    start = f"{stage}.train.init_from={trained / stage}"
    return make_task(tiny(start, f"{stage}.train.lora={{rank: 2, alpha: 3}}", *settings), trained, stage)


def train_a_little(task: Task, steps: int = 3) -> None:
    task.train()
    optimizer = torch.optim.AdamW(task.network.parameters(), lr=0.05)
    for step in range(steps):
        task(task.make([4 * step + i for i in range(4)], list(range(4)))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("source", ["model", "sr256"])
def test_a_stage_starts_from_a_model_or_a_component(tiny: Tiny, trained: Path, source: str) -> None:
    task = make_task(tiny(f"sr256.train.init_from={trained / source}"), trained, "sr256")
    weights = load_file(component_folder(str(trained / source), "sr256") / WEIGHTS)
    assert weights.keys() == task.network.state_dict().keys()
    for name, tensor in task.network.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, weights[name].float())


def test_a_prior_goes_on_with_the_statistics_it_knows(tiny: Tiny, trained: Path) -> None:
    changed = f"prior.train.init_from={trained / 'prior'}", "data.styles=[noto]"
    task, other = make_task(tiny(*changed), trained, "prior"), make_task(tiny(changed[1]), trained, "prior")
    mean = load_file(trained / "prior" / WEIGHTS)["statistics.mean"]
    assert torch.equal(task.network.get_buffer("statistics.mean"), mean)
    assert not torch.equal(other.network.get_buffer("statistics.mean"), mean)


@pytest.mark.parametrize(
    ("settings", "source", "message"),
    [
        (
            ["sr256.stage.unet.channels=[16, 24]", "sr256.stage.unet.head_channels=8"],
            "sr256",
            r"sr256.train.init_from: .*sr256: .*wrongly shaped tensor .* instead of .*: expected the network",
        ),
        (["sr256.stage.diffusion.prediction=eps"], "sr256", "predicts 'v': expected 'eps', as in the recipe"),
        ([], "prior", "prior/config.json: expected class Stage, found 'DiffusionPrior'"),
        ([], "nowhere", "no model .*nowhere"),
    ],
)
def test_what_does_not_fit_is_one_line(
    tiny: Tiny, trained: Path, settings: list[str], source: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make_task(tiny(f"sr256.train.init_from={trained / source}", *settings), trained, "sr256")
    assert "\n" not in str(caught.value)


def test_a_component_the_model_lacks_is_named(trained: Path) -> None:
    with pytest.raises(InputError, match="unknown component 'sr265' in .*did you mean 'sr256'"):
        component_folder(str(trained / "model"), "sr265")


def test_a_stage_of_no_images_is_taken_as_it_is(recipe_file: Path, trained: Path, tmp_path: Path) -> None:
    argv = [str(recipe_file), "--stage", "sr256", "--out", str(tmp_path), "--set", "sr256.train.images=0"]
    assert main([*argv, "--set", f"sr256.train.init_from={trained / 'model'}"]) == 0
    found, source = (load_file(out / "sr256" / WEIGHTS) for out in (tmp_path, trained / "model"))
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in source.items())
    assert main(argv) == 2  # without weights to take


@pytest.mark.parametrize("stage", ["base", "prior"])
def test_training_changes_adapters_alone(tiny: Tiny, trained: Path, stage: str) -> None:
    task = adapted(tiny, trained, stage)
    before = {name: t.clone() for name, t in task.network.state_dict().items()}
    train_a_little(task)
    changed = {n for n, t in task.network.state_dict().items() if not torch.equal(t, before[n])}
    assert changed and changed == {n for n in before if ".lora_A." in n or ".lora_B." in n}
    assert changed == {n for n, p in task.network.named_parameters() if p.requires_grad}


def test_merged_weights_answer_as_the_network_with_adapters_does(
    tiny: Tiny, trained: Path, tmp_path: Path
) -> None:
    task = adapted(tiny, trained)
    batch = task.make([0, 1, 2, 3], [0, 1, 2, 3])
    task.eval()
    with torch.no_grad():
        plain = make_task(tiny(), trained, "base").eval()
        plain.network.load_state_dict(load_file(trained / "base" / WEIGHTS))
        assert torch.equal(task(batch), plain(batch))  # nothing is changed at first
        train_a_little_with_grad(task)
        task.eval()
        changed = task(batch)
        assert (changed - plain(batch)).abs().max() > 1e-4
        plain.network.load_state_dict(task.merged(task.network.state_dict()))
        torch.testing.assert_close(plain(batch), changed, rtol=0, atol=1e-5)
        # and as another program merges what was saved
        task.adapter(task.network.state_dict()).save(tmp_path / "lora")
        plain.network.load_state_dict(load_file(trained / "base" / WEIGHTS))
        load_adapter(tmp_path / "lora").merge(plain.network.state_dict())
        torch.testing.assert_close(plain(batch), changed, rtol=0, atol=1e-5)


@torch.enable_grad()
def train_a_little_with_grad(task: Task) -> None:
    train_a_little(task)


def test_targets_that_name_no_layer_are_refused(tiny: Tiny, trained: Path) -> None:
    with pytest.raises(
        InputError, match=r"base.train.lora.targets \['to_q'\]: expected names of layers: .*q"
    ):
        adapted(tiny, trained, "base", "base.train.lora.targets=[to_q]")
    with pytest.raises(InputError, match="lora .*: expected init_from, the weights that are adapted"):
        tiny("base.train.lora={}")


def test_an_adapter_is_trained_saved_resumed_and_assembled(
    recipe_file: Path, trained: Path, tiny: Tiny, tmp_path: Path
) -> None:
    """By the command: small on disk, grids and later stages see it merged, and the base is untouched."""
    shutil.copytree(trained / "clip", tmp_path / "clip")
    source = (trained / "base" / WEIGHTS).read_bytes()
    settings = [f"base.train.init_from={trained / 'base'}", "base.train.lora.rank=2", "base.train.lr=0.05"]
    argv = [str(recipe_file), "--stage", "base", "--out", str(tmp_path)]
    argv += [word for setting in settings for word in ("--set", setting)]
    assert main([*argv, "--set", "base.train.images=16"]) == 0
    assert main([*argv]) == 0  # from its state
    records = (tmp_path / "base-training" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["images"] for line in records] == [8, 16, 24]
    assert (tmp_path / "base" / WEIGHTS).stat().st_size < 0.25 * len(source)
    assert (trained / "base" / WEIGHTS).read_bytes() == source

    adapter = load_adapter(tmp_path / "base")
    assert (adapter.config.component, adapter.config.rank, adapter.config.base) == (
        "base", 2, str(trained / "base"),
    )  # fmt: skip
    expected = load_file(trained / "base" / WEIGHTS)
    adapter.merge(expected)
    merged = load_stage(tiny(), tmp_path, "base").unet.state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(
        merged["down.1.attentions.0.q.weight"],
        load_file(trained / "base" / WEIGHTS)["down.1.attentions.0.q.weight"],
    )
    pipe = Cascade.from_pretrained(assemble(tiny(), tmp_path))
    assert isinstance(pipe.stages["base"], Stage)
    assert torch.equal(
        pipe.stages["base"].unet.stem.weight.float(), expected["stem.weight"].bfloat16().float()
    )


def test_an_adapter_is_no_start_for_a_network_of_other_adapters(tiny: Tiny, trained: Path) -> None:
    """A training state of one rank is not resumed with another."""
    one, other = adapted(tiny, trained), adapted(tiny, trained, "base", "base.train.lora.rank=4")
    assert one.identity() != other.identity() != make_task(tiny(), trained, "base").identity()
