"""Diffusers folders: pipelines of DeepFloyd IF, Karlo (unCLIP) and Kandinsky's prior, and single networks.

Everything is taken from the folder's own configuration; what diffusers' pipelines keep in code (guidance,
steps, how the low-resolution picture is enlarged) is in the tables below.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cascade import checkpoint
from cascade.config import AugmentConfig, StageConfig, UNetConfig, read_mapping, to_dict
from cascade.errors import InputError, unknown
from cascade.pretrained.model import Model, Part, Read, TextFiles
from cascade.pretrained.process import process_from_diffusers, schedule_from_diffusers
from cascade.pretrained.source import find_licence, has_weights, read_tensors
from cascade.pretrained.unet import tensors_from_diffusers, unet_from_diffusers

UNETS = ("UNet2DConditionModel", "UNet2DModel")
PRIOR = "PriorTransformer"
TEXT, TOKENIZER = "text_encoder", "tokenizer"
TEXT_LENGTH = 77  # tokens of a prompt, of T5 and CLIP alike
FACTOR = 4  # of every super-resolution network of the family
IF, KARLO, KANDINSKY = "DeepFloyd IF", "Karlo", "Kandinsky prior"
LICENCES = {
    IF: "DeepFloyd IF License (non-commercial research)",
    KARLO: "CreativeML Open RAIL-M",
    KANDINSKY: "Apache-2.0",
}
PIPELINES = {"IF": IF, "UnCLIP": KARLO, "Kandinsky": KANDINSKY}  # by how their class names start
# Defaults of the pipelines. DeepFloyd IF: stage I, stage II; Karlo: decoder, super-resolution.
IF_BASE: dict[str, Any] = dict(steps=100, guidance=7.0)
IF_SR: dict[str, Any] = dict(steps=50, guidance=4.0, aug_level=0.25)
KARLO_BASE: dict[str, Any] = dict(steps=25, guidance=8.0)
KARLO_SR: dict[str, Any] = dict(steps=7)


def is_diffusers(folder: Path) -> bool:
    """Whether a folder is a pipeline of diffusers, or one of its networks alone."""
    index = folder / checkpoint.INDEX
    if index.is_file():
        return read_mapping(index).get("_class_name") not in (None, "Cascade")
    return _class(folder) in (*UNETS, PRIOR) and (folder / checkpoint.CONFIG).is_file()


def open_diffusers(folder: Path, allow_legacy: bool) -> Model:
    """What the folder holds. Raises InputError for a pipeline that is none of these families."""
    if not (folder / checkpoint.INDEX).is_file():
        return _open_network(folder, allow_legacy)
    index = read_mapping(folder / checkpoint.INDEX)
    name = str(index.get("_class_name"))
    family = next((family for start, family in PIPELINES.items() if name.startswith(start)), None)
    if family is None or (family == KANDINSKY and "Prior" not in name):
        known = ["IFPipeline", "IFSuperResolutionPipeline", "UnCLIPPipeline", "KandinskyV22PriorPipeline"]
        raise unknown("pipeline", name, known, where=str(folder / checkpoint.INDEX))
    present = {k for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[0] is not None}
    reader = _Reader(folder, family, allow_legacy)
    parts, used = {IF: reader.floyd, KARLO: reader.karlo, KANDINSKY: reader.kandinsky}[family](present)
    if not parts:
        raise InputError(
            f"{folder}: expected the weights of a network, found none of {', '.join(sorted(used))}"
        )
    return reader.model(parts, tuple(sorted(present - used - {TEXT, TOKENIZER})))


def _open_network(folder: Path, allow_legacy: bool) -> Model:
    """One network without a pipeline around it: sampled as its family is."""
    family = KANDINSKY if _class(folder) == PRIOR else IF
    reader = _Reader(folder, family, allow_legacy)
    if family == KANDINSKY:
        part = reader.prior("", {"prediction_type": "sample", "clip_sample_range": 10.0})
    else:
        part = reader.stage("", IF_BASE, None)
    return reader.model({part.name: part}, ())


class _Reader:
    """Parts of one folder."""

    def __init__(self, folder: Path, family: str, allow_legacy: bool) -> None:
        self.folder, self.family, self.allow_legacy = folder, family, allow_legacy

    # -- families ------------------------------------------------------------------------------------------

    def floyd(self, present: set[str]) -> tuple[dict[str, Part], set[str]]:
        """Stage I or II: the folder of each holds one network."""
        used = {"unet", "scheduler", "image_noising_scheduler"}
        if not self._has("unet", present):
            return {}, used
        settings = IF_SR if _in_channels(self.folder / "unet") == 6 else IF_BASE
        part = self.stage("unet", settings, "scheduler")
        return {part.name: part}, used

    def karlo(self, present: set[str]) -> tuple[dict[str, Part], set[str]]:
        used = {"prior", "decoder", "text_proj", "super_res_first", "super_res_last"}
        used |= {"prior_scheduler", "decoder_scheduler", "super_res_scheduler"}
        parts: list[Part] = []
        if self._has("prior", present):
            parts.append(self.prior("prior", self._config("prior_scheduler")))
        if self._has("decoder", present):
            parts.append(self.stage("decoder", KARLO_BASE, "decoder_scheduler", text_proj="text_proj"))
        if self._has("super_res_first", present):
            last = "super_res_last" if self._has("super_res_last", present) else None
            parts.append(self.stage("super_res_first", KARLO_SR, "super_res_scheduler", last=last))
        return {part.name: part for part in parts}, used

    def kandinsky(self, present: set[str]) -> tuple[dict[str, Part], set[str]]:
        used = {"prior", "scheduler"}
        if not self._has("prior", present):
            return {}, used
        return {"prior": self.prior("prior", self._config("scheduler"))}, used

    # -- parts ---------------------------------------------------------------------------------------------

    def stage(
        self,
        place: str,
        settings: dict[str, Any],
        scheduler: str | None,
        text_proj: str | None = None,
        last: str | None = None,
    ) -> Part:
        """A U-Net as a stage. `text_proj` and `last` are the folders of Karlo's decoder and last step."""
        config, where = self._config(place), str(self.folder / place)
        unet = unet_from_diffusers(config, None if text_proj is None else self._config(text_proj))
        px = config.get("sample_size")
        if not isinstance(px, int) or px < 1:
            raise InputError(f"{where}: sample_size {px!r}: expected the side of its pictures in px")
        process = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"}
        if scheduler is not None:
            process = self._config(scheduler)
        learned = unet.out_channels == 2 * unet.in_channels
        diffusion, sampling = process_from_diffusers(
            process, learned, f"{self.folder / (scheduler or place)}"
        )
        lowres = bool(unet.lowres_channels)
        stage = StageConfig(
            name=f"sr{px}" if lowres else "base",
            image_px=px,
            lowres_px=px // FACTOR if lowres else None,
            unet=unet,
            last_unet=None if last is None else unet_from_diffusers(self._config(last)),
            diffusion=diffusion,
            augment=self._augment() if lowres else None,
            sampling=replace(sampling, **settings),
        )
        return Part(
            stage.name, "cascade", "Stage", to_dict(stage), self._unets(place, stage, text_proj, last), where
        )

    def prior(self, place: str, scheduler: Mapping[str, Any]) -> Part:
        reader = importlib.import_module("prior.pretrained")  # cascade does not depend on prior
        where = self.folder / place
        config = reader.prior_from_diffusers(self._config(place), scheduler)

        def read(device: str) -> dict[str, Tensor]:
            return reader.tensors_from(reader.DIFFUSERS, self._tensors(place, device), config, str(where))

        return Part("prior", "prior", "DiffusionPrior", to_dict(config), read, str(where))

    def model(self, parts: dict[str, Part], unused: tuple[str, ...]) -> Model:
        text = self._text(parts)
        missing = () if text.folders else (text.reference["expected"],)
        return Model(
            self.folder,
            self.family,
            parts,
            (text,),
            find_licence(self.folder, LICENCES[self.family]),
            unused,
            missing,
        )

    # -- pieces --------------------------------------------------------------------------------------------

    def _text(self, parts: Mapping[str, Part]) -> TextFiles:
        """The folder's text encoder, or what stands for it."""
        clip = self.family != IF
        if has_weights(self.folder / TEXT) and (self.folder / TOKENIZER).is_dir():
            reference = dict(
                kind="hf", name=".", subfolder=TEXT, tokenizer_subfolder=TOKENIZER, max_length=TEXT_LENGTH
            )
            own: dict[str, Any] = dict(projection=True) if clip else dict(clean=True)
            return TextFiles({**reference, **own}, self.folder, (TEXT, TOKENIZER))
        dims = next((list(width) for width in map(text_dims, parts.values()) if width), [])
        kind = "CLIP's text tower with its projection" if clip else "T5 (v1.1 XXL in the published models)"
        width = f", {dims[0]} wide" if dims else ""
        return TextFiles(
            {"kind": "missing", "expected": f"a text encoder, {kind}{width}", "dims": dims}, self.folder
        )

    def _augment(self) -> AugmentConfig:
        if self.family == KARLO:
            return AugmentConfig(upsample="bicubic", max_level=0.0)
        noising = self.folder / "image_noising_scheduler"
        schedule = "discrete_cosine"
        if noising.is_dir():
            schedule = schedule_from_diffusers(self._config(noising.name), str(noising))
        return AugmentConfig(upsample="bilinear_aligned", schedule=schedule)

    def _unets(self, place: str, stage: StageConfig, text_proj: str | None, last: str | None) -> Read:
        def read(device: str) -> dict[str, Tensor]:
            beside = None if text_proj is None else self._tensors(text_proj, device)
            tensors = self._unet(place, stage.unet, device, beside)
            if last is not None and stage.last_unet is not None:
                others = self._unet(last, stage.last_unet, device, None)
                tensors |= {f"{checkpoint.LAST}{name}": t for name, t in others.items()}
            return tensors

        return read

    def _unet(
        self, place: str, cfg: UNetConfig, device: str, text_proj: dict[str, Tensor] | None
    ) -> dict[str, Tensor]:
        try:
            return tensors_from_diffusers(self._tensors(place, device), cfg, text_proj)
        except InputError as error:
            raise InputError(f"{self.folder / place}: {error}") from None

    def _tensors(self, place: str, device: str) -> dict[str, Tensor]:
        return read_tensors(self.folder / place, allow_legacy=self.allow_legacy, device=device)

    def _config(self, place: str) -> dict[str, Any]:
        name = "scheduler_config.json" if place.endswith("scheduler") else checkpoint.CONFIG
        return read_mapping(self.folder / place / name)

    def _has(self, place: str, present: set[str]) -> bool:
        return place in present and (self.folder / place).is_dir()


def _class(folder: Path) -> str | None:
    path = folder / checkpoint.CONFIG
    return read_mapping(path).get("_class_name") if path.is_file() else None


def _in_channels(folder: Path) -> Any:
    return read_mapping(folder / checkpoint.CONFIG).get("in_channels")


def text_dims(part: Part) -> tuple[int, ...]:
    """Widths of the token sequences that a part takes."""
    stage = part.stage
    if stage is not None:
        return stage.unet.text_dims
    return (part.config["text_dim" if "text_dim" in part.config else "width"],)
