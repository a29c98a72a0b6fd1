"""The diffusion prior of unCLIP (Ramesh et al. 2022, arXiv:2204.06125, section 2.2): text to image embedding.

A causal transformer reads the text tokens, the CLIP text embedding, the noise level, the noised image
embedding and a learned query, at which it predicts the clean embedding. Embeddings are standardised per
dimension (Karlo) instead of scaled by a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.conditioning import TextEmbedding
from cascade.config import DiffusionConfig, Prediction, SamplerName, ScheduleConfig, Spacing
from cascade.diffusion.denoiser import Denoiser
from cascade.diffusion.guidance import cfg
from cascade.diffusion.loss import diffusion_loss
from cascade.diffusion.samplers import SAMPLERS
from cascade.errors import unknown
from cascade.nn.layers import LevelEmbedding
from cascade.random import seed_list
from prior.base import (
    MAX_STEPS,
    OnStep,
    candidate_noise,
    check_number,
    device_of,
    negative_rows,
    pick_best,
)
from prior.clip import select_tokens
from prior.guess import Guess
from prior.prefix import Prefix, TextPrefix, causal_mask
from prior.statistics import Standardizer
from prior.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Network, diffusion process, default sampling settings. The paper: width 2048, 24 layers, 32 heads."""

    width: int = 256
    layers: int = 6
    heads: int = 8
    text_dim: int = 384  # width of the text encoder's tokens
    text_sequence: int = 0  # which encoder's tokens, where several stand side by side
    text_length: int = 64  # most tokens of a prompt
    embed_dim: int = 256  # of the CLIP
    text_norm: bool = True  # layer norm of the tokens; False: as they come (Karlo)
    pooled_scale: float | None = None  # of the CLIP text embedding; None: sqrt(embed_dim), for unit norm
    learned_null: bool = True  # learned null text; False: the null is the encoded empty prompt (Karlo)
    unit_norm: bool = (
        True  # image embeddings are of unit norm; False: as CLIP's projection emits them (Karlo)
    )
    dropout: float = 0.0
    guess_width: int = 0  # of the network that guesses x_0 from the text alone; 0: no guess is made
    prediction: Prediction = "x0"  # better than eps (unCLIP 2.2)
    schedule: ScheduleConfig = ScheduleConfig()
    sampler: SamplerName = "dpmpp_2m"
    steps: int = 25
    spacing: Spacing = "t"
    eta: float = 1.0  # stochasticity of ddim and dpmpp_2m_sde
    guidance: float = 1.0  # 1 is off: unCLIP guides the decoder only (5.5)
    best_of: int = 2  # candidates a picture, of which the one nearest to the text is kept
    clamp: float = 10.0  # of predictions, in standard deviations (Karlo)

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.prediction == "edm":
            raise ValueError("prediction 'edm' is for pictures: expected x0, v or eps")
        if self.guess_width < 0:
            raise ValueError(f"guess_width {self.guess_width}: expected an integer of at least 0")
        if self.guess_width and self.prediction != "x0":
            raise ValueError(f"guess_width with prediction {self.prediction!r}: expected x0, which it is of")

    @property
    def diffusion(self) -> DiffusionConfig:
        return DiffusionConfig(prediction=self.prediction, schedule=self.schedule, weighting="none")


class PriorNet(nn.Module):
    """The transformer. `prepare` runs the text once; each call then costs three positions."""

    def __init__(self, config: PriorConfig):
        super().__init__()
        width = config.width
        self.prefix = TextPrefix(
            width,
            config.text_dim,
            config.text_sequence,
            config.text_length,
            config.embed_dim,
            text_norm=config.text_norm,
            pooled_scale=config.pooled_scale,
            learned_null=config.learned_null,
        )
        self.time = LevelEmbedding(width, width, "silu")
        self.input = nn.Linear(config.embed_dim, width)
        self.query = nn.Parameter(torch.randn(width).mul_(0.02))
        self.positions = nn.Parameter(torch.randn(3, width).mul_(0.02))  # of time, embedding and query
        self.transformer = Transformer(width, config.layers, config.heads, config.dropout)
        self.output = nn.Linear(width, config.embed_dim)
        nn.init.zeros_(self.output.weight)  # the first prediction is the mean
        nn.init.zeros_(self.output.bias)
        self.guess = None
        if config.guess_width:
            self.guess = Guess(config.text_dim, config.guess_width, config.embed_dim)
            self.guess_input = nn.Linear(config.embed_dim, width)

    def prepare(self, text: TextEmbedding, keep: Tensor | None = None) -> Prefix:
        """K and V of the text, B rows. keep: B bool, False where the learned null stands for the text."""
        x, visible = self.prefix(text, keep)
        _, past = self.transformer(x, causal_mask(visible, x.shape[1]))
        return Prefix(past, visible, self._guess(text, keep))

    def _guess(self, text: TextEmbedding, keep: Tensor | None) -> Tensor | None:
        """B D; of a dropped text the mean embedding, 0. It learns from its own error alone."""
        if self.guess is None:
            return None
        guess = self.guess(text.sequences[self.prefix.sequence]).detach()
        return guess if keep is None else guess * keep[:, None]

    def forward(self, x: Tensor, time: Tensor, prefix: Prefix) -> Tensor:
        """x: B D, noised and standardised. time: B in [0, 1000]. Returns the prediction, B D."""
        query = self.query.to(x.dtype).expand(len(x), -1)
        if prefix.guess is not None:
            query = query + self.guess_input(prefix.guess)
        tokens = torch.stack([self.time(time), self.input(x), query], dim=1) + self.positions  # B 3 width
        visible = F.pad(prefix.mask, (0, 3), value=True)  # B P+3
        states, _ = self.transformer(tokens, causal_mask(visible, 3), prefix.past)
        answer = self.output(states[:, -1])
        return answer if prefix.guess is None else answer + prefix.guess  # of a guess it learns the error


