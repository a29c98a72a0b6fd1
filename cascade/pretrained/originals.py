"""The layouts in which the families were published: DeepFloyd IF (pytorch_model.bin and config.yml), Karlo
(three checkpoints and the statistics of its prior), GLIDE (one file a network), DALLE2-pytorch's prior.

What the original programs keep in code (noise levels, sampling) is in the tables below.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from cascade import checkpoint
from cascade.config import (
    AugmentConfig,
    DiffusionConfig,
    SamplingConfig,
    ScheduleConfig,
    StageConfig,
    UNetConfig,
    read_mapping,
    to_dict,
)
from cascade.errors import InputError
from cascade.pretrained.folders import FACTOR, IF, KARLO, LICENCES, TEXT_LENGTH, text_dims
from cascade.pretrained.model import Model, Part, Read, TextFiles
from cascade.pretrained.source import LEGACY, find_licence, read_tensors
from cascade.pretrained.unet import tensors_from_original, unet_from_original

GLIDE, LAION = "GLIDE", "DALLE2-pytorch prior"
HEAD = 64  # width of the attention heads where no file tells it: of all published networks
CLIP_L = "openai/clip-vit-large-patch14"  # the text tower of Karlo
GLIDE_TOKENS = "openai-community/gpt2"  # whose byte pairs GLIDE reads
PIXEL = SamplingConfig(sampler="ddpm", spacing="linspace", threshold="static")
IF_THRESHOLD: dict[str, Any] = dict(threshold="dynamic", threshold_percentile=0.95)
SETTINGS = {
    (IF, "base"): replace(PIXEL, steps=100, guidance=7.0, threshold_cap=1.5, **IF_THRESHOLD),
    (IF, "sr"): replace(
        PIXEL,
        respacing="smart50",
        guidance=4.0,
        aug_level=0.25,
        lowres_noise="step",
        threshold_cap=1.0,
        **IF_THRESHOLD,
    ),
    (KARLO, "base"): replace(PIXEL, steps=50, guidance=8.0),
    (KARLO, "sr"): replace(PIXEL, steps=7),
    (GLIDE, "base"): replace(PIXEL, steps=100, guidance=3.0),
    (GLIDE, "sr"): replace(PIXEL, sampler="ddim", eta=0.0, respacing="glide27", temperature=0.997),
}
GLIDE_INPAINT = {
    "base": replace(PIXEL, steps=100, guidance=5.0),
    "upsample": replace(PIXEL, respacing="glide27", temperature=0.997),
}
AUGMENTS = {
    IF: AugmentConfig(upsample="bilinear_aligned", schedule="discrete_cosine"),
    KARLO: AugmentConfig(upsample="bicubic", max_level=0.0),
    GLIDE: AugmentConfig(upsample="bilinear", eight_bit=True, max_level=0.0),
}
Process = Literal["discrete_cosine", "discrete_linear"]
Tensors = dict[str, Tensor]


def open_original(folder: Path, allow_legacy: bool) -> Model:
    """What a folder of original checkpoints holds. Raises InputError where there are none."""
    reader = _Reader(folder, allow_legacy)
    for opened in (reader.floyd, reader.karlo, reader.laion, reader.glide):
        model = opened()
        if model is not None:
            return model
    raise InputError(
        f"{folder} is not a model folder: expected {checkpoint.INDEX}, a network of diffusers, or the "
        "original files of DeepFloyd IF (config.yml), Karlo, GLIDE or DALLE2-pytorch"
    )


class _Reader:
    """Parts of one folder. Files are found by what their names begin with."""

    def __init__(self, folder: Path, allow_legacy: bool) -> None:
        self.folder, self.allow_legacy = folder, allow_legacy

    # -- families ------------------------------------------------------------------------------------------

    def floyd(self) -> Model | None:
        config = self.folder / "config.yml"
        if not config.is_file():
            return None
        params = read_mapping(config).get("params")
        if not isinstance(params, dict):
            raise InputError(f"{config}: expected params, the settings of the network")
        stage, read = self._stage(IF, self.folder, "discrete_cosine", params, px=params.get("image_size"))
        part = Part(stage.name, "cascade", "Stage", to_dict(stage), read, str(self.folder))
        need = f"a text encoder, T5 (v1.1 XXL), {stage.unet.text_dims[0]} wide"
        text = {"kind": "missing", "expected": need, "dims": list(stage.unet.text_dims)}
        return self._model(IF, {part.name: part}, text, (need,))

    def karlo(self) -> Model | None:
        parts = {}
        prior, decoder, sr = (self._find(name) for name in ("prior-ckpt", "decoder-ckpt", "improved-sr-ckpt"))
        if prior is not None:
            parts["prior"] = self._karlo_prior(prior)
        for file, last in ((decoder, None), (sr, "model_last_step.")):
            if file is not None:
                prefix = "model." if last is None else "model_first_steps."
                heads = self._karlo_heads() if last is None else HEAD  # the other has no attention
                stage, read = self._stage(KARLO, file, "discrete_cosine", None, prefix, last, heads=heads)
                parts[stage.name] = Part(stage.name, "cascade", "Stage", to_dict(stage), read, str(file))
        if not parts:
            return None
        text = dict(kind="hf", name=CLIP_L, max_length=TEXT_LENGTH, projection=True, pad_id=0)
        return self._model(KARLO, parts, text)

    def glide(self) -> Model | None:
        parts, length = {}, 0
        for name, variant in product(("base", "upsample"), ("", "-inpaint")):
            file = self._find(name + variant, exact=True)
            if file is None:
                continue
            process: Process = "discrete_linear" if name == "upsample" else "discrete_cosine"
            stage, read = self._stage(GLIDE, file, process, None)
            if variant:
                stage = replace(stage, sampling=GLIDE_INPAINT[name])
            if stage.name in parts:
                raise InputError(
                    f"{self.folder}: expected one network a size, found {Path(parts[stage.name].where).name} "
                    f"and {file.name}: move one to a folder of its own"
                )
            parts[stage.name] = Part(stage.name, "cascade", "Stage", to_dict(stage), read, str(file))
            assert stage.unet.text_transformer is not None
            length = stage.unet.text_transformer.length
        if not parts:
            return None
        return self._model(GLIDE, parts, dict(kind="glide", name=GLIDE_TOKENS, max_length=length))

    def laion(self) -> Model | None:
        config = self.folder / "prior_config.json"
        if not config.is_file():
            return None
        reader = importlib.import_module("prior.laion_checkpoint")  # cascade does not depend on prior
        file = self._largest()
        settings = reader.laion_config(self._read(file, "meta"), read_mapping(config))

        def read(device: str) -> Tensors:
            return reader.laion_tensors(self._read(file, device), settings, str(file))

        part = Part("prior", "prior", "LaionPrior", to_dict(settings), read, str(file))
        text = dict(kind="hf", name=CLIP_L, max_length=settings.text_length, projection=True)
        return self._model(LAION, {"prior": part}, text)

    # -- parts ---------------------------------------------------------------------------------------------

    def _stage(
        self,
        family: str,
        file: Path,
        schedule: Process,
        params: dict[str, Any] | None,
        prefix: str = "",
        last: str | None = None,
        px: Any = None,
        heads: int = HEAD,
    ) -> tuple[StageConfig, Read]:
        """A U-Net as a stage, its configuration taken from the shapes of its tensors. `prefix` stands before
        their names, `last` before those of the last step's network. heads: their width, where `params` do not
        tell it."""

        def tensors(device: str, start: str) -> Tensors:
            found = self._read(file, device)
            return {name.removeprefix(start): t for name, t in found.items() if name.startswith(start)}

        unet = self._described(
            file, lambda: unet_from_original(tensors("meta", prefix), params, head_channels=heads)
        )
        sr = bool(unet.lowres_channels)
        if px is None:
            px = 2 ** (len(unet.channels) + 2)  # the deepest level of all of these networks has 8 px
        key = "sr" if sr else "base"
        learned = unet.out_channels == 2 * unet.in_channels
        process = DiffusionConfig(
            prediction="eps",
            schedule=ScheduleConfig(name=schedule),
            weighting="none",
            learned_variance=learned,
        )
        stage = StageConfig(
            name=f"sr{px}" if sr else "base",
            image_px=px,
            lowres_px=px // FACTOR if sr else None,
            unet=unet,
            last_unet=None
            if last is None
            else self._described(file, lambda: unet_from_original(tensors("meta", last))),
            diffusion=process,
            augment=AUGMENTS[family] if sr else None,
            sampling=SETTINGS[family, key],
        )

        def read(device: str) -> Tensors:
            ours = self._translated(file, tensors(device, prefix), unet)
            if last is not None and stage.last_unet is not None:
                others = self._translated(file, tensors(device, last), stage.last_unet)
                ours |= {f"{checkpoint.LAST}{name}": t for name, t in others.items()}
            return ours

        return stage, read

    def _karlo_prior(self, file: Path) -> Part:
        reader = importlib.import_module("prior.pretrained")  # cascade does not depend on prior
        statistics = self._find("ViT-L-14_stats")
        if statistics is None:
            raise InputError(f"{self.folder}: expected ViT-L-14_stats.th beside the prior, its statistics")
        described = self._karlo_config("prior")
        if described is None:
            raise InputError(f"{self.folder}: expected prior_1B_vit_l.yaml, the prior's configuration")
        config = reader.prior_from_karlo(read_mapping(described))

        def read(device: str) -> Tensors:
            mean, std = self._read(statistics, device).values()
            found = self._read(file, device) | {"clip_mean": mean[None], "clip_std": std[None]}
            return reader.tensors_from(reader.KARLO, found, config, str(file))

        return Part("prior", "prior", "DiffusionPrior", to_dict(config), read, str(file))

    def _karlo_config(self, name: str) -> Path | None:
        """A configuration of Karlo's program: it keeps them in a folder of their own."""
        places = (self.folder, self.folder / "configs")
        return next((p for place in places for p in sorted(place.glob(f"{name}*.yaml"))), None)

    def _karlo_heads(self) -> int:
        """Width of the decoder's attention heads: what decoder_900M_vit_l.yaml says where it is at hand."""
        file = self._karlo_config("decoder")
        if file is None:
            return HEAD
        hparams = (read_mapping(file).get("model") or {}).get("hparams") or {}
        width = hparams.get("num_head_channels", HEAD)
        if not isinstance(width, int) or width < 1:
            raise InputError(f"{file}: num_head_channels {width!r}: expected the width of an attention head")
        return width

    def _model(
        self, family: str, parts: dict[str, Part], text: dict[str, Any], missing: tuple[str, ...] = ()
    ) -> Model:
        licence = find_licence(self.folder, {**LICENCES, GLIDE: "MIT", LAION: "MIT"}[family])
        widths = [width for width in map(text_dims, parts.values()) if width]
        files = TextFiles(text, self.folder, expected=widths[0] if widths else ())
        return Model(self.folder, family, parts, (files,), licence, (), missing)

    # -- files ---------------------------------------------------------------------------------------------

    def _find(self, name: str, exact: bool = False) -> Path | None:
        """The file whose name begins with `name`, or is it but for its ending; safetensors before pickles."""
        for ending in (".safetensors", *LEGACY):
            for path in sorted(self.folder.glob(f"*{ending}")):
                if path.stem == name or (not exact and path.stem.startswith(name)):
                    return path
        return None

    def _largest(self) -> Path:
        """The checkpoint of a folder that holds one: its largest file of weights."""
        files = [p for ending in (".safetensors", *LEGACY) for p in self.folder.glob(f"*{ending}")]
        if not files:
            raise InputError(
                f"{self.folder}: expected a checkpoint (.safetensors, .pth) beside prior_config.json"
            )
        return max(files, key=lambda p: (p.suffix == ".safetensors", p.stat().st_size))

    def _read(self, file: Path, device: str) -> Tensors:
        return read_tensors(file, allow_legacy=self.allow_legacy, device=device)

    def _described(self, file: Path, describe: Callable[[], UNetConfig]) -> UNetConfig:
        try:
            return describe()
        except InputError as error:
            raise InputError(_at(file, error)) from None

    def _translated(self, file: Path, tensors: Tensors, cfg: UNetConfig) -> Tensors:
        try:
            return tensors_from_original(tensors, cfg)
        except InputError as error:
            raise InputError(_at(file, error)) from None


def _at(file: Path, error: InputError) -> str:
    """The message with the file's name, once."""
    return str(error) if str(error).startswith(str(file)) else f"{file}: {error}"
