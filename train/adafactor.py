"""Adafactor as optax has it: what Imagen's base model was trained with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Adafactor(torch.optim.Adafactor):
    """torch's Adafactor (arXiv:1804.04235, algorithm 4, without a first moment), of a given learning rate
    relative to the size of each weight: lr x max(RMS(weight), 1e-3) (torch caps lr at 1 / sqrt(steps)).

    The second moment is factored over the two longest axes of a weight: of a kernel its channels, at each of
    its places. torch takes the last two, a kernel's height and width, which saves nothing. optax leaves
    weights whole whose second longest axis is below 128; here they are factored as well."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        # torch squares the first: the paper's 1e-30
        super().__init__(parameters, lr=lr, eps=(1e-15, 1e-3), weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with self._longest_axes_last():
            return super().step(closure)

    @contextmanager
    def _longest_axes_last(self) -> Iterator[None]:
        """Weights and gradients as views with their axes in order of length."""
        own = [(p, p.data, p.grad) for group in self.param_groups for p in group["params"]]
        for p, weight, grad in own:
            order = sorted(range(p.ndim), key=weight.shape.__getitem__)
            p.grad, p.data = None, weight.permute(order)
            p.grad = None if grad is None else grad.permute(order)
        try:
            yield
        finally:
            for p, weight, grad in own:
                p.grad, p.data = None, weight
                p.grad = grad
