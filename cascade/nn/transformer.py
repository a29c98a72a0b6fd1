"""The text transformer that GLIDE trains as a part of its U-Net (arXiv:2112.10741, section 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cascade.config import TextTransformerConfig
from cascade.errors import InputError


class TextTransformer(nn.Module):
    """Token ids (B L, mask True at real ones) to states (B L D): pre-norm blocks in which all tokens see each
    other. Each place of padding has a learned embedding of its own. Raises InputError at another length."""

    def __init__(self, cfg: TextTransformerConfig) -> None:
        super().__init__()
        self.length = cfg.length
        self.embedding = nn.Embedding(cfg.vocab, cfg.width)
        self.position = nn.Parameter(torch.randn(cfg.length, cfg.width).mul_(0.01))
        self.padding = nn.Parameter(torch.randn(cfg.length, cfg.width).mul_(0.01))
        norm = nn.LayerNorm(cfg.width)
        self.blocks = nn.TransformerEncoder(_block(cfg), 0, norm, enable_nested_tensor=False)
        # not as copies of one: they share no initial weights
        self.blocks.layers.extend(_block(cfg) for _ in range(cfg.layers))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        if ids.shape[1] != self.length:
            raise InputError(f"token ids: expected sequences of {self.length}, got {ids.shape[1]}")
        states = self.embedding(ids) + self.position
        return self.blocks(torch.where(mask[..., None], states, self.padding))


def _block(cfg: TextTransformerConfig) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        cfg.width, cfg.heads, 4 * cfg.width, 0.0, activation="gelu", batch_first=True, norm_first=True
    )
