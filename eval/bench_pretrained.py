"""Seconds a batch of an IF-shaped stage, here and in diffusers: the same weights, steps, batch and precision.

    OMP_NUM_THREADS=2 python -m eval.bench_pretrained --width 64 --steps 10

The network is DeepFloyd IF stage I (three residual blocks a level, widths 1 to 4 times `--width`, 77 tokens
of T5-XXL width a prompt) with random weights; 192 is IF-I-M, 704 IF-I-XL. diffusers runs its IFPipeline.
Runs alternate, so that both see the same load; the median of each counts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cascade.conditioning import TextEmbedding, Tokens
from cascade.config import StageConfig
from cascade.hardware import network_dtype, place_network
from cascade.nn.presets import IF_I_XL
from cascade.pretrained.unet import config_to_diffusers, tensors_to_diffusers
from cascade.stage import Stage

TOKENS = 77
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Result:
    """Median seconds of one batch, all of its steps."""

    here: float
    diffusers: float

    @property
    def ratio(self) -> float:
        return self.diffusers / self.here


def if_shaped(width: int, text_dim: int) -> StageConfig:
    """DeepFloyd IF stage I at other widths of pictures and of tokens."""
    channels = tuple(width * m for m in (1, 2, 3, 4))
    unet = replace(IF_I_XL.unet, channels=channels, context_dim=channels[-1], text_dims=(text_dim,))
    return replace(IF_I_XL, unet=unet)


def prompts(batch: int, text_dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random token states, B L D."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, TOKENS, text_dim, generator=generator).to(dtype)


def run_here(stage: Stage, steps: int, states: Tensor, null: Tensor) -> Callable[[], object]:
    mask = torch.ones(states.shape[:2], dtype=torch.bool)
    text, negative = (TextEmbedding((Tokens(part, mask),)) for part in (states, null))
    return lambda: stage.sample(text, negative=negative, steps=steps, micro_batch=len(states))


def run_diffusers(stage: Stage, steps: int, states: Tensor, null: Tensor) -> Callable[[], object]:
    """The pipeline around the same weights, without text encoder and safety checker."""
    diffusers: Any = importlib.import_module("diffusers")
    unet = diffusers.UNet2DConditionModel.from_config(
        config_to_diffusers(stage.config.unet, image_px=64)["unet"]
    )
    unet.load_state_dict(tensors_to_diffusers(stage.unet.state_dict(), stage.config.unet)["unet"])
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5,
    )
    pipe = diffusers.IFPipeline(
        tokenizer=None,
        text_encoder=None,
        unet=unet.to(states.dtype).eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return lambda: pipe(
        prompt_embeds=states,
        negative_prompt_embeds=null,
        num_inference_steps=steps,
        guidance_scale=stage.config.sampling.guidance,
        output_type="pt",
    )


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def bench(width: int, text_dim: int, steps: int, batch: int, dtype: torch.dtype, rounds: int) -> Result:
    torch.manual_seed(0)
    stage = Stage(if_shaped(width, text_dim))
    place_network(stage.unet, "cpu", dtype)
    states, null = (prompts(batch, text_dim, dtype, seed) for seed in (0, 1))
    runs = [make(stage, steps, states, null) for make in (run_here, run_diffusers)]
    for run in runs:  # kernels are chosen and caches filled
        run()
    times = [[seconds(run) for run in runs] for _ in range(rounds)]
    here, diffusers = (statistics.median(column) for column in zip(*times, strict=True))
    return Result(here, diffusers)


def main(argv: list[str] | None = None) -> int:
    own = str(network_dtype("cpu")).removeprefix("torch.")
    text_dim = IF_I_XL.unet.text_dims[0]
    parser = argparse.ArgumentParser(prog="python -m eval.bench_pretrained")
    parser.add_argument("--width", type=int, default=64, help="channels of the first level, a multiple of 64")
    parser.add_argument(
        "--text-dim", type=int, default=text_dim, help="width of the tokens, a multiple of 64"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1, help="pictures at once")
    parser.add_argument("--dtype", choices=DTYPES, default=own, help=f"default: this machine's, {own}")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; the median counts")
    arguments = vars(parser.parse_args(argv))
    result = bench(**{**arguments, "dtype": DTYPES[arguments["dtype"]]})
    print(f"here      {result.here:8.2f} s")
    print(f"diffusers {result.diffusers:8.2f} s")
    print(f"here is {result.ratio:.2f} times as fast ({torch.get_num_threads()} threads)")
    print(json.dumps({**arguments, **vars(result), "ratio": result.ratio}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
