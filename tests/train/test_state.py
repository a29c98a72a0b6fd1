"""Training states: whole or absent, checked by hash, the newest valid one is taken."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from train import state
from train.ema import EMA
from train.state import Counters, load_state, save_state

IDENTITY = {"stage": "base", "network": {"unet": {"channels": [4], "dropout": 0.0}}, "batch": 8, "seed": 0}


class Run:
    """A network with every kind of entry (4-D, scalar, buffer), its average and its optimiser."""

    def __init__(self, seed: int = 0, width: int = 4) -> None:
        torch.manual_seed(seed)
        self.network = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
        self.network.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = EMA(self.network, 0.9)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.1, fused=True)

    def steps(self, number: int = 1) -> None:
        for _ in range(number):
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(self.ema.updates))
            (self.network(x) * self.network.scale).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update()

    def save(self, out: Path, images: int, identity: dict[str, Any] = IDENTITY) -> Path:
        counters = Counters(images, 1.5)
        return save_state(out, self.network, self.ema, self.optimizer, counters, identity)

    def load(self, out: Path, identity: dict[str, Any] = IDENTITY) -> tuple[Counters, Path | None, list[str]]:
        return load_state(out, self.network, self.ema, self.optimizer, identity)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**self.network.state_dict(), **{f"ema {k}": v for k, v in self.ema.average.items()}}


def same(a: Run, b: Run) -> bool:
    x, y = a.tensors(), b.tensors()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    run = Run()
    run.steps(3)
    folder = run.save(tmp_path, 24)
    assert folder.name == "state-0000000024"
    other = Run(seed=9)
    counters, resumed, notes = other.load(tmp_path)
    assert counters == Counters(24, 1.5) and resumed == folder and notes == []
    assert same(run, other) and other.ema.updates == 3
    run.steps(3)
    other.steps(3)
    assert same(run, other)


def test_step_counts_and_moments_lie_where_the_parameters_lie(tmp_path: Path) -> None:
    run, other = Run(), Run()
    run.steps()
    run.save(tmp_path, 8)
    other.load(tmp_path)
    for p, slots in run.optimizer.state.items():
        name = next(n for n, q in run.network.named_parameters() if q is p)
        loaded = other.optimizer.state[dict(other.network.named_parameters())[name]]
        assert loaded.keys() == slots.keys()
        for slot, value in slots.items():
            assert torch.equal(loaded[slot], value)
            assert (loaded[slot].device, loaded[slot].dtype) == (value.device, value.dtype)
            assert loaded[slot].stride() == value.stride()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_is_resumed(tmp_path: Path) -> None:
    """The fused optimiser wants its step counts on the device."""
    run, other = Run(), Run()
    for each in (run, other):
        each.network.cuda()
        each.ema = EMA(each.network, 0.9)
    x = torch.randn(4, 3, 8, 8, device="cuda")
    for each in (run, other):
        if each is other:
            each.load(tmp_path)
        each.network(x).square().mean().backward()
        each.optimizer.step()
        each.ema.update()
        each.save(tmp_path, 8 * each.ema.updates)
    assert other.ema.updates == 2


def test_nothing_to_resume(tmp_path: Path) -> None:
    run, before = Run(), Run()
    assert run.load(tmp_path) == (Counters(), None, [])
    assert same(run, before)


@pytest.mark.parametrize("name", [*state.FILES, "manifest.json"])
@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_a_flipped_byte_in_any_file_is_found(tmp_path: Path, name: str, place: str) -> None:
    run = Run()
    run.steps()
    older = run.save(tmp_path, 8)
    run.steps()
    newer = run.save(tmp_path, 16)
    content = bytearray((newer / name).read_bytes())
    where = {"start": 0, "middle": len(content) // 2, "end": len(content) - 2}[place]
    content[where] ^= 0x80  # makes JSON invalid UTF-8
    (newer / name).write_bytes(content)
    counters, resumed, notes = Run().load(tmp_path)
    assert counters.images == 8 and resumed == older
    assert len(notes) == 1 and notes[0].startswith("state-0000000016: ") and "\n" not in notes[0]


@pytest.mark.parametrize("name", [*state.FILES, "manifest.json"])
def test_a_missing_or_emptied_file_is_found(tmp_path: Path, name: str) -> None:
    run = Run()
    run.steps()
    folder = run.save(tmp_path, 8)
    (folder / name).write_bytes(b"")
    assert Run().load(tmp_path)[0].images == 0
    (folder / name).unlink()
    counters, resumed, notes = Run().load(tmp_path)
    assert counters.images == 0 and resumed is None and len(notes) == 1


@pytest.mark.parametrize("text", ["{}", "[]", "3", "null", '{"state.json": 1}'])
def test_a_manifest_that_lists_less_proves_nothing(tmp_path: Path, text: str) -> None:
    run = Run()
    run.steps()
    (run.save(tmp_path, 8) / "manifest.json").write_text(text)
    assert Run().load(tmp_path)[1] is None


def test_two_states_are_kept_and_an_interrupted_one_is_ignored_then_removed(tmp_path: Path) -> None:
    run = Run()
    run.steps()
    for images in (8, 16, 24):
        run.save(tmp_path, images)
    assert names(tmp_path) == ["state-0000000016", "state-0000000024"]
    temporary = tmp_path / ".state-0000000032.new-abc"
    temporary.mkdir()
    (temporary / "state.json").write_text("{}")
    counters, resumed, notes = Run().load(tmp_path)
    assert counters.images == 24 and notes == []
    run.save(tmp_path, 40)
    assert names(tmp_path) == ["state-0000000024", "state-0000000040"]


def test_old_states_go_only_when_the_new_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    run.steps()
    run.save(tmp_path, 8)
    run.save(tmp_path, 16)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(state, "write_json", full)
        with pytest.raises(OSError, match="No space"):
            run.save(tmp_path, 24)
    assert names(tmp_path) == ["state-0000000008", "state-0000000016"]
    assert Run().load(tmp_path)[0].images == 16


def test_a_state_is_replaced_by_one_of_the_same_moment(tmp_path: Path) -> None:
    run, other = Run(), Run(seed=1)
    run.steps()
    run.save(tmp_path, 8)
    run.steps()
    run.save(tmp_path, 8)
    other.load(tmp_path)
    assert same(run, other) and names(tmp_path) == ["state-0000000008"]


# -- configurations ------------------------------------------------------------------------------------------


def changed(**values: Any) -> dict[str, Any]:
    identity = copy.deepcopy(IDENTITY)
    identity["network"]["unet"] |= values.pop("unet", {})  # type: ignore[index]
    return identity | values


@pytest.mark.parametrize(
    ("identity", "what"),
    [
        (changed(batch=16), "batch"),
        (changed(seed=1), "seed"),
        (changed(unet={"dropout": 0.1}), "network.unet.dropout"),
        (changed(unet={"channels": [4, 4]}), "network.unet.channels"),
    ],
)
def test_a_state_of_another_configuration_is_passed_over_and_kept(
    tmp_path: Path, identity: dict[str, Any], what: str
) -> None:
    run = Run()
    run.steps()
    for images in (80, 160):
        run.save(tmp_path, images, identity)
    counters, resumed, notes = run.load(tmp_path)
    assert counters.images == 0 and resumed is None
    assert notes[0] == f"state-0000000160: it belongs to another configuration ({what})"
    for images in (8, 16, 24):  # the new run's states are neither pushed out by the old nor push them out
        run.save(tmp_path, images)
    assert names(tmp_path) == [f"state-{n:010d}" for n in (16, 24, 80, 160)]
    assert run.load(tmp_path)[0].images == 24


def test_options_younger_than_a_state_do_not_forbid_it(tmp_path: Path) -> None:
    run = Run()
    run.steps()
    folder = run.save(tmp_path, 8)
    assert Run().load(tmp_path, changed(unet={"new_option": 0}))[1] == folder
    assert run.load(tmp_path, {**IDENTITY, "network": {"unet": {"channels": [4]}}})[1] == folder


def test_other_weights_forbid_it(tmp_path: Path) -> None:
    run = Run()
    run.steps()
    run.save(tmp_path, 8)
    notes = Run(width=5).load(tmp_path)[2]
    assert notes == ["state-0000000008: it belongs to a network of other weights"]


def test_the_files_are_plain(tmp_path: Path) -> None:
    run = Run()
    run.steps()
    folder = run.save(tmp_path, 8)
    assert names(folder) == sorted([*state.FILES, "manifest.json"])
    written = json.loads((folder / "state.json").read_text())
    assert written == {"images": 8, "seconds": 1.5, "ema_updates": 1, "identity": IDENTITY}
