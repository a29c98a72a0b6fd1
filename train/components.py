"""The trained components of a run, and the weights that a stage starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cascade import Cascade, Stage, adapter
from cascade.checkpoint import (
    CONFIG,
    INDEX,
    LAST,
    WEIGHTS,
    Component,
    check_tensors,
    load_component,
    load_tensors,
    read_index,
    resolve_source,
    sha256,
)
from cascade.config import UNetConfig, from_dict, to_dict
from cascade.errors import InputError, unknown
from cascade.loading import fill_stage
from cascade.pretrained.folders import is_diffusers
from cascade.pretrained.model import open_model
from cascade.pretrained.unet_tensors import skeleton
from cascade.text import load_text_encoder
from prior.clip import CLIP, ClipConfig
from prior.diffusion import DiffusionPrior, PriorConfig
from prior.pretrained_clip import OpenCLIP, OpenClipConfig
from train.data import PictureSet
from train.encoded import ImageStore
from train.recipe import Recipe

PRIOR_SAMPLING = ("sampler", "steps", "eta", "guidance", "best_of", "clamp")  # keys of PriorConfig
CLASSES = {"clip": "CLIP", "prior": "DiffusionPrior"}  # of the other stages: Stage


def class_of(name: str) -> str:
    return CLASSES.get(name, "Stage")


def trained(out: Path, name: str) -> bool:
    return (out / name).is_dir()


def read_component(folder: Path, name: str) -> Component:
    """The component `name` in its folder; an adapter comes merged into the weights it adapts. Raises
    InputError where the folder holds something else."""
    part = load_component(folder)
    if part.class_name == adapter.CLASS:
        lora = adapter.load_adapter(folder)
        part, _ = source_component(lora.config.base, name)
        weights = {key: tensor.float() for key, tensor in part.tensors.items()}
        lora.merge(weights)
        return Component(part.class_name, part.config, weights)
    if part.class_name != class_of(name):
        raise InputError(f"{folder / CONFIG}: expected class {class_of(name)}, found {part.class_name!r}")
    return part


def source_component(source: str, name: str) -> tuple[Component, Path]:
    """The component `name` of a model of this project or of public weights, or in a folder of its own; and
    where it is."""
    folder = resolve_source(source)
    own = (folder / INDEX).is_file() or (folder / CONFIG).is_file()
    if own and not is_diffusers(folder):
        folder = component_folder(source, name)
        return read_component(folder, name), folder
    parts = open_model(folder).parts
    if name not in parts:
        raise unknown("component", name, parts, where=str(folder))
    part = parts[name]
    if part.class_name != class_of(name):
        raise InputError(f"{folder}: expected class {class_of(name)}, found {part.class_name!r}")
    return Component(part.class_name, part.config, part.read("cpu")), folder


def component_folder(source: str, name: str) -> Path:
    """Where `source`, a model's folder or hub id or a component's folder, has the component `name`."""
    folder = resolve_source(source)
    if not (folder / INDEX).is_file():
        return folder
    components = read_index(folder).components
    if name not in components:
        raise unknown("component", name, components, where=str(folder))
    return folder / name


def start_from(
    network: nn.Module, source: str, name: str, prediction: str, last: UNetConfig | None = None
) -> dict[str, Tensor]:
    """Load the weights of another model's component, and return those of the network of its last step where
    it has one, `last`. Raises InputError, and loads nothing, where they are of other shapes or of a network
    that predicts something else."""
    part, folder = source_component(source, name)
    found = part.config.get("diffusion", part.config).get("prediction", prediction)
    if found != prediction:
        where = f"{name}.train.init_from: {folder}"
        raise InputError(f"{where} predicts {found!r}: expected {prediction!r}, as in the recipe")
    beside = {} if last is None else {f"{LAST}{n}": t for n, t in skeleton(last).state_dict().items()}
    kept = {n: t for n, t in part.tensors.items() if last is not None and n.startswith(LAST)}
    try:
        check_tensors(kept, beside, folder)
        load_tensors(network, {n: t for n, t in part.tensors.items() if n not in kept}, folder)
    except InputError as error:
        raise InputError(f"{name}.train.init_from: {error}: expected the network of the recipe") from None
    return kept


def load_clip(recipe: Recipe, out: Path) -> CLIP | OpenCLIP:
    """The CLIP of this run, trained or pretrained, frozen."""
    if recipe.clip is None:
        raise InputError(f"recipe {recipe.name} has no clip")
    if recipe.clip.pretrained is not None:
        return OpenCLIP(recipe.clip.pretrained).eval().requires_grad_(False)
    if not trained(out, "clip"):
        raise InputError(f"no trained clip in {out}: train --stage clip first")
    part = read_component(out / "clip", "clip")
    clip = CLIP(from_dict(ClipConfig, part.config))
    load_tensors(clip, part.tensors, out / "clip")
    return clip.eval().requires_grad_(False)


def load_prior(recipe: Recipe, out: Path) -> DiffusionPrior | None:
    """The trained prior, with the recipe's sampling settings."""
    if not trained(out, "prior"):
        return None
    part = read_component(out / "prior", "prior")
    config = from_dict(PriorConfig, part.config)
    if recipe.prior is not None:
        config = replace(config, **{name: getattr(recipe.prior.model, name) for name in PRIOR_SAMPLING})
    prior = DiffusionPrior(config)
    load_tensors(prior, part.tensors, out / "prior")
    return prior.eval().requires_grad_(False)


