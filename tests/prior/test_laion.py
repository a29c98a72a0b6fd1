"""The prior of DALLE2-pytorch against an independent reading of its network, one position at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade.conditioning import TextEmbedding, Tokens
from cascade.errors import InputError
from prior import LaionConfig, LaionPrior
from prior.laion_checkpoint import bindings, laion_config, laion_tensors

SIZES: list[dict[str, Any]] = [
    dict(width=12, layers=2, heads=3, head_width=8, inner=20, text_length=5),
    dict(width=16, layers=1, heads=2, head_width=40, inner=24, text_length=40, inner_norm=True),
    dict(width=8, layers=3, heads=1, head_width=4, inner=16, text_length=3, rotary=False),
]


def checkpoint(config: LaionConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors by the names of DALLE2-pytorch, and what its checkpoints hold beside them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = LaionPrior(config).state_dict()
    found = {}
    for binding in bindings(config):
        (tensor,) = binding.write([shapes[binding.ours[0]]])
        found[binding.theirs[0]] = torch.randn(tensor.shape, generator=generator) * 0.5
    found["net.causal_transformer.layers.0.0.rotary_emb.freqs"] = torch.zeros(4)
    found["noise_scheduler.betas"] = torch.zeros(1000)
    return found


def text(config: LaionConfig, kept: list[int]) -> TextEmbedding:
    generator = torch.Generator().manual_seed(1)
    length = config.text_length - 1
    states = torch.randn(len(kept), length, config.width, generator=generator)
    mask = torch.arange(length)[None] < torch.tensor(kept)[:, None]
    return TextEmbedding((Tokens(states, mask),), torch.randn(len(kept), config.width, generator=generator))


def gain_norm(x: Tensor, gain: Tensor) -> Tensor:
    return (x - x.mean()) / (((x - x.mean()) ** 2).mean() + 1e-5).sqrt() * gain


def turn(x: Tensor, place: int) -> Tensor:
    """Neighbouring pairs of the first 32 entries as complex numbers, times e^(i place rate)."""
    dim = min(32, len(x))
    pairs = torch.view_as_complex(x[:dim].reshape(-1, 2).contiguous())
    rates = torch.tensor([10_000 ** (-2 * k / dim) for k in range(dim // 2)])
    return torch.cat([torch.view_as_real(pairs * torch.exp(1j * place * rates)).flatten(), x[dim:]])


def t5_bucket(distance: int, buckets: int = 32) -> int:
    distance, half = max(distance, 0), buckets // 2
    if distance < half:
        return distance
    return min(half + int(math.log(distance / half) / math.log(128 / half) * half), buckets - 1)


def attend(w: dict[str, Tensor], start: str, config: LaionConfig, x: list[Tensor]) -> list[Tensor]:
    table = w["net.causal_transformer.rel_pos_bias.relative_attention_bias.weight"]
    null_k, null_v = w[f"{start}.null_kv"]
    place = (lambda t, i: turn(t, i)) if config.rotary else (lambda t, i: t)
    normed = [gain_norm(h, w[f"{start}.norm.g"]) for h in x]
    halves = [(w[f"{start}.to_kv.weight"] @ h).chunk(2) for h in normed]
    keys = [null_k, *(place(k, i) for i, (k, _) in enumerate(halves))]
    values = [null_v, *(v for _, v in halves)]
    out = []
    for i, h in enumerate(normed):
        heads = []
        for n, q in enumerate((w[f"{start}.to_q.weight"] @ h).chunk(config.heads)):
            q = place(q, i)
            score = [
                16 * torch.cosine_similarity(q, keys[j], dim=0) + table[t5_bucket(i - j), n]
                for j in range(i + 2)
            ]
            share = torch.stack(score).softmax(0)
            heads.append(sum(s * v for s, v in zip(share, values, strict=False)))
        out.append(gain_norm(w[f"{start}.to_out.0.weight"] @ torch.cat(heads), w[f"{start}.to_out.1.g"]))
    return out


def expected(w: dict[str, Tensor], config: LaionConfig, x: Tensor, time: int, states: Tensor, kept: int,
             pooled: Tensor) -> Tensor:  # fmt: skip
    """The prediction for one row."""
    padding = w["net.null_text_encodings"][0]
    tokens = [states[i] if i < kept else padding[i] for i in range(config.text_length)]
    tokens += [pooled, w["net.to_time_embeds.0.weight"][time], x, w["net.learned_query"]]
    for layer in range(config.layers):
        start = f"net.causal_transformer.layers.{layer}"
        tokens = [t + a for t, a in zip(tokens, attend(w, f"{start}.0", config, tokens), strict=True)]
        for i, h in enumerate(tokens):
            value, gate = (w[f"{start}.1.1.weight"] @ gain_norm(h, w[f"{start}.1.0.g"])).chunk(2)
            inner = value * gate * gate.sigmoid()
            inner = gain_norm(inner, w[f"{start}.1.3.g"]) if config.inner_norm else inner
            tokens[i] = h + w[f"{start}.1.5.weight"] @ inner
    last = gain_norm(tokens[-1] / tokens[-1].max(), w["net.causal_transformer.norm.g"])
    return w["net.causal_transformer.project_out.weight"] @ last


@pytest.mark.parametrize("sizes", SIZES)
def test_the_network_is_that_of_the_checkpoint(sizes: dict[str, Any]) -> None:
    w = checkpoint(LaionConfig(**sizes))
    rotary = {"net": {"rotary_emb": sizes.get("rotary", True)}}
    config = laion_config(w, {"prior": {"predict_x_start": True, **rotary}})
    assert config == LaionConfig(**sizes)
    prior = LaionPrior(config)
    prior.load_state_dict(laion_tensors(w, config, "checkpoint"))
    kept = [1, config.text_length - 1]
    given, x, time = text(config, kept), torch.randn(2, config.width), torch.tensor([7.0, 999.0])
    with torch.no_grad():
        got = prior.net(x, time, prior.net.prepare(given))
    assert given.pooled is not None
    for i in range(2):
        states = given.sequences[0].states[i]
        pooled = given.pooled[i] / given.pooled[i].norm()
        row = expected(w, config, x[i], int(time[i]), states, kept[i], pooled)
        assert torch.allclose(got[i], row, atol=2e-5, rtol=1e-4)


def test_the_null_of_guidance_has_neither_text_nor_image() -> None:
    config = LaionConfig(**SIZES[0])
    w = checkpoint(config)
    prior = LaionPrior(config)
    prior.load_state_dict(laion_tensors(w, config, "checkpoint"))
    given = text(config, [2])
    dropped = torch.tensor([False])
    with torch.no_grad():
        got = prior.net(torch.randn(1, 12), torch.tensor([3.0]), (prior.net.prepare(given, dropped), dropped))
    states, pooled = given.sequences[0].states[0], w["net.null_text_embeds"][0, 0]
    row = expected(w, config, w["net.null_image_embed"][0], 3, states, 0, pooled)
    assert torch.allclose(got[0], row, atol=2e-5, rtol=1e-4)


def test_sampling() -> None:
    """Unit norm, the same alone and in a batch, and better candidates the more there are."""
    config = LaionConfig(**SIZES[0])
    prior = LaionPrior(config)
    prior.load_state_dict(laion_tensors(checkpoint(config), config, "checkpoint"))
    given = text(config, [2, 3])
    both = prior.sample(given, seeds=[4, 5], steps=6, guidance=2.0)
    assert torch.allclose(both.norm(dim=1), torch.ones(2), atol=1e-6)
    alone = prior.sample(given[[1]], seeds=[5], steps=6, guidance=2.0)
    assert torch.allclose(both[[1]], alone, atol=1e-4)
    assert given.pooled is not None

    def cosine(candidates: int) -> Tensor:
        found = prior.sample(given, seeds=[4, 5], steps=6, num_candidates=candidates)
        return torch.cosine_similarity(found, given.pooled)

    assert (cosine(8) >= cosine(1) - 1e-6).all() and (cosine(8) > cosine(1)).any()


def test_a_checkpoint_that_does_not_fit_is_refused() -> None:
    config = LaionConfig(**SIZES[0])
    w = checkpoint(config)
    name = "net.causal_transformer.layers.1.1.5.weight"
    for damaged, words in (
        ({n: t for n, t in w.items() if n != name}, f"missing tensor {name}"),
        ({**w, name: w[name].T}, f"transposed tensor {name}"),
        ({**w, "net.self_cond": w[name]}, "unexpected tensor net.self_cond"),
    ):
        with pytest.raises(InputError, match=words):
            laion_tensors(damaged, config, "checkpoint")
    with pytest.raises(InputError, match="predict_x_start False"):
        laion_config(w, {"prior": {"predict_x_start": False}})
    with pytest.raises(InputError, match="missing tensor net.to_time_embeds.0.weight"):
        laion_config({}, {})
