"""A recipe: one YAML for the whole cascade, so that its stages agree."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cascade.config import StageConfig, from_dict, override, read_mapping, to_dict
from cascade.errors import InputError, unknown
from cascade.loading import find_model
from cascade.nn.presets import PRESETS
from cascade.nn.unet import check as check_unet
from cascade.stage import resolve_settings
from prior.clip import ClipConfig
from prior.diffusion import PriorConfig
from prior.pretrained_clip import OpenClipConfig
from train.data.config import DataConfig

RECIPES = Path(__file__).parent / "recipes"
ORDER = ("clip", "prior", "base", "sr256", "sr1024")  # of training: later ones build on earlier ones
WHOLE = ("data", "text")  # keys of a recipe that say what kind they are: one extends no other kind's


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv:2106.09685) in place of the weights: W + alpha / rank B A."""

    rank: int = 16
    alpha: float = 16.0
    # names of the linear and convolution layers that get one; default: every projection of every attention
    targets: tuple[str, ...] = ("q", "k", "v", "kv", "kv_context", "qkv", "out")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank {self.rank}: expected an integer of at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha {self.alpha}: expected a number above 0")
        if not self.targets:
            raise ValueError("targets is empty: expected names of layers")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What the validation loss is measured on: so many held-out pictures, each at every noise level."""

    pictures: int = 32
    levels: int = 8  # t = (level + 1/2) / levels

    def __post_init__(self) -> None:
        for name in ("pictures", "levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected an integer of at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How one stage is trained. Lengths are in training images, so that they hold at any batch size."""

    images: int
    batch: int  # of one optimiser step, over all processes and accumulated parts
    accumulate: int = 1  # parts that a process makes its share of the batch in, for less memory
    lr: float
    # adamw8bit: moments of 8 bits, by bitsandbytes. adafactor: no first moment, the second one factored; lr
    # is relative to each weight's size, and betas and eps are not used (train.adafactor)
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    warmup_images: int = 10_000
    cooldown_images: int = 0  # at the end, linear to zero
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    skip_limit: int = 20  # so many skipped updates in a row (loss or gradient not finite) end the run
    ema: float = 0.9995  # largest decay of the average; it rises to it as (1 + n) / (10 + n)
    # power-function averages of these widths are kept every average_images, for `python -m train.ema`
    ema_sigma_rel: tuple[float, ...] = ()
    average_images: int = 1_000_000
    text_drop: float = 0.1
    image_drop: float = 0.1
    image_noise: float = 0.0  # on CLIP image embeddings, in their standard deviations: the prior errs as well
    image_blend: float = 0.0  # share of pictures told an embedding between their own and a similar one's
    # share of pictures whose embedding is a random mean of those of their subject's pictures: of all of them
    # where it is asked for (prior), of the others where it is told; which one is meant, the text alone tells
    image_siblings: float = 0.0
    vary: float = 0.0  # share of pictures shown changed and told by their embedding alone (train.vary)
    guess_batch: int = 0  # pictures a step beside the batch, from which the guess of x_0 learns (guess_width)
    crop_px: int | None = None  # side of the random training crop; None: the whole picture
    crops_per_picture: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    compile: bool = True
    gradient_checkpointing: bool = False  # of the U-Net's blocks: less memory, a forward pass more
    workers: int = 1  # processes that make batches
    log_images: int = 5_000
    save_images: int = 50_000
    grid_images: int = 50_000
    validate_images: int = 50_000
    # a model folder, a stage's folder or a hub id whose weights the stage starts from; with images: 0 the
    # stage is taken as it is
    init_from: str | None = None
    lora: LoraConfig | None = None  # train adapters on the weights of init_from, which stay as they are

    def __post_init__(self) -> None:
        least = 0 if self.init_from else 1
        self._expect("images", self.images >= least, f"an integer of at least {least}")
        for name in ("batch", "crops_per_picture", "log_images", "save_images", "grid_images"):
            self._expect(name, getattr(self, name) >= 1, "an integer of at least 1")
        self._expect("validate_images", self.validate_images >= 1, "an integer of at least 1")
        adapted = self.lora is None or self.init_from is not None
        self._expect("lora", adapted, "init_from, the weights that are adapted")
        for name in ("accumulate", "skip_limit", "average_images"):
            self._expect(name, getattr(self, name) >= 1, "an integer of at least 1")
        for name in ("warmup_images", "cooldown_images", "workers"):
            self._expect(name, getattr(self, name) >= 0, "an integer of at least 0")
        self._expect("eps", 0 < self.eps < math.inf, "a number above 0")
        widths = all(0.01 <= sigma <= 0.28 for sigma in self.ema_sigma_rel)  # train.ema.SIGMA_RELS
        self._expect("ema_sigma_rel", widths, "numbers from 0.01 to 0.28")
        self._expect("lr", 0 < self.lr < math.inf, "a number above 0")
        self._expect("grad_clip", self.grad_clip > 0, "a number above 0, or inf")
        for name in ("ema", "text_drop", "image_drop", "image_blend", "image_siblings", "vary"):
            self._expect(name, 0 <= getattr(self, name) <= 1, "a number from 0 to 1")
        self._expect("betas", all(0 <= beta < 1 for beta in self.betas), "numbers from 0 to below 1")
        self._expect("weight_decay", 0 <= self.weight_decay < math.inf, "a number of at least 0")
        self._expect("image_noise", 0 <= self.image_noise < math.inf, "a number of at least 0")
        whole = self.guess_batch >= 0 and self.guess_batch % self.batch == 0
        self._expect("guess_batch", whole, f"a multiple of batch, {self.batch}")
        self._expect("crop_px", self.crop_px is None or self.crop_px >= 1, "an integer above 0, or null")
        multiple = self.batch % self.crops_per_picture == 0
        self._expect("batch", multiple, f"a multiple of crops_per_picture, {self.crops_per_picture}")

    @property
    def guess_share(self) -> int:
        """Pictures that the guess learns from, for each of the batch."""
        return self.guess_batch // self.batch

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} {getattr(self, name)!r}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class ClipRecipe:
    """A CLIP to train, or one of open_clip as it is."""

    model: ClipConfig = field(default_factory=ClipConfig)
    pretrained: OpenClipConfig | None = None
    train: TrainConfig | None = None

    def __post_init__(self) -> None:
        if (self.pretrained is None) == (self.train is None):
            raise ValueError("expected either train or pretrained")

    @property
    def embed_dim(self) -> int:
        return (self.pretrained or self.model).embed_dim


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
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # beside log.jsonl
    validation: ValidationConfig = ValidationConfig()
    clip: ClipRecipe | None = None
    prior: PriorRecipe | None = None
    base: StageRecipe | None = None  # may be absent where a prior is trained alone
    sr256: StageRecipe | None = None
    sr1024: StageRecipe | None = None

    def __post_init__(self) -> None:
        if not self.grid_prompts:
            raise ValueError("grid_prompts is empty: expected at least one prompt")
        if self.sr1024 is not None and self.sr256 is None:
            raise ValueError("sr1024 without sr256: expected the stage below it")
        if self.base is None and (self.prior is None or self.sr256 is not None):
            raise ValueError("missing key 'base', the first stage")
        images = self.base is not None and self.base.stage.unet.image_embed_dim is not None
        if self.clip is None and (self.prior is not None or images):
            raise ValueError("missing key 'clip', whose embeddings prior and base.stage.unet take")

    @property
    def stages(self) -> tuple[str, ...]:
        """What there is to train, in order."""
        parts = {name: getattr(self, name) for name in ORDER}
        return tuple(name for name, part in parts.items() if part is not None and part.train is not None)

    def of(self, stage: str) -> ClipRecipe | PriorRecipe | StageRecipe:
        if stage not in self.stages:
            raise unknown("stage", stage, self.stages)
        return getattr(self, stage)

    def train_of(self, stage: str) -> TrainConfig:
        train = self.of(stage).train
        assert train is not None
        return train

    def sees_padding(self, stage: str) -> bool:
        """Whether a stage's network attends to the padding of its text (DeepFloyd IF)."""
        part = self.of(stage)
        unet = part.stage.unet if isinstance(part, StageRecipe) else None
        return unet is not None and not unet.text_masked and unet.text_transformer is None

    @property
    def pictures(self) -> dict[str, StageRecipe]:
        """The stages that draw pictures, from small to large."""
        parts = {"base": self.base, "sr256": self.sr256, "sr1024": self.sr1024}
        return {name: part for name, part in parts.items() if part is not None}


