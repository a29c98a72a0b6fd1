"""What is trained at each stage: a module whose forward gives the loss of every sample of a batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascade import Cascade, Stage
from cascade.augment import condition_lowres
from cascade.checkpoint import load_component, load_tensors, save_component
from cascade.config import from_dict, to_dict
from cascade.diffusion import diffusion_loss
from cascade.errors import InputError
from cascade.images import downsample, from_pil, to_pil
from cascade.text import load_text_encoder
from prior.clip import CLIP, ClipConfig
from prior.diffusion import DiffusionPrior, PriorConfig
from train.batches import Batch, ClipMaker, PriorMaker, StageMaker, conditioning_of, pixels, text_of
from train.data import PictureSet, TextStore
from train.recipe import Recipe, StageRecipe

EMBEDS = "image_embeds.safetensors"


class Task(nn.Module):
    """One stage's training. `network` is what is optimised, averaged and saved; `forward(batch)` gives B losses."""

    def __init__(self, recipe: Recipe, out: Path, name: str) -> None:
        super().__init__()
        self.recipe, self.out, self.name = recipe, out, name
        self.pictures = PictureSet(recipe.data)
        self.text = TextStore(self.pictures, recipe.text)

    network: nn.Module
    make: Callable[[list[int], list[int]], Batch]

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
        self.network = CLIP(recipe.clip.model)
        self.network.build_vision()
        self.make = ClipMaker(recipe, self.pictures, self.text)

    def config(self) -> dict[str, Any]:
        return to_dict(self.recipe.clip.model)

    def forward(self, batch: Batch) -> Tensor:
        text = text_of(batch)
        assert text is not None
        return self.network(batch["x"], text, batch["group"])[None]  # one number for the whole batch

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Also writes the image embeddings of every picture, which the later stages train on."""
        save_component(self.out / "clip", self.config(), tensors, "CLIP")
        clip = load_clip(self.out)
        images = self.pictures.pixels(self.recipe.clip.model.image_px)
        rows = [range(i, min(i + 256, len(images))) for i in range(0, len(images), 256)]
        with torch.no_grad():
            embeds = torch.cat([clip.encode_image(pixels(images, list(r))) for r in rows])
        save_file({"embeds": embeds}, self.out / "clip" / EMBEDS)


class PriorTask(Task):
    def __init__(self, recipe: Recipe, out: Path) -> None:
        super().__init__(recipe, out, "prior")
        self.clip = load_clip(out)
        embeds = load_embeds(out)
        self.network = DiffusionPrior(recipe.prior.model)
        self.network.fit_statistics(embeds[self.pictures.train])
        self.make = PriorMaker(recipe, self.pictures, self.text, embeds)

    def config(self) -> dict[str, Any]:
        return to_dict(self.recipe.prior.model)

    def forward(self, batch: Batch) -> Tensor:
        text = text_of(batch)
        assert text is not None
        with torch.no_grad():
            text = type(text)(text.sequences, self.clip.encode_text(text))
        return self.network(batch["x"], text, batch["keep_text"], batch["t"], batch["noise"])

    def save(self, tensors: dict[str, Tensor]) -> None:
        save_component(self.out / "prior", self.config(), tensors, "DiffusionPrior")


class StageTask(Task):
    def __init__(self, recipe: Recipe, out: Path, name: str) -> None:
        super().__init__(recipe, out, name)
        part = recipe.of(name)
        assert isinstance(part, StageRecipe)
        self.cfg = part.stage
        self.stage = Stage(self.cfg)
        self.network = self.stage.unet
        embeds = load_embeds(out) if self.cfg.unet.image_embed_dim else None
        self.make = StageMaker(recipe, name, self.pictures, self.text, embeds)

    def config(self) -> dict[str, Any]:
        return to_dict(self.cfg)

    def identity(self) -> dict[str, Any]:
        """The network and what it predicts; weighting and sampling settings may change between sessions."""
        return {"unet": to_dict(self.cfg.unet), "prediction": self.cfg.diffusion.prediction}

    def forward(self, batch: Batch) -> Tensor:
        lowres = None
        if self.cfg.augment is not None:
            size = tuple(batch["x"].shape[-2:])
            lowres = condition_lowres(batch["lowres"], size, self.cfg.augment, batch["aug_level"], batch["aug_noise"])
        logsnr = self.stage.schedule.logsnr(batch["t"]).float()
        return diffusion_loss(self.stage.denoiser, batch["x"], conditioning_of(batch, lowres), logsnr, batch["noise"])

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
        """The recipe's prompts at fixed seeds, through the prior where it is trained, else with CLIP text embeddings."""
        prompts = list(self.recipe.grid_prompts)
        text = load_text_encoder(self.recipe.text)(prompts)
        embed = None
        if self.cfg.unet.image_embed_dim:
            text = type(text)(text.sequences, load_clip(self.out).encode_text(text))
            prior = load_prior(self.out)
            embed = text.pooled if prior is None else prior.sample(text, seed=0)
        return tile(stage.sample(text, image_embed=embed, seed=0, micro_batch=8), 8)

    def _heldout(self, stage: Stage) -> Image.Image:
        """Held-out pictures, a row each: the upsampled input, the output, the original."""
        chosen = self.pictures.heldout[:: max(1, len(self.pictures.heldout) // 4)][:4]
        side = self.cfg.image_px
        real = torch.stack([downsample(from_pil(_open(self.pictures, i)), side) for i in chosen])
        lowres = downsample(real, self.cfg.lowres_px or side)
        text = self.text([3 * i for i in chosen]) if self.cfg.unet.text_dims else None
        out = stage.sample(text, lowres=lowres, seed=0)
        up = torch.nn.functional.interpolate(lowres, (side, side), mode="nearest")
        return tile(torch.stack([up, out, real], dim=1).flatten(0, 1), 3)


def make_task(recipe: Recipe, out: Path, name: str) -> Task:
    if name == "clip":
        return ClipTask(recipe, out)
    if name == "prior":
        return PriorTask(recipe, out)
    return StageTask(recipe, out, name)


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


def load_embeds(out: Path) -> Tensor:
    path = out / "clip" / EMBEDS
    if not path.exists():
        raise InputError(f"no image embeddings in {out / 'clip'}: train --stage clip first")
    return load_file(path)["embeds"]


def assemble(recipe: Recipe, out: Path) -> Path:
    """The model folder of all stages that are trained, in bf16."""
    stages = {}
    for name in ("base", "sr256", "sr1024"):
        if (out / name).is_dir():
            part = recipe.of(name)
            assert isinstance(part, StageRecipe)
            component = load_component(out / name, "Stage")
            stage = Stage(part.stage)  # sampling defaults are the recipe's of today
            load_tensors(stage.unet, component.tensors, out / name)
            stages[name] = stage
    model = Cascade(stages.values(), load_text_encoder(recipe.text), load_prior(out), load_clip(out))
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


def _open(pictures: PictureSet, index: int) -> Image.Image:
    return Image.open(pictures.folder / pictures.records[index]["file_name"])
