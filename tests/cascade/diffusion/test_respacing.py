"""Step lists of the public weights: named sections, leading and linspace steps, against diffusers'."""

from __future__ import annotations

import pytest
import torch

from cascade.config import DiffusionConfig, SamplingConfig, ScheduleConfig, StageConfig, UNetConfig
from cascade.diffusion.schedule import RESPACINGS, DiscreteSchedule, make_schedule
from cascade.errors import InputError
from cascade.stage import resolve_settings

diffusers = pytest.importorskip("diffusers")
SCHEDULE = make_schedule(ScheduleConfig(name="discrete_cosine"))


def indices(grid: torch.Tensor) -> list[int]:
    assert isinstance(SCHEDULE, DiscreteSchedule)
    return SCHEDULE.index(grid[:-1]).tolist()


@pytest.mark.parametrize("name", RESPACINGS)
def test_named_sections_are_those_of_deepfloyd(name: str) -> None:
    from diffusers.pipelines.deepfloyd_if import timesteps

    assert isinstance(SCHEDULE, DiscreteSchedule)
    assert indices(SCHEDULE.respaced(name)) == getattr(timesteps, f"{name}_timesteps")


def test_glide_s_section_starts_below_the_noisiest() -> None:
    assert isinstance(SCHEDULE, DiscreteSchedule)
    fast = indices(SCHEDULE.respaced("fast27"))
    assert indices(SCHEDULE.respaced("glide27")) == [997, *fast[1:]]


@pytest.mark.parametrize("steps", [1, 7, 20, 27, 100, 999, 1000])
def test_leading_and_linspace_are_those_of_diffusers(steps: int) -> None:
    for ours, theirs in (("leading", "leading"), ("linspace", "linspace"), ("t", "trailing")):
        if (ours, steps) == ("linspace", 1):
            continue  # diffusers starts at 0, which samples nothing
        scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing=theirs)
        scheduler.set_timesteps(steps)
        assert indices(SCHEDULE.grid(steps, ours)) == scheduler.timesteps.tolist()
    if steps > 1:
        unclip = diffusers.UnCLIPScheduler()
        unclip.set_timesteps(steps)
        assert indices(SCHEDULE.grid(steps, "linspace")) == unclip.timesteps.tolist()


def settings(schedule: str, **given: object) -> SamplingConfig:
    config = StageConfig(
        name="base",
        image_px=8,
        unet=UNetConfig(),
        diffusion=DiffusionConfig(schedule=ScheduleConfig(name=schedule)),  # type: ignore[arg-type]
    )
    return resolve_settings(config, dict(given))


def test_settings_that_need_a_discrete_schedule() -> None:
    assert settings("discrete_linear", respacing="smart50", spacing="leading").respacing == "smart50"
    for given in (dict(respacing="smart50"), dict(spacing="leading"), dict(spacing="linspace")):
        with pytest.raises(InputError, match=f"base.{next(iter(given))}"):
            settings("cosine", **given)
    with pytest.raises(InputError, match="one of fast27, smart27"):
        settings("discrete_cosine", respacing="fast28")
    with pytest.raises(InputError, match="temperature"):
        settings("cosine", temperature=0.0)
