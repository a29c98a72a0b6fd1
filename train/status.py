"""What a run says while it trains: the status line, log.jsonl and events.jsonl."""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from train.files import write_whole
from train.guards import BINS, Report
from train.trackers import Trackers

LOG, EVENTS = "log.jsonl", "events.jsonl"


class Clock:
    """Where the time of the steps goes: waiting for data, computing (forward, backward, optimiser), all else.
    On a GPU computing is measured there, as the host runs ahead of it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.restart()
        self.data_wanted()

    def restart(self) -> None:
        self._mark, self._waited, self._computed = time.perf_counter(), 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def data_wanted(self) -> None:
        self._wanted = time.perf_counter()

    def data_ready(self) -> None:
        self._waited += time.perf_counter() - self._wanted

    @contextmanager
    def computing(self) -> Iterator[None]:
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            start = time.perf_counter()
            yield
            self._computed += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is no step's."""
        start = time.perf_counter()
        yield
        self._mark += time.perf_counter() - start

    def read(self) -> tuple[float, float, float]:
        """Seconds since the restart; shares of them waited for data, and spent outside computing."""
        if self._events:
            self._events[-1][1].synchronize()
            self._computed = sum(start.elapsed_time(end) for start, end in self._events) / 1000
        seconds = time.perf_counter() - self._mark
        return seconds, self._waited / seconds, max(0.0, 1 - self._computed / seconds)


class Reports:
    """Hands the numbers of each step from the device to the host. From a GPU they come a step late, so
    that the host, which reads them, never makes it wait."""

    def __init__(self, device: torch.device, lag: int | None = None) -> None:
        self._cuda = device.type == "cuda"
        self._lag = int(self._cuda) if lag is None else lag
        self._queue: deque[tuple[int, Tensor, Any, torch.cuda.Event | None]] = deque()

    def add(self, images: int, numbers: Tensor, kept: Any) -> None:
        """`numbers`: norm of the gradient, stop, loss sums and counts by noise level. `kept`: of the
        step's batch, handed back with its report."""
        host = numbers.detach().to("cpu", non_blocking=True)
        event = None
        if self._cuda:
            event = torch.cuda.Event()
            event.record()
        self._queue.append((images, host, kept, event))

    def ready(self, everything: bool = False) -> Iterator[tuple[Report, Any]]:
        while len(self._queue) > (0 if everything else self._lag):
            images, host, kept, event = self._queue.popleft()
            if event is not None:
                event.synchronize()
            values = host.double().numpy()
            sums, counts = values[2 : 2 + BINS], values[2 + BINS :]
            yield Report(images, bool(values[1] > 0), float(values[0]), sums, counts), kept


class Log:
    """The status line and log.jsonl: a record a log interval, each once, also after a resume."""

    def __init__(
        self,
        folder: Path,
        console: Console,
        stage: str,
        flops: float,
        clock: Clock,
        trackers: Trackers,
        main: bool,
    ) -> None:
        self.folder, self.console, self.stage, self.trackers = folder, console, stage, trackers
        self.flops, self.clock, self._main = flops, clock, main
        self._reset()

    def _reset(self) -> None:
        self._sums, self._counts = np.zeros(BINS), np.zeros(BINS)
        self._images, self._norm, self._skipped = 0, math.nan, 0

    def resume(self, images: int) -> None:
        """Drop the records after `images`: the steps they tell of are made again."""
        for name in (LOG, EVENTS) if self._main else ():
            path = self.folder / name
            if path.exists():
                lines = path.read_bytes().splitlines(keepends=True)
                kept = [line for line in lines if _images_of(line) <= images]
                if len(kept) < len(lines):
                    write_whole(path, b"".join(kept))

    def add(self, report: Report, batch: int) -> None:
        self._images += batch
        if report.finite:
            self._sums, self._counts = self._sums + report.sums, self._counts + report.counts
            self._norm = report.norm
        else:
            self._skipped += 1

    def event(self, record: dict[str, Any], message: str) -> None:
        """Something that happened at a step: a line of its own."""
        self.console.print(message)
        self._append(EVENTS, record)

    def flush(self, images: int, total: int, lr: float) -> float:
        """Print and write one record of all since the last. Returns the seconds since then."""
        seconds, waited, outside = self.clock.read()
        rate = self._images / seconds
        number = float(self._counts.sum())
        loss = float(self._sums.sum()) / number if number else None
        by_level = self._sums / self._counts.clip(min=1)
        norm = self._norm if math.isfinite(self._norm) else None
        record = {
            "images": images,
            "loss": loss,
            "loss_by_t": by_level.tolist(),
            "images_per_s": rate,
            "flop_per_s": rate * self.flops,
            "data_wait": waited,
            "outside": outside,  # of forward, backward and optimiser: share of the time; data_wait is part
            "grad_norm": norm,
            "skipped": self._skipped,
            "lr": lr,
            "seconds": seconds,
        }
        self._append(LOG, record)
        levels = " ".join(f"{x:.4f}" for x, n in zip(by_level, self._counts, strict=True) if n)
        shown = "-" if loss is None else f"{loss:.4f} (by t: {levels})"
        self.console.print(
            f"{self.stage} {images:>9,}/{total:,}  loss {shown}  {rate:.1f} img/s  "
            f"{rate * self.flops / 1e9:,.0f} GFLOP/s  outside {outside:.1%} (data {waited:.1%})  "
            f"|g| {self._norm:.2f}  lr {lr:.1e}  {(total - images) / rate / 60:.0f} min left"
        )
        self._reset()
        self.clock.restart()
        return seconds

    def _append(self, name: str, record: dict[str, Any]) -> None:
        """A line of a file. One that cannot be written is told, and training goes on."""
        if not self._main:
            return
        path = self.folder / name
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, size)  # no half line before the next
            self.console.print(f"cannot write {path}: {error.strerror}")
        self.trackers.log(record.get("event", "train"), record, record["images"])


def _images_of(line: bytes) -> float:
    """Of a record; inf for half a line, which a kill can leave."""
    try:
        return json.loads(line)["images"] if line.endswith(b"\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf
