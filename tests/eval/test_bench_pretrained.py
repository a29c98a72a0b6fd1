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