def load_recipe(source: str, settings: list[str] | None = None) -> Recipe:
    """Read a recipe by name (train/recipes/NAME.yaml) or path, with `a.b=c` settings on top.

    `extends: NAME` at its top fills in from another recipe what it does not say itself, and `preset: NAME`
    in a stage from a stage of published size (cascade.nn.presets). In a stage and in prior.model it may also
    be a model's folder or hub id, of this project or of public weights: then its part of that name fills in.
    Raises InputError for a recipe that is not there, an unknown key (with the nearest), a value out of range,
    and stages that do not fit each other."""
    data = override(_read(source), settings or [])
    for name, key in (("prior", "model"), ("base", "stage"), ("sr256", "stage"), ("sr1024", "stage")):
        if isinstance(part := data.get(name), dict) and isinstance(part.get(key), dict):
            part[key] = _from_preset(name, key, part[key])
    recipe = from_dict(Recipe, data, where="recipe")
    width = None if recipe.clip is None else recipe.clip.embed_dim
    if recipe.prior is not None and recipe.prior.model.embed_dim != width:
        found = recipe.prior.model.embed_dim
        raise InputError(f"recipe.prior.model.embed_dim {found}: expected clip.model.embed_dim, {width}")
    if recipe.clip is not None and recipe.clip.train is not None:
        _check_guess("recipe.clip", 0, recipe.clip.train)
    if recipe.prior is not None:
        _check_guess("recipe.prior", recipe.prior.model.guess_width, recipe.prior.train)
    below = None
    for name, part in recipe.pictures.items():
        _check_stage(f"recipe.{name}", name, part, width, below)
        below = part.stage
    return recipe


