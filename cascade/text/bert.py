"""BERT's encoder (arXiv:1810.04805) for inference, on a checkpoint's own tensors.

The embedded default needs a 6-layer BERT and nothing else of transformers, whose import would cost more
time than the base stage's sampling; the test holds this to transformers' BertModel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class Bert:
    """Post-norm transformer encoder, absolute positions, exact GELU; `weights` by their checkpoint names."""

    def __init__(self, weights: dict[str, Tensor], heads: int, eps: float) -> None:
        self.weights = weights
        self.heads = heads
        self.eps = eps
        self.layers = len({name.split(".")[2] for name in weights if name.startswith("encoder.layer.")})

    def to(self, device: torch.device, dtype: torch.dtype) -> Bert:
        weights = {name: tensor.to(device=device, dtype=dtype) for name, tensor in self.weights.items()}
        return Bert(weights, self.heads, self.eps)

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask (B L, True at real tokens) to the states of the last layer (B L D)."""
        w = self.weights
        x = w["embeddings.word_embeddings.weight"][ids]  # B L D
        x = x + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = x + w["embeddings.token_type_embeddings.weight"][0]  # every token is of the first sentence
        x = self._norm(x, "embeddings.LayerNorm")
        for i in range(self.layers):
            name = f"encoder.layer.{i}"
            h = self._attend(x, mask, f"{name}.attention")  # B L D
            x = self._norm(x + h, f"{name}.attention.output.LayerNorm")
            h = F.gelu(self._linear(x, f"{name}.intermediate.dense"))  # B L 4D
            x = self._norm(x + self._linear(h, f"{name}.output.dense"), f"{name}.output.LayerNorm")
        return x

    def _attend(self, x: Tensor, mask: Tensor, name: str) -> Tensor:
        q, k, v = (
            self._linear(x, f"{name}.self.{part}").unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B h L d
            for part in ("query", "key", "value")
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self._linear(x.transpose(1, 2).flatten(2), f"{name}.output.dense")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, (x.shape[-1],), weight, bias, self.eps)
