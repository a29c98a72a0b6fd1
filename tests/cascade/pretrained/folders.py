"""Tiny pipelines of diffusers with random weights, saved as diffusers saves them, and their noise."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
import transformers
from diffusers import UnCLIPScheduler
from torch import Tensor

from tests.cascade.pretrained.unets import randomise

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "apple", "cat", "green", "pear", "and"]
PROMPTS = ["a red apple", "cat"]
T5_DIM, CLIP_DIM, LENGTH = 24, 16, 77
unclip = importlib.import_module("diffusers.pipelines.deprecated.unclip")


def tokenizer(end: str = "</s>") -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(f"$A {end}", None, [(end, 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token=end, unk_token="<unk>", model_max_length=LENGTH
    )


def t5() -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=10, d_model=T5_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()


def clip_text() -> Any:
    torch.manual_seed(0)
    sizes = dict(hidden_size=CLIP_DIM, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(vocab_size=10, bos_token_id=3, eos_token_id=1, pad_token_id=0)
    config = transformers.CLIPTextConfig(**sizes, **ids, projection_dim=CLIP_DIM)
    return transformers.CLIPTextModelWithProjection(config).eval()


def calm(network: Any, seed: int, scale: float = 0.3) -> Any:
    """Random weights. Outputs are scaled down: otherwise each step of guided sampling multiplies the rounding
    of float32, by which two correct programs differ, as no trained network does."""
    randomise(network, seed)
    last = network.proj_to_clip_embeddings if hasattr(network, "clip_std") else network.conv_out
    for parameter in last.parameters():
        parameter.data *= scale
    return network.eval()


def exact(scheduler: Any) -> Any:
    """The scheduler with tables in float64. diffusers computes them in float32, in which 1 - alpha_bar of the
    last step is 5e-4 off."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - alpha_bar((i + 1) / 1000) / alpha_bar(i / 1000), 0.999) for i in range(1000)]
    scheduler.betas = torch.tensor(betas, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


def floyd_unet(px: int, lowres: bool, **changes: Any) -> Any:
    config: dict[str, Any] = dict(
        sample_size=px,
        in_channels=6 if lowres else 3,
        out_channels=6,
        block_out_channels=[32, 64],
        layers_per_block=1,
        down_block_types=["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
        up_block_types=["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        attention_head_dim=16,
        cross_attention_dim=32,
        cross_attention_norm="group_norm",
        encoder_hid_dim=T5_DIM,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    if lowres:
        config |= dict(
            class_embed_type="timestep",
            time_embedding_act_fn="gelu",
            resnet_skip_time_act=True,
            resnet_out_scale_factor=1 / 0.7071,
            mid_block_scale_factor=1 / 0.7071,
            only_cross_attention=True,
        )
    return calm(diffusers.UNet2DConditionModel(**{**config, **changes}), seed=px)


def floyd_scheduler(cap: float) -> Any:
    return diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=cap,
    )


def floyd(folder: Path, px: int, lowres: bool) -> Any:
    """Stage I or II of DeepFloyd IF."""
    rest: dict[str, Any] = dict(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        unet=floyd_unet(px, lowres),
        scheduler=floyd_scheduler(1.0 if lowres else 1.5),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    if lowres:
        noising = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        pipe = diffusers.IFSuperResolutionPipeline(**rest, image_noising_scheduler=noising)
    else:
        pipe = diffusers.IFPipeline(**rest)
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def karlo_prior() -> Any:
    sizes = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=CLIP_DIM)
    network = calm(diffusers.PriorTransformer(**sizes), seed=1)
    network.clip_std.data = network.clip_std.data.abs() + 0.5
    return network


def karlo(folder: Path) -> Any:
    """The prior, the decoder and both super-resolution networks of Karlo."""
    blocks = dict(block_out_channels=[32, 64], layers_per_block=1, resnet_time_scale_shift="scale_shift")
    decoder = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=6,
        down_block_types=["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
        up_block_types=["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        attention_head_dim=16,
        cross_attention_dim=32,
        class_embed_type="identity",
        **blocks,
    )
    enlarging = [
        diffusers.UNet2DModel(
            sample_size=64,
            in_channels=6,
            out_channels=3,
            down_block_types=["ResnetDownsampleBlock2D"] * 2,
            up_block_types=["ResnetUpsampleBlock2D"] * 2,
            add_attention=False,
            **{**blocks, "resnet_time_scale_shift": "default"},
        )
        for _ in range(2)
    ]
    text_proj = unclip.UnCLIPTextProjModel(
        clip_embeddings_dim=CLIP_DIM, time_embed_dim=128, cross_attention_dim=32
    )
    calm(decoder, seed=0)
    for seed, network in enumerate(enlarging):
        calm(network, seed, scale=0.1)
    randomise(text_proj.eval(), seed=3)
    pipe = unclip.UnCLIPPipeline(
        prior=karlo_prior(),
        decoder=decoder,
        text_encoder=clip_text(),
        tokenizer=tokenizer(),
        text_proj=text_proj,
        super_res_first=enlarging[0],
        super_res_last=enlarging[1],
        prior_scheduler=exact(UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)),
        decoder_scheduler=exact(UnCLIPScheduler(variance_type="learned_range")),
        super_res_scheduler=exact(UnCLIPScheduler()),
    )
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def kandinsky(folder: Path, later: bool = True) -> Any:
    """Kandinsky's prior with its text encoder, in the pipeline of 2.2 (`later`) or of 2.1."""
    sizes = dict(hidden_size=CLIP_DIM, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    seeing = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=CLIP_DIM)
    torch.manual_seed(1)
    scheduler = UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0)
    cls = diffusers.KandinskyV22PriorPipeline if later else diffusers.KandinskyPriorPipeline
    pipe = cls(
        prior=karlo_prior(),
        image_encoder=transformers.CLIPVisionModelWithProjection(seeing).eval(),
        text_encoder=clip_text(),
        tokenizer=tokenizer(),
        scheduler=exact(scheduler),
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
    )
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


NOISE_USERS = (
    "diffusers.schedulers.scheduling_ddpm",
    "diffusers.schedulers.scheduling_unclip",
    "diffusers.pipelines.deepfloyd_if.pipeline_if",
    "diffusers.pipelines.deepfloyd_if.pipeline_if_superresolution",
    "diffusers.pipelines.deprecated.unclip.pipeline_unclip",
    "diffusers.pipelines.kandinsky.pipeline_kandinsky_prior",
    "diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2_prior",
)


@contextlib.contextmanager
def noise_of(draws: Iterator[Tensor]) -> Iterator[None]:
    """Where diffusers draws noise, it gets these, in turn."""

    def draw(shape: Any, *_: Any, **__: Any) -> Tensor:
        noise = next(draws)
        assert noise.shape == torch.Size(shape)
        return noise

    with contextlib.ExitStack() as stack:
        for module in NOISE_USERS:
            stack.enter_context(mock.patch.object(importlib.import_module(module), "randn_tensor", draw))
        yield
