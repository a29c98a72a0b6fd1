"""Kill training at random instants, over and over, and look at what can be resumed.

python -m tests.train.soak --kills 200

Two processes train the toy base stage and save every 3 steps. Each round starts them where the last one
was killed, and kills both with SIGKILL at a seeded random instant after the first step: while they
compute, write, rename, remove old states. After each kill the newest valid state must be at most 3 steps
older than the last step that was logged, and the log must not repeat a step.

SIGKILL does not test a power cut: what a process wrote lives on in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import yaml

from tests.train.conftest import make_records, tiny_recipe, write_data
from tests.train.ranks import Ranks, wait_until
from train.state import damaged, states

STEPS, BATCH = 3, 8  # steps between two saves; samples of a step
INSTANTS_S = 1.5  # a kill comes up to so long after the first step


def prepare(folder: Path) -> Path:
    """A recipe that never ends, on the toy data."""
    recipe = tiny_recipe(write_data(folder / "data", make_records()), folder / "runs")
    train = {"images": 10**9, "save_images": STEPS * BATCH, "log_images": BATCH, "grid_images": 10**9}
    train |= {"validate_images": 10**9}
    recipe["base"]["train"] |= train
    recipe["base"]["stage"]["unet"].pop("image_embed_dim")
    path = folder / "soak.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def logged(folder: Path) -> list[int]:
    """The steps of whole lines in the log."""
    path = folder / "log.jsonl"
    text = path.read_text() if path.exists() else ""
    return [
        json.loads(line)["images"] // BATCH for line in text.splitlines(keepends=True) if line.endswith("\n")
    ]


def stepped(folder: Path, state: int, began: float) -> bool:
    """Whether a step beyond `state` was logged since."""
    path = folder / "log.jsonl"
    return path.exists() and path.stat().st_mtime > began and logged(folder)[-1:] > [state]


def newest(folder: Path) -> tuple[int, int]:
    """The step of the newest valid state (0: none), and how many newer ones are damaged."""
    bad = 0
    for state in reversed(states(folder)):
        if damaged(state, []) is None:
            return int(state.name[-10:]) // BATCH, bad
        bad += 1
    return 0, bad


def soak(kills: int, seed: int, folder: Path) -> dict[str, int]:
    """Returns counts over all kills. Raises AssertionError at the first that cost more than it may."""
    recipe, instants = prepare(folder), random.Random(seed)
    out = folder / "runs" / "tiny"
    training = out / "base-training"
    result = {"kills": 0, "resumed": 0, "newest damaged": 0, "most steps lost": 0, "while writing": 0}
    command = [recipe, "--stage", "base", "--out", out]
    with Ranks(folder) as ranks:
        while result["kills"] < kills:
            before, began = newest(training)[0], time.time()
            pids = ranks.start(2, command)
            wait_until(partial(stepped, training, before, began))
            time.sleep(instants.uniform(0, INSTANTS_S))
            for pid in pids:
                os.killpg(pid, signal.SIGKILL)
            status = ranks.wait()
            assert status.status == [-signal.SIGKILL] * 2, status.err
            steps, (state, bad) = logged(training), newest(training)
            assert len(set(steps)) == len(steps), "the log repeats a step"
            lost = steps[-1] - state
            assert 0 <= lost <= STEPS, f"newest valid state {state} after step {steps[-1]}"
            assert state >= before, "a kill cost a state that stood before"
            result["kills"] += 1
            result["resumed"] += int(
                before > 0 and f"resumed from state-{before * BATCH:010d}" in status.out[0]
            )
            result["newest damaged"] += bad
            result["most steps lost"] = max(result["most steps lost"], lost)
            result["while writing"] += any(training.glob(".state-*.new-*"))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        result = soak(arguments.kills, arguments.seed, Path(folder))
    kills = result.pop("kills")
    print(f"{kills} of {kills} kills left a valid state at most {STEPS} steps old")
    print("; ".join(f"{name}: {number}" for name, number in result.items()))
    print(f"{time.monotonic() - start:.0f} s, seed {arguments.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
