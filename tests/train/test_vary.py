"""Variants of pictures: what they change."""

from __future__ import annotations

import torch

from train.vary import CHANNELS, variants


def test_a_variant_is_the_picture_mirrored_moved_and_with_its_channels_exchanged() -> None:
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    seeds = list(range(400))
    found = {tuple(v.flatten().tolist()) for v in variants(x.expand(400, -1, -1, -1), seeds)}
    expected = set()
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="replicate")[0]
    for channels in CHANNELS:
        for picture in (padded, padded.flip(-1)):
            for top in range(5):
                for left in range(5):
                    moved = picture[list(channels), top : top + 16, left : left + 16]
                    expected.add(tuple(moved.flatten().tolist()))
    assert found <= expected and len(found) > 200  # of 300


def test_a_variant_depends_on_its_own_seed_alone() -> None:
    x = torch.rand(3, 3, 24, 16, generator=torch.Generator().manual_seed(0))
    together = variants(x, [5, 6, 7])
    assert all(torch.equal(variants(x[i : i + 1], [5 + i])[0], together[i]) for i in range(3))
    assert not torch.equal(variants(x, [6, 6, 7])[0], together[0])
