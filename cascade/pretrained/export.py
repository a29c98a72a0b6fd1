"""A model as folders that diffusers loads: a pipeline folder a stage for DeepFloyd IF's kind of network, one
folder for all parts of Karlo's kind, one for a prior alone."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade import checkpoint
from cascade.config import StageConfig
from cascade.errors import InputError
from cascade.pretrained.convert import LICENCE_FILE, check_empty, in_dtype, licence_text
from cascade.pretrained.folders import TEXT, TOKENIZER
from cascade.pretrained.model import Model, Part
from cascade.pretrained.process import process_to_diffusers
from cascade.pretrained.unet import config_to_diffusers, tensors_to_diffusers

SCHEDULER = "scheduler_config.json"
Index = dict[str, Any]  # component -> [library, class]


def export(model: Model, folder: Path, dtype: torch.dtype | None = None) -> list[Path]:
    """Write the model's parts for diffusers; the pipeline folders that were made. Raises InputError for a
    folder that is not empty, and for what diffusers' classes cannot express."""
    check_empty(folder)
    if not model.parts:
        raise InputError(f"{model.folder}: nothing to export")
    with checkpoint.new_folder(folder) as new:
        writer = _Writer(model, dtype)
        stages = {name: stage for name, part in model.parts.items() if (stage := part.stage) is not None}
        karlo = any(stage.unet.text_embed_dim or stage.last_unet for stage in stages.values())
        made = ["."] if karlo or not stages else list(stages)
        if karlo:
            writer.karlo(new, stages)
        for name, stage in {} if karlo else stages.items():
            writer.floyd(new / name, model.parts[name], stage)
        if not stages:
            writer.prior_alone(new)
        if model.licence is not None:
            (new / LICENCE_FILE).write_text(licence_text(model.licence), encoding="utf-8")
    return [folder / name for name in made]


