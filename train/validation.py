"""The validation loss: held-out pictures at fixed noise levels with fixed noise, by the averaged weights.

Everything it draws is keyed by (seed, stage, sample), and what is computed together does not depend on the
number of processes; so two values differ by the weights alone, down to the last bit on one type of machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cascade import random
from train.batches import Batch, StageMaker
from train.data import Reader
from train.ema import local
from train.tasks import ClipTask, Task

CHUNK = 16  # samples of one forward pass: kernels round differently at other sizes


@dataclass(frozen=True)
class Validated:
    """Mean loss, and that at each noise level t = (level + 1/2) / levels; one level in a stage without."""

    loss: float
    by_level: list[float]

    def event(self, stage: str, images: int) -> tuple[dict[str, Any], str]:
        """The record of this result after so many training images, and the line that tells it."""
        record = {"event": "validation", "images": images, "loss": self.loss, "by_t": self.by_level}
        levels = " ".join(f"{x:.4f}" for x in self.by_level)
        return record, f"{stage} {images:>9,}  validation loss {self.loss:.4f} (by t: {levels})"


class Validation:
    """The validation loss of a stage. Its samples are all levels of each picture, picture after picture."""

    def __init__(self, task: Task, accelerator: Accelerator) -> None:
        cfg, heldout = task.recipe.validation, np.asarray(task.pictures.heldout)
        self.task, self.accelerator = task, accelerator
        contrastive = isinstance(task, ClipTask)  # a batch has one loss and no noise
        wanted = cfg.pictures * cfg.levels if contrastive else cfg.pictures
        self.levels = 1 if contrastive else cfg.levels
        spread = np.linspace(0, len(heldout) - 1, min(wanted, len(heldout)), dtype=int)
        self.pictures = heldout[spread]
        self.chunk = len(self.pictures) if contrastive else CHUNK
        self._make = copy(task.make)
        # what a guess learns from is no sample; captions stay where dropout would empty them, pictures and
        # embeddings as they are
        plain = dict(guess_batch=0, text_drop=0.0, image_blend=0.0, image_siblings=0.0, vary=0.0)
        self._make.train = replace(task.make.train, **plain)
        if isinstance(self._make, StageMaker):
            self._make.fine = False
        self._make.reader = Reader(task.pictures, Held(self.pictures))

    def __bool__(self) -> bool:
        """Whether there is a picture to validate on."""
        return len(self.pictures) > 0

    @torch.no_grad()
    def run(self, weights: Mapping[str, Tensor]) -> Validated:
        """The losses under `weights`, averages of some of the network's parameters. Collective: each process
        computes some chunks, all of them as many, as networks that are sharded need."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        total = len(self.pictures) * self.levels
        chunks = [range(start, min(start + self.chunk, total)) for start in range(0, total, self.chunk)]
        losses = torch.zeros(total, device=self.accelerator.device)
        training = self.task.training
        self.task.eval()
        try:
            # another mode would be compiled anew
            with averaged(self.task.network, weights), torch.compiler.set_stance("force_eager"):
                for first in range(0, len(chunks), world):
                    items = chunks[min(first + rank, len(chunks) - 1)]
                    found = self.task(self._batch(items)).float()
                    if first + rank < len(chunks):
                        losses[items.start : items.stop] = found
        finally:
            self.task.train(training)
        # the others add zeros, which change no bit
        values = cast(Tensor, self.accelerator.reduce(losses, "sum")).cpu().double()
        by_level = values.view(-1, self.levels).mean(0)
        return Validated(values.mean().item(), by_level.tolist())

    def _batch(self, items: range) -> Batch:
        """A training batch of these samples, but at the fixed noise levels and with nothing left out."""
        task, device = self.task, self.accelerator.device
        positions = [i // self.levels * self._make.train.crops_per_picture for i in items]
        seeds = [random.key(task.recipe.seed, "validation", task.name, i) for i in items]
        batch = self._make.complete(self._make.draw(positions, seeds), device)
        for name in ("keep_text", "keep_image"):
            if name in batch:
                batch[name] = torch.ones_like(batch[name])
        if "t" in batch:
            level = torch.tensor([i % self.levels for i in items], dtype=torch.float64)
            batch["t"] = (level + 0.5) / self.levels
        return {name: value.to(device) for name, value in batch.items()}


class Held:
    """Held-out pictures in the order they are validated in, as training's `Order` is read."""

    def __init__(self, pictures: np.ndarray) -> None:
        self._pictures = pictures

    def __getitem__(self, position: int) -> int:
        return int(self._pictures[position])

    def replacement(self, position: int, attempt: int) -> int:
        return int(self._pictures[(position + attempt) % len(self._pictures)])


@contextmanager
def averaged(network: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """`network` with these weights in place of its own. They are copied into its parameters, of which a
    sharded network keeps views."""
    parameters = dict(network.named_parameters())
    own = {name: local(parameters[name].detach()).clone() for name in weights}
    try:
        for name, value in weights.items():
            local(parameters[name].detach()).copy_(local(value))
        yield
    finally:
        for name, value in own.items():
            local(parameters[name].detach()).copy_(value)
