"""What is watched in training: steps whose loss or gradient is not finite, and losses that jump."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cascade.errors import InputError

BINS = 4  # quarters of t in which the loss is reported and watched
WINDOW, ENOUGH = 256, 64  # steps that a jump is measured against; from how many on
JUMP = 8.0  # robust standard deviations of the log loss
NAMED = 8  # samples in a message


@dataclass(frozen=True)
class Report:
    """What the processes know of a step together, on the host."""

    images: int  # training images before the step
    stop: bool  # a process was asked to stop
    norm: float  # of the gradient
    sums: np.ndarray  # BINS: of the losses by noise level
    counts: np.ndarray  # BINS

    @property
    def finite(self) -> bool:
        return math.isfinite(self.norm) and self.finite_loss

    @property
    def finite_loss(self) -> bool:
        return bool(np.isfinite(self.sums).all())

    @property
    def by_level(self) -> list[float | None]:
        """Mean loss by noise level; None where the step had no sample."""
        return [s / n if n else None for s, n in zip(self.sums.tolist(), self.counts.tolist(), strict=True)]


def by_noise_level(losses: Tensor, t: Tensor | None) -> Tensor:
    """Sums of the losses by quarter of t, then counts: 2 BINS. Without noise levels all is in the first."""
    bins = torch.zeros_like(losses, dtype=torch.long) if t is None else (t * BINS).long().clamp(max=BINS - 1)
    sums = losses.new_zeros(2, BINS).float()
    sums[0].index_add_(0, bins, losses.float())
    sums[1].index_add_(0, bins, torch.ones_like(losses, dtype=torch.float32))
    return sums.flatten()


class Skips:
    """Counts skipped updates, and ends a run that makes no others. Of a `scaled` loss (fp16) some are meant
    to be skipped: the scale, which is halved then, is found so, and found again whenever it was doubled."""

    def __init__(self, stage: str, limit: int, scaled: bool = False) -> None:
        self.stage, self.limit, self.scaled, self.in_a_row = stage, limit, scaled, 0
        self.suspect = False  # the weights of now may be past help

    def add(self, report: Report) -> None:
        self.in_a_row = 0 if report.finite else self.in_a_row + 1
        self.suspect = not report.finite and not self.overflow(report)

    def overflow(self, report: Report) -> bool:
        """Whether the gradient was too large for its scale alone."""
        return self.scaled and report.finite_loss and not report.finite

    def check(self, last: bool = False) -> None:
        """Raises InputError where too many were skipped; at the `last` step, where that was."""
        if self.in_a_row >= (1 if last else self.limit):
            found = f"{self.in_a_row} updates in a row were skipped, as loss or gradient was not finite"
            raise InputError(
                f"stage {self.stage}: {found}: lower train.lr, or look at the samples named above"
            )


def skip_event(stage: str, images: int, samples: list[int], t: list[float], losses: list[float]) -> dict:
    """The record of a skipped update: the samples whose loss is not finite, or all where only the gradient is
    not. `samples`, `t` and `losses` are those of the whole batch; t may be empty, and losses one for all."""
    bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
    chosen = bad if bad and len(losses) == len(samples) else range(len(samples))
    return {
        "event": "skipped",
        "stage": stage,
        "images": images,
        "what": "loss" if bad else "gradient",
        "samples": [samples[i] for i in chosen],
        "t": [t[i] for i in chosen] if t else [],
    }


def overflow_event(stage: str, images: int) -> dict[str, Any]:
    """The record of an update that was skipped as the scale of the loss was too large for fp16."""
    return {"event": "skipped", "stage": stage, "images": images, "what": "overflow", "samples": [], "t": []}


def skip_message(event: dict[str, Any]) -> str:
    """One line of a `skip_event` or `overflow_event`."""
    where = f"{event['stage']} {event['images']:>9,}"
    if event["what"] == "overflow":
        return f"{where}  update skipped, the gradient overflowed in fp16; the loss scale is halved"
    samples, t = event["samples"], event["t"] or [None] * len(event["samples"])
    names = [f"{s}" if u is None else f"{s} (t {u:.3f})" for s, u in zip(samples, t, strict=True)]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    what = f"update skipped, the {event['what']} is not finite"
    return f"{where}  {what}; samples {', '.join(names[:NAMED])}{more}"


class Spikes:
    """Finds losses that jump. A diffusion loss spans orders of magnitude over the noise levels, so that each
    quarter of t is held against itself: the log of its mean against median and MAD of the last steps."""

    def __init__(self) -> None:
        self._history = [deque[float](maxlen=WINDOW) for _ in range(BINS)]

    def add(self, report: Report) -> list[tuple[int, float, float]]:
        """(quarter, loss, median) of each quarter that jumped in this step."""
        found = []
        for i, (loss, past) in enumerate(zip(report.by_level, self._history, strict=True)):
            if loss is None or not 0 < loss < math.inf:
                continue
            if len(past) >= ENOUGH:
                logs = np.asarray(past)
                median = float(np.median(logs))
                deviation = 1.4826 * float(np.median(np.abs(logs - median)))  # of a Gaussian
                if math.log(loss) - median > max(JUMP * deviation, math.log(2)):
                    found.append((i, loss, math.exp(median)))
            past.append(math.log(loss))
        return found
