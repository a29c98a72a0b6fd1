"""The command line: files and metadata on success, one line and status 2 on bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cascade import cli
from cascade.images import read_png_metadata
from cascade.pipeline import Cascade


@pytest.fixture
def model(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny cascade as the model, on the CPU whatever the machine has, in a folder of its own."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(model_folder.parent)
    return model_folder


def sample(model: Path, *arguments: str) -> int:
    return cli.main(["sample", *arguments, "--model", str(model), "--out", "out"])


def names() -> list[str]:
    return sorted(p.name for p in Path("out").iterdir())


def test_sample_writes_a_png_a_picture_and_prints_its_path(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(model, "A red, RED apple!", "a cat", "--num", "2", "--seed", "5") == 0
    expected = ["000-a-red-red-apple-5", "001-a-red-red-apple-6", "002-a-cat-5", "003-a-cat-6"]
    assert names() == [f"{stem}.png" for stem in expected]
    captured = capsys.readouterr()
    assert captured.out.split() == [f"out/{name}" for name in names()] and captured.err == ""
    with Image.open(f"out/{names()[0]}") as image:
        assert image.size == (64, 64) and image.mode == "RGB"


def test_metadata_says_how_to_draw_the_picture_again(model: Path) -> None:
    arguments = ["--negative", "snow", "--set", "base.steps=3", "--set", "base.guidance=1.5", "--seed", "3"]
    assert sample(model, "café au lait", *arguments, "--num", "2", "--stop-at", "sr256") == 0
    path = Path("out") / names()[1]
    metadata = read_png_metadata(path)
    assert metadata["prompt"] == "café au lait" and metadata["negative"] == "snow"
    assert metadata["seed"] == "4" and metadata["model"] == str(model)
    settings = json.loads(metadata["settings"])
    assert settings["base"]["steps"] == 3 and settings["sr256"]["steps"] == 2 and "sr1024" not in settings
    chosen = {name: settings[name] for name in ("base", "sr256")}
    again = Cascade.from_pretrained(model)(
        metadata["prompt"], seed=4, negative=metadata["negative"], stop_at="sr256", **chosen
    )
    with Image.open(path) as image:
        assert image.tobytes() == again.images[0].tobytes()


def test_save_stages_size_and_stop(model: Path) -> None:
    assert sample(model, "a cat", "--save-stages", "--size", "48x80") == 0
    assert names() == ["000-a-cat-0-base.png", "000-a-cat-0-sr256.png", "000-a-cat-0.png"]
    sizes = {}
    for name in names():
        with Image.open(f"out/{name}") as image:
            sizes[name] = image.size
    assert list(sizes.values()) == [(20, 12), (40, 24), (80, 48)]
    assert read_png_metadata("out/000-a-cat-0-base.png")["stage"] == "base"


BAD = [
    (["sample"], "arguments are required: PROMPT"),
    (["sampel", "a cat"], "invalid choice"),
    ([], "COMMAND"),
    (["sample", ""], "empty prompt"),
    (["sample", "x" * 10_000], "prompt of 10000 characters"),
    (["sample", "a cat", "--seed", "-1"], "seed -1"),
    (["sample", "a cat", "--seed", "x"], "invalid int value: 'x'"),
    (["sample", "a cat", "--num", "0"], "num_images 0"),
    (["sample", "a cat", "--sed", "1"], "unknown argument '--sed'.*did you mean '--seed'"),
    (["sample", "a cat", "--size", "63"], "height 63: .*the nearest is 64"),
    (["sample", "a cat", "--size", "big"], "expected HxW"),
    (["sample", "a cat", "--stop-at", "sr25"], "unknown stage 'sr25'.*did you mean 'sr256'"),
    (["sample", "a cat", "--stop-at", "prior"], "draws no picture"),
    (["sample", "a cat", "--set", "base.guidance=nan"], "base.guidance: expected a number, got nan"),
    (["sample", "a cat", "--set", "base.guidance=.nan"], "base.guidance: expected a number, got nan"),
    (["sample", "a cat", "--set", "base.stepz=3"], "unknown setting 'stepz'.*did you mean 'steps'"),
    (["sample", "a cat", "--set", "bsae.steps=3"], "unknown stage 'bsae'.*did you mean 'base'"),
    (["sample", "a cat", "--set", "seed.steps=3"], "unknown stage 'seed'"),
    (["sample", "a cat", "--set", "steps=3"], "expected STAGE.NAME=VALUE"),
    (["sample", "a cat", "--set", "base.steps"], "expected NAME=VALUE"),
    (["sample", "a cat", "--set", "base.steps=[1"], "not valid YAML"),
    (["sample", "a cat", "--negative", " "], "empty negative prompt"),
    (["info", "--model", "nowhere"], "no model 'nowhere'"),
    (["info", "a cat"], "unknown argument 'a cat'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_one_line_status_2_and_no_file(
    model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[:1] == ["sample"]:
        arguments = [*arguments, "--out", "out", "--model", str(model)]
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and re.search(message, captured.err)
    assert not Path("out").exists()


def test_a_broken_model_is_one_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "base" / "config.json").write_text("{}")
    assert sample(model, "a cat") == 2
    assert capsys.readouterr().err.startswith("cascade: ") and not Path("out").exists()


def test_an_output_folder_that_cannot_be_made_is_refused_first(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").write_text("a file")
    assert sample(model, "a cat") == 2
    assert "cannot make folder out" in capsys.readouterr().err


def test_a_failed_write_leaves_nothing_half_written(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    assert sample(model, "a cat") == 2
    assert names() == []


def test_info(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--model", str(model)]) == 0
    out = capsys.readouterr().out
    assert "base          Stage" in out and "noise -> 16 px, dpmpp_2m 2 steps, guidance 2" in out
    assert "16 px -> 32 px" in out and "DiffusionPrior" in out and "verified" in out


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, cascade.cli as c\ntry: c.main(['--help'])\nexcept SystemExit as e: assert e.code == 0\n"
    )
    code += "assert not {'torch', 'numpy', 'yaml', 'PIL', 'rich'} & set(sys.modules), 'heavy imports'"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "sample" in run.stdout, run.stderr
