"""Frozen, keyword-only configuration with strict conversion from and to plain data (JSON, YAML).

Unknown keys, missing keys and wrong types raise `InputError` with the full path of the field.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from cascade.errors import InputError, unknown

T = TypeVar("T")

Prediction = Literal["v", "eps", "x0", "edm"]
SamplerName = Literal["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun"]
Spacing = Literal["t", "logsnr", "edm", "leading", "linspace"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """log-SNR as a function of t in [0, 1], falling from data to noise."""

    name: Literal["cosine", "linear", "sigmoid", "discrete_cosine", "discrete_linear"] = "cosine"
    shift: float = 0.0  # added to the log-SNR: 2 log(64 / d) for d px (simple diffusion, arXiv:2301.11093)
    shift_low: float | None = None  # shift at t = 0 when interpolated; `shift` then holds at t = 1
    logsnr_min: float = -15.0  # clamp of the continuous schedules
    logsnr_max: float = 15.0
    zero_terminal_snr: bool = False  # rescale of a discrete grid (arXiv:2305.08891)


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """What the network predicts, at which noise levels it is trained, and how the loss is weighted."""

    prediction: Prediction = "v"
    schedule: ScheduleConfig = ScheduleConfig()
    weighting: Literal["none", "min_snr", "clamped_snr", "soft_min_snr", "sigmoid"] = "min_snr"
    weighting_param: float = 5.0  # gamma of the SNR weightings, b of sigmoid
    learned_variance: bool = False  # 2C outputs, hybrid loss (arXiv:2102.09672)
    sigma_data: float = 0.5  # EDM preconditioning only


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Corruption of the low-resolution input (Imagen 2.4, CDM 4.4, unCLIP appendix C)."""

    upsample: Literal["bicubic", "bilinear", "bilinear_aligned"] = "bicubic"  # aligned: by corners (IF)
    eight_bit: bool = False  # round the low-resolution picture to 8 bits first (GLIDE)
    max_level: float = 1.0  # training draws aug_level from U(0, max_level)
    # variance-preserving noise at a level; on a discrete grid level a is step floor(1000 a) (DeepFloyd IF)
    schedule: Literal["cosine", "linear", "discrete_cosine", "discrete_linear"] = "cosine"
    blur_prob: float = 0.0  # share of examples that are blurred in training (CDM: 0.5)
    blur_sigma: tuple[float, float] = (0.4, 0.6)  # px of the low-resolution picture, 3x3 kernel
    degrade_prob: float = 0.0  # share of examples with BSR-style degradation in training
    residual: bool = False  # diffuse what the low-resolution picture does not tell: see augment.residual_base


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Default sampling settings of a stage; each can be set at a call."""

    sampler: SamplerName = "dpmpp_2m"
    steps: int = 25
    spacing: Spacing = "t"  # grid uniform in t, in log-SNR, or EDM's rho = 7; two more of discrete schedules
    respacing: str | None = None  # of a discrete schedule, in place of steps and spacing: "10,10,5", "fast27"
    eta: float = 1.0  # stochasticity of ddim and dpmpp_2m_sde
    guidance: float = 1.0  # w of uncond + w (cond - uncond); 1 is off
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # of t, in which guidance is applied
    guidance_rescale: float = 0.0  # phi of arXiv:2305.08891
    apg: bool = False  # adaptive projected guidance (arXiv:2410.02416)
    threshold: Literal["none", "static", "dynamic"] = "static"
    threshold_percentile: float = 0.995  # dynamic thresholding (Imagen 2.3)
    threshold_cap: float = math.inf  # upper bound of the dynamic threshold (DeepFloyd IF)
    noise_free_steps: int = 0  # of the last ones: each sees the estimate before it, without noise, for x_t
    flatten: float = 0.0  # bandwidth, in colours of [-1, 1], of a mean shift of the finished picture; 0: none
    flatten_rounds: int = 8  # in each of which a pixel sees 2 px to every side
    aug_level: float = 0.0  # noise level of the low-resolution input
    lowres_noise: Literal["once", "step"] = "once"  # step: anew at each step and half of guidance
    temperature: float = 1.0  # scale of the initial noise (GLIDE's upsampler: 0.997)


@dataclass(frozen=True, kw_only=True)
class TextTransformerConfig:
    """A transformer over token ids that is part of the network and trained with it (GLIDE)."""

    vocab: int
    length: int = 128
    width: int = 512
    layers: int = 16
    heads: int = 8


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """A U-Net of the Imagen / ADM family. Tuples have one entry a level, from high to low resolution.

    The fields describe this project's own networks and the public ones alike; `cascade.pretrained` translates
    the configurations of the latter."""

    in_channels: int = 3
    out_channels: int = 3  # 6 with learned variance
    patch: int = 1  # pixel-unshuffle of the input and pixel-shuffle of the output
    channels: tuple[int, ...] = (128, 256, 384, 512)
    blocks: tuple[int, ...] = (3, 3, 3, 3)
    strides: tuple[int, ...] = (1, 2, 2, 2)  # of the level's resampling; entry 0 is 1 in the adm layout
    self_attention: tuple[bool, ...] = (False, True, True, True)
    text_attention: tuple[bool, ...] = (False, True, True, True)
    layout: Literal["efficient", "adm"] = "efficient"
    # efficient: strided conv before the blocks, up conv after, one skip, one attention a level (Imagen B.1)
    # adm: resampling residual blocks after the blocks, a skip and an attention a block, a middle block
    # (arXiv:2105.05233)
    middle_blocks: int = 2  # adm: residual blocks below the deepest level, an attention after the first
    middle_attention: tuple[bool, bool] | None = None  # adm: to itself, to tokens; None: as the deepest level
    head_channels: int | tuple[int, ...] = 64  # width of an attention head; a tuple where levels differ
    stem_kernel: int = 3  # of the first convolution
    norm: Literal["group", "rms"] = "group"
    norm_groups: int = 32
    act: Literal["silu", "gelu", "gelu_tanh", "mish", "relu"] = "silu"
    modulation: Literal["scale_shift", "shift"] = "scale_shift"  # how the conditioning vector enters a block
    residual_scale: float = 1.0  # of the residual sum (IF stage II: 1/sqrt(2))
    skip_scale: float = 1.0  # of the long U-Net skips (Imagen B.1: 1/sqrt(2))
    time_dim: int | None = None  # width of the conditioning vector; None: 4 * channels[0]
    text_dims: tuple[int, ...] = ()  # widths of the token sequences; () is a network without text
    text_transformer: TextTransformerConfig | None = None  # then text_dims is (1,): the sequence holds ids
    text_masked: bool = True  # False: padding is attended to and pooled as any token is (DeepFloyd IF, GLIDE)
    context_dim: int | None = None  # width to which the tokens are projected; None: no projection layer
    context_norm: Literal["layer", "group", "projected", "none"] = "layer"
    # layer: of each token, in each attention; group: likewise, over all tokens (DeepFloyd IF);
    # projected: once, after the projection of text (Karlo)
    text_pool: Literal["attention", "last", "none"] = "attention"  # how text enters the conditioning vector
    pool_heads: int = 8  # heads of the attention pooling of text
    pool_projected: bool = False  # pool the projected tokens instead of the encoder's own
    learned_null: bool = True  # learned null text; False: the null is the encoded empty prompt
    text_embed_dim: int | None = None  # CLIP text embedding, added to the conditioning vector (Karlo)
    image_embed_dim: int | None = None  # CLIP image embedding
    image_embed_scale: float = 1.0  # sqrt(dim) brings a unit-norm embedding to unit variance
    image_tokens: int = 4  # tokens made of the image embedding (unCLIP 2.1)
    image_vector: Literal["linear", "mlp"] = "linear"  # how it enters the conditioning vector
    image_null: bool = True  # learned null image embedding; False: the null is zero
    lowres_channels: int = 0  # 3 in a super-resolution stage
    aug_embedding: bool = True  # such a stage is told its aug level; False: not (Karlo, GLIDE)
    inpaint_channels: int = 0  # 4 in an inpainting network: the picture times its mask, and the mask
    # side of the first level's learned position map; 0: none, positions come from padding
    position_grid: int = 0
    guess_width: int = 0  # of the network that guesses x_0 from the conditions alone; 0: no guess is made
    fine_channels: tuple[int, ...] = ()  # of a network over pixels for the lowest noise levels
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of the cascade: network, diffusion, corruption of its input, default sampling settings."""

    name: str
    image_px: int
    lowres_px: int | None = None
    unet: UNetConfig
    last_unet: UNetConfig | None = None  # a second network, for the last step alone (Karlo)
    text_sequences: tuple[int, ...] | None = None  # which token sequences of the text it reads; None: all
    diffusion: DiffusionConfig = DiffusionConfig()
    augment: AugmentConfig | None = None
    sampling: SamplingConfig = SamplingConfig()


