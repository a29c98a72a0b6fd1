"""Public priors through `DiffusionPrior`: against diffusers' PriorTransformer and UnCLIPScheduler."""

from __future__ import annotations

import random as python_random
from typing import Any

import pytest
import torch
from diffusers import PriorTransformer, UnCLIPScheduler
from torch import Tensor

from cascade import random
from cascade.conditioning import TextEmbedding, Tokens
from cascade.errors import InputError
from prior import DiffusionPrior
from prior.base import candidate_noise
from prior.pretrained import (
    DIFFUSERS,
    KARLO,
    prior_from_diffusers,
    prior_from_karlo,
    prior_to_diffusers,
    tensors_from,
    tensors_to,
)

SCHEDULER = dict(prediction_type="sample", clip_sample_range=5.0)


def sizes(seed: int) -> dict[str, Any]:
    draw = python_random.Random(seed)
    return dict(
        num_attention_heads=draw.choice([1, 2, 3]),
        attention_head_dim=draw.choice([4, 8, 10]),
        num_layers=draw.randint(1, 4),
        embedding_dim=draw.choice([6, 12, 20]),
        num_embeddings=draw.choice([5, 9, 77]),
    )


def reference(config: dict[str, Any], seed: int = 0) -> PriorTransformer:
    torch.manual_seed(seed)
    network = PriorTransformer(**config).eval()
    for name, parameter in network.named_parameters():  # not the initial zeros and ones
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1)
        if name == "clip_std":
            parameter.data = parameter.data.abs() + 0.5
    return network.requires_grad_(False)


def ours(network: PriorTransformer, scheduler: dict[str, Any] = SCHEDULER) -> DiffusionPrior:
    config = prior_from_diffusers(dict(network.config), scheduler)
    prior = DiffusionPrior(config)
    prior.load_state_dict(tensors_from(DIFFUSERS, network.state_dict(), config, "prior"))
    return prior.eval()


def text(config: dict[str, Any], rows: int, seed: int) -> TextEmbedding:
    generator = torch.Generator().manual_seed(seed)
    length, dim = config["num_embeddings"], config["embedding_dim"]
    states = torch.randn(rows, length, dim, generator=generator)
    kept = torch.randint(1, length + 1, (rows,), generator=generator)
    mask = torch.arange(length)[None] < kept[:, None]
    return TextEmbedding((Tokens(states, mask),), torch.randn(rows, dim, generator=generator))


def theirs(network: PriorTransformer, x: Tensor, time: Tensor, given: TextEmbedding) -> Tensor:
    (tokens,) = given.sequences
    assert given.pooled is not None
    return network(x, time, given.pooled, tokens.states, tokens.mask).predicted_image_embedding


