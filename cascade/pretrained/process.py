"""The diffusion process of a diffusers folder: scheduler_config.json read and written.

A scheduler says at which noise levels a network was trained and, beside it, how it is sampled by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from cascade.config import DiffusionConfig, Prediction, SamplerName, SamplingConfig, ScheduleConfig, Spacing
from cascade.errors import InputError, unknown

UNCLIP = "UnCLIPScheduler"
SAMPLERS: dict[str, SamplerName] = {
    "DDPMScheduler": "ddpm",
    UNCLIP: "ddpm",
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}
PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
SPACINGS: dict[str, Spacing] = {"leading": "leading", "linspace": "linspace", "trailing": "t"}
BETAS: dict[str, Literal["discrete_cosine", "discrete_linear"]] = {
    "squaredcos_cap_v2": "discrete_cosine",
    "linear": "discrete_linear",
}
LINEAR_RANGE = (1e-4, 0.02)
UNBOUNDED = 1e9  # in place of infinity, which JSON lacks


def process_from_diffusers(
    data: Mapping[str, Any], learned_variance: bool, where: str
) -> tuple[DiffusionConfig, SamplingConfig]:
    """The process and the default sampling. learned_variance: whether the network has outputs for it.
    Raises InputError, one line, that names the first key that cannot be followed."""
    name = str(data.get("_class_name", "DDPMScheduler"))
    if name not in SAMPLERS:
        raise unknown("scheduler", name, SAMPLERS, where=where)
    _expect(data, "num_train_timesteps", 1000, (1000,), where)
    prediction = _expect(data, "prediction_type", "epsilon", tuple(PREDICTIONS), where)
    diffusion = DiffusionConfig(
        prediction=PREDICTIONS[prediction],
        schedule=ScheduleConfig(name=schedule_from_diffusers(data, where)),
        weighting="none",
        learned_variance=learned_variance,
    )
    if SAMPLERS[name] == "ddpm":
        # where the network has no outputs for the variance, the larger one ("fixed_large") is not offered
        known = ("learned_range",) if learned_variance else ("fixed_small", "fixed_small_log")
        _expect(data, "variance_type", "fixed_small_log" if name == UNCLIP else "fixed_small", known, where)
    spacing: Spacing = "linspace"
    if name != UNCLIP:
        default = "linspace" if name.startswith("DPM") else "leading"
        spacing = SPACINGS[_expect(data, "timestep_spacing", default, tuple(SPACINGS), where)]
        _expect(data, "steps_offset", 0, (0,), where)
    sampling = SamplingConfig(
        sampler=SAMPLERS[name],
        spacing=spacing,
        eta=0.0 if name == "DDIMScheduler" else 1.0,
        **_threshold(data, clips=not name.startswith("DPM"), where=where),
    )
    return diffusion, sampling


def schedule_from_diffusers(
    data: Mapping[str, Any], where: str
) -> Literal["discrete_cosine", "discrete_linear"]:
    """The noise levels of a scheduler."""
    default = "squaredcos_cap_v2" if data.get("_class_name") == UNCLIP else "linear"
    name = BETAS[_expect(data, "beta_schedule", default, tuple(BETAS), where)]
    if name == "discrete_linear":
        for key, value in zip(("beta_start", "beta_end"), LINEAR_RANGE, strict=True):
            _expect(data, key, value, (value,), where)
    for key in ("trained_betas", "rescale_betas_zero_snr"):
        _expect(data, key, None, (None, False), where)
    return name


def _threshold(data: Mapping[str, Any], clips: bool, where: str) -> dict[str, Any]:
    if data.get("thresholding", False):
        return dict(
            threshold="dynamic",
            threshold_percentile=data.get("dynamic_thresholding_ratio", 0.995),
            threshold_cap=data.get("sample_max_value", 1.0),
        )
    if data.get("clip_sample", clips):
        _expect(data, "clip_sample_range", 1.0, (1.0,), where)
        return dict(threshold="static")
    return dict(threshold="none")


def _expect(data: Mapping[str, Any], key: str, default: Any, known: tuple[Any, ...], where: str) -> Any:
    value = data.get(key, default)
    if value not in known:
        raise InputError(f"{where}: {key} {value!r}: expected {' or '.join(map(repr, known))}")
    return value


def process_to_diffusers(diffusion: DiffusionConfig, sampling: SamplingConfig) -> dict[str, Any]:
    """scheduler_config.json of a DDPMScheduler, which every folder of this family has. Raises InputError that
    names the first field that it cannot express."""
    schedules = {ours: theirs for theirs, ours in BETAS.items()}
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    spacings = {ours: theirs for theirs, ours in SPACINGS.items()}
    for what, value, known in (
        ("diffusion.schedule.name", diffusion.schedule.name, schedules),
        ("diffusion.prediction", diffusion.prediction, predictions),
        ("sampling.spacing", sampling.spacing, spacings),
    ):
        if value not in known:
            raise InputError(f"{what} {value!r}: diffusers can express {', '.join(known)} alone")
    if diffusion.schedule != ScheduleConfig(name=diffusion.schedule.name):
        raise InputError("diffusion.schedule: diffusers can express it without shift and rescaling alone")
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": schedules[diffusion.schedule.name],
        "beta_start": LINEAR_RANGE[0],
        "beta_end": LINEAR_RANGE[1],
        "prediction_type": predictions[diffusion.prediction],
        "variance_type": "learned_range" if diffusion.learned_variance else "fixed_small",
        "thresholding": sampling.threshold == "dynamic",
        "dynamic_thresholding_ratio": sampling.threshold_percentile,
        "sample_max_value": min(sampling.threshold_cap, UNBOUNDED),
        "clip_sample": sampling.threshold == "static",
        "clip_sample_range": 1.0,
        "timestep_spacing": spacings[sampling.spacing],
        "steps_offset": 0,
    }