class _Writer:
    def __init__(self, model: Model, dtype: torch.dtype | None) -> None:
        self.model, self.dtype = model, dtype

    def floyd(self, folder: Path, part: Part, stage: StageConfig) -> None:
        index: Index = {name: [None, None] for name in ("safety_checker", "feature_extractor", "watermarker")}
        index |= self._unet(folder, {"unet": "unet"}, stage, part.read("cpu"))
        index |= self._scheduler(folder, "scheduler", process_to_diffusers(stage.diffusion, stage.sampling))
        name = "IFPipeline"
        if stage.augment is not None:
            name = "IFSuperResolutionPipeline"
            index |= self._scheduler(folder, "image_noising_scheduler", _noising(stage))
        index |= self._text(folder, "T5EncoderModel")
        self._index(folder, name, index, requires_safety_checker=False)

    def karlo(self, folder: Path, stages: Mapping[str, StageConfig]) -> None:
        index = self._prior(folder, "prior_scheduler")
        for name, stage in stages.items():
            tensors = self.model.parts[name].read("cpu")
            first = {n: t for n, t in tensors.items() if not n.startswith(checkpoint.LAST)}
            last = {n.removeprefix(checkpoint.LAST): t for n, t in tensors.items() if n not in first}
            base = stage.lowres_px is None
            place = "decoder" if base else "super_res_first"
            index |= self._unet(folder, {"unet": place, "text_proj": "text_proj"}, stage, first)
            if stage.last_unet is not None:
                index |= self._unet(folder, {"unet": "super_res_last"}, stage, last, stage.last_unet)
            scheduler = {
                "_class_name": "UnCLIPScheduler",
                "prediction_type": "epsilon",
                "clip_sample_range": 1.0,
            }
            scheduler["variance_type"] = (
                "learned_range" if stage.diffusion.learned_variance else "fixed_small_log"
            )
            index |= self._scheduler(folder, f"{'decoder' if base else 'super_res'}_scheduler", scheduler)
        index |= self._text(folder, "CLIPTextModelWithProjection")
        self._index(folder, "UnCLIPPipeline", index)

    def prior_alone(self, folder: Path) -> None:
        index = self._prior(folder, "scheduler") | self._text(folder, "CLIPTextModelWithProjection")
        index |= {"image_encoder": [None, None], "image_processor": [None, None]}
        self._index(folder, "KandinskyV22PriorPipeline", index)

    # -- pieces --------------------------------------------------------------------------------------------

    def _unet(
        self,
        folder: Path,
        places: dict[str, str],
        stage: StageConfig,
        ours: dict[str, Tensor],
        unet: Any = None,
    ) -> Index:
        """Write a network and what belongs to it; `places` are their folders."""
        cfg = stage.unet if unet is None else unet
        try:
            configs = config_to_diffusers(cfg, stage.image_px)
        except InputError as error:
            raise InputError(f"stage {stage.name} is nothing that diffusers has: {error}") from None
        for name, tensors in tensors_to_diffusers(ours, cfg).items():
            checkpoint.save_component(
                folder / places[name], _settings(configs[name]), self._cast(tensors), _class(configs[name])
            )
        return {places[name]: [_library(config), _class(config)] for name, config in configs.items()}

    def _prior(self, folder: Path, scheduler: str) -> Index:
        part = self.model.parts.get("prior")
        if part is None:
            return {}
        if part.class_name != "DiffusionPrior":
            raise InputError(f"prior of class {part.class_name}: diffusers has no such network")
        writer = importlib.import_module("prior.pretrained")  # cascade does not depend on prior
        config = part.typed_config(importlib.import_module("prior").PriorConfig)
        model, process = writer.prior_to_diffusers(config)
        tensors = self._cast(writer.tensors_to(writer.DIFFUSERS, part.read("cpu"), config))
        checkpoint.save_component(folder / "prior", _settings(model), tensors, _class(model))
        return {"prior": ["diffusers", _class(model)]} | self._scheduler(folder, scheduler, process)

    def _scheduler(self, folder: Path, name: str, config: dict[str, Any]) -> Index:
        (folder / name).mkdir(parents=True)
        checkpoint.write_json(folder / name / SCHEDULER, config)
        return {name: ["diffusers", _class(config)]}

    def _text(self, folder: Path, class_name: str) -> Index:
        """The encoder and tokeniser of the model where their files are at hand."""
        for text in self.model.text:
            places = {key: text.reference.get(f"{key}subfolder") for key in ("", "tokenizer_")}
            # beside the model, or where it was trained with them
            root = text.root if text.folders else Path(str(text.reference.get("name")))
            if text.reference.get("kind") == "hf" and all(places.values()) and root.is_dir():
                shutil.copytree(root / str(places[""]), folder / TEXT)
                shutil.copytree(root / str(places["tokenizer_"]), folder / TOKENIZER)
                return {TEXT: ["transformers", class_name], TOKENIZER: ["transformers", _tokenizer(folder)]}
        return {TEXT: [None, None], TOKENIZER: [None, None]}

    def _index(self, folder: Path, name: str, components: Index, **options: Any) -> None:
        data = {"_class_name": name, "_diffusers_version": "0.33.1", **components, **options}
        checkpoint.write_json(folder / checkpoint.INDEX, data)

    def _cast(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return in_dtype(tensors, self.dtype)


def _noising(stage: StageConfig) -> dict[str, Any]:
    """The scheduler by which stage II of DeepFloyd IF noises its low-resolution picture."""
    assert stage.augment is not None
    names = {"discrete_cosine": "squaredcos_cap_v2", "discrete_linear": "linear"}
    if stage.augment.schedule not in names or stage.augment.residual:
        raise InputError(
            f"stage {stage.name}: diffusers can express a low-resolution picture noised on a discrete "
            f"schedule alone, not {stage.augment.schedule!r}"
            f"{' with a residual' if stage.augment.residual else ''}"
        )
    return {
        "_class_name": "DDPMScheduler",
        "beta_schedule": names[stage.augment.schedule],
        "num_train_timesteps": 1000,
    }


def _tokenizer(folder: Path) -> str:
    """The tokeniser's class, as its configuration names it."""
    path = folder / TOKENIZER / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return str(config.get("tokenizer_class", "PreTrainedTokenizerFast"))


def _class(config: dict[str, Any]) -> str:
    return str(config["_class_name"])


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "_class_name"}


def _library(config: dict[str, Any]) -> str:
    return "unclip" if _class(config) == "UnCLIPTextProjModel" else "diffusers"
