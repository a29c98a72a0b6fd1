"""Which number format and memory layout networks run in on a device."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def network_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the device multiplies it faster than float32, else float32. float16 is never chosen:
    activations of T5 and of deep U-Nets leave its range."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if kind == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.float32


def place_network(network: M, device: torch.device | str, dtype: torch.dtype) -> M:
    """A convolutional network on its device, in channels_last (the layout of the fast convolution kernels),
    without gradients and in evaluation mode."""
    network.to(device=device, dtype=dtype)
    return network.to(memory_format=torch.channels_last).eval().requires_grad_(False)
