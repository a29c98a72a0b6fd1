"""Attention and attention pooling against a plain softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cascade.nn.attention import Attention2d, AttentionPool, extend_mask


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Written out, head by head. q: B N C; k, v: B M C; mask: B M."""
    parts = []
    for q_h, k_h, v_h in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = q_h @ k_h.transpose(1, 2) / q_h.shape[-1] ** 0.5  # B N M
        parts.append(scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ v_h)
    return torch.cat(parts, dim=-1)


def attention(self_attention: bool = True, context_dim: int = 6) -> Attention2d:
    layer = Attention2d(16, 8, "rms", self_attention=self_attention, context_dim=context_dim)
    torch.nn.init.normal_(layer.out.weight)
    return layer


@pytest.mark.parametrize(("self_attention", "context_dim"), [(True, 6), (True, 0), (False, 6)])
def test_pixels_attend_to_tokens_and_pixels_in_one_softmax(self_attention: bool, context_dim: int) -> None:
    layer = attention(self_attention, context_dim)
    x, context = torch.randn(2, 16, 3, 4), torch.randn(2, 5, 6)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])

    h = layer.norm(x).flatten(2).transpose(1, 2)  # B HW C
    keys, values, masks = [], [], []
    if layer.kv_context is not None:
        k, v = layer.context_kv(context).chunk(2, dim=-1)
        keys, values, masks = [k], [v], [mask]
    if layer.kv is not None:
        k, v = layer.kv(h).chunk(2, dim=-1)
        keys, values, masks = [*keys, k], [*values, v], [*masks, torch.ones(2, 12, dtype=torch.bool)]
    joined = [torch.cat(parts, dim=1) for parts in (keys, values, masks)]
    h = layer.out(softmax_attention(layer.q(h), *joined, heads=2))
    expected = x + h.transpose(1, 2).reshape(x.shape)

    kv = layer.context_kv(context) if context_dim else None
    torch.testing.assert_close(layer(x, kv, mask if context_dim else None), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("self_attention", [True, False])
def test_masked_tokens_do_not_matter(self_attention: bool) -> None:
    layer = attention(self_attention)
    x, context = torch.randn(1, 16, 3, 4), torch.randn(1, 5, 6)
    mask = torch.tensor([[True, True, False, False, False]])
    other = torch.where(mask[..., None], context, 100.0)
    out = layer(x, layer.context_kv(context), mask)
    torch.testing.assert_close(layer(x, layer.context_kv(other), mask), out)
    torch.testing.assert_close(layer(x, layer.context_kv(context[:, :2]), None), out)
    assert not torch.allclose(layer(x, layer.context_kv(other), torch.ones_like(mask)), out)


def test_attention_starts_as_the_identity() -> None:
    layer = Attention2d(16, 8, "group", self_attention=True, context_dim=6)
    x = torch.randn(2, 16, 3, 4)
    assert torch.equal(layer(x, layer.context_kv(torch.randn(2, 5, 6)), None), x)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 0), (0, 7), (2, 3)])
def test_a_mask_is_extended_by_true(before: int, after: int) -> None:
    mask = torch.tensor([[True, False, False], [False, True, False]])
    expected = torch.nn.functional.pad(mask, (before, after), value=True)
    assert torch.equal(extend_mask(mask, before, after), expected)


def test_a_width_below_one_head_is_one_head() -> None:
    assert Attention2d(16, 64, "rms", self_attention=True, context_dim=0).heads == 1


def test_pool_is_the_attention_of_a_class_token() -> None:
    pool = AttentionPool(8, heads=2)
    tokens, mask = torch.randn(2, 5, 8), torch.tensor([[True] * 5, [True, True, False, False, False]])
    mean = torch.stack([tokens[0].mean(0), tokens[1, :2].mean(0)])[:, None]
    first = mean + pool.position
    states = torch.cat([first, tokens], dim=1)
    seen = torch.cat([torch.ones(2, 1, dtype=torch.bool), mask], dim=1)
    expected = softmax_attention(pool.q(first), pool.k(states), pool.v(states), seen, heads=2)[:, 0]
    torch.testing.assert_close(pool(tokens, mask), expected, atol=1e-5, rtol=1e-5)


def test_pool_ignores_masked_tokens_and_the_order_of_the_others() -> None:
    pool = AttentionPool(8, heads=2)
    tokens, mask = torch.randn(1, 5, 8), torch.tensor([[True, True, True, False, False]])
    out = pool(tokens, mask)
    torch.testing.assert_close(pool(torch.where(mask[..., None], tokens, 9.0), mask), out)
    torch.testing.assert_close(pool(tokens[:, [2, 0, 1, 4, 3]], mask), out)


def test_pool_of_nothing_is_finite() -> None:
    out = AttentionPool(8, heads=2)(torch.randn(1, 5, 8), torch.zeros(1, 5, dtype=torch.bool))
    assert bool(out.isfinite().all())
