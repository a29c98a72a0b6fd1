"""The benchmark runs, on a network of its smallest size."""

from __future__ import annotations

import json

import pytest

from eval.bench_pretrained import Result, main

pytest.importorskip("diffusers")


@pytest.mark.parametrize("stage", ["I", "II"])
def test_prints_both_times_and_their_ratio(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    size = "--width 64 --px 32 --text-dim 64 --steps 1 --rounds 1 --dtype float32"
    assert main([*size.split(), "--stage", stage]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["steps"] == 1 and found["here"] > 0 and found["diffusers"] > 0
    assert found["ratio"] == Result(found["here"], found["diffusers"]).ratio
    assert Result(here=2.0, diffusers=3.0).ratio == 1.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--px 40", "--px 40: expected a multiple of 32, the nearest is 32"),
        ("--text-dim 4000", "--text-dim 4000: expected a multiple of 64, the nearest is 3968"),
        ("--steps 0", "--steps 0: expected an integer of at least 1"),
    ],
)
def test_bad_sizes_are_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    assert capsys.readouterr().err == f"eval.bench_pretrained: {message}\n"