def load_stage(recipe: Recipe, out: Path, name: str) -> Stage:
    """A trained stage of this run; its sampling defaults are the recipe's of today."""
    stage = Stage(recipe.pictures[name].stage)
    fill_stage(stage, read_component(out / name, name).tensors, str(out / name))
    return stage.eval()


def open_images(recipe: Recipe, out: Path, pictures: PictureSet) -> ImageStore:
    """CLIP image embeddings of the pictures, by the CLIP of this run. Those of a small set are written now,
    where that has not been done."""
    return clip_store(recipe, out, pictures).prepare()


def clip_store(recipe: Recipe, out: Path, pictures: PictureSet) -> ImageStore:
    """What the CLIP of this run says of the pictures, as far as it is written."""
    clip = load_clip(recipe, out)
    about = to_dict(clip.config)
    if isinstance(clip, CLIP):
        about = {"config": about, "sha256": sha256(out / "clip" / WEIGHTS)}
    elif files := local_files(clip.config):
        about["sha256"] = {path.name: sha256(path) for path in files}
    return ImageStore(pictures, clip, about)


def local_files(config: OpenClipConfig) -> list[Path]:
    """The files of an open_clip model on this machine, which may change; none of one that has a tag."""
    if config.model.startswith("local-dir:"):
        folder = Path(config.model.removeprefix("local-dir:"))
        return [
            path for path in sorted(folder.glob("*.*")) if path.suffix in (".json", ".safetensors", ".bin")
        ]
    weights = Path(config.pretrained or "")
    return [weights] if weights.is_file() else []


def assemble(recipe: Recipe, out: Path) -> Path:
    """The model folder of all stages that are trained, in bf16. Raises InputError where there is none."""
    stages = [load_stage(recipe, out, name) for name in recipe.pictures if trained(out, name)]
    if not stages and (recipe.pictures or not trained(out, "prior")):
        first = next(iter(recipe.pictures), "prior")
        raise InputError(f"no trained stage in {out}: train --stage {first} first")
    clip = None if recipe.clip is None else load_clip(recipe, out)
    model = Cascade(stages, load_text_encoder(recipe.text), load_prior(recipe, out), clip, recipe.name)
    folder = out / "model"
    model.save_pretrained(folder, dtype=torch.bfloat16)
    return folder
