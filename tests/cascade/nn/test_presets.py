"""The published sizes. Networks are built on the meta device: no memory, no initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cascade.config import StageConfig, from_dict, to_dict
from cascade.diffusion.denoiser import Denoiser
from cascade.nn.presets import IF_I_XL, IMAGEN_BASE_2B, IMAGEN_SR_400M, IMAGEN_SR_600M
from cascade.nn.unet import UNet
from cascade.stage import resolve_settings

PRESETS = [IMAGEN_BASE_2B, IMAGEN_SR_600M, IMAGEN_SR_400M, IF_I_XL]
IDS = ["IMAGEN_BASE_2B", "IMAGEN_SR_600M", "IMAGEN_SR_400M", "IF_I_XL"]
IF_I_XL_PARAMETERS = 4_304_695_110  # of diffusers' UNet2DConditionModel in this layout


def build(preset: StageConfig) -> UNet:
    with torch.device("meta"):
        return UNet(preset.unet)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("preset", "published"),
    [(IMAGEN_BASE_2B, 2.0e9), (IMAGEN_SR_600M, 600e6), (IMAGEN_SR_400M, 400e6)],
    ids=IDS[:3],
)
def test_imagen_has_its_published_size(preset: StageConfig, published: float) -> None:
    """Within 20%: the paper rounds, and leaves the widths of the text layers open."""
    assert count(build(preset)) == pytest.approx(published, rel=0.2)


def test_if_has_exactly_its_published_size() -> None:
    assert count(build(IF_I_XL)) == IF_I_XL_PARAMETERS


def test_if_has_the_size_diffusers_gives_it() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        reference = diffusers.UNet2DConditionModel(
            sample_size=64,
            in_channels=3,
            out_channels=6,
            block_out_channels=(704, 1408, 2112, 2816),
            layers_per_block=3,
            down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
            attention_head_dim=64,
            cross_attention_dim=2816,
            cross_attention_norm="group_norm",
            encoder_hid_dim=4096,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text",
            addition_embed_type_num_heads=64,
        )
    assert count(reference) == IF_I_XL_PARAMETERS


@pytest.mark.parametrize(
    ("preset", "px", "multiple"), [*zip(PRESETS, (64, 256, 1024, 64), (8, 16, 16, 8), strict=True)], ids=IDS
)
def test_a_preset_is_a_whole_stage(preset: StageConfig, px: int, multiple: int) -> None:
    """It survives a configuration file, its diffusion process and settings are accepted, and sizes fit."""
    assert from_dict(StageConfig, to_dict(preset)) == preset
    assert resolve_settings(preset, {}) == preset.sampling
    Denoiser(nn.Identity(), preset.diffusion)
    net = build(preset)
    assert preset.image_px == px and net.size_multiple == multiple
    assert (preset.lowres_px is None) == (preset.augment is None) == (preset.unet.lowres_channels == 0)


@pytest.mark.parametrize("preset", [IMAGEN_SR_600M, IMAGEN_SR_400M], ids=IDS[1:3])
def test_efficient_presets_attend_with_8_heads_at_the_last_level_alone(preset: StageConfig) -> None:
    attentions = build(preset).token_attentions
    assert [a.heads for a in attentions] == [8, 8]  # one on the way down, one on the way up
    assert {a.self_attention for a in attentions} == {preset is IMAGEN_SR_600M}


def test_most_parameters_stand_at_low_resolution() -> None:
    """The point of the Efficient U-Net (Imagen B.1)."""
    net = build(IMAGEN_SR_600M)
    deepest = count(net.down[-1]) + count(net.up[0])
    assert deepest > 2 / 3 * count(net)