def _read(source: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """A recipe's mapping on top of that of the recipe it extends."""
    path = Path(source)
    if not path.suffix:
        path = RECIPES / f"{source}.yaml"
        if not path.exists():
            raise unknown("recipe", source, sorted(p.stem for p in RECIPES.glob("*.yaml")))
    data = read_mapping(path)
    base = data.pop("extends", None)
    if base is None:
        return data
    if not isinstance(base, str) or base in seen:
        raise InputError(f"{path}: extends {base!r}: expected the name of a recipe that does not extend it")
    return merge(_read(base, (*seen, source, base)), data, WHOLE)


def _from_preset(part: str, key: str, config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a stage or prior on top of those of its preset, if it names one."""
    name = config.get("preset")
    if name is None:
        return config
    own = {key: value for key, value in config.items() if key != "preset"}
    if key == "stage" and name in PRESETS:
        return merge(to_dict(PRESETS[name]), own)
    if not isinstance(name, str) or ("/" not in name and not Path(name).is_dir()):
        raise unknown("preset", name, PRESETS, where=f"recipe.{part}.{key}")
    parts = find_model(name, verify=False).parts
    if part not in parts:
        raise unknown("part", part, parts, where=name)
    found, expected = parts[part].class_name, {"stage": "Stage", "model": "DiffusionPrior"}[key]
    if found != expected:
        raise InputError(f"recipe.{part}.{key}.preset {name}: {part} is a {found}: expected a {expected}")
    return merge(parts[part].config, own)


def merge(below: dict[str, Any], above: dict[str, Any], whole: tuple[str, ...] = ()) -> dict[str, Any]:
    """Nested `above` on top of `below`; the mappings named in `whole` are taken from one of them alone."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and key not in whole:
            value = merge(old, value)
        result[key] = value
    return result


def _check_stage(
    where: str, name: str, part: StageRecipe, embed_dim: int | None, below: StageConfig | None
) -> None:
    """Refuse a stage that does not fit the CLIP or the stage `below` it (None: it is the first)."""
    cfg, unet, train, crop = part.stage, part.stage.unet, part.train, part.train.crop_px

    def expect(key: str, found: object, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"{where}.{key} {found!r}: expected {expected}")

    check_unet(unet)
    resolve_settings(cfg, {})
    expect("stage.name", cfg.name, cfg.name == name, repr(name))
    wanted, found = (6 if cfg.diffusion.learned_variance else 3), unet.out_channels
    expect("stage.unet.out_channels", found, found == wanted, f"{wanted}, as diffusion.learned_variance says")
    dim = unet.image_embed_dim
    expect("stage.unet.image_embed_dim", dim, dim in (None, embed_dim), f"clip.model.embed_dim, {embed_dim}")
    size, side, factor, channels = unet.patch * math.prod(unet.strides), crop or cfg.image_px, 1, 0
    expect("stage.image_px", cfg.image_px, cfg.image_px % size == 0, f"a multiple of patch x strides, {size}")
    if below is None:
        expect("stage.lowres_px", cfg.lowres_px, cfg.lowres_px is None, "null in the first stage")
    else:
        given, lowres = cfg.lowres_px, below.image_px
        expect("stage.lowres_px", given, given == lowres, f"image_px of {below.name}, {lowres}")
        expect("stage.augment", None, cfg.augment is not None, "a mapping, {} for the defaults")
        whole = cfg.image_px > lowres and cfg.image_px % lowres == 0
        expect("stage.image_px", cfg.image_px, whole, f"a multiple of lowres_px, {lowres}")
        factor, channels = cfg.image_px // lowres, 3
    found = unet.lowres_channels
    expect("stage.unet.lowres_channels", found, found == channels, f"{channels} in this stage")
    step = math.lcm(size, factor)
    fits = side <= cfg.image_px and side % step == 0
    expect("train.crop_px", crop, fits, f"a multiple of {step}, at most image_px {cfg.image_px}")
    _check_guess(where, unet.guess_width, train)
    told = unet.image_embed_dim is not None and unet.learned_null
    fits = not train.image_blend or (told and bool(unet.text_dims))
    expected = "0, or texts, image embeddings and nulls of the network's own"
    expect("train.image_blend", train.image_blend, fits, expected)
    fits = not train.vary or (told and crop is None)
    expected = "0, or whole pictures, image embeddings and a null text of the network's own"
    expect("train.vary", train.vary, fits, expected)
    fits = cfg.last_unet is None or train.init_from is not None
    expect("train.init_from", None, fits, "a model, whose stage.last_unet is taken over as it is")


def _check_guess(where: str, width: int, train: TrainConfig) -> None:
    """Refuse a guess that would not learn, and pictures that none would learn from."""
    if bool(width) != bool(train.guess_batch):
        expected = "0" if train.guess_batch else f"a multiple of batch, {train.batch}"
        raise InputError(
            f"{where}.train.guess_batch {train.guess_batch}: expected {expected}, for guess_width {width}"
        )
