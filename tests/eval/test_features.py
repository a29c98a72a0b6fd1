"""Rows are computed once, and a restart gives the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cascade.checkpoint import sha256
from cascade.images import save_png
from eval import features
from eval.extractors.base import Extractor
from eval.features import Picture, picture_rows


class Toy(Extractor):
    """Mean colour, and the place in the batch, so that company shows."""

    batch = 4
    network, resize = "toy", "none"

    def __init__(self, weight: float = 1.0, dies_after: int = 1000) -> None:
        self.module = nn.Linear(1, 1)
        nn.init.constant_(self.module.weight, weight)
        nn.init.zeros_(self.module.bias)
        self.calls, self.dies_after = 0, dies_after

    def prepare(self, picture: Tensor) -> Tensor:
        return picture.mean(dim=(1, 2))

    def encode(self, pictures: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        if self.calls >= self.dies_after:
            raise KeyboardInterrupt
        self.calls += 1
        place = torch.arange(len(pictures))[:, None] + 100.0 * len(pictures)
        return torch.cat([torch.stack(list(pictures)), place, torch.tensor([[len(t)] for t in texts])], dim=1)


class Reader(Toy):
    reads_text = True


def pictures(folder: Path, count: int, text: str = "a", **changed: int) -> list[Picture]:
    found = []
    for i in range(count):
        path = folder / f"{i}-{changed.get(f'p{i}', 0)}.png"
        save_png(Image.new("RGB", (4, 4), (i * 7 % 256, changed.get(f"p{i}", 0), 0)), path)
        found.append(Picture(path, sha256(path), text))
    return found


def test_rows_are_computed_once(tmp_path: Path) -> None:
    first, file = Toy(), tmp_path / "deep" / "toy.safetensors"
    rows = picture_rows(first, pictures(tmp_path, 10), file)
    again = Toy()
    assert torch.equal(picture_rows(again, pictures(tmp_path, 10), file), rows)
    assert (first.calls, again.calls) == (3, 0)
    assert rows[:, 3].tolist() == [400, 401, 402, 403, 400, 401, 402, 403, 200, 201]


def test_a_killed_extraction_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "SAVE_EVERY", 1)
    file, whole = tmp_path / "toy.safetensors", tmp_path / "whole.safetensors"
    with pytest.raises(KeyboardInterrupt):
        picture_rows(Toy(dies_after=2), pictures(tmp_path, 10), file)
    rest = Toy()
    rows = picture_rows(rest, pictures(tmp_path, 10), file)
    assert rest.calls == 1
    assert torch.equal(rows, picture_rows(Toy(), pictures(tmp_path, 10), whole))


def test_a_longer_list_keeps_the_whole_batches(tmp_path: Path) -> None:
    file = tmp_path / "toy.safetensors"
    picture_rows(Toy(), pictures(tmp_path, 10), file)
    longer = Toy()
    rows = picture_rows(longer, pictures(tmp_path, 13), file)
    assert longer.calls == 2  # rows 8 and 9 were computed in other company
    assert torch.equal(rows, picture_rows(Toy(), pictures(tmp_path, 13), tmp_path / "whole.safetensors"))


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        (lambda folder: (Toy(), pictures(folder, 10, p5=9)), 2),  # from the batch of the changed picture on
        (lambda folder: (Toy(), pictures(folder, 6)), 1),
        (lambda folder: (Toy(weight=2.0), pictures(folder, 10)), 3),
        (lambda folder: (Toy(), pictures(folder, 10, text="other")), 0),  # which it does not read
    ],
)
def test_what_changed_is_computed_anew(tmp_path: Path, change: Any, calls: int) -> None:
    file = tmp_path / "toy.safetensors"
    picture_rows(Toy(), pictures(tmp_path, 10), file)
    extractor, now = change(tmp_path)
    rows = picture_rows(extractor, now, file)
    assert extractor.calls == calls
    assert torch.equal(rows, picture_rows(extractor, now, tmp_path / "whole.safetensors"))


def test_a_reader_sees_a_changed_text(tmp_path: Path) -> None:
    file, again = tmp_path / "toy.safetensors", Reader()
    picture_rows(Reader(), pictures(tmp_path, 4, text="a"), file)
    assert picture_rows(again, pictures(tmp_path, 4, text="abc"), file)[:, 4].tolist() == [3] * 4
    assert again.calls == 1


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "toy.safetensors"
    rows = picture_rows(Toy(), pictures(tmp_path, 5), file)
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(picture_rows(Toy(), pictures(tmp_path, 5), file), rows)
