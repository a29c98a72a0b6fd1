"""Wall time and peak memory of a whole process.

    python -m eval.process COMMAND...

runs COMMAND and prints one line of JSON: seconds, peak_bytes, status. It stands between the caller and the
command because Linux starts a child's peak at the memory its parent held at the fork: measured straight
from a process that has a model loaded, every child would look as big as that one. Standard library only,
so that this launcher itself stays at a few megabytes.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere


@dataclass(frozen=True)
class Measured:
    seconds: float  # wall time from start to exit
    peak_bytes: int  # the largest resident set of the process
    status: int
    stderr: str


def measure(command: Sequence[str]) -> Measured:
    """Run `command` in the checkout's root, its output discarded, and wait for it."""
    launcher = [sys.executable, "-m", "eval.process", *command]
    run = subprocess.run(launcher, cwd=ROOT, capture_output=True, text=True, check=True)
    return Measured(**json.loads(run.stdout), stderr=run.stderr)


def main(command: Sequence[str]) -> None:
    start = time.perf_counter()
    status = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * MAXRSS_BYTES
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "status": status}))


if __name__ == "__main__":
    main(sys.argv[1:])
