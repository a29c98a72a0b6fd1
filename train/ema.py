"""Exponential moving average of a network's parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """float32 average of the parameters; buffers are copied. The decay rises as (1 + n) / (10 + n) to its
    maximum, so that a young average forgets its random start. `updates` is part of the training state."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._parameters = dict(module.named_parameters())
        self._buffers = dict(module.named_buffers())
        self.average = {name: p.detach().clone().float() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [p.float() for p in self._parameters.values()]
        # one kernel for all tensors
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged network, under the network's own names."""
        return {**self.average, **{name: b.detach() for name, b in self._buffers.items()}}

    def load_state_dict(self, tensors: dict[str, Tensor], updates: int) -> None:
        for name, tensor in self.average.items():
            tensor.copy_(tensors[name])
        self.updates = updates
