"""Building blocks that know no schedule: embeddings, norms, residual blocks, resampling.

Shapes: B batch, C channels, H and W size, E conditioning width, D text width, L tokens.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(time: Tensor, dim: int) -> Tensor:
    """[cos, sin] features of a noise level in [0, 1000] (arXiv:2105.05233), float32: B -> B dim."""
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=time.device)
    angles = time.float()[:, None] * torch.exp(-math.log(10_000.0) * index / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class MLP(nn.Module):
    """Linear, activation, Linear: B D -> B E."""

    def __init__(self, dim: int, out_dim: int, act: str) -> None:
        super().__init__()
        self.dim = dim
        self.linear_1 = nn.Linear(dim, out_dim)
        self.act = activation(act)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x.to(self.linear_1.weight.dtype))))


class LevelEmbedding(MLP):
    """An MLP on the sinusoid of a noise level: how it enters a network. B -> B E."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(sinusoid(x, self.dim))


class ExactGELU(nn.GELU):
    """GELU. torch's fast kernel on the CPU wants a contiguous tensor, which a channels_last map is to the one
    who reads its channels last."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that torch gives it)
        if input.dim() != 4:
            return super().forward(input)
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def activation(name: str) -> nn.Module:
    if name == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    return {"silu": nn.SiLU, "gelu": ExactGELU, "mish": nn.Mish, "relu": nn.ReLU}[name]()


class RMSNorm2d(nn.Module):
    """Root-mean-square norm over channels at each pixel. Its statistics are local, so a picture larger than
    the training crop is normalised as the crop was (why the 1024 px stage uses it), and it fuses well."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:  # B C H W
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(dim=1, keepdim=True) + self.eps)
        return (x32 * scale * self.weight.float()[:, None, None]).to(x.dtype)


class GroupNorm2d(nn.GroupNorm):
    """Group norm of a feature map. On the CPU torch's kernel for channels_last in half precision is several
    times as slow as that for float32 where maps have under 1024 places and groups under 16 channels."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that torch gives it)
        small = input.shape[-2] * input.shape[-1] < 1024 and self.num_channels < 16 * self.num_groups
        if small and input.device.type == "cpu" and input.dtype != torch.float32:
            weight, bias = self.weight.float(), self.bias.float()
            return F.group_norm(input.float(), self.num_groups, weight, bias, self.eps).to(input.dtype)
        return super().forward(input)


def norm2d(kind: Literal["group", "rms"], channels: int, groups: int = 32) -> nn.Module:
    if kind == "rms":
        return RMSNorm2d(channels)
    return GroupNorm2d(math.gcd(groups, channels), channels, eps=1e-5)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling, then a 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=float(self.stride), mode="nearest"))


class ResBlock(nn.Module):
    """Residual block into which the conditioning vector enters by its second norm.

    norm, act, [resample], conv, adaptive norm, act, dropout, zero-initialised conv, plus the shortcut
    (arXiv:2105.05233). `resample` halves (average pool) or doubles (nearest) both branches. The vector gives
    a scale and a shift after the norm, or with modulation "shift" a shift before it (arXiv:2006.11239).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int,
        *,
        norm: Literal["group", "rms"],
        act: str,
        dropout: float,
        scale: float,
        groups: int = 32,
        modulation: Literal["scale_shift", "shift"] = "scale_shift",
        resample: Literal["none", "down", "up"] = "none",
    ) -> None:
        super().__init__()
        self.shift_alone = modulation == "shift"
        self.norm1 = norm2d(norm, in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_dim, out_channels if self.shift_alone else 2 * out_channels)
        self.norm2 = norm2d(norm, out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.act = activation(act)
        self.resample = resample
        self.scale = scale

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # B C H W, B E (already activated)
        h = self._resample(self.act(self.norm1(x)))
        h = self.conv1(h)
        emb = self.emb(emb)[:, :, None, None]
        if self.shift_alone:
            h = self.norm2(h + emb)
        else:
            scale, shift = emb.chunk(2, dim=1)  # B C 1 1 each
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)  # one pass over h
        h = self.conv2(self.dropout(self.act(h)))
        out = self.shortcut(self._resample(x)) + h
        return out if self.scale == 1.0 else out * self.scale

    def _resample(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x


def zero_init(module: nn.Module) -> nn.Module:
    """Zero a layer's parameters, so that the branch it ends starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
