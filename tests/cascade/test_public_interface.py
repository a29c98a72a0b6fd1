"""The public interface, frozen: a change here breaks users, so it must be meant."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import cascade
from cascade import cli
from cascade.pipeline import Cascade, Event, Output
from cascade.stage import Stage


def parameters(function: Callable[..., Any]) -> str:
    """Names, kinds and defaults, without annotations."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def test_names() -> None:
    assert cascade.__all__ == [
        "Cascade",
        "Conditioning",
        "InputError",
        "Stage",
        "TextEmbedding",
        "__version__",
    ]
    assert all(hasattr(cascade, name) for name in cascade.__all__)
    assert {name for name in vars(Cascade) if not name.startswith("_")} == {
        "device",
        "encode",
        "from_pretrained",
        "load_adapter",
        "request",
        "save_pretrained",
        "stream",
        "to",
    }
    with pytest.raises(AttributeError, match="no attribute 'Casacde'"):
        cascade.Casacde  # noqa: B018 - the access is the test


def test_signatures() -> None:
    assert {
        "from_pretrained": parameters(Cascade.from_pretrained),
        "call": parameters(Cascade.__call__),
        "stream": parameters(Cascade.stream),
        "encode": parameters(Cascade.encode),
        "save": parameters(Cascade.save_pretrained),
        "to": parameters(Cascade.to),
        "load_adapter": parameters(Cascade.load_adapter),
        "stage": parameters(Stage.sample),
    } == {
        "from_pretrained": "(source=None, *, revision=None, device='cpu', dtype=None, verify=True, "
        "offload=False, allow_legacy=False)",
        "call": "(self, prompts, *, seed=0, num_images=1, negative=None, stop_at=None, start_at=None, "
        "images=None, image_embed=None, inpaint=None, size=None, on_event=None, **settings)",
        "stream": "(self, prompts, **arguments)",
        "encode": "(self, prompts)",
        "save": "(self, folder, dtype=None)",
        "to": "(self, device, dtype=None)",
        "load_adapter": "(self, folder, scale=1.0)",
        "stage": "(self, text=None, *, image_embed=None, lowres=None, inpaint=None, seed=0, negative=None, "
        "size=None, micro_batch=None, on_step=None, **settings)",
    }


def test_results() -> None:
    assert [f.name for f in dataclasses.fields(Output)] == ["images", "stages", "image_embed"]
    assert [f.name for f in dataclasses.fields(Event)] == [
        "stage",
        "step",
        "total",
        "pictures",
        "x0",
        "output",
    ]


def test_the_example_of_the_design_runs(tiny_cascade: Cascade, tmp_path) -> None:
    pipe = tiny_cascade
    out = pipe(
        ["a red apple"],
        seed=7,
        num_images=2,
        negative=None,
        stop_at="sr1024",
        base=dict(steps=3, guidance=4.0),
        sr256=dict(aug_level=0.1),
        sr1024=dict(),
    )
    assert len(out.images) == 2 and out.stages["base"].shape == (2, 3, 16, 16)
    assert out.image_embed is not None and len(out.image_embed) == 2
    text = pipe.encode(["a red apple"])
    assert pipe.prior is not None
    embed = pipe.prior.sample(text, seed=7)
    x64 = pipe.stages["base"].sample(text, image_embed=embed, seed=7)
    x256 = pipe.stages["sr256"].sample(text, lowres=x64, seed=7)
    assert x256.shape == (1, 3, 32, 32) and x256.dtype == torch.float32
    for event in pipe.stream("a red apple", seed=7):
        assert event.stage in ("prior", *pipe.stages) and 1 <= event.step <= event.total
        assert isinstance(event.preview, list)
    pipe.save_pretrained(tmp_path / "model")
    assert pipe.to("cpu") is pipe


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "sample",
            ["allow-legacy-checkpoint", "inpaint", "mask", "model", "negative", "num", "offload", "out"]
            + ["save-stages", "seed", "set", "size", "stop-at"],
        ),
        ("info", ["allow-legacy-checkpoint", "model"]),
        ("convert", ["allow-legacy-checkpoint", "dtype", "to"]),
    ],
)
def test_command_line(command: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    words = capsys.readouterr().out.replace("[", " ").replace("]", " ").split()
    assert stop.value.code == 0
    assert {word for word in words if word.startswith("--")} - {"--help"} == {f"--{name}" for name in options}
