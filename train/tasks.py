"""What is trained at each stage: a module whose forward gives the loss of every sample of a batch."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, distributed, nn

from cascade import Cascade, Stage
from cascade.augment import condition_lowres, residual_base, residual_variance
from cascade.checkpoint import WEIGHTS, load_component, load_tensors, save_component, sha256
from cascade.conditioning import TextEmbedding
from cascade.config import from_dict, to_dict
from cascade.diffusion import diffusion_loss
from cascade.errors import InputError
from cascade.images import downsample, from_uint8, to_pil
from cascade.text import load_text_encoder
from prior.clip import CLIP, MAX_LOGIT_SCALE, ClipConfig, contrastive_loss
from prior.diffusion import DiffusionPrior, PriorConfig
from train.batches import Batch, ClipMaker, Maker, PriorMaker, StageMaker, conditioning_of, text_of
from train.data import PictureSet, open_pictures
from train.encoded import ImageStore, TextStore
from train.recipe import Recipe, StageRecipe

PRIOR_SAMPLING = ("sampler", "steps", "eta", "guidance", "best_of", "clamp")  # keys of PriorConfig


class Task(nn.Module):
    """One stage's training. `network` is what is optimised, averaged and saved; `forward(batch)` gives the
    losses of the batch's samples."""

    def __init__(self, recipe: Recipe, out: Path, name: str) -> None:
        super().__init__()
        self.recipe, self.out, self.name = recipe, out, name
        self.pictures = open_pictures(recipe.data)
        self.text = TextStore(self.pictures, recipe.text).prepare()

    network: nn.Module
    make: Maker
    processes: int = 1  # over which a batch is spread

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What config.json holds."""

    def identity(self) -> dict[str, Any]:
        """What a training state must agree with to be resumed."""
        return self.config()

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor: ...

    def compile(self) -> None:
        """Compile the network in place; parameter names stay."""
        self.network.compile()

    @abstractmethod
    def save(self, tensors: dict[str, Tensor]) -> None:
        """Write the component's folder from averaged weights."""

    def grid(self, tensors: dict[str, Tensor]) -> Image.Image | None:
        """A picture that shows how far the averaged weights are; None where there is nothing to see."""
        return None


class ClipTask(Task):
    def __init__(self, recipe: Recipe, out: Path) -> None:
        super().__init__(recipe, out, "clip")
        cfg = recipe.clip.model
        check_width("clip.model.text_dim", cfg.text_dim, self.text.dims, cfg.text_sequence)
        self.network = CLIP(cfg)
        self.network.build_vision()
        self.make = ClipMaker(recipe, self.pictures, self.text)

    def config(self) -> dict[str, Any]:
        return to_dict(self.recipe.clip.model)

    def forward(self, batch: Batch) -> Tensor:
        """One number for the whole batch, in which every caption is held against every picture."""
        text = text_of(batch)
        assert text is not None
        if self.processes > 1:
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

    def save(self, tensors: dict[str, Tensor]) -> None:
        save_component(self.out / "clip", self.config(), tensors, "CLIP")


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
    def __init__(self, recipe: Recipe, out: Path, planning: bool) -> None:
        super().__init__(recipe, out, "prior")
        cfg = recipe.prior.model
        check_width("prior.model.text_dim", cfg.text_dim, self.text.dims, cfg.text_sequence)
        if cfg.text_length < self.text.max_length:
            expected = f"at least the text encoder's {self.text.max_length} tokens"
            raise InputError(f"prior.model.text_length {cfg.text_length}: expected {expected}")
        self.clip = CLIP(recipe.clip.model) if planning else load_clip(out)
        images = open_images(recipe, out, self.pictures, planning)
        self.network = DiffusionPrior(cfg)
        if not planning:
            self.network.fit_statistics(images.sample())
        self.make = PriorMaker(recipe, self.pictures, self.text, images)

    def train(self, mode: bool = True) -> PriorTask:
        super().train(mode)
        self.clip.eval()  # it is frozen
        return self

    def config(self) -> dict[str, Any]:
        return to_dict(self.recipe.prior.model)

    def identity(self) -> dict[str, Any]:
        """All but the sampling settings, which may change between sessions."""
        return {name: value for name, value in self.config().items() if name not in PRIOR_SAMPLING}

    def forward(self, batch: Batch) -> Tensor:
        text = text_of(batch)
        assert text is not None
        with torch.no_grad():
            text = type(text)(text.sequences, self.clip.encode_text(text))
        keep = batch["keep_text"][:, 0]  # tokens and CLIP embedding go together (unCLIP 2.2)
        return self.network(batch["image_embed"], text, keep, batch["t"], batch["noise"])

    def save(self, tensors: dict[str, Tensor]) -> None:
        save_component(self.out / "prior", self.config(), tensors, "DiffusionPrior")


