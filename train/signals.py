"""Stopping on a signal: SIGTERM and SIGUSR1 mean "save and leave", as schedulers send them before they
preempt."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REQUEUE = os.EX_TEMPFAIL  # 75: the exit status of a run that was stopped and can go on


class Preempted(BaseException):
    """A signal asked the run to stop. Not an Exception: no handler of errors may swallow it."""


class StopSignal:
    """In its block, a signal raises `Preempted` at once, wherever the main thread is: making caches,
    drawing a grid, validating. Only where `deferred` is open does it wait for the loop to ask `received`,
    which saves."""

    def __init__(self) -> None:
        self.received = False
        self._deferred = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        with suppress(ValueError):  # not in the main thread
            for name in SIGNALS:
                self._former[name] = signal.signal(name, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._former.items():
            signal.signal(name, handler)

    def _receive(self, *_: object) -> None:
        self.received = True
        if not self._deferred:
            raise Preempted

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Where leaving at once would lose steps."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within `deferred`: long work that can be left as it is, with everything saved before."""
        self._deferred = False
        try:
            if self.received:
                raise Preempted
            yield
        finally:
            self._deferred = True


def settle_worker(_: int) -> None:
    """Prepare a process that makes batches. It outlives a signal to the whole group, so that the last state
    can be saved; and its big buffers go back to the system at once: glibc would keep them on its heap,
    which then grows by gigabytes."""
    for name in (*SIGNALS, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD of malloc.h, bytes
