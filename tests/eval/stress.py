"""What a kill costs an evaluation: nothing. Not collected by pytest, as it takes minutes to hours.

    python -m tests.eval.stress --folder /tmp/stress [-- more arguments of python -m eval]

draws a list of DrawBench's format (200 prompts, its categories and counts, texts of the own suite) through
the embedded default, two pictures a prompt: once without an interruption, once with every process of the
launch killed by SIGKILL at random instants and started again, and once with one process. It compares
report.json and the manifest byte for byte and exits with 1 where they differ.
"""

from __future__ import annotations

import argparse
import csv
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from eval.suites import load_suite
from eval.suites.drawbench import COUNTS

SAME = ("report.json", "manifest.jsonl")


def write_list(path: Path) -> Path:
    categories = [category for category, count in COUNTS.items() for _ in range(count)]
    texts = [prompt.text for prompt in load_suite("skills").prompts[: len(categories)]]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("Prompts", "Category"), *zip(texts, categories, strict=True)])
    return path


def launch(arguments: list[str], processes: int) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    return subprocess.Popen([sys.executable, *launcher, "-m", "eval", *arguments], stdout=subprocess.DEVNULL)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a launch and all that it started, none of which can do anything about it."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in family:
        each.kill()
    psutil.wait_procs(family)
    process.wait()


def finish(arguments: list[str], processes: int) -> float:
    """Seconds until a launch is done."""
    start = time.monotonic()
    if launch(arguments, processes).wait() != 0:
        raise SystemExit("stress: the evaluation failed")
    return time.monotonic() - start


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

    took = finish(arguments, given.processes)
    expected = keep(run, given.folder / "whole")
    print(f"uninterrupted: {took:.0f} s", flush=True)

    instants = random.Random(given.seed)
    done = 0
    while done < given.kills:
        process = launch(arguments, given.processes)
        try:
            process.wait(instants.uniform(0, took))
        except subprocess.TimeoutExpired:
            kill_all(process)
            done += 1
            drawn = sum(file.read_bytes().count(b"\n") for file in run.glob("manifest*.jsonl"))
            print(f"kill {done} at {drawn} pictures", flush=True)
            continue
        shutil.rmtree(run)  # it came to its end: begin again
    finish(arguments, given.processes)
    killed = keep(run, given.folder / "killed")
    finish(arguments, 1)
    alone = keep(run, given.folder / "alone")
    print(f"killed {done} times: {verdict(killed, expected)}; one process: {verdict(alone, expected)}")
    return 0 if killed == alone == expected else 1


def keep(run: Path, place: Path) -> dict[str, bytes]:
    run.rename(place)
    return {name: (place / name).read_bytes() for name in SAME}


def verdict(found: dict[str, bytes], expected: dict[str, bytes]) -> str:
    differing = [name for name in SAME if found[name] != expected[name]]
    return f"{', '.join(differing)} differ" if differing else "the same bytes"


if __name__ == "__main__":
    sys.exit(main())
