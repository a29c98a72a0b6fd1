"""The embedded default: whole, small enough, and drawing through every stage without a network."""

from __future__ import annotations

import json

import pytest
import torch

from cascade import Cascade
from cascade.cli import main
from cascade.images import read_png_metadata
from cascade.pipeline import EMBEDDED

QUICK = {"base": {"steps": 3}, "sr256": {"steps": 2}, "sr1024": {"steps": 1}}
MB = 1_000_000


@pytest.fixture(scope="module")
def pipe() -> Cascade:
    return Cascade.from_pretrained()


def test_folder_is_small_and_holds_every_stage(pipe: Cascade) -> None:
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 64 * MB
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    assert list(pipe.stages) == ["base", "sr256", "sr1024"]
    assert pipe.prior is not None
    index = json.loads((EMBEDDED / "model_index.json").read_text())
    assert set(index["sha256"]) >= {f"{name}/diffusion_pytorch_model.safetensors" for name in pipe.stages}


def test_draws_through_every_stage_and_the_same_in_a_batch(pipe: Cascade) -> None:
    alone = pipe("red apple, twemoji style", seed=3, **QUICK)
    assert [tuple(x.shape) for x in alone.stages.values()] == [(1, 3, s, s) for s in (64, 256, 1024)]
    assert alone.images[0].size == (1024, 1024)
    batch = pipe(["dog face", "red apple, twemoji style"], seed=3, stop_at="base", base=QUICK["base"])
    assert torch.equal(batch.stages["base"][1], alone.stages["base"][0])


def test_conditions_matter(pipe: Cascade) -> None:
    """A red heart is redder than a blue one: the text reaches the picture."""
    out = pipe(["red heart, twemoji style", "blue heart, twemoji style"], seed=[1, 1], stop_at="base")
    red, blue = out.stages["base"].mean((2, 3))  # 3 each
    assert red[0] - red[2] > blue[0] - blue[2]


def test_command_line_writes_a_described_picture(tmp_path) -> None:
    arguments = ["sample", "cat face", "--seed", "1", "--stop-at", "base", "--set", "base.steps=2"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    (picture,) = tmp_path.glob("*.png")
    metadata = read_png_metadata(picture)
    assert metadata["prompt"] == "cat face"
    assert metadata["seed"] == "1"


def test_info_says_which_stages_flatten(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "flattened by 0.01" in lines["base"]
    assert "8 steps, the last 3 without noise, guidance 2" in lines["base"]
    assert "flattened by 0.1" in lines["sr256"]
    assert "flattened" not in lines["sr1024"]
