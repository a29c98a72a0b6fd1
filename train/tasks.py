"""What is trained at each stage: a module whose forward gives the loss of every sample of a batch."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, distributed, nn

from cascade import Stage
from cascade.adapter import Adapter, AdapterConfig
from cascade.augment import condition_lowres, residual_base, residual_variance, told_level
from cascade.checkpoint import save_component
from cascade.conditioning import Conditioning, TextEmbedding
from cascade.config import UNetConfig, to_dict
from cascade.diffusion import corrupt
from cascade.diffusion.loss import loss_and_estimate
from cascade.diffusion.prediction import to_x0
from cascade.errors import InputError
from cascade.loading import fill_stage
from prior.clip import CLIP, MAX_LOGIT_SCALE, contrastive_loss
from prior.diffusion import DiffusionPrior
from train.batches import (
    Batch,
    ClipMaker,
    Maker,
    PriorMaker,
    StageMaker,
    conditioning_of,
    guess_part,
    text_of,
)
from train.components import PRIOR_SAMPLING, class_of, load_clip, open_images, start_from
from train.data import open_pictures
from train.encoded import ImageStore, TextStore
from train.grids import prompt_sheet, upsampling_sheet
from train.lora import adapter_tensors, base_tensors, inject
from train.recipe import ClipRecipe, PriorRecipe, Recipe, StageRecipe

OWN = 0.1, 0.6  # between these t a network's estimates of x_0 are like the pictures that it draws
FINE_SCALE = 0.03  # of the fine network's loss, so that its gradient does not fill the limit for both


class Task(nn.Module):
    """One stage's training. `network` is what is optimised, averaged and saved, with `train.lora` its
    adapters alone; `forward(batch)` gives the losses of the batch's samples."""

    network: nn.Module
    make: Maker
    prediction: str = ""  # what the network predicts
    last_unet: UNetConfig | None = None  # the network of the stage's last step, which stays as it is
    processes: int = 1  # over which a batch is spread

    def __init__(self, recipe: Recipe, out: Path, name: str) -> None:
        super().__init__()
        self.recipe, self.out, self.name = recipe, out, name
        self.settings = recipe.train_of(name)
        self.pictures = open_pictures(recipe.data)
        self.text = TextStore(self.pictures, recipe.text, recipe.sees_padding(name)).prepare()
        self.beside: dict[str, Tensor] = {}  # of init_from: saved with the component, but not trained

    def start(self) -> None:
        """Give the network the weights it starts from, and adapters. Raises InputError where they do not
        fit."""
        if self.settings.init_from is not None:
            source, last = self.settings.init_from, self.last_unet
            self.beside = start_from(self.network, source, self.name, self.prediction, last)
        if self.settings.lora is not None:
            inject(self.network, self.settings.lora, f"{self.name}.train.lora")

    def check_siblings(self, images: ImageStore | None) -> None:
        """Refuse means over siblings in a stage that is told none, or where no embeddings are at hand to be
        averaged. images: of a stage that can be told them."""
        share, stored = self.settings.image_siblings, images is not None and images.cache is not None
        if share and (images is None or (self.pictures.subjects and not stored)):
            expected = "0, or texts, image embeddings that are stored, and nulls of the network's own"
            raise InputError(f"{self.name}.train.image_siblings {share:g}: expected {expected}")

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What config.json holds."""

    def architecture(self) -> dict[str, Any]:
        """What of the config a training state depends on."""
        return self.config()

    def identity(self) -> dict[str, Any]:
        """What a training state must agree with to be resumed."""
        lora = self.settings.lora
        return self.architecture() | ({} if lora is None else {"lora": to_dict(lora)})

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor: ...

    def compile(self) -> None:
        """Compile the network in place; parameter names stay."""
        self.network.compile()

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Write the component's folder from averaged weights, or that of its adapter."""
        if self.settings.lora is None:
            whole = tensors | self.beside
            save_component(self.out / self.name, self.config(), whole, class_of(self.name))
        else:
            self.adapter(tensors).save(self.out / self.name)

    def adapter(self, tensors: dict[str, Tensor]) -> Adapter:
        lora, base = self.settings.lora, self.settings.init_from
        assert lora is not None and base is not None
        config = AdapterConfig(component=self.name, base=base, rank=lora.rank, alpha=lora.alpha)
        return Adapter(config, adapter_tensors(tensors))

    def merged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the plain network out of those in training."""
        if self.settings.lora is None:
            return tensors
        weights = {name: tensor.clone() for name, tensor in base_tensors(tensors).items()}
        self.adapter(tensors).merge(weights)
        return weights

    def grid(self, tensors: dict[str, Tensor]) -> Image.Image | None:
        """A picture that shows how far the averaged weights are; None where there is nothing to see."""
        return None


class ClipTask(Task):
    def __init__(self, recipe: Recipe, out: Path) -> None:
        super().__init__(recipe, out, "clip")
        part = recipe.of("clip")
        assert isinstance(part, ClipRecipe)
        self.cfg = part.model
        check_width("clip.model.text_dim", self.cfg.text_dim, self.text.dims, self.cfg.text_sequence)
        self.check_siblings(None)
        self.network = CLIP(self.cfg)
        self.network.build_vision()
        self.make = ClipMaker(recipe, self.pictures, self.text)

    def config(self) -> dict[str, Any]:
        return to_dict(self.cfg)

    def forward(self, batch: Batch) -> Tensor:
        """One number for the whole batch, in which every caption is held against every picture."""
        text = text_of(batch)
        assert text is not None
        if self.training and self.processes > 1:
            return self._global_loss(batch["x"], text, batch["group"])[None]
        return self.network(batch["x"], text, batch["group"])[None]

    def _global_loss(self, images: Tensor, text: TextEmbedding, group: Tensor) -> Tensor:
        """`CLIP.loss` over the batch of all processes. Each computes all of it; gathering sums the gradients
        of the embeddings over processes and their average then gives those of one process."""
        network = self.network
        assert isinstance(network, CLIP)
        scale = network.logit_scale.float().clamp(max=MAX_LOGIT_SCALE).exp()
        image, caption, groups = (
            gather(part) for part in (network.encode_image(images), network.encode_text(text), group)
        )
        return contrastive_loss(image, caption, scale, groups)


class _Gather(torch.autograd.Function):
    """Rows of all processes, one process after the other. Backward: the sum over processes of the gradient of
    one's own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        distributed.all_reduce(total)
        return total.chunk(distributed.get_world_size())[distributed.get_rank()]


