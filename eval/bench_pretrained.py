"""Seconds a batch of an IF-shaped stage, here and in diffusers: the same weights, steps, batch and precision.

    OMP_NUM_THREADS=2 python -m eval.bench_pretrained --width 64 --steps 10

The network is DeepFloyd IF's with random weights: stage I (three residual blocks a level, widths 1 to 4 times
`--width`; 192 is IF-I-M, 704 IF-I-XL) or stage II, and 77 tokens of T5-XXL's width a prompt. diffusers runs
its own pipelines. Runs alternate, so that both see the same load; the median of each counts.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cascade.arguments import Parser
from cascade.conditioning import TextEmbedding, Tokens
from cascade.config import AugmentConfig, StageConfig
from cascade.errors import InputError
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


def if_shaped(stage: str, width: int, px: int, text_dim: int) -> StageConfig:
    """DeepFloyd IF stage I or II at other widths of pictures and of tokens, and of another size."""
    mult = (1, 2, 3, 4) if stage == "I" else (1, 1, 2, 3, 4)
    channels = tuple(width * m for m in mult)
    unet = replace(IF_I_XL.unet, channels=channels, context_dim=channels[-1], text_dims=(text_dim,))
    if stage == "I":
        return replace(IF_I_XL, image_px=px, unet=unet)
    unet = replace(
        unet,
        blocks=(2, 2, 3, 5, 5),
        strides=(1, 2, 2, 2, 2),
        self_attention=(False,) * 5,
        text_attention=(False, False, False, True, True),
        lowres_channels=3,
        residual_scale=0.7071,
    )
    augment = AugmentConfig(upsample="bilinear_aligned", schedule="discrete_cosine")
    sampling = replace(IF_I_XL.sampling, guidance=4.0, threshold_cap=1.0, aug_level=0.25)
    return StageConfig(
        name="sr",
        image_px=px,
        lowres_px=px // 4,
        unet=unet,
        augment=augment,
        diffusion=IF_I_XL.diffusion,
        sampling=sampling,
    )


@dataclass(frozen=True)
class Inputs:
    """What both implementations are given."""

    states: Tensor  # B L D, the prompts' tokens
    null: Tensor  # B L D, those of the empty prompt
    lowres: Tensor | None  # B 3 h w, of stage II


def random_inputs(config: StageConfig, batch: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shape = (2, batch, TOKENS, config.unet.text_dims[0])
    states, null = torch.randn(*shape, generator=generator).to(dtype)
    if config.lowres_px is None:
        return Inputs(states, null, None)
    side = config.lowres_px
    return Inputs(states, null, torch.randn(batch, 3, side, side, generator=generator).clamp(-1, 1).to(dtype))


def run_here(stage: Stage, steps: int, inputs: Inputs) -> Callable[[], object]:
    batch = len(inputs.states)
    mask = torch.ones(batch, TOKENS, dtype=torch.bool)
    text, negative = (TextEmbedding((Tokens(part, mask),)) for part in (inputs.states, inputs.null))
    return lambda: stage.sample(text, negative=negative, lowres=inputs.lowres, steps=steps, micro_batch=batch)


def run_diffusers(stage: Stage, steps: int, inputs: Inputs) -> Callable[[], object]:
    """The pipeline around the same weights, without text encoder and safety checker."""
    diffusers: Any = importlib.import_module("diffusers")
    config, px = stage.config, stage.config.image_px
    written = config_to_diffusers(config.unet, px)["unet"]
    unet = diffusers.UNet2DConditionModel.from_config(written)
    unet.load_state_dict(tensors_to_diffusers(stage.unet.state_dict(), config.unet)["unet"])
    noise = dict(beta_schedule="squaredcos_cap_v2")
    scheduler = diffusers.DDPMScheduler(
        variance_type="learned_range",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=config.sampling.threshold_cap,
        **noise,
    )
    parts: dict[str, Any] = dict(unet=unet.to(inputs.states.dtype).eval(), scheduler=scheduler)
    absent = ("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker")
    parts |= {**dict.fromkeys(absent), "requires_safety_checker": False}
    given: dict[str, Any] = dict(prompt_embeds=inputs.states, negative_prompt_embeds=inputs.null)
    if inputs.lowres is None:
        pipe = diffusers.IFPipeline(**parts)
    else:
        pipe = diffusers.IFSuperResolutionPipeline(
            image_noising_scheduler=diffusers.DDPMScheduler(**noise), **parts
        )
        given |= dict(image=inputs.lowres, noise_level=round(1000 * config.sampling.aug_level))
    pipe.set_progress_bar_config(disable=True)
    given |= dict(height=px, width=px, num_inference_steps=steps, output_type="pt")
    return lambda: pipe(guidance_scale=config.sampling.guidance, **given)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def bench(config: StageConfig, steps: int, batch: int, dtype: torch.dtype, rounds: int) -> Result:
    torch.manual_seed(0)
    stage = Stage(config)
    place_network(stage.unet, "cpu", dtype)
    inputs = random_inputs(config, batch, dtype)
    runs = [make(stage, steps, inputs) for make in (run_here, run_diffusers)]
    for run in runs:  # kernels are chosen and caches filled
        run()
    times = [[seconds(run) for run in runs] for _ in range(rounds)]
    here, diffusers = (statistics.median(column) for column in zip(*times, strict=True))
    return Result(here, diffusers)


def main(argv: list[str] | None = None) -> int:
    own = str(network_dtype("cpu")).removeprefix("torch.")
    text_dim = IF_I_XL.unet.text_dims[0]
    parser = Parser(prog="python -m eval.bench_pretrained", allow_abbrev=False)
    add = parser.add_argument
    add("--stage", choices=("I", "II"), default="I")
    add("--px", type=int, default=64, help="size of the pictures, a multiple of 32")
    add("--width", type=int, default=64, help="channels of the first level, a multiple of 64")
    add("--text-dim", type=int, default=text_dim, help="width of the tokens, a multiple of 64")
    add("--steps", type=int, default=10)
    add("--batch", type=int, default=1, help="pictures at once")
    add("--dtype", choices=DTYPES, default=own, help=f"default: this machine's, {own}")
    add("--rounds", type=int, default=3, help="runs of each; the median counts")
    try:
        args = parser.parse_args(argv)
        for name, unit in (("px", 32), ("width", 64), ("text_dim", 64)):
            if (value := getattr(args, name)) < unit or value % unit:
                expected = f"a multiple of {unit}, the nearest is {max(1, round(value / unit)) * unit}"
                raise InputError(f"--{name.replace('_', '-')} {value}: expected {expected}")
        for name in ("steps", "batch", "rounds"):
            if (value := getattr(args, name)) < 1:
                raise InputError(f"--{name} {value}: expected an integer of at least 1")
    except InputError as error:
        print(f"eval.bench_pretrained: {error}", file=sys.stderr)
        return 2
    config = if_shaped(args.stage, args.width, args.px, args.text_dim)
    result = bench(config, args.steps, args.batch, DTYPES[args.dtype], args.rounds)
    print(f"here      {result.here:8.2f} s")
    print(f"diffusers {result.diffusers:8.2f} s")
    print(f"here is {result.ratio:.2f} times as fast ({torch.get_num_threads()} threads)")
    print(json.dumps({**vars(args), **vars(result), "ratio": result.ratio}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
