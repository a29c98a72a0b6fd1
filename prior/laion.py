"""The prior of DALLE2-pytorch (LAION's weights): another transformer than unCLIP's, on unit embeddings.

Tokens: text, CLIP text embedding, noise level, noised image embedding, query; those of padding are learned,
one a position. Attention has one key and value for all heads (arXiv:1911.02150), a learned null one of each,
rotary positions (arXiv:2104.09864), cosine similarity times 16 and T5's relative bias (arXiv:1910.10683); the
feed-forward layer is gated by SiLU (arXiv:2002.05202); norms have a gain alone. It predicts x_0 of embeddings
of unit norm times sqrt(width).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade import random
from cascade.conditioning import TextEmbedding
from cascade.config import DiffusionConfig, Prediction, SamplerName, ScheduleConfig, Spacing
from cascade.diffusion.denoiser import Denoiser
from cascade.diffusion.guidance import cfg
from cascade.diffusion.samplers import SAMPLERS
from cascade.errors import InputError
from prior.base import OnStep, candidate_noise, check_number, device_of, negative_rows, pick_best
from prior.clip import select_tokens

SIMILARITY = 16.0  # scale of the cosine: its root on the keys; queries are scaled before they are normed
ROTARY = 32  # most dimensions of a head that turn with the position
DISTANCE = 128  # of the relative bias, at which its buckets end
EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class LaionConfig:
    """Network and default sampling. The published one: width 768, 24 layers."""

    width: int  # of the CLIP embeddings and of the network
    layers: int
    heads: int
    head_width: int = 64
    inner: int  # width of the feed-forward layer
    inner_norm: bool = False  # a norm after its gate
    rotary: bool = True
    buckets: int = 32  # of the relative bias
    text_length: int = 77
    text_sequence: int = 0  # which encoder's tokens, where several stand side by side
    prediction: Prediction = "x0"
    schedule: ScheduleConfig = ScheduleConfig(name="discrete_cosine")
    sampler: SamplerName = "ddpm"
    steps: int = 64
    spacing: Spacing = "linspace"
    guidance: float = 1.0
    best_of: int = 2

    @property
    def embed_dim(self) -> int:
        return self.width

    @property
    def text_dim(self) -> int:
        return self.width


class Norm(nn.Module):
    """Layer norm with a gain alone. `stable`: divided by its largest entry first, as the last norm is."""

    def __init__(self, width: int, stable: bool = False) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))
        self.stable = stable

    def forward(self, x: Tensor) -> Tensor:
        if self.stable:
            x = x / x.amax(dim=-1, keepdim=True)
        return F.layer_norm(x, (x.shape[-1],), self.g, eps=EPS)


class Attention(nn.Module):
    """Causal, of many queries to one key and value a position, and to a learned one before all."""

    def __init__(self, config: LaionConfig) -> None:
        super().__init__()
        width, inner = config.width, config.heads * config.head_width
        self.config = config
        self.norm = Norm(width)
        self.null_kv = nn.Parameter(torch.randn(2, config.head_width))
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * config.head_width, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.norm_out = Norm(width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x: B L D; bias: H L L+1, -inf where attention is not allowed."""
        x = self.norm(x)
        q = self.to_q(x).unflatten(-1, (self.config.heads, -1)).transpose(1, 2)  # B H L d
        k, v = self.to_kv(x).chunk(2, dim=-1)  # B L d each
        if self.config.rotary:
            q, k = rotate(q), rotate(k)
        null_k, null_v = (null.expand(len(x), 1, -1) for null in self.null_kv)  # B 1 d each
        k, v = torch.cat([null_k, k], dim=1), torch.cat([null_v, v], dim=1)  # B L+1 d
        q, k = (F.normalize(t, dim=-1) * SIMILARITY**0.5 for t in (q, k))
        weight = (q @ k[:, None].transpose(-1, -2) + bias).softmax(dim=-1)  # B H L L+1
        y = (weight @ v[:, None]).transpose(1, 2).flatten(2)  # B L H*d
        return self.norm_out(self.to_out(y))


