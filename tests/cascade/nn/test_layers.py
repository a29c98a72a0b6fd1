"""Building blocks against their formulae."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cascade.nn.layers import LevelEmbedding, ResBlock, RMSNorm2d, Upsample, activation, norm2d, sinusoid


def test_sinusoid_is_cosines_then_sines_of_geometric_frequencies() -> None:
    features = sinusoid(torch.tensor([0.0, 250.0]), 8)
    angles = [250 * 10_000 ** (-i / 4) for i in range(4)]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    assert features.dtype == torch.float32
    torch.testing.assert_close(features[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    torch.testing.assert_close(features[1], torch.tensor(expected), atol=1e-5, rtol=0)


def test_levels_are_told_apart_in_a_bf16_network() -> None:
    """The sinusoid is taken in float32: rounded to bfloat16 first, 996 and 1000 would be one level."""
    embed = LevelEmbedding(16, 32, "silu").bfloat16()
    out = embed(torch.tensor([996.0, 1000.0]))
    assert out.shape == (2, 32) and out.dtype == torch.bfloat16
    assert not torch.equal(out[0], out[1])


def test_rms_norm_brings_each_pixel_to_unit_mean_square() -> None:
    x = 7 * torch.randn(2, 16, 3, 5) + 1
    norm = RMSNorm2d(16)
    torch.testing.assert_close(norm(x).square().mean(1), torch.ones(2, 3, 5))
    torch.testing.assert_close(norm(x)[..., 1:2, 2:4], norm(x[..., 1:2, 2:4]))  # local
    with torch.no_grad():
        norm.weight.fill_(3.0)
    torch.testing.assert_close(norm(x).square().mean(1), 9 * torch.ones(2, 3, 5))


def test_rms_norm_computes_in_float32() -> None:
    x = (200 * torch.randn(1, 64, 4, 4)).half()  # squares overflow half precision
    out = RMSNorm2d(64).half()(x)
    assert out.dtype == torch.float16 and bool(out.isfinite().all())
    torch.testing.assert_close(out.float(), RMSNorm2d(64)(x.float()), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 16), (7, 1)])
def test_group_norm_takes_at_most_32_groups_that_divide(channels: int, groups: int) -> None:
    norm = norm2d("group", channels)
    assert isinstance(norm, torch.nn.GroupNorm) and norm.num_groups == groups


@pytest.mark.parametrize("channels", [96, 512])
@pytest.mark.parametrize("side", [5, 40])
def test_group_norm_in_bf16_is_that_in_float32_rounded(channels: int, side: int) -> None:
    """Whichever kernel a size takes."""
    norm = norm2d("group", channels).bfloat16()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x = (3 * torch.randn(2, channels, side, side) + 1).bfloat16()
    out = norm(x.contiguous(memory_format=torch.channels_last))
    expected = F.group_norm(x.float(), 32, norm.weight.float(), norm.bias.float())
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.float(), expected, atol=1e-2, rtol=8e-3)


@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (3, 7)])
def test_gelu_is_exact_and_keeps_the_layout(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    out = activation("gelu")(x)
    assert out.stride() == x.stride()
    torch.testing.assert_close(out, x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))


def test_upsample_repeats_pixels_then_convolves() -> None:
    layer = Upsample(2, 3, stride=3)
    x = torch.randn(1, 2, 4, 5)
    repeated = x.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    torch.testing.assert_close(layer(x), layer.conv(repeated))


@pytest.mark.parametrize("resample", ["none", "down", "up"])
@pytest.mark.parametrize("out_channels", [8, 12])
def test_res_block_starts_as_its_shortcut(resample, out_channels: int) -> None:
    block = ResBlock(8, out_channels, 6, norm="group", act="silu", dropout=0.0, scale=0.5, resample=resample)
    x = torch.randn(2, 8, 4, 4)
    resized = {"none": x, "down": F.avg_pool2d(x, 2), "up": F.interpolate(x, scale_factor=2.0)}[resample]
    torch.testing.assert_close(block(x, torch.randn(2, 6)), 0.5 * block.shortcut(resized))


def test_res_block_is_norm_act_conv_adaptive_norm_act_conv() -> None:
    block = ResBlock(8, 8, 6, norm="rms", act="gelu", dropout=0.0, scale=1.0)
    torch.nn.init.normal_(block.conv2.weight)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    scale, shift = block.emb(emb)[..., None, None].chunk(2, dim=1)
    h = block.conv1(F.gelu(block.norm1(x)))
    h = block.conv2(F.gelu(block.norm2(h) * (1 + scale) + shift))
    torch.testing.assert_close(block(x, emb), x + h)


def test_dropout_acts_in_training_alone() -> None:
    block = ResBlock(8, 8, 6, norm="rms", act="silu", dropout=0.5, scale=1.0)
    torch.nn.init.normal_(block.conv2.weight)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    assert not torch.equal(block(x, emb), block(x, emb))
    block.eval()
    assert torch.equal(block(x, emb), block(x, emb))
