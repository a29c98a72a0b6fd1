"""A short version of `python -m tests.train.soak`."""

from __future__ import annotations

from pathlib import Path

from tests.train.soak import STEPS, soak


def test_killed_runs_resume_from_a_state_at_most_one_interval_old(tmp_path: Path) -> None:
    result = soak(4, seed=1, folder=tmp_path)
    assert result["kills"] == 4 and result["resumed"] == 3  # the first had nothing to resume from
    assert result["most steps lost"] <= STEPS and result["newest damaged"] == 0
