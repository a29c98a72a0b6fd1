"""Which number format and memory layout networks run in on a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)
ALIGNMENT = 64  # bytes: a cache line, the widest vector register, and what torch allocates by on CPUs


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
    without gradients and in evaluation mode. On a CPU each weight begins at a multiple of `ALIGNMENT`, which
    one read in place from a file need not: some kernels round otherwise then."""
    network.to(device=device, dtype=dtype)
    network.to(memory_format=torch.channels_last).eval().requires_grad_(False)
    for weight in network.parameters():
        if weight.is_cpu and weight.data_ptr() % ALIGNMENT:
            weight.data = weight.data.clone()
    return network


@contextmanager
def resident(
    module: nn.Module | None, device: torch.device, peak: dict[str, int], name: str
) -> Iterator[None]:
    """`module` on `device` while the block runs, in main memory after it. `peak[name]` becomes the most bytes
    that the device held meanwhile: measured on CUDA, elsewhere those of the module's tensors."""
    cuda = device.type == "cuda"
    if module is not None:
        module.to(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    finally:
        used = torch.cuda.max_memory_allocated(device) if cuda else tensor_bytes(module)
        peak[name] = max(used, peak.get(name, 0))
        if module is not None:
            module.to("cpu")


def tensor_bytes(module: nn.Module | None) -> int:
    """Bytes of a module's parameters and buffers."""
    return 0 if module is None else sum(t.numel() * t.element_size() for t in module.state_dict().values())