def to_dict(config: Any) -> Any:
    """Plain data (dict, list, str, int, float, bool, None) of a config dataclass."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [to_dict(item) for item in config]
    if isinstance(config, dict):
        return {name: to_dict(value) for name, value in config.items()}
    if isinstance(config, float) and math.isinf(config):
        return "inf" if config > 0 else "-inf"  # JSON has no infinity
    return config


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """The inverse of `to_dict`. InputError names the field and, for an unknown key, the nearest one."""
    place = where or cls.__name__
    if not isinstance(data, dict):
        raise InputError(f"{place}: expected a mapping, got {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in data:
        if name not in fields:
            raise unknown("key", name, fields, where=place)
    values = {name: _convert(hints[name], value, f"{place}.{name}") for name, value in data.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise InputError(f"{place}: missing key {name!r}")
    try:
        return cls(**values)
    except InputError:
        raise
    except ValueError as error:  # __post_init__ of the dataclass
        raise InputError(f"{place}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            if type(None) in args:
                return None
            raise InputError(f"{where}: expected {_describe(hint)}, got null")
        inner = [a for a in args if a is not type(None)]
        return _convert(inner[0], value, where) if len(inner) == 1 else _first_fit(inner, value, where)
    if origin is Literal:
        if value not in args:
            raise unknown("value", value, [str(a) for a in args], where=where)
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where}: expected a list, got {value!r}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise InputError(f"{where}: expected {len(kinds)} entries, got {len(value)}")
        return tuple(
            _convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{where}: expected a mapping, got {value!r}")
        return {str(k): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return (
            value
            if isinstance(value, typing.cast(type, hint))
            else from_dict(typing.cast(type, hint), value, where)
        )
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-4 as a string
        except ValueError:
            raise InputError(f"{where}: expected a number, got {value!r}") from None
        if math.isnan(number):
            raise InputError(f"{where}: expected a number, got nan")
        return number
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise InputError(f"{where}: expected {_describe(hint)}, got {value!r}")


def _first_fit(kinds: list[Any], value: Any, where: str) -> Any:
    for kind in kinds:
        try:
            return _convert(kind, value, where)
        except InputError:
            continue
    raise InputError(f"{where}: expected {' or '.join(map(_describe, kinds))}, got {value!r}")


def _describe(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint))


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML file that holds one mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    try:
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"{path} is not valid {path.suffix[1:].upper()}: {str(error).splitlines()[0]}"
        ) from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping at the top level")
    return data


def override(data: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """A copy of nested `data` with each setting `a.b=value` (value read as YAML) put in its place.

    A new key may be set (strict reading follows), but a path may not run through a scalar."""
    result = _unshared(data)
    for setting in settings:
        path, separator, text = setting.partition("=")
        if not separator or not path:
            raise InputError(f"setting {setting!r}: expected NAME=VALUE, as in base.steps=25")
        *parents, last = path.split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"setting {setting!r}: {parent!r} is not a mapping")
        try:
            node[last] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
            raise InputError(f"setting {setting!r}: not valid YAML ({str(error).splitlines()[0]})") from None
    return result


def _unshared(data: Any) -> Any:
    """A copy in which no two places share a mapping, as those that a YAML alias (`*name`) fills do."""
    if isinstance(data, dict):
        return {name: _unshared(value) for name, value in data.items()}
    return [_unshared(item) for item in data] if isinstance(data, list) else data
