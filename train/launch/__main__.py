"""`python -m train.launch OPTIONS -m train RECIPE ...` is `accelerate launch OPTIONS -m train RECIPE
...`, made for job scripts: its exit status is that of the first process that failed (2 bad input, 75
stopped and to be queued again), the launcher adds no traceback to what that process says, and SIGUSR1
reaches the processes."""

from __future__ import annotations

import sys

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException

from cascade.launch import status_of
from train.signals import REQUEUE

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # torch's own and the one of schedulers


def main(argv: list[str] | None = None) -> int:
    arguments = launch_command_parser().parse_args(argv)
    arguments.signals_to_handle = SIGNALS
    try:
        return status_of(lambda: launch_command(arguments))
    except SignalException:
        return REQUEUE
    except (ValueError, OSError, ImportError) as error:
        print(f"train.launch: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
