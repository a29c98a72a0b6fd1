"""Which number format is chosen, and how networks are laid out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cascade.hardware import ALIGNMENT, network_dtype, place_network


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_cpus_run_bfloat16_where_they_multiply_it(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool
) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    assert network_dtype("cpu") == (torch.bfloat16 if avx512 or amx else torch.float32)


def test_a_placed_network_is_frozen_channels_last_and_in_evaluation_mode() -> None:
    conv = nn.Conv2d(4, 8, 3)
    network = place_network(nn.Sequential(conv, nn.Dropout()), "cpu", torch.bfloat16)
    weight = conv.weight
    assert weight.dtype == torch.bfloat16 and weight.is_contiguous(memory_format=torch.channels_last)
    assert not network.training and not weight.requires_grad


def test_a_weight_read_in_place_from_a_file_is_aligned() -> None:
    conv = nn.Conv2d(1, 8, 3)
    values = conv.weight.detach().flatten()
    conv.weight.data = torch.cat([values.new_zeros(1), values])[1:].view(conv.weight.shape)
    assert conv.weight.data_ptr() % ALIGNMENT
    weight = place_network(conv, "cpu", torch.float32).weight
    assert weight.data_ptr() % ALIGNMENT == 0
    assert torch.equal(weight.flatten(), values)
