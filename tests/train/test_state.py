"""Training states: whole or absent, checked by hash, the newest valid one is taken."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cascade.checkpoint import sha256
from cascade.errors import InputError
from train import state
from train.ema import EMA, PowerEMA
from train.optim import make_optimizer
from train.recipe import TrainConfig
from train.state import Trained, Writer, find_state, load_state, read_average, save_averages, save_state

FILES = [*state.FILES, "ema-0.1.safetensors"]
IDENTITY = {"stage": "base", "network": {"unet": {"channels": [4], "dropout": 0.0}}, "batch": 8, "seed": 0}


class Run:
    """A network with every kind of entry (4-D, scalar, buffer), its averages and its optimiser."""

    def __init__(self, seed: int = 0, width: int = 4, optimizer: str = "adamw") -> None:
        torch.manual_seed(seed)
        self.network = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
        self.network.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = make_optimizer(
            TrainConfig(images=1, batch=1, lr=0.1, optimizer=optimizer),  # type: ignore[arg-type]
            self.network.parameters(),
        )
        self.ema = EMA(self.network, 0.9)
        self.trained = Trained(self.network, [self.ema, PowerEMA(self.network, 0.1)], self.optimizer)

    def steps(self, number: int = 1) -> None:
        for _ in range(number):
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(self.ema.updates))
            (self.network(x) * self.network.scale).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            for ema in self.trained.averages:
                ema.update()

    def state(self, images: int, identity: dict[str, Any] = IDENTITY) -> dict[str, Any]:
        return {"images": images, "seconds": 1.5, "ema_updates": self.ema.updates, "identity": identity}

    def save(self, out: Path, images: int, identity: dict[str, Any] = IDENTITY) -> Path:
        return save_state(out, self.trained.snapshot(True), self.state(images, identity))

    def load(self, out: Path, identity: dict[str, Any] = IDENTITY) -> tuple[int, Path | None, list[str]]:
        """Images (0: from the start), folder, notes."""
        folder, notes = find_state(out, self.trained, identity)
        return (load_state(folder, self.trained)["images"] if folder else 0), folder, notes

    def tensors(self) -> dict[str, torch.Tensor]:
        averages = {f"{i} {k}": v for i, e in enumerate(self.trained.averages) for k, v in e.average.items()}
        return {**self.network.state_dict(), **averages}


def same(a: Run, b: Run) -> bool:
    x, y = a.tensors(), b.tensors()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    run = Run(optimizer=optimizer)
    run.steps(3)
    folder = run.save(tmp_path, 24)
    assert folder.name == "state-0000000024"
    other = Run(seed=9, optimizer=optimizer)
    assert other.load(tmp_path) == (24, folder, [])
    assert same(run, other) and [e.updates for e in other.trained.averages] == [3, 3]
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
        each.trained = Trained(each.network, [each.ema], each.optimizer)
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
    assert run.load(tmp_path) == (0, None, [])
    assert same(run, before)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
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
    images, resumed, notes = Run().load(tmp_path)
    assert images == 8 and resumed == older
    assert len(notes) == 1 and notes[0].startswith("state-0000000016: ") and "\n" not in notes[0]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_or_emptied_file_is_found(tmp_path: Path, name: str) -> None:
    run = Run()
    run.steps()
    folder = run.save(tmp_path, 8)
    (folder / name).write_bytes(b"")
    assert Run().load(tmp_path)[0] == 0
    (folder / name).unlink()
    images, resumed, notes = Run().load(tmp_path)
    assert images == 0 and resumed is None and len(notes) == 1


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
    images, resumed, notes = Run().load(tmp_path)
    assert images == 24 and notes == []
    run.save(tmp_path, 40)
    assert names(tmp_path) == ["state-0000000024", "state-0000000040"]


def test_old_states_go_only_when_the_new_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    run.steps()
    run.save(tmp_path, 8)
    run.save(tmp_path, 16)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(state, "write_json", full)
        with pytest.raises(InputError, match="cannot write .*24: No space left on device; .* before stays"):
            run.save(tmp_path, 24)
    assert names(tmp_path) == ["state-0000000008", "state-0000000016"]
    assert Run().load(tmp_path)[0] == 16


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
        (changed(batch=16), "batch 16 there, 8 now"),
        (changed(seed=1), "seed 1 there, 0 now"),
        (changed(unet={"dropout": 0.1}), "network.unet.dropout 0.1 there, 0.0 now"),
        (changed(unet={"channels": [4, 4]}), "network.unet.channels [4, 4] there, [4] now"),
    ],
)
def test_states_of_another_configuration_are_refused_and_kept(
    tmp_path: Path, identity: dict[str, Any], what: str
) -> None:
    run = Run()
    run.steps()
    for images in (80, 160):
        run.save(tmp_path, images, identity)
    with pytest.raises(InputError) as caught:
        run.load(tmp_path)
    assert f"state-0000000160: it belongs to another configuration ({what})" in str(caught.value)
    for images in (8, 16, 24):  # where both are: neither pushes the other out, and the right one is taken
        run.save(tmp_path, images)
    assert names(tmp_path) == [f"state-{n:010d}" for n in (16, 24, 80, 160)]
    images, _, notes = run.load(tmp_path)
    assert images == 24
    assert notes[0] == f"state-0000000160: it belongs to another configuration ({what})"


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
    assert names(folder) == sorted([*FILES, "manifest.json"])
    assert json.loads((folder / "state.json").read_text()) == run.state(8)


def test_a_state_of_the_first_format_is_resumed(tmp_path: Path) -> None:
    """Four files and a manifest of them, with `images`, `seconds`, `ema_updates` and a shorter identity."""
    run = Run()
    run.trained = Trained(run.network, [run.ema], run.optimizer)
    run.steps(2)
    folder = run.save(tmp_path, 16)
    assert names(folder) == sorted([*state.FILES, "manifest.json"])
    assert json.loads((folder / "state.json").read_text()).keys() == {
        "images",
        "seconds",
        "ema_updates",
        "identity",
    }
    other = Run(seed=3)
    other.trained = Trained(other.network, [other.ema], other.optimizer)
    assert other.load(tmp_path, {**IDENTITY, "optimizer": "adamw", "ema_sigma_rel": []})[0] == 16
    assert same(run, other)


def test_moments_of_8_bits_are_resumed(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    run, other = (Run(seed, 256, "adamw8bit") for seed in (0, 1))  # 4096 weights and more are quantised
    run.steps(2)
    assert any(slots["state1"].dtype == torch.uint8 for slots in run.optimizer.state.values())
    run.save(tmp_path, 16)
    other.load(tmp_path)
    for each in (run, other):
        each.steps(2)
    assert same(run, other)


# -- hostile folders -----------------------------------------------------------------------------------------


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("hashed", [False, True])
def test_a_pickle_in_the_place_of_a_file_does_not_run(tmp_path: Path, name: str, hashed: bool) -> None:
    """Also where the manifest was made to fit it."""
    run, marker = Run(), tmp_path / "ran"
    run.steps()
    folder = run.save(tmp_path, 8)
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    if hashed and name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest[name] = sha256(folder / name)
        (folder / "manifest.json").write_text(json.dumps(manifest))
    images, resumed, notes = Run().load(tmp_path)
    assert (images, resumed, len(notes)) == (0, None, 1) and "\n" not in notes[0]
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # it would have shown


# -- in the background ---------------------------------------------------------------------------------------


def test_the_writer_finishes_one_job_before_the_next_and_hands_errors_over(tmp_path: Path) -> None:
    writer, gate, done = Writer(), threading.Event(), []
    writer.start(lambda: (gate.wait(10), done.append(1)))
    assert done == []  # it runs beside
    gate.set()
    writer.start(done.append, 2)
    writer.join()
    assert done == [1, 2]

    def fail() -> None:
        raise InputError("full")

    writer.start(fail)
    with pytest.raises(InputError, match="full"):
        writer.join()
    writer.join()  # told once


def test_a_snapshot_is_of_its_moment(tmp_path: Path) -> None:
    """What is written later is what was there when it was taken."""
    run, other = Run(), Run(seed=1)
    run.steps()
    snapshot, state_json, before = run.trained.snapshot(True), run.state(8), copy.deepcopy(run.tensors())
    run.steps()
    save_state(tmp_path, snapshot, state_json)
    other.load(tmp_path)
    assert all(torch.equal(other.tensors()[name], value) for name, value in before.items())
    assert run.trained.snapshot(False) == {name: {} for name in snapshot}


def test_snapshots_of_averages_are_read_back_whole_or_not_at_all(tmp_path: Path) -> None:
    run = Run()
    run.steps(3)
    save_averages(tmp_path, run.trained.snapshot(True), run.state(24))
    expected = run.trained.averages[1].average
    found = read_average(tmp_path, 24, 0.1)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    path = tmp_path / "average-0000000024" / "ema-0.1.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="ema-0.1.safetensors is damaged"):
        read_average(tmp_path, 24, 0.1)
