"""Several processes as one: what fails on one of them ends all, and one of them says why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import distributed

PATIENCE = timedelta(days=30)  # of a process that waits for the others to end their share


class Lost(Exception):
    """The other processes cannot be reached: one of them failed, and says why."""


def processes() -> PartialState:
    """This process among those of its launch, and its device: one of them or many.

    Kernels of the CPU add up in another order when more threads share the work, which changes the last bits.
    So a process computes with one thread there, and several cores are used by several processes."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, **({"timeout": PATIENCE} if "LOCAL_RANK" in os.environ else {}))
    if cpu:
        torch.set_num_threads(1)
    return state


@contextmanager
def together(state: PartialState) -> Iterator[None]:
    """Raises `Lost` where another process has gone, to tell that from an error of one's own."""
    try:
        yield
    except RuntimeError as error:
        if state.num_processes > 1 and (isinstance(error, distributed.DistError) or "by peer" in str(error)):
            raise Lost(str(error).strip().splitlines()[0]) from None
        raise
