"""Whole sampling loops of public pipelines, from the folder to the picture: against diffusers, same noise."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade import Cascade, random
from cascade.text import load_text_encoder
from prior.base import candidate_noise
from tests.cascade.pretrained.folders import PROMPTS, floyd, kandinsky, karlo, noise_of

SEEDS = [5, 6]
TOLERANCE = dict(atol=1e-3, rtol=0.0)


def load(folder: Path, **arguments: Any) -> Cascade:
    """With the text encoder in float32, in which diffusers' is here; T5 is in bfloat16 otherwise."""
    pipe = Cascade.from_pretrained(folder, dtype=torch.float32, **arguments)
    reference = pipe.text_encoder.reference()
    pipe.text_encoder = load_text_encoder(reference, folder, dtype=torch.float32)
    return pipe


def step_noise(stage: str, px: int) -> Iterator[Tensor]:
    """Initial noise, then that of each step."""
    yield random.normal((3, px, px), SEEDS, "init", stage)
    for step in range(1000):
        yield random.normal((3, px, px), SEEDS, "step", stage, step)


@pytest.fixture(scope="module")
def floyd_base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("if-i")
    return floyd(folder, 16, lowres=False), folder


@pytest.mark.parametrize("steps", [dict(steps=20), dict(respacing="fast27")])
def test_deepfloyd_stage_one(floyd_base: tuple[Any, Path], steps: dict[str, Any]) -> None:
    theirs, folder = floyd_base
    ours = load(folder)
    assert list(ours.stages) == ["base"] and ours.stages["base"].config.sampling.guidance == 7.0
    got = ours(PROMPTS, seed=SEEDS, base=steps).stages["base"]
    timesteps = dict(num_inference_steps=20)
    if "respacing" in steps:
        from diffusers.pipelines.deepfloyd_if import fast27_timesteps

        timesteps = dict(timesteps=fast27_timesteps)
    with noise_of(step_noise("base", 16)):
        expected = theirs(PROMPTS, output_type="pt", clean_caption=False, **timesteps).images
    assert expected.abs().max() > 0.1 and torch.allclose(got, expected.clamp(-1, 1), **TOLERANCE)


def test_deepfloyd_stage_two(tmp_path: Path) -> None:
    theirs = floyd(tmp_path, 32, lowres=True)
    ours = load(tmp_path)
    lowres = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    got = ours(PROMPTS, seed=SEEDS, start_at="sr32", images=lowres, sr32=dict(steps=20)).stages["sr32"]
    draws = step_noise("sr32", 32)
    noise = chain([next(draws), random.normal((3, 32, 32), SEEDS, "lowres", "sr32")], draws)
    with noise_of(noise):
        expected = theirs(
            PROMPTS, image=lowres, num_inference_steps=20, output_type="pt", clean_caption=False
        ).images
    assert torch.allclose(got, expected.clamp(-1, 1), **TOLERANCE)


def test_low_res_noise_of_the_original_is_drawn_at_each_step(tmp_path: Path) -> None:
    """Stage II's original program noises the low-resolution picture anew for each evaluation and half."""
    theirs = floyd(tmp_path, 32, lowres=True)
    stage = load(tmp_path).stages["sr32"]
    text = load(tmp_path).encode([PROMPTS[0], ""])
    lowres = torch.zeros(1, 3, 8, 8)
    settings = dict(steps=2, lowres_noise="step", aug_level=0.5)
    got = stage.sample(text[[0]], negative=text[[1]], lowres=lowres, seed=3, **settings)

    scheduler, unet = theirs.scheduler, theirs.unet
    scheduler.set_timesteps(2)
    x = random.normal((3, 32, 32), [3], "init", "sr32")
    states = text.sequences[0].states[[0, 1]]
    for step, time in enumerate(scheduler.timesteps):
        noises = [random.normal((3, 32, 32), [3], "lowres", "sr32", half, step) for half in ("cond", "null")]
        noisy = theirs.image_noising_scheduler.add_noise(
            torch.zeros(2, 3, 32, 32), torch.cat(noises), torch.tensor([500, 500])
        )
        with torch.no_grad():
            both = unet(
                torch.cat([x.repeat(2, 1, 1, 1), noisy], 1),
                time,
                encoder_hidden_states=states,
                class_labels=torch.tensor([500, 500]),
            ).sample
        (cond, null), variance = both[:, :3], both[:1, 3:]
        output = torch.cat([null + 4.0 * (cond - null), variance[0]])[None]
        with noise_of(iter([random.normal((3, 32, 32), [3], "step", "sr32", step)])):
            x = scheduler.step(output, time, x).prev_sample
    assert torch.allclose(got, x.clamp(-1, 1), **TOLERANCE)


def test_karlo(tmp_path: Path) -> None:
    """Prior, decoder and seven steps of super-resolution with its last network, in one call."""
    theirs = karlo(tmp_path)
    ours = load(tmp_path)
    assert list(ours.stages) == ["base", "sr64"] and ours.prior is not None
    got = ours(PROMPTS, seed=SEEDS)

    def prior_noise() -> Iterator[Tensor]:
        yield candidate_noise(16, SEEDS, 1, "prior", "init")
        yield from (random.normal((16,), SEEDS, "prior", "step", step, 0) for step in range(24))

    def limited(stage: str, px: int, steps: int) -> Iterator[Tensor]:
        draws = step_noise(stage, px)
        return (next(draws) for _ in range(steps))

    noise = chain(prior_noise(), limited("base", 16, 25), limited("sr64", 64, 7))
    with noise_of(noise):
        expected = theirs(PROMPTS, output_type="np").images
    pictures = (got.stages["sr64"] * 0.5 + 0.5).permute(0, 2, 3, 1)
    assert torch.allclose(pictures, torch.from_numpy(expected), **TOLERANCE)


@pytest.mark.parametrize("later", [True, False], ids=["2.2", "2.1"])
@pytest.mark.parametrize("negative", [None, "pear"])
def test_kandinskys_prior(tmp_path: Path, later: bool, negative: str | None) -> None:
    """Its pipeline also draws embeddings of the negative prompts, as further rows of one batch."""
    theirs = kandinsky(tmp_path, later)
    ours = load(tmp_path)
    assert ours.stages == {} and ours.prior is not None
    got = ours(PROMPTS, seed=SEEDS, negative=negative, stop_at="prior", prior=dict(steps=20)).image_embed
    rows = SEEDS if negative is None else [*SEEDS, 7, 8]

    def noise() -> Iterator[Tensor]:
        yield candidate_noise(16, rows, 1, "prior", "init")
        yield from (random.normal((16,), rows, "prior", "step", step, 0) for step in range(20))

    negatives = None if negative is None else [negative] * 2
    with noise_of(noise()):
        expected = theirs(PROMPTS, negative_prompt=negatives, num_inference_steps=20).image_embeds
    assert got is not None and torch.allclose(got, expected, **TOLERANCE) and expected.std() > 0.1