@pytest.mark.parametrize("seed", range(12))
def test_the_network_is_that_of_diffusers(seed: int) -> None:
    config = sizes(seed)
    network, given = reference(config, seed), text(config, 3, seed)
    prior = ours(network)
    x, time = torch.randn(3, config["embedding_dim"]), torch.tensor([0, 421, 999])
    with torch.no_grad():
        got = prior.net(x, time.float(), prior.net.prepare(given))
    assert torch.allclose(got, theirs(network, x, time, given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("steps", "clip"), [(25, 5.0), (20, 10.0)])
def test_sampling_is_that_of_karlo_and_kandinsky(steps: int, clip: float) -> None:
    """The loop of diffusers' unCLIP and Kandinsky prior pipelines on the same noise."""
    config = sizes(1)
    network = reference(config)
    scheduler = UnCLIPScheduler(**{**SCHEDULER, "clip_sample_range": clip})
    prior, given, null = ours(network, dict(scheduler.config)), text(config, 2, 3), text(config, 1, 4)
    seeds = [5, 6]
    got = prior.sample(given, seeds=seeds, negative=null, steps=steps)

    scheduler.set_timesteps(steps)
    x = candidate_noise(config["embedding_dim"], seeds, 1, "prior", "init")
    pair = TextEmbedding.cat([null.repeat(2), given])
    times = scheduler.timesteps.tolist()
    for step, time in enumerate(times):
        uncond, cond = theirs(network, x.repeat(2, 1), torch.tensor(time), pair).chunk(2)
        noise = random.normal((config["embedding_dim"],), seeds, "prior", "step", step, 0)
        x = step_with(scheduler, uncond + 4.0 * (cond - uncond), time, x, [*times, None][step + 1], noise)
    assert torch.allclose(got, network.post_process_latents(x), atol=1e-3)


def step_with(
    scheduler: Any, output: Tensor, time: int, x: Tensor, before: int | None, noise: Tensor
) -> Tensor:
    """One step of a scheduler of diffusers with given noise."""
    import diffusers.schedulers.scheduling_unclip as module

    original, module.randn_tensor = module.randn_tensor, lambda *_, **__: noise
    try:
        return scheduler.step(output, timestep=time, sample=x, prev_timestep=before).prev_sample
    finally:
        module.randn_tensor = original


@pytest.mark.parametrize("layout", [DIFFUSERS, KARLO])
def test_there_and_back(layout: Any) -> None:
    config = prior_from_diffusers(sizes(2), SCHEDULER)
    tensors = {name: torch.randn_like(t) for name, t in DiffusionPrior(config).state_dict().items()}
    public = tensors_to(layout, tensors, config)
    back = tensors_from(layout, public, config, "prior")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    if layout is DIFFUSERS:
        model, scheduler = prior_to_diffusers(config)
        assert prior_from_diffusers(model, scheduler) == config
        network = PriorTransformer.from_config(model)
        network.load_state_dict(public)


def test_the_rows_of_karlos_own_layout_go_head_by_head() -> None:
    config = prior_from_diffusers(
        dict(num_attention_heads=2, attention_head_dim=3, num_layers=1, embedding_dim=4, num_embeddings=2),
        SCHEDULER,
    )
    ours = DiffusionPrior(config).state_dict()
    qkv = ours["denoiser.net.transformer.blocks.0.attention.qkv.bias"]
    qkv.copy_(torch.arange(18.0))  # q of head 0: 0 1 2, of head 1: 3 4 5; k from 6, v from 12
    bias = tensors_to(KARLO, ours, config)["model.transformer.resblocks.0.attn.c_qkv.bias"]
    assert bias.tolist() == [0, 1, 2, 6, 7, 8, 12, 13, 14, 3, 4, 5, 9, 10, 11, 15, 16, 17]


def test_karlos_own_configuration() -> None:
    hparams = dict(text_ctx=7, xf_width=12, xf_layers=2, xf_heads=3, xf_final_ln=True, clip_dim=8)
    diffusion = dict(steps=1000, learn_sigma=False, noise_schedule="squaredcos_cap_v2", predict_xstart=True)
    data = {"model": {"hparams": {**hparams, "clip_xf_width": 8}}, "diffusion": diffusion}
    config = prior_from_karlo(data)
    like = dict(num_attention_heads=3, attention_head_dim=4, num_layers=2, embedding_dim=8, num_embeddings=7)
    assert config == prior_from_diffusers(like, {**SCHEDULER, "clip_sample_range": 10.0})
    with pytest.raises(InputError, match="diffusion.steps"):
        prior_from_karlo({**data, "diffusion": {**diffusion, "steps": 500}})


def damage(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    name = "transformer_blocks.0.ff.net.2.weight"
    found = dict(tensors)
    if kind == "missing":
        del found[name]
    elif kind == "unexpected":
        found["norm_in.weight"] = torch.zeros(3)
    else:
        found[name] = found[name].T if kind == "transposed" else found[name][:-1]
    return found


@pytest.mark.parametrize("kind", ["missing", "unexpected", "transposed", "wrongly shaped"])
def test_a_tensor_that_does_not_fit_is_named(kind: str) -> None:
    network = reference(sizes(0))
    config = prior_from_diffusers(dict(network.config), SCHEDULER)
    wrong = "norm_in.weight" if kind == "unexpected" else "transformer_blocks.0.ff.net.2.weight"
    with pytest.raises(InputError, match=f"{kind} tensor {wrong}") as error:
        tensors_from(DIFFUSERS, damage(network.state_dict(), kind), config, "prior")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "scheduler", "words"),
    [
        (dict(norm_in_type="layer"), {}, "norm_in_type"),
        (dict(clip_embed_dim=5), {}, "clip_embed_dim 5: expected null or 12"),
        (dict(additional_embeddings=0), {}, "additional_embeddings"),
        (dict(num_heads=2), {}, "did you mean 'num_attention_heads'"),
        ({}, dict(variance_type="learned_range"), "variance_type"),
    ],
)
def test_a_prior_of_another_kind_is_refused(model: dict, scheduler: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        prior_from_diffusers({"embedding_dim": 12, **model}, {**SCHEDULER, **scheduler})


def test_without_learned_null_guidance_needs_the_empty_prompt() -> None:
    config = sizes(0)
    with pytest.raises(InputError, match="no learned null text"):
        ours(reference(config)).sample(text(config, 1, 0), steps=2)