def gather(rows: Tensor) -> Tensor:
    """B ... of each of N processes to N B ..., differentiable."""
    gathered = _Gather.apply(rows)
    assert isinstance(gathered, Tensor)
    return gathered


class PriorTask(Task):
    def __init__(self, recipe: Recipe, out: Path) -> None:
        super().__init__(recipe, out, "prior")
        part = recipe.of("prior")
        assert isinstance(part, PriorRecipe)
        self.cfg = cfg = part.model
        check_width("prior.model.text_dim", cfg.text_dim, self.text.dims, cfg.text_sequence)
        if cfg.text_length < self.text.max_length:
            expected = f"at least the text encoder's {self.text.max_length} tokens"
            raise InputError(f"prior.model.text_length {cfg.text_length}: expected {expected}")
        self.clip, self.prediction = load_clip(recipe, out), cfg.prediction
        images = open_images(recipe, out, self.pictures)
        self.check_siblings(images)
        self.network = DiffusionPrior(cfg)
        if self.settings.init_from is None:  # else it goes on with those it knows
            self.network.fit_statistics(images.sample())
        self.make = PriorMaker(recipe, self.pictures, self.text, images)
        if not cfg.learned_null:
            self.text.with_null()

    def train(self, mode: bool = True) -> PriorTask:
        super().train(mode)
        self.clip.eval()  # it is frozen
        return self

    def config(self) -> dict[str, Any]:
        return to_dict(self.cfg)

    def architecture(self) -> dict[str, Any]:
        """All but the sampling settings, which may change between sessions."""
        return {name: value for name, value in self.config().items() if name not in PRIOR_SAMPLING}

    def forward(self, batch: Batch) -> Tensor:
        text = text_of(batch)
        assert text is not None
        with torch.no_grad():
            text = type(text)(text.sequences, self.clip.encode_text(text))
        keep = batch.get("keep_text")
        keep = None if keep is None else keep[:, 0]  # tokens and CLIP embedding go together (unCLIP 2.2)
        losses = self.network(batch["image_embed"], text, keep, batch["t"], batch["noise"])
        if not (part := guess_part(batch)):
            return losses
        assert isinstance(self.network, DiffusionPrior)
        means = text_of(part)
        assert means is not None
        return with_gradient(losses, self.network.guess_loss(part["image_embed"], means))


def with_gradient(losses: Tensor, guessed: Tensor) -> Tensor:
    """The losses, which stay those of diffusion, with the gradient of the guess's beside theirs."""
    return losses + (guessed - guessed.detach())


