"""A recipe: one YAML for the whole cascade, so that its stages agree."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cascade.config import StageConfig, from_dict, override, read_mapping
from cascade.errors import InputError, unknown
from prior.clip import ClipConfig
from prior.diffusion import PriorConfig

RECIPES = Path(__file__).parent / "recipes"
ORDER = ("clip", "prior", "base", "sr256", "sr1024")  # of training; each needs the ones its conditions come from


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures, how often, and how their captions are composed."""

    name: Literal["emoji"] = "emoji"
    folder: str = "data/emoji"
    styles: tuple[str, ...] = ("noto", "twemoji", "fluent")
    toned_period: int = 5  # a skin-toned variant takes part in one epoch of this many
    style_period: dict[str, int] = field(default_factory=dict)  # likewise for the pictures of a style; default 1
    caption_weights: tuple[float, float, float] = (0.7, 0.2, 0.1)  # label + style; label + tags + style; label


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How one stage is trained. Lengths are in training images, so that they hold at any batch size."""

    images: int
    batch: int  # over all processes
    lr: float
    warmup_images: int = 10_000
    cooldown_images: int = 0  # at the end, linear to zero
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema: float = 0.9995  # largest decay of the average; it rises to it as (1 + n) / (10 + n)
    text_drop: float = 0.1
    image_drop: float = 0.1
    crop_px: int | None = None  # side of the random training crop; None: the whole picture
    crops_per_picture: int = 1
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    compile: bool = True
    workers: int = 1  # processes that make batches
    log_images: int = 5_000
    save_images: int = 50_000
    grid_images: int = 50_000


@dataclass(frozen=True, kw_only=True)
class ClipRecipe:
    model: ClipConfig = field(default_factory=ClipConfig)
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class PriorRecipe:
    model: PriorConfig
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class StageRecipe:
    stage: StageConfig
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that defines a cascade and its training."""

    name: str
    seed: int = 0
    out: str = "runs/{name}"
    text: dict[str, Any]  # reference of the frozen text encoder (cascade.text.load_text_encoder)
    data: DataConfig
    grid_prompts: tuple[str, ...]
    clip: ClipRecipe
    prior: PriorRecipe
    base: StageRecipe
    sr256: StageRecipe
    sr1024: StageRecipe

    def of(self, stage: str) -> ClipRecipe | PriorRecipe | StageRecipe:
        if stage not in ORDER:
            raise unknown("stage", stage, ORDER)
        return getattr(self, stage)


def load_recipe(source: str, settings: list[str] | None = None) -> Recipe:
    """Read a recipe by name (train/recipes/NAME.yaml) or path, with `a.b=c` settings on top."""
    path = Path(source)
    if not path.suffix:
        path = RECIPES / f"{source}.yaml"
        if not path.exists():
            raise unknown("recipe", source, sorted(p.stem for p in RECIPES.glob("*.yaml")))
    recipe = from_dict(Recipe, override(read_mapping(path), settings or []), where="recipe")
    for stage in ORDER:
        _check(stage, recipe)
    return recipe


def _check(stage: str, recipe: Recipe) -> None:
    train = recipe.of(stage).train
    where = f"recipe.{stage}"
    if train.batch % train.crops_per_picture:
        raise InputError(f"{where}.train.batch {train.batch} is not a multiple of crops_per_picture {train.crops_per_picture}")
    part = recipe.of(stage)
    if isinstance(part, StageRecipe):
        cfg = part.stage
        if cfg.name != stage:
            raise InputError(f"{where}.stage.name is {cfg.name!r}: expected {stage!r}")
        embed = cfg.unet.image_embed_dim
        if embed is not None and embed != recipe.clip.model.embed_dim:
            raise InputError(f"{where}: image_embed_dim {embed} differs from clip.model.embed_dim {recipe.clip.model.embed_dim}")
        if cfg.lowres_px and (train.crop_px or cfg.image_px) % (cfg.image_px // cfg.lowres_px):
            raise InputError(f"{where}.train.crop_px must be a multiple of {cfg.image_px // cfg.lowres_px}")
