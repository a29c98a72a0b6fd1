"""The benchmark runs, on a network of its smallest size."""

from __future__ import annotations

import json

import pytest

from eval.bench_pretrained import Result, main

pytest.importorskip("diffusers")


def test_prints_both_times_and_their_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--width 64 --text-dim 64 --steps 1 --rounds 1 --dtype float32".split()) == 0
    *_, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["steps"] == 1 and found["here"] > 0 and found["diffusers"] > 0
    assert found["ratio"] == Result(found["here"], found["diffusers"]).ratio
    assert Result(here=2.0, diffusers=3.0).ratio == 1.5
