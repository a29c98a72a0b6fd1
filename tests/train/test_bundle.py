"""A batch as one tensor of bytes."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, Dataset

from train.bundle import Bundle, bundled

BATCH = {
    "odd": torch.arange(7, dtype=torch.uint8),
    "wide": torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "half": torch.tensor([[0.5, torch.inf]], dtype=torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
    "none": torch.zeros(0, 4),
    "one": torch.tensor(3),
    "pixels": torch.arange(2 * 4 * 6 * 3).view(2, 4, 6, 3).permute(0, 3, 1, 2),
    "part": torch.arange(60).view(6, 10)[::2, 3:7],
    "row": torch.ones(1, 3).expand(4, 3),
}


class Two(Dataset[Bundle]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Bundle:
        return bundled({name: x.clone() if index else x for name, x in BATCH.items()})


def check(bundle: Bundle) -> None:
    found = bundle.open()
    assert list(found) == list(BATCH)
    for name, x in BATCH.items():
        assert torch.equal(found[name], x) and found[name].dtype == x.dtype, name
        assert found[name].data_ptr() % 64 == bundle.data.data_ptr() % 64, name


def test_a_bundle_holds_the_tensors() -> None:
    check(bundled(BATCH))
    assert bundled({}).open() == {}


def test_the_memory_format_stays_without_its_gaps() -> None:
    found = bundled(BATCH).open()
    assert found["pixels"].is_contiguous(memory_format=torch.channels_last)
    assert found["part"].is_contiguous()


def test_it_passes_from_a_loader_process_as_one_tensor() -> None:
    loader = DataLoader(Two(), batch_size=None, num_workers=1, multiprocessing_context="fork")
    for bundle in loader:
        assert bundle.data.is_shared()
        check(bundle)
        assert len({x.untyped_storage().data_ptr() for x in bundle.open().values()}) == 1
