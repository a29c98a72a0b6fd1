"""The autoregressive prior of unCLIP (Ramesh et al. 2022, arXiv:2204.06125, section 2.2).

The image embedding becomes a sequence of quantised principal components, predicted one after the other from
[text tokens, CLIP text embedding, dot-product token]. The dot-product token says how near image and text lie;
at sampling it is drawn from the top half of its distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade import random
from cascade.conditioning import TextEmbedding
from prior.base import OnStep, check_number, device_of, negative_rows, pick_best
from prior.codes import PCAQuantizer
from prior.prefix import Prefix, TextPrefix, causal_mask
from prior.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig:
    """Network, codes and default sampling settings. The paper: width 1664, 24 layers, 26 heads, 319 codes."""

    width: int = 256
    layers: int = 6
    heads: int = 8
    text_dim: int = 384  # width of the text encoder's tokens
    text_sequence: int = 0  # which encoder's tokens, where several stand side by side
    text_length: int = 64  # most tokens of a prompt
    embed_dim: int = 256  # of the CLIP
    codes: int = 128  # principal components; `prior.codes.components_for` finds those that keep 99%
    buckets: int = 1024  # a component, and of the dot product
    dropout: float = 0.0
    guidance: float = 1.0  # 1 is off
    best_of: int = 2  # candidates a picture, of which the one nearest to the text is kept
    temperature: float = 1.0
    top_k: int | None = None  # buckets a draw is limited to; None: all
    dot_quantile: float = 0.5  # the dot-product token is drawn above this quantile

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if not 1 <= self.codes <= self.embed_dim:
            raise ValueError(f"codes {self.codes}: expected 1 to embed_dim, {self.embed_dim}")
        if not 0 <= self.dot_quantile < 1:
            raise ValueError(f"dot_quantile {self.dot_quantile}: expected at least 0, less than 1")


class CodeNet(nn.Module):
    """The transformer over text, dot-product token and codes. The state at a position predicts the next."""

    def __init__(self, config: AutoregressiveConfig):
        super().__init__()
        width = config.width
        self.prefix = TextPrefix(
            width, config.text_dim, config.text_sequence, config.text_length, config.embed_dim
        )
        self.dot = nn.Embedding(config.buckets, width)
        self.null_dot = nn.Parameter(torch.randn(width).mul_(0.02))
        self.code = nn.Embedding(config.buckets, width)  # shared: the position says which component it is
        self.positions = nn.Parameter(torch.randn(config.codes, width).mul_(0.02))  # dot, code 1 .. code K-1
        self.transformer = Transformer(width, config.layers, config.heads, config.dropout)
        self.dot_head = nn.Linear(width, config.buckets)
        self.code_head = nn.Linear(width, config.buckets)
        for embedding in (self.dot, self.code):
            nn.init.normal_(embedding.weight, std=0.02)
        for head in (self.dot_head, self.code_head):  # the first prediction is uniform
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(
        self, text: TextEmbedding, keep: Tensor | None, dot: Tensor, codes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """dot: B, codes: B K, the true ones. Returns logits of the product, B V, and the codes, B K V."""
        x, visible = self.prefix(text, keep)
        first = self.embed_dot(dot, keep)[:, None]  # B 1 width
        rest = self.code(codes[:, :-1]) + self.positions[1:]  # B K-1 width
        visible = F.pad(visible, (0, codes.shape[1]), value=True)
        x = torch.cat([x, first, rest], dim=1)
        states, _ = self.transformer(x, causal_mask(visible, x.shape[1]))
        states = states[:, -codes.shape[1] - 1 :]
        return self.dot_head(states[:, 0]), self.code_head(states[:, 1:])

    def prepare(self, text: TextEmbedding, keep: Tensor | None = None) -> tuple[Prefix, Tensor]:
        """What the network remembers of the text, and the logits of the dot product, B V."""
        x, visible = self.prefix(text, keep)
        states, past = self.transformer(x, causal_mask(visible, x.shape[1]))
        return Prefix(past, visible), self.dot_head(states[:, -1])

    def embed_dot(self, dot: Tensor, keep: Tensor | None = None) -> Tensor:
        """B to B width; where the text is dropped, a learned null, as the product would tell of the text."""
        x = self.dot(dot)
        if keep is not None:
            x = torch.where(keep[:, None], x, self.null_dot.to(x.dtype))
        return x + self.positions[0]

    def step(self, x: Tensor, prefix: Prefix) -> tuple[Tensor, Prefix]:
        """One more position, B width. Returns the logits of the next code, B V, and the longer memory."""
        visible = F.pad(prefix.mask, (0, 1), value=True)
        states, past = self.transformer(x[:, None], causal_mask(visible, 1), prefix.past)
        return self.code_head(states[:, 0]), Prefix(past, visible)


class AutoregressivePrior(nn.Module):
    """Text to CLIP image embeddings. Fit the statistics before training; they are stored with the weights."""

    config_class: ClassVar[type] = AutoregressiveConfig

    def __init__(self, config: AutoregressiveConfig):
        super().__init__()
        self.config = config
        self.quantizer = PCAQuantizer(config.embed_dim, config.codes, config.buckets)
        self.net = CodeNet(config)

    def fit_statistics(self, embeds: Tensor) -> None:
        """embeds: N D, CLIP image embeddings of the training pictures."""
        self.quantizer.fit(embeds)

    def loss(
        self,
        image_embed: Tensor,
        text: TextEmbedding,
        keep: Tensor | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Loss of each sample, B, float32: nats a token, over the dot product and the codes.

        image_embed: B D as CLIP emits it. keep: B bool, False where the text is dropped (about one in ten),
        or None. t and noise are those of the diffusion prior, so that both train alike, and unused."""
        del t, noise
        pooled = self.net.prefix.check(text)[2]  # B D
        codes = self.quantizer.encode(image_embed)  # B K
        dot = self.dot_bucket(image_embed, pooled)
        dot_logits, code_logits = self.net(text, keep, dot, codes)
        loss = F.cross_entropy(code_logits.float().flatten(0, 1), codes.flatten(), reduction="none")
        dot_loss = F.cross_entropy(dot_logits.float(), dot, reduction="none")  # B
        if keep is not None:
            dot_loss = dot_loss * keep  # without the text there is no product to predict
        return (loss.unflatten(0, codes.shape).sum(1) + dot_loss) / (codes.shape[1] + 1)

    def forward(
        self,
        image_embed: Tensor,
        text: TextEmbedding,
        keep: Tensor | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """`loss`, so that wrappers for compilation and parallel training apply."""
        return self.loss(image_embed, text, keep, t, noise)

    def dot_bucket(self, image_embed: Tensor, pooled: Tensor) -> Tensor:
        """B, int64: the bucket in [-1, 1] of the cosine between image and text embedding."""
        cosine = F.cosine_similarity(image_embed.float(), pooled.float(), dim=-1)
        return ((cosine + 1) / 2 * self.config.buckets).long().clamp(0, self.config.buckets - 1)

    @torch.no_grad()
    def sample(
        self,
        text: TextEmbedding,
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        num_candidates: int | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        negative: TextEmbedding | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Draw one image embedding a row of `text`: B D, float32, unit norm, as CLIP emits them.

        seed, seeds: row i is a function of its text and of seeds[i], or of seed + i.
        num_candidates, guidance, temperature, top_k: in place of the config's best_of and so on.
        negative: encoded negative prompts (one row, or one a row) in place of the null text of guidance.
        on_step: called after each code with (code from 0, number of codes, current embeddings).
        Raises InputError on an impossible setting or a text of another width."""
        config, device = self.config, device_of(self)
        number = config.best_of if num_candidates is None else num_candidates
        scale = config.guidance if guidance is None else guidance
        heat = config.temperature if temperature is None else temperature
        limit = config.top_k if top_k is None else top_k
        check_number("num_candidates", number, number >= 1, "an integer of at least 1")
        check_number("guidance", scale, True, "a finite number")
        check_number("temperature", heat, heat > 0, "a number above 0")
        if limit is not None:
            check_number("top_k", limit, limit >= 1, "an integer of at least 1")
        rows = random.seed_list(seed if seeds is None else seeds, len(text))

        was_training = self.training
        self.eval()  # no dropout
        try:
            text = text.to(device)
            pooled = self.net.prefix.check(text)[2]
            draws = [random.uniform(rows, "prior", "codes", j, count=config.codes + 1) for j in range(number)]
            u = torch.stack(draws, dim=1).flatten(0, 1).to(device)  # B*N K+1
            prefix, dot_logits = self.net.prepare(text)
            prefix, dot_logits = prefix.repeat(number), dot_logits.repeat_interleave(number, 0)
            above = config.dot_quantile + (1 - config.dot_quantile) * u[:, 0]
            dot = draw(dot_logits, above)
            x = self.net.embed_dot(dot)
            if scale != 1:
                null, null_x = self._unconditional(text, negative, number, x)
                prefix, x = Prefix.cat([prefix, null]), torch.cat([x, null_x])

            codes: list[Tensor] = []
            for k in range(config.codes):
                logits, prefix = self.net.step(x, prefix)
                if scale != 1:
                    cond, uncond = logits.float().chunk(2)
                    logits = uncond + scale * (cond - uncond)
                codes.append(draw(logits / heat, u[:, k + 1], limit))
                if on_step is not None:
                    estimate = self.quantizer.decode(torch.stack(codes, dim=1))
                    on_step(k, config.codes, F.normalize(estimate, dim=-1))
                if k + 1 < config.codes:
                    x = self.net.code(codes[-1]) + self.net.positions[k + 1]
                    x = x if scale == 1 else x.repeat(2, 1)
        finally:
            self.train(was_training)
        return pick_best(self.quantizer.decode(torch.stack(codes, dim=1)), pooled, number)

    def _unconditional(
        self, text: TextEmbedding, negative: TextEmbedding | None, number: int, x: Tensor
    ) -> tuple[Prefix, Tensor]:
        """Memory and dot-product token, (B * number) rows, of the other half of guidance: null text and null
        product, or the negative text at the same product (a picture that is as near to it)."""
        if negative is not None:
            return self.net.prepare(negative_rows(negative, len(text)).to(x.device))[0].repeat(number), x
        dropped = torch.zeros(len(text), dtype=torch.bool, device=x.device)
        null_x = self.net.null_dot + self.net.positions[0]
        return self.net.prepare(text, dropped)[0].repeat(number), null_x.expand_as(x)


def draw(logits: Tensor, u: Tensor, top_k: int | None = None) -> Tensor:
    """Sample rows of B V logits by inverting their distribution functions at `u` (B, in [0, 1)): int64 B.
    A u from [q, 1) draws from above the q-quantile. top_k: only the largest logits take part."""
    logits = logits.double()
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    mass = logits.softmax(dim=-1).cumsum(dim=-1)  # B V
    index = torch.searchsorted(mass, (u.double() * mass[:, -1])[:, None], right=True)[:, 0]
    return index.clamp(max=logits.shape[-1] - 1)
