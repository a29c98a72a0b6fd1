"""A batch as one tensor of bytes, as which it passes from a loader process to the one that trains.

Each tensor that passes costs a file descriptor of its own, sent over a socket: for the dozen and more of a
batch that takes longer than to read what is in them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ALIGN = 64  # bytes: where a tensor may begin


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a bundle, and how."""

    start: int
    bytes: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Bundle:
    data: Tensor  # uint8
    places: dict[str, Place]

    def open(self) -> dict[str, Tensor]:
        """The tensors by name: views of the bytes, in the memory format they had."""
        return {
            name: self.data[p.start : p.start + p.bytes].view(p.dtype).as_strided(p.shape, p.stride)
            for name, p in self.places.items()
        }


def bundled(batch: dict[str, Tensor]) -> Bundle:
    """A copy of tensors of the CPU."""
    places, end = {}, 0
    for name, x in batch.items():
        stride = torch.empty_like(x, device="meta").stride()  # its own, without gaps
        places[name] = Place(end, x.nbytes, x.dtype, x.shape, stride)
        end += -(-x.nbytes // ALIGN) * ALIGN
    bundle = Bundle(torch.empty(end, dtype=torch.uint8), places)
    for name, view in bundle.open().items():
        view.copy_(batch[name])
    return bundle