class StageTask(Task):
    def __init__(self, recipe: Recipe, out: Path, name: str, planning: bool) -> None:
        super().__init__(recipe, out, name)
        part = recipe.of(name)
        assert isinstance(part, StageRecipe)
        self.cfg = part.stage
        dims = self.cfg.unet.text_dims
        if dims and dims != self.text.dims:
            found, expected = list(dims), list(self.text.dims)
            raise InputError(f"{name}.stage.unet.text_dims {found}: expected the text encoder's {expected}")
        self.stage = Stage(self.cfg)
        self.network = self.stage.unet
        images = open_images(recipe, out, self.pictures, planning) if self.cfg.unet.image_embed_dim else None
        self.make = StageMaker(recipe, name, self.pictures, self.text, images)

    def config(self) -> dict[str, Any]:
        return to_dict(self.cfg)

    def identity(self) -> dict[str, Any]:
        """The network and what it predicts; weighting and sampling settings may change between sessions."""
        return {"unet": to_dict(self.cfg.unet), "prediction": self.cfg.diffusion.prediction}

    def forward(self, batch: Batch) -> Tensor:
        lowres, x, augment, weight = None, batch["x"], self.cfg.augment, 1.0
        if augment is not None:
            height, width = x.shape[-2:]
            level, noise = batch["aug_level"], batch["aug_noise"]
            lowres = condition_lowres(batch["lowres"], (height, width), augment, level, noise)
            if augment.residual:
                x = x - residual_base(lowres, level, augment)
                # else the noisiest inputs, whose residuals are the largest, would be nearly all of the loss
                variance = self.cfg.diffusion.sigma_data**2
                weight = (variance / (variance + residual_variance(level, augment))).float()  # B
        cond = conditioning_of(batch, lowres)
        logsnr = self.stage.schedule.logsnr(batch["t"]).float()
        return weight * diffusion_loss(self.stage.denoiser, x, cond, logsnr, batch["noise"])

    def save(self, tensors: dict[str, Tensor]) -> None:
        save_component(self.out / self.name, self.config(), tensors, "Stage")

    def grid(self, tensors: dict[str, Tensor]) -> Image.Image:
        stage = Stage(self.cfg)
        stage.unet.load_state_dict(tensors)
        stage = stage.eval().to(next(self.network.parameters()).device, torch.bfloat16)
        if self.cfg.lowres_px is None:
            return self._prompts(stage)
        return self._heldout(stage)

    def _prompts(self, stage: Stage) -> Image.Image:
        """The recipe's prompts at fixed seeds, through the prior where it is trained, else with CLIP text
        embeddings."""
        prompts = list(self.recipe.grid_prompts)
        text = load_text_encoder(self.recipe.text)(prompts)
        embed = None
        if self.cfg.unet.image_embed_dim:
            text = type(text)(text.sequences, load_clip(self.out).encode_text(text))
            prior = load_prior(self.out)
            embed = text.pooled if prior is None else prior.sample(text, seed=0)
        return tile(stage.sample(text, image_embed=embed, seed=0, micro_batch=8), 8)

    def _heldout(self, stage: Stage) -> Image.Image:
        """Held-out pictures (if any: else training pictures), a row each: the upsampled input, the output,
        the original."""
        pool = self.pictures.heldout if len(self.pictures.heldout) else self.pictures.train
        chosen, side = [int(i) for i in pool[:: max(1, len(pool) // 4)][:4]], self.cfg.image_px
        real = from_uint8(torch.stack([self.pictures.resized(i, side) for i in chosen]))  # B 3 H W
        lowres = downsample(real, self.cfg.lowres_px or side)
        captions = [self.pictures.captions(i)[0] for i in chosen]
        text = self.text(captions) if self.cfg.unet.text_dims else None
        out = stage.sample(text, lowres=lowres, seed=0)
        up = torch.nn.functional.interpolate(lowres, (side, side), mode="nearest")
        return tile(torch.stack([up, out, real], dim=1).flatten(0, 1), 3)


def make_task(recipe: Recipe, out: Path, name: str, planning: bool = False) -> Task:
    """The training of one stage. planning: for a look at its size, which needs no trained CLIP."""
    if name == "clip":
        return ClipTask(recipe, out)
    if name == "prior":
        return PriorTask(recipe, out, planning)
    return StageTask(recipe, out, name, planning)


def check_width(key: str, width: int, dims: tuple[int, ...], sequence: int) -> None:
    """Refuse a network for another text encoder."""
    if sequence >= len(dims) or dims[sequence] != width:
        expected = f"one of the text encoder's {list(dims)}, by text_sequence"
        raise InputError(f"{key} {width}, text_sequence {sequence}: expected {expected}")


def load_clip(out: Path) -> CLIP:
    """The trained CLIP of this run, frozen."""
    if not (out / "clip").is_dir():
        raise InputError(f"no trained clip in {out}: train --stage clip first")
    part = load_component(out / "clip", "CLIP")
    clip = CLIP(from_dict(ClipConfig, part.config))
    load_tensors(clip, part.tensors, out / "clip")
    return clip.eval().requires_grad_(False)


def load_prior(out: Path) -> DiffusionPrior | None:
    if not (out / "prior").is_dir():
        return None
    part = load_component(out / "prior", "DiffusionPrior")
    prior = DiffusionPrior(from_dict(PriorConfig, part.config))
    load_tensors(prior, part.tensors, out / "prior")
    return prior.eval().requires_grad_(False)


def open_images(recipe: Recipe, out: Path, pictures: PictureSet, planning: bool = False) -> ImageStore:
    """CLIP image embeddings of the pictures, by the CLIP of this run; when `planning`, by an untrained one.
    Those of a small set are written now, where that has not been done."""
    assert recipe.clip is not None
    if planning:
        return ImageStore(pictures, CLIP(recipe.clip.model), {"planning": True})
    clip = load_clip(out)
    about = {"config": to_dict(clip.config), "sha256": sha256(out / "clip" / WEIGHTS)}
    return ImageStore(pictures, clip, about).prepare()


def assemble(recipe: Recipe, out: Path) -> Path:
    """The model folder of all stages that are trained, in bf16. Raises InputError where there is none."""
    stages = []
    for name in ("base", "sr256", "sr1024"):
        if (out / name).is_dir():
            part = recipe.of(name)
            assert isinstance(part, StageRecipe)
            component = load_component(out / name, "Stage")
            stage = Stage(part.stage)  # sampling defaults are the recipe's of today
            load_tensors(stage.unet, component.tensors, out / name)
            stages.append(stage)
    if not stages:
        raise InputError(f"no trained stage in {out}: train --stage base first")
    prior, clip = load_prior(out), load_clip(out)
    model = Cascade(stages, load_text_encoder(recipe.text), prior, clip, recipe.name)
    folder = out / "model"
    model.save_pretrained(folder, dtype=torch.bfloat16)
    return folder


def tile(x: Tensor, columns: int) -> Image.Image:
    """B 3 H W to one picture, row by row, 2 px of grey between."""
    b, _, height, width = x.shape
    rows = -(-b // columns)
    sheet = Image.new("RGB", (columns * (width + 2), rows * (height + 2)), "grey")
    for i, picture in enumerate(to_pil(x)):
        sheet.paste(picture, ((i % columns) * (width + 2), (i // columns) * (height + 2)))
    return sheet
