"""What a kill costs an evaluation: nothing. Not collected by pytest, as it takes minutes to hours.

    python -m tests.eval.stress --folder /tmp/stress [-- more arguments of python -m eval]

draws a list of DrawBench's format (200 prompts, its categories and counts, texts of the own suite) through
the embedded default, two pictures a prompt: once without an interruption, once with every process of the
launch killed by SIGKILL at random instants and started again, and once with another number of processes. It
compares report.json and the manifest byte for byte and exits with 1 where they differ.

The instants lie anywhere in the work, not anywhere in the time that a whole run takes: a process that is
started again needs seconds before it draws, and one that may live for a random part of the whole would draw
nothing, or nearly all.
"""

from __future__ import annotations

import argparse
import csv
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from eval.run import MANIFEST, RUN, rank_manifests
from eval.suites import load_suite
from eval.suites.drawbench import COUNTS

SAME = ("report.json", "manifest.jsonl")
LOOK_S = 0.1
PICTURES = 2 * sum(COUNTS.values())
EARLY, LATE = 0.15, 0.15  # shares of the kills before a process draws, and after the last picture


def write_list(path: Path) -> Path:
    categories = [category for category, count in COUNTS.items() for _ in range(count)]
    texts = [prompt.text for prompt in load_suite("skills").prompts[: len(categories)]]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("Prompts", "Category"), *zip(texts, categories, strict=True)])
    return path


def launch(arguments: list[str], processes: int) -> subprocess.Popen[bytes]:
    command = ["eval.launch", "--nproc", str(processes)] if processes > 1 else ["eval"]
    return subprocess.Popen([sys.executable, "-m", *command, *arguments], stdout=subprocess.DEVNULL)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a launch and all that it started, none of which can do anything about it."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in family:
        each.kill()
    psutil.wait_procs(family)
    process.wait()


def until(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> float:
    """Seconds until a launch has reached something, or its end."""
    start = time.monotonic()
    while process.poll() is None and not reached():
        time.sleep(LOOK_S)
    return time.monotonic() - start


def finish(arguments: list[str], processes: int) -> None:
    if launch(arguments, processes).wait() != 0:
        raise SystemExit("stress: the evaluation failed")


def drawn(run: Path) -> int:
    """Pictures in the manifests; a launch that begins moves lines from one to another."""
    found = set[bytes]()
    for path in (run / MANIFEST, *rank_manifests(run)):
        with suppress(FileNotFoundError):
            found.update(path.read_bytes().splitlines(keepends=True))
    return len(found)


class Pace:
    """Seconds that the parts of a run take: until it begins to draw, a picture, and what follows the last."""

    def __init__(self, arguments: list[str], processes: int, run: Path) -> None:
        process = launch(arguments, processes)
        self.start = until(process, lambda: (run / RUN).exists())
        self.picture = until(process, lambda: drawn(run) >= PICTURES) / PICTURES
        self.rest = until(process, lambda: False)
        if process.returncode != 0:
            raise SystemExit("stress: the evaluation failed")


def kill_at(
    goal: float, process: subprocess.Popen[bytes], run: Path, pace: Pace, instants: random.Random
) -> bool:
    """Kill a launch before it draws or, mostly, a moment after `goal` pictures; whether it lived so long."""
    if instants.random() < EARLY:
        time.sleep(instants.uniform(0, pace.start))
    else:
        until(process, lambda: drawn(run) >= min(goal, PICTURES))
        time.sleep(instants.uniform(0, 2 * pace.picture if goal < PICTURES else pace.start + pace.rest))
    alive = process.poll() is None
    if alive:
        kill_all(process)
    return alive


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("more", nargs="*")
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    prompts, run = write_list(given.folder / "prompts.csv"), given.folder / "run"
    arguments = ["drawbench", str(prompts), "--per-prompt", "2", "--out", str(run), *given.more]

    pace = Pace(arguments, given.processes, run)
    expected = keep(run, given.folder / "whole")
    parts = f"{pace.start:.1f} s to start, {pace.picture:.3f} s a picture, {pace.rest:.1f} s to measure"
    print(f"uninterrupted: {parts}", flush=True)

    instants = random.Random(given.seed)
    goals = sorted(instants.uniform(0, PICTURES / (1 - LATE)) for _ in range(given.kills))
    for number, goal in enumerate(goals, start=1):
        while not kill_at(goal, launch(arguments, given.processes), run, pace, instants):
            pass
        print(f"kill {number} at {drawn(run)} pictures", flush=True)
    finish(arguments, given.processes)
    killed = keep(run, given.folder / "killed")
    others = 1 if given.processes > 1 else 2
    finish(arguments, others)
    other = keep(run, given.folder / "others")
    print(f"killed {given.kills} times: {verdict(killed, expected)}")
    print(f"processes, {others} instead of {given.processes}: {verdict(other, expected)}")
    return 0 if killed == other == expected else 1


def keep(run: Path, place: Path) -> dict[str, bytes]:
    run.rename(place)
    return {name: (place / name).read_bytes() for name in SAME}


def verdict(found: dict[str, bytes], expected: dict[str, bytes]) -> str:
    differing = [name for name in SAME if found[name] != expected[name]]
    return f"{', '.join(differing)} differ" if differing else "the same bytes"


if __name__ == "__main__":
    sys.exit(main())