class FeedForward(nn.Module):
    def __init__(self, config: LaionConfig) -> None:
        super().__init__()
        self.norm = Norm(config.width)
        self.inwards = nn.Linear(config.width, 2 * config.inner, bias=False)
        self.inner_norm = Norm(config.inner) if config.inner_norm else nn.Identity()
        self.outwards = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.inwards(self.norm(x)).chunk(2, dim=-1)
        return self.outwards(self.inner_norm(value * F.silu(gate)))


class Layer(nn.Module):
    def __init__(self, config: LaionConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attention(x, bias)
        return x + self.feed_forward(x)


class LaionNet(nn.Module):
    """The transformer. `prepare` makes what does not change with the step."""

    def __init__(self, config: LaionConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.time = nn.Embedding(1000, width)
        self.query = nn.Parameter(torch.randn(width))
        self.null_tokens = nn.Parameter(torch.randn(config.text_length, width))
        self.null_pooled = nn.Parameter(torch.randn(width))
        self.null_image = nn.Parameter(torch.randn(width))
        self.relative = nn.Embedding(config.buckets, config.heads)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = Norm(width, stable=True)
        self.output = nn.Linear(width, width, bias=False)

    def prepare(self, text: TextEmbedding, keep: Tensor | None = None) -> Tensor:
        """B L+1 D: the text, or, in rows where `keep` (B bool) is False, what was learned for none."""
        tokens = select_tokens(text, self.config.text_sequence, self.config.width, "prior")
        if text.pooled is None or text.pooled.shape[-1] != self.config.width:
            raise InputError(f"prior: expected CLIP text embeddings of width {self.config.width}")
        length = tokens.states.shape[1]
        if length > self.config.text_length:
            raise InputError(f"prior: expected at most {self.config.text_length} text tokens, got {length}")
        missing = self.config.text_length - length
        states, mask = F.pad(tokens.states, (0, 0, 0, missing)), F.pad(tokens.mask, (0, missing))
        pooled = F.normalize(text.pooled, dim=-1)
        if keep is not None:
            mask = mask & keep[:, None]
            pooled = torch.where(keep[:, None], pooled, self.null_pooled)
        states = torch.where(mask[..., None], states.to(self.null_tokens.dtype), self.null_tokens)
        return torch.cat([states, pooled.to(states.dtype)[:, None]], dim=1)

    def forward(self, x: Tensor, time: Tensor, prefix: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """x: B D, noised; time: B in [0, 1000]; prefix: from `prepare`, and B bool that says where the image
        embedding is kept, if not everywhere. Returns the prediction, B D."""
        text, keep = prefix if isinstance(prefix, tuple) else (prefix, None)
        if keep is not None:
            x = torch.where(keep[:, None], x, self.null_image.to(x.dtype))
        tail = torch.stack([self.time(time.long()).to(x.dtype), x, self.query.expand_as(x)], dim=1)
        h = torch.cat([text.to(x.dtype), tail], dim=1)  # B L+4 D
        bias = self.bias(h.shape[1])
        for layer in self.layers:
            h = layer(h, bias)
        return self.output(self.norm(h[:, -1]))

    def bias(self, length: int) -> Tensor:
        """H L L+1: T5's bias of the distance from each query to each key, keys counted from the null one, and
        -inf at keys that come after the query."""
        query = torch.arange(length, device=self.query.device)[:, None]
        key = torch.arange(length + 1, device=self.query.device)[None]
        values = self.relative(bucket(query - key, self.config.buckets)).permute(2, 0, 1)
        return values.masked_fill(key > query + 1, -torch.inf)


def bucket(distance: Tensor, buckets: int) -> Tensor:
    """T5's bucket of a distance backwards: exact in the first half of the buckets, then logarithmic."""
    distance, exact = distance.clamp(min=0), buckets // 2
    share = torch.log(distance.float().clamp(min=1) / exact) / math.log(DISTANCE / exact)
    far = exact + (share * (buckets - exact)).long()
    return torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


def rotate(x: Tensor) -> Tensor:
    """Rotary positions: the first dimensions of ... L d, in neighbouring pairs, turned by the place in L."""
    dim = min(ROTARY, x.shape[-1])
    turned, rest = x[..., :dim], x[..., dim:]
    rate = 10_000 ** (-torch.arange(0, dim, 2, device=x.device) / dim)
    angle = (torch.arange(x.shape[-2], device=x.device)[:, None] * rate).repeat_interleave(2, dim=-1)  # L dim
    even, odd = turned[..., 0::2], turned[..., 1::2]
    across = torch.stack([-odd, even], dim=-1).flatten(-2)
    return torch.cat([turned * angle.cos() + across * angle.sin(), rest], dim=-1).to(x.dtype)


class LaionPrior(nn.Module):
    """Text to CLIP image embeddings of unit norm; it takes part in sampling alone."""

    config_class: ClassVar[type] = LaionConfig

    def __init__(self, config: LaionConfig) -> None:
        super().__init__()
        self.config = config
        diffusion = DiffusionConfig(prediction=config.prediction, schedule=config.schedule, weighting="none")
        self.denoiser = Denoiser(LaionNet(config), diffusion)
        self.schedule = self.denoiser.schedule

    @property
    def net(self) -> LaionNet:
        return self.denoiser.net  # type: ignore[return-value]

    @torch.no_grad()
    def sample(
        self,
        text: TextEmbedding,
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        num_candidates: int | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        negative: TextEmbedding | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Draw one image embedding a row of `text`: B D, float32, unit norm. Arguments as those of
        `DiffusionPrior.sample`. Raises InputError on an impossible setting or a text of another width."""
        config, device = self.config, device_of(self)
        number = config.best_of if num_candidates is None else num_candidates
        scale = config.guidance if guidance is None else guidance
        steps = config.steps if steps is None else steps
        check_number("num_candidates", number, number >= 1, "an integer of at least 1")
        check_number("steps", steps, 1 <= steps <= 1000, "an integer from 1 to 1000")
        check_number("guidance", scale, True, "a finite number")
        rows, text = random.seed_list(seed if seeds is None else seeds, len(text)), text.to(device)

        def step_noise(step: int) -> Tensor:
            return candidate_noise(config.width, rows, number, "prior", "step", step).to(device)

        def report(step: int, total: int, x0: Tensor) -> None:
            if on_step is not None:
                on_step(step, total, F.normalize(x0, dim=-1))

        x = candidate_noise(config.width, rows, number, "prior", "init").to(device)
        grid = self.schedule.grid(steps, config.spacing)
        denoise = self._guided(text, negative, scale, number)
        x0 = SAMPLERS[config.sampler](denoise, x, grid, noise=step_noise, on_step=report, eta=1.0)
        assert text.pooled is not None  # `prepare` has seen it
        return pick_best(x0, text.pooled, number)

    def _guided(self, text: TextEmbedding, negative: TextEmbedding | None, scale: float, number: int):
        """The denoiser as a function of (x, logsnr), guided in one batched forward. The null of guidance has
        neither text nor image embedding; a negative text keeps the latter."""
        prefix = self.net.prepare(text)
        if scale == 1:
            prefix = prefix.repeat_interleave(number, 0)
            return lambda x, logsnr: self.denoiser(x, logsnr, prefix)
        keep = torch.zeros(len(text), dtype=torch.bool, device=prefix.device)
        if negative is None:
            null = self.net.prepare(text, keep)
        else:
            null = self.net.prepare(negative_rows(negative, len(text)).to(prefix.device))
        kept = torch.cat([torch.ones_like(keep), keep if negative is None else ~keep])
        both = torch.cat([prefix, null]).repeat_interleave(number, 0), kept.repeat_interleave(number)

        def denoise(x: Tensor, logsnr: Tensor) -> Tensor:
            cond, uncond = self.denoiser(x.repeat(2, 1), logsnr.repeat(2), both).chunk(2)
            return cfg(cond, uncond, scale)

        return denoise