class StageTask(Task):
    def __init__(self, recipe: Recipe, out: Path, name: str) -> None:
        super().__init__(recipe, out, name)
        part = recipe.of(name)
        assert isinstance(part, StageRecipe)
        self.cfg, self.prediction = part.stage, part.stage.diffusion.prediction
        dims = self.cfg.unet.text_dims
        if dims and dims != self.text.dims:
            found, expected = list(dims), list(self.text.dims)
            raise InputError(f"{name}.stage.unet.text_dims {found}: expected the text encoder's {expected}")
        self.last_unet = self.cfg.last_unet
        self.stage = Stage(replace(self.cfg, last_unet=None))
        self.network = self.stage.unet
        images = open_images(recipe, out, self.pictures) if self.cfg.unet.image_embed_dim else None
        self.check_siblings(images if dims and self.cfg.unet.learned_null else None)
        self.make = StageMaker(recipe, name, self.pictures, self.text, images)
        if dims and not self.cfg.unet.learned_null:
            self.text.with_null()

    def config(self) -> dict[str, Any]:
        return to_dict(self.cfg)

    def architecture(self) -> dict[str, Any]:
        """The network and what it predicts; weighting and sampling settings may change between sessions."""
        return {"unet": to_dict(self.cfg.unet), "prediction": self.cfg.diffusion.prediction}

    def forward(self, batch: Batch) -> Tensor:
        lowres, x, augment, weight = None, batch["x"], self.cfg.augment, 1.0
        if augment is not None:
            height, width = x.shape[-2:]
            level, noise = batch["aug_level"], batch["aug_noise"]
            lowres = condition_lowres(batch["lowres"], (height, width), augment, level, noise)
            batch = batch | {"aug_level": told_level(level, augment.schedule)}  # as in sampling
            if augment.residual:
                x = x - residual_base(lowres, level, augment)
                # else the noisiest inputs, whose residuals are the largest, would be nearly all of the loss
                variance = self.cfg.diffusion.sigma_data**2
                weight = (variance / (variance + residual_variance(level, augment))).float()  # B
        cond = conditioning_of(batch, lowres)
        logsnr = self.stage.schedule.logsnr(batch["t"]).float()
        losses, x0_hat = loss_and_estimate(self.stage.denoiser, x, cond, logsnr, batch["noise"])
        losses = weight * losses
        if part := guess_part(batch):
            losses = with_gradient(losses, self._guess_loss(part))
        if "fine_noise" in batch:
            losses = with_gradient(losses, self._fine_loss(batch, cond, x0_hat))
        return losses

    def _guess_loss(self, batch: Batch) -> Tensor:
        """Squared error of the guess of x_0, one number."""
        assert self.stage.unet.guess is not None
        guess = self.stage.unet.guess(conditioning_of(batch, None), len(batch["x"]))
        return (guess.float() - batch["x"]).square().mean()

    def _fine_loss(self, batch: Batch, cond: Conditioning, x0_hat: Tensor) -> Tensor:
        """Loss of the fine network, B: of pictures noised a little, and of the base's own estimates without
        noise, told the same levels, as in the last steps of sampling (noise_free_steps). What those have
        uneven is to go, what they have right is to stay."""
        fine, denoiser, x0 = self.stage.unet.fine, self.stage.denoiser, batch["x"]
        assert fine is not None
        place, corner = batch["fine_draws"][:, 0], batch["fine_draws"][:, 1:]
        low, high = math.log(fine.cleanest), math.log(fine.noisiest)
        logsnr = -2 * (high + place * (low - high))  # B
        drawn = ((batch["t"] > OWN[0]) & (batch["t"] < OWN[1]))[:, None, None, None]
        noise = batch["fine_noise"].masked_fill(drawn, 0)
        x_t = corrupt(torch.where(drawn, x0_hat.clamp(-1, 1), x0), noise, logsnr).x_t
        with torch.no_grad():
            output, _ = denoiser.raw(x_t, logsnr, cond)
        config = denoiser.config
        estimate = to_x0(config.prediction, output, x_t, logsnr, config.sigma_data)
        told = denoiser.fine_input(x_t, logsnr, fine.cleanest)
        return FINE_SCALE * fine.loss(*told, estimate, x0, corner)

    def compile(self) -> None:
        super().compile()
        if self.stage.unet.fine is not None:
            self.stage.unet.fine.net.compile()

    def grid(self, tensors: dict[str, Tensor]) -> Image.Image:
        """The recipe's prompts, or what becomes of low-resolution pictures."""
        stage = Stage(self.cfg)
        fill_stage(stage, self.merged(tensors) | self.beside, self.name)
        device = next(self.network.parameters()).device
        stage, encoder = stage.eval().to(device, torch.bfloat16), self.text.encoder
        if self.cfg.lowres_px is None:
            return prompt_sheet(stage, self.recipe, self.out, encoder)
        return upsampling_sheet(stage, self.recipe, self.out, encoder, self.pictures)


def make_task(recipe: Recipe, out: Path, name: str) -> Task:
    """The training of one stage. Raises InputError where the recipe, the data or the stages trained so far
    do not allow it."""
    task: Task
    if name == "clip":
        task = ClipTask(recipe, out)
    elif name == "prior":
        task = PriorTask(recipe, out)
    else:
        task = StageTask(recipe, out, name)
    task.start()
    return task


def check_width(key: str, width: int, dims: tuple[int, ...], sequence: int) -> None:
    """Refuse a network for another text encoder."""
    if sequence >= len(dims) or dims[sequence] != width:
        expected = f"one of the text encoder's {list(dims)}, by text_sequence"
        raise InputError(f"{key} {width}, text_sequence {sequence}: expected {expected}")
