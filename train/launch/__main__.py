"""`python -m train.launch OPTIONS -m train RECIPE ...` is `accelerate launch OPTIONS -m train RECIPE
...`, made for job scripts: its exit status is that of the first process that failed (2 bad input, 75
stopped and to be queued again), the launcher adds no traceback to what that process says, and SIGUSR1
reaches the processes."""

from __future__ import annotations

import logging
import sys

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from train.signals import REQUEUE

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # torch's own and the one of schedulers


def main(argv: list[str] | None = None) -> int:
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    arguments = launch_command_parser().parse_args(argv)
    arguments.signals_to_handle = SIGNALS
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return (
            failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        )  # as a shell tells a signal
    except SignalException:
        return REQUEUE
    except (ValueError, OSError, ImportError) as error:
        print(f"train.launch: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
