"""The transformer shared by the CLIP text head and both priors: pre-norm, fused attention, K/V cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]  # K and V of one layer, each B H L D


class Attention(nn.Module):
    """Multi-head self-attention. Raises ValueError when `width` is not a multiple of `heads`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """x: B L D. mask: bool, broadcastable to B H L (P+L), True where attention is allowed; None allows
        all. past: K and V of P earlier positions. Returns the output and K and V of all P+L positions."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B H L D
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2)), (k, v)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) with a GELU of four times the width."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        y, present = self.attention(self.norm1(x), mask, past)
        x = x + self.dropout(y)
        return x + self.dropout(self.mlp(self.norm2(x))), present


class Transformer(nn.Module):
    """A stack of blocks and a last norm. Weights N(0, 1/width); the two projections into the residual
    stream are divided by sqrt(2 layers), so that its variance does not grow with depth (GPT-2)."""

    def __init__(self, width: int, layers: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for block in self.blocks:
            assert isinstance(block, Block)
            for linear in (block.attention.qkv, block.attention.out, block.mlp[0], block.mlp[2]):
                assert isinstance(linear, nn.Linear)
                nn.init.normal_(linear.weight, std=width**-0.5)
                nn.init.zeros_(linear.bias)
            for residual in (block.attention.out, block.mlp[2]):
                assert isinstance(residual, nn.Linear)
                residual.weight.data.mul_((2 * layers) ** -0.5)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, past: list[KeyValue] | None = None
    ) -> tuple[Tensor, list[KeyValue]]:
        """x: B L D. mask as in `Attention`. past: what an earlier call returned for the positions before.
        Returns the normed states, B L D, and the K and V of every layer for a later call."""
        present: list[KeyValue] = []
        for i, block in enumerate(self.blocks):
            x, layer = block(x, mask, None if past is None else past[i])
            present.append(layer)
        return self.norm(x), present
