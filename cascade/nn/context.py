"""A `Conditioning` as the U-Net's blocks consume it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.errors import InputError


@dataclass(frozen=True)
class Context:
    """What does not depend on the noise level, made once a prompt by `UNet.prepare`."""

    vector: Tensor | None  # B E, added to the time embedding
    kv: tuple[Tensor, ...]  # B L 2C for each attention that sees tokens, in order of use
    mask: Tensor | None  # B L bool; None: every token is attended to
    lowres: Tensor | None  # B 3 H W
    inpaint: Tensor | None = None  # B 4 H W
    guess: Tensor | None = None  # B 3 H W

    @staticmethod
    def cat(parts: list[Context]) -> Context:
        """Concatenate along the batch; shorter token sequences are padded with masked tokens. Raises
        InputError when lengths differ in a network that attends to padding."""
        lengths = {kv.shape[1] for p in parts for kv in p.kv[:1]}
        if len(lengths) > 1 and any(p.mask is None for p in parts):
            raise InputError(
                f"token sequences of lengths {sorted(lengths)}: this network attends to padding, so all must "
                "be padded to one length"
            )
        padded = [p._pad(max(lengths, default=0)) for p in parts]
        kv = tuple(torch.cat(same) for same in zip(*(p.kv for p in padded), strict=True))
        names = ("vector", "mask", "lowres", "inpaint", "guess")
        return Context(kv=kv, **{name: _cat([getattr(p, name) for p in padded]) for name in names})

    def aligned(self, multiple: int) -> Context:
        """The same with masked tokens added up to a multiple of their number."""
        if not self.kv:
            return self
        rows, length = self.kv[0].shape[:2]
        mask = self.mask if self.mask is not None else self.kv[0].new_ones(rows, length, dtype=torch.bool)
        return replace(self, mask=mask)._pad(length + -length % multiple)

    def _pad(self, length: int) -> Context:
        if self.mask is None or self.mask.shape[1] == length:
            return self
        extra = length - self.mask.shape[1]
        kv = tuple(F.pad(t, (0, 0, 0, extra)) for t in self.kv)
        return replace(self, kv=kv, mask=F.pad(self.mask, (0, extra)))


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    present = [p for p in parts if p is not None]
    return torch.cat(present) if present else None
