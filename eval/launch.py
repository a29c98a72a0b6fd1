"""`python -m eval.launch --nproc N SUITE ...` is `python -m eval SUITE ...` by N processes of this machine.

torchrun and `accelerate launch` start them as well, for several machines too; but where a process fails they
add a traceback to what it says, and end with 1. Here the exit status is that of the process: 2 after bad
input, of which the first process says one line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException

from cascade.arguments import Parser
from cascade.errors import InputError
from cascade.launch import status_of


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: that of the first process that failed, else 0."""
    parser = Parser(prog="python -m eval.launch", description=__doc__, allow_abbrev=False)
    parser.add_argument("--nproc", type=int, required=True, metavar="N", help="processes, one a GPU or core")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="SUITE ..., as after python -m eval")
    try:
        given = parser.parse_args(argv)
        if given.nproc < 1:
            raise InputError(f"--nproc {given.nproc}: expected at least 1")
    except InputError as error:
        print(f"eval.launch: {error}", file=sys.stderr)
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else torchrun sets it and says so
    processes = ["--standalone", "--nproc-per-node", str(given.nproc)]
    try:
        return status_of(lambda: run.main([*processes, "-m", "eval", *given.command]))
    except SignalException as error:
        return 128 + error.sigval


if __name__ == "__main__":
    sys.exit(main())
