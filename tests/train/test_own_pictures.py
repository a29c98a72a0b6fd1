"""The recipe for one's own pictures, run whole: from the embedded default to a model folder that draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from cascade import Cascade
from cascade.checkpoint import WEIGHTS
from train.__main__ import main

ROOT = Path(__file__).parents[2]
SHAPES = {"red circle": "ellipse", "blue square": "rectangle", "green egg": "ellipse"}
SHORT = ["grid_prompts=[red circle]", "base.stage.sampling.steps=2", "prior.model.steps=2"]
SHORT += [f"{stage}.train.{s}" for stage in ("prior", "base") for s in ("batch=4", "compile=false")]
SHORT += ["prior.train.images=8", "base.train.images=8", "base.train.guess_batch=8", "base.train.lr=1e-3"]
SHORT += ["prior.train.lr=1e-3", "prior.train.warmup_images=0", "base.train.warmup_images=0"]


def draw(folder: Path) -> Path:
    """Pictures of several sizes, none of them as large as the default's."""
    folder.mkdir()
    lines = []
    for number, (text, shape) in enumerate(SHAPES.items()):
        for side in (96, 200):
            name = f"{number}-{side}.png"
            picture = Image.new("RGB", (side, side), "white")
            colour, size = text.split()[0], (side // 5, side // 5, side - side // 4, side - side // 5)
            getattr(ImageDraw.Draw(picture), shape)(size, fill=colour)
            picture.save(folder / name)
            lines.append(json.dumps({"file_name": name, "text": f"{text}, my style"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_the_recipe_for_ones_own_pictures_ends_in_a_model_that_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)  # the recipe names the default's folder from there
    out, data = tmp_path / "out", draw(tmp_path / "own")
    settings = [word for setting in (f"data.folder={data}", *SHORT) for word in ("--set", setting)]
    assert main(["finetune", "--out", str(out), *settings]) == 0
    assert f"model folder: {out / 'model'}" in capsys.readouterr().out
    source = ROOT / "cascade" / "models" / "emoji"
    for name in ("clip", "prior", "base", "sr256", "sr1024"):
        found, given = (load_file(folder / name / WEIGHTS) for folder in (out / "model", source))
        assert found.keys() == given.keys()
        changed = any(not torch.equal(found[key], given[key]) for key in given)
        assert changed == (name in ("prior", "base")), name
    pipe = Cascade.from_pretrained(out / "model")
    (picture,) = pipe("red circle, my style", seed=1, base={"steps": 2}).images
    assert picture.size == (1024, 1024) and np.asarray(picture).std() > 5