class DiffusionPrior(nn.Module):
    """Text to CLIP image embeddings. Fit the statistics before training; they are stored with the weights."""

    config_class: ClassVar[type] = PriorConfig

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.config = config
        self.statistics = Standardizer(config.embed_dim)
        self.denoiser = Denoiser(PriorNet(config), config.diffusion)
        self.schedule = self.denoiser.schedule

    @property
    def net(self) -> PriorNet:
        return self.denoiser.net  # type: ignore[return-value]

    @property
    def learned_null(self) -> bool:
        """False: guidance needs `negative`, the encoded empty prompt where no other is given."""
        return self.config.learned_null

    def fit_statistics(self, embeds: Tensor) -> None:
        """embeds: N D, CLIP image embeddings of the training pictures."""
        self.statistics.fit(embeds)

    def loss(
        self,
        image_embed: Tensor,
        text: TextEmbedding,
        keep: Tensor | None,
        t: Tensor,
        noise: Tensor,
    ) -> Tensor:
        """Loss of each sample, B, float32: squared error of the standardised embedding.

        image_embed: B D as CLIP emits it. keep: B bool, False where the text is dropped (about one in ten),
        or None. t: B in [0, 1], 0 is data. noise: B D, unit Gaussian."""
        logsnr = self.schedule.logsnr(t.double()).to(noise.device)
        prefix = self.net.prepare(text, keep)
        return diffusion_loss(self.denoiser, self.statistics(image_embed), prefix, logsnr, noise)

    def guess_loss(self, image_embed: Tensor, text: TextEmbedding) -> Tensor:
        """Squared error of the guess, one number. image_embed: B D as CLIP emits it. Of the text it takes the
        tokens alone, or their mean as the one token."""
        assert self.net.guess is not None
        tokens = select_tokens(text, self.config.text_sequence, self.config.text_dim, "prior")
        guess = self.net.guess(tokens)
        return (guess.float() - self.statistics(image_embed)).square().mean()

    def forward(
        self, image_embed: Tensor, text: TextEmbedding, keep: Tensor | None, t: Tensor, noise: Tensor
    ) -> Tensor:
        """`loss`, so that wrappers for compilation and parallel training apply."""
        return self.loss(image_embed, text, keep, t, noise)

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
        sampler: SamplerName | None = None,
        negative: TextEmbedding | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Draw one image embedding a row of `text`: B D, float32, of unit norm where the config says so.

        seed, seeds: row i is a function of its text and of seeds[i], or of seed + i.
        num_candidates, guidance, steps, sampler: in place of the config's best_of, guidance, steps, sampler.
        negative: encoded negative prompts (one row, or one a row) in place of the null text of guidance.
        on_step: called after each step with (step from 0, total, current embeddings).
        Raises InputError on an impossible setting or a text of another width."""
        config, device = self.config, device_of(self)
        number = config.best_of if num_candidates is None else num_candidates
        scale = config.guidance if guidance is None else guidance
        steps = config.steps if steps is None else steps
        name = config.sampler if sampler is None else sampler
        if name not in SAMPLERS:
            raise unknown("sampler", name, SAMPLERS, where="prior")
        check_number("num_candidates", number, number >= 1, "an integer of at least 1")
        check_number("steps", steps, 1 <= steps <= MAX_STEPS, f"an integer from 1 to {MAX_STEPS}")
        check_number("guidance", scale, True, "a finite number")
        rows = seed_list(seed if seeds is None else seeds, len(text))

        was_training = self.training
        self.eval()  # no dropout
        try:
            text = text.to(device)
            pooled = self.net.prefix.check(text)[2]
            denoise = self._guided(text, negative, scale, number)

            def step_noise(step: int) -> Tensor:
                return candidate_noise(config.embed_dim, rows, number, "prior", "step", step).to(device)

            def report(step: int, total: int, x0: Tensor) -> None:
                if on_step is not None:
                    estimate = self.statistics.inverse(x0)
                    on_step(step, total, F.normalize(estimate, dim=-1) if config.unit_norm else estimate)

            x = candidate_noise(config.embed_dim, rows, number, "prior", "init").to(device)
            grid = self.schedule.grid(steps, config.spacing)
            x0 = SAMPLERS[name](denoise, x, grid, noise=step_noise, on_step=report, eta=config.eta)
        finally:
            self.train(was_training)
        return pick_best(self.statistics.inverse(x0), pooled, number, config.unit_norm)

    def _guided(self, text: TextEmbedding, negative: TextEmbedding | None, scale: float, number: int):
        """The denoiser as a function of (x, logsnr): guided in one batched forward, then clamped."""
        clamp = self.config.clamp
        prefix = self.net.prepare(text).repeat(number)
        if scale == 1:
            return lambda x, logsnr: self.denoiser(x, logsnr, prefix).clamp(-clamp, clamp)
        if negative is None:
            null = self.net.prepare(text, torch.zeros(len(text), dtype=torch.bool, device=device_of(self)))
        else:
            null = self.net.prepare(negative_rows(negative, len(text)).to(device_of(self)))
        pair = Prefix.cat([prefix, null.repeat(number)])

        def denoise(x: Tensor, logsnr: Tensor) -> Tensor:
            cond, uncond = self.denoiser(x.repeat(2, 1), logsnr.repeat(2), pair).chunk(2)
            return cfg(cond, uncond, scale).clamp(-clamp, clamp)

        return denoise
