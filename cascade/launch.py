"""What starts several processes, ended as they end. Launchers of training and evaluation stand on it."""

from __future__ import annotations

import logging
from collections.abc import Callable


def status_of(launch: Callable[[], object]) -> int:
    """Exit status of a launch by torchrun's or accelerate's function: that of the first process that failed
    (a signal as a shell tells it), where they have 1 and add a traceback to what that process said."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0
