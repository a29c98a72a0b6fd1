"""The settings a run draws: one, a grid of guidance weights, or the default beside what is varied.

--guidance base=1,2,4,8                every weight (several options: every combination)
--sweep sr256.aug_level=0,0.1,0.2      the default, and one setting a value
--ablate prior                         the default, the text embedding in its place, and none
--ablate lowres                        the default, and super-resolution of real pictures
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from cascade import Cascade
from cascade.config import override
from cascade.errors import InputError, unknown
from eval.run import Setting
from eval.suites import Suite

Overrides = dict[str, dict[str, Any]]
ABLATIONS: dict[str, list[Setting]] = {
    "prior": [
        Setting(id="embed=text", embed="text", study="prior", label="text embedding in the prior's place"),
        Setting(id="embed=none", embed="none", study="prior", label="no image embedding"),
    ],
    "lowres": [Setting(id="lowres=real", lowres="real", study="lowres", label="real pictures, downsampled")],
}


def make_settings(
    common: Sequence[str] = (),
    guidance: Sequence[str] = (),
    sweeps: Sequence[str] = (),
    ablations: Sequence[str] = (),
) -> tuple[Setting, ...]:
    """Settings from command-line texts (see the module). common: STAGE.NAME=VALUE of every setting.
    Raises InputError, one line, where a text is malformed or two settings are the same."""
    axes = [_axis(f"{stage}.guidance={values}") for stage, values in map(_divide, guidance)]
    grid = [_combine(axis) for axis in itertools.product(*axes)] if axes else [Setting()]
    varied = [_combine((choice,)) for sweep in sweeps for choice in _axis(sweep)]
    for name in ablations:
        if name not in ABLATIONS:
            raise unknown("ablation", name, ABLATIONS)
        varied += ABLATIONS[name]
    base = _mapping(common)
    settings = [_over(base, setting) for setting in (*grid, *varied)]
    ids = [setting.id for setting in settings]
    twice = next((name for name in ids if ids.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"setting {twice} is given twice: expected different ones")
    return tuple(settings)


def check_settings(
    pipe: Cascade, settings: Sequence[Setting], stop_at: str | None, suite: Suite, references: str | None
) -> None:
    """Raises InputError, one line, where a model cannot draw a setting: an unknown stage or setting, no prior
    to do without, no real pictures to start from."""
    for setting in settings:
        request = pipe.request(["check"], stop_at=stop_at, **setting.overrides)
        if not request.runs:
            raise InputError(
                f"stop-at {stop_at!r} draws no picture: expected one of {', '.join(pipe.stages)}"
            )
        if setting.embed != "prior" and pipe.prior is None:
            raise InputError(f"model {pipe.name} has no prior: expected no --ablate prior")
        if setting.embed == "text" and pipe.clip is None:
            raise InputError(f"model {pipe.name} has no CLIP, whose text embedding --ablate prior feeds")
        if setting.lowres == "real":
            if len(request.runs) < 2:
                raise InputError(f"model {pipe.name} draws no super-resolution: expected no --ablate lowres")
            if references is None or any(prompt.reference is None for prompt in suite.prompts):
                raise InputError(
                    "--ablate lowres starts from real pictures: expected --references and a suite that "
                    f"names one a prompt ({suite.name}, --references {references})"
                )


def _axis(text: str) -> list[tuple[str, str, Any]]:
    """(stage, name, value) of each value of STAGE.NAME=V1,V2,..."""
    path, values = _divide(text)
    stage, dot, name = path.partition(".")
    if not (stage and dot and name) or not values:
        raise InputError(f"{text!r}: expected STAGE.NAME=V1,V2, as in sr256.aug_level=0,0.1,0.2")
    return [(stage, name, _value(value, text)) for value in values.split(",")]


def _divide(text: str) -> tuple[str, str]:
    name, separator, values = text.partition("=")
    if not separator or not name or not values:
        raise InputError(f"{text!r}: expected NAME=V1,V2, as in base=1,2,4,8")
    return name, values


def _value(text: str, where: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        value = None
    if not isinstance(value, str | int | float):
        raise InputError(f"{where!r}: expected numbers or names, got {text!r}")
    return value


def _combine(choices: tuple[tuple[str, str, Any], ...]) -> Setting:
    overrides: Overrides = {}
    for stage, name, value in choices:
        overrides.setdefault(stage, {})[name] = value
    shown = [f"{stage}.{name}={_short(value)}" for stage, name, value in choices]
    study = ",".join(f"{stage}.{name}" for stage, name, _ in choices)
    return Setting(
        id=",".join(shown),
        overrides=overrides,
        study=study,
        label=", ".join(_short(value) for _, _, value in choices),
    )


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    if not all(letter.isalnum() or letter in "._+-" for letter in text):
        raise InputError(f"value {text!r}: expected a number or a name")
    return text


def _mapping(common: Sequence[str]) -> Overrides:
    for stage, values in (settings := override({}, list(common))).items():
        if not isinstance(values, dict):
            raise InputError(f"--set {stage}={values}: expected STAGE.NAME=VALUE, as in base.steps=25")
    return settings


def _over(base: Mapping[str, dict[str, Any]], setting: Setting) -> Setting:
    """The setting with `base` beneath its own overrides."""
    stages = dict.fromkeys((*base, *setting.overrides))
    merged = {stage: {**base.get(stage, {}), **setting.overrides.get(stage, {})} for stage in stages}
    return replace(setting, overrides=merged)
