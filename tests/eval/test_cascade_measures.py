"""Measures that only a cascade has, on pictures whose figures are known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cascade.images import save_png, to_pil
from eval.cascade_measures import cascade_measures, compare
from eval.run import Item, Model, Plan, Run
from eval.settings import make_settings
from eval.suites.suite import Prompt, make_suite


def test_an_enlarged_picture_agrees_with_its_input_and_adds_nothing() -> None:
    flat = torch.full((1, 3, 8, 8), 0.5)
    found = compare(flat.repeat_interleave(4, 2).repeat_interleave(4, 3), flat)
    assert found["input_difference"] == 0 and found["detail"] < 1e-6 and found["clipped"] == 0
    assert found["input_psnr_db"] == pytest.approx(10 * math.log10(12 * 255**2))  # 8-bit rounding


def test_figures_of_a_known_error() -> None:
    """Half of the pixels at the ends of the range; +-0.2 in a checkerboard is detail that no input shows."""
    lowres = torch.zeros(1, 3, 4, 4)
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2 - 1.0  # 8 8
    found = compare((0.2 * board).expand(1, 3, 8, 8), lowres)
    assert found["input_difference"] == pytest.approx(0, abs=1e-6)
    assert found["detail"] == pytest.approx(0.1, rel=1e-5)
    found = compare(torch.full((1, 3, 8, 8), 0.1), lowres)
    assert found["input_difference"] == pytest.approx(0.05) and found["detail"] == pytest.approx(0, abs=1e-6)
    assert found["input_psnr_db"] == pytest.approx(-20 * math.log10(0.05), abs=1e-4)
    halves = torch.cat([torch.full((1, 3, 4, 8), 1.0), torch.full((1, 3, 4, 8), -0.3)], dim=2)
    assert compare(halves, None) == {"clipped": 0.5}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two prompts; base 4 px, sr 8 px; a sweep of the aug level that brightens sr by the level, in [0, 1]."""
    settings = make_settings(sweeps=["sr.aug_level=0.1,0.2"])
    sampling = {"base": {"guidance": 1.0}, "sr": {"aug_level": 0.0}}
    model = Model(
        name="m",
        path="m",
        sha256="",
        kind="cascade",
        stages={"base": 4, "sr": 8},
        config={"sampling": sampling},
    )
    suite = make_suite("s", "own", [Prompt(text="a"), Prompt(text="b")])
    plan = Plan(suite=suite, models={"A": model}, settings=settings, per_prompt=1, seed=0, batch=1)
    items = []
    for _, setting, prompt, k in plan.keys():
        level = next(s for s in settings if s.id == setting).overrides.get("sr", {}).get("aug_level", 0)
        files, hashes = {}, {}
        for stage, px, value in (("base", 4, 0.0), ("sr", 8, 2 * level)):
            files[stage] = f"{setting}-{stage}-{prompt}.png"
            save_png(to_pil(torch.full((1, 3, px, px), value + 0.004 * prompt))[0], tmp_path / files[stage])
            hashes[stage] = f"{stage}{value}{prompt}"
        items.append(
            Item(
                model="A",
                setting=setting,
                prompt=prompt,
                k=k,
                text="",
                category="all",
                seed=0,
                files=files,
                sha256=hashes,
                overrides={},
                model_sha256="",
                code="",
            )
        )
    return Run(tmp_path, plan, tuple(items))


def test_tables_of_stages_and_of_a_sweep(run) -> None:
    def score(stage: str):
        cell = {"overall": {"mean": 0.5, "low": 0.4, "high": 0.6, "count": 2}}
        return (
            {"clip": {"title": "CLIP", "values": {"A": {s.id: cell for s in run.settings}}}}
            if stage == "sr"
            else {}
        )

    tables = cascade_measures(run, score)
    assert list(tables) == ["stages", "sr.aug_level"]
    assert [(row["stage"], row["px"]) for row in tables["stages"]["rows"]] == [("base", 4), ("sr", 8)]
    assert "CLIP" not in tables["stages"]["rows"][0] and tables["stages"]["rows"][1]["CLIP_high"] == 0.6
    rows = tables["sr.aug_level"]["rows"]
    assert [(row["stage"], row["sr.aug_level"]) for row in rows] == [
        ("sr", "0.0"),
        ("sr", "0.1"),
        ("sr", "0.2"),
    ]
    for row, level in zip(rows, (0, 0.1, 0.2), strict=True):
        assert row["input_difference"] == pytest.approx(level, abs=0.003)
        assert row["input_difference_low"] <= row["input_difference"] <= row["input_difference_high"]


def test_a_picture_that_settings_share_is_compared_once(run, monkeypatch) -> None:
    calls = []

    def counted(picture, lowres):
        calls.append(picture.shape[-1])
        return compare(picture, lowres)

    monkeypatch.setattr("eval.cascade_measures.compare", counted)
    cascade_measures(run, lambda stage: {})
    assert sorted(calls) == [4, 4, 8, 8, 8, 8, 8, 8]  # of 6 items, and the plain ones again
