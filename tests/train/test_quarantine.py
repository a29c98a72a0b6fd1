"""Pictures that cannot be used: found, listed once, borne up to a share, and replaced by keyed draws."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from cascade.errors import InputError
from tests.train.conftest import tiny_recipe
from tests.train.picture_files import Item, bomb, items, noise, write
from train.__main__ import main
from train.data import BadPicture, DataConfig, Reader, open_pictures
from train.data.decode import decode
from train.data.quarantine import Quarantine

COUNT, PX = 120, 16
BAD = {  # 5%
    7: b"no picture at all",
    30: noise(30, 64, 64, "JPEG")[:900],
    55: noise(55)[:-400],
    80: bomb(),
    81: b"",
    119: noise(119, 8, 8),
}


def spoilt(folder: Path, kind: str = "folder") -> DataConfig:
    rows = [Item(r.name, BAD.get(i, r.data), r.text) for i, r in enumerate(items(COUNT, width=20, height=20))]
    return replace(write(folder, kind, rows), max_bad=0.06)


class Reading(Dataset[tuple[int, float]]):
    """Position -> which picture was read there, and what it looks like."""

    def __init__(self, cfg: DataConfig, seed: int = 0) -> None:
        self.pictures = open_pictures(cfg)
        self.reader = Reader(self.pictures, self.pictures.order(seed))

    def __getitem__(self, position: int) -> tuple[int, float]:
        return self.reader(position, lambda i: (i, float(self.pictures.resized(i, PX).float().mean())))


def listed(cfg: DataConfig) -> dict[str, str]:
    lines = (Path(cfg.folder) / "quarantine.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({row["id"] for row in rows}) == len(rows)  # each once
    return {row["id"]: row["reason"] for row in rows}


def read(cfg: DataConfig, positions: range, workers: int = 0) -> list[tuple[int, float]]:
    context = "fork" if workers else None
    loader = DataLoader(
        Reading(cfg), None, sampler=positions, num_workers=workers, multiprocessing_context=context
    )
    return [(int(i), float(x)) for i, x in loader]


@pytest.mark.parametrize("kind", ["folder", "parquet", "webdataset"])
def test_two_epochs_with_bad_pictures(tmp_path: Path, kind: str) -> None:
    cfg = spoilt(tmp_path / "a", kind)
    seen = read(cfg, range(2 * COUNT))
    names = {open_pictures(cfg).name(i) for i in BAD}
    assert set(listed(cfg)) == names and len(seen) == 2 * COUNT
    times = Counter(i for i, _ in seen)
    assert not times.keys() & BAD.keys()
    assert times.total() == 2 * COUNT and all(times[i] >= 2 for i in range(COUNT) if i not in BAD)


def test_the_same_pictures_and_the_same_list_by_any_readers_and_after_a_resume(tmp_path: Path) -> None:
    seen = read(spoilt(tmp_path / "one"), range(2 * COUNT))
    two = spoilt(tmp_path / "two")
    parts = [read(two, range(rank, 2 * COUNT, 2), workers=2) for rank in range(2)]
    assert [x for pair in zip(*parts, strict=True) for x in pair] == seen
    resumed = spoilt(tmp_path / "resumed")
    assert read(resumed, range(70)) + read(resumed, range(50, 2 * COUNT))[20:] == seen
    assert listed(two) == listed(resumed) == listed(spoilt(tmp_path / "one"))


def test_reasons_are_told(tmp_path: Path) -> None:
    cfg = spoilt(tmp_path)
    read(cfg, range(COUNT))
    reasons = {name: reason.partition(" (")[0] for name, reason in listed(cfg).items()}
    assert reasons == {
        "p007.png": "not a picture",
        "p030.png": "not a whole picture",
        "p055.png": "not a whole picture",
        "p080.png": "too large",
        "p081.png": "not a picture",
        "p119.png": "too small",
    }
    assert "10000x10000 px, at most 67,108,864 in all" in listed(cfg)["p080.png"]


def test_a_replacement_is_a_function_of_seed_and_position(tmp_path: Path) -> None:
    cfg = spoilt(tmp_path)
    reading = Reading(cfg)
    (place,) = (p for p in range(COUNT) if reading.reader.order[p] == 7)
    found = reading[place][0]
    assert found not in BAD and found == Reading(cfg)[place][0]
    assert {Reading(cfg, seed)[p][0] for seed in range(3) for p in range(5)}.isdisjoint(BAD)
    (later,) = (p for p in range(COUNT, 2 * COUNT) if reading.reader.order[p] == 7)
    assert reading[later][0] != found  # another epoch, another picture


def test_more_than_the_budget_ends_with_one_line(tmp_path: Path) -> None:
    cfg = replace(spoilt(tmp_path), max_bad=0.03)
    message = (
        r"4 of 120 pictures cannot be used, more than data.max_bad 0.03: see .*quarantine.jsonl; the last is"
    )
    with pytest.raises(InputError, match=message) as caught:
        read(cfg, range(2 * COUNT))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="of 120 pictures cannot be used"):  # it stays so
        read(cfg, range(2 * COUNT))


def test_nothing_but_bad_pictures(tmp_path: Path) -> None:
    rows = [Item(f"p{i}.png", b"x", "t") for i in range(3)]
    cfg = replace(write(tmp_path, "folder", rows), max_bad=0.99)
    with pytest.raises(InputError, match="3 of 3 pictures cannot be used"):
        read(cfg, range(1))


def test_the_limit_of_pixels_is_held_before_decoding() -> None:
    data = noise(0, 100, 50)
    assert decode("p", data, 5000).shape == (3, 50, 100)
    with pytest.raises(BadPicture, match=r"cannot read p: too large \(100x50 px, at most 4,999 in all\)"):
        decode("p", data, 4999)
    with pytest.raises(BadPicture, match="too large"):  # Pillow's own limit, which is not raised
        decode("p", bomb(20_000), 10**12)


def test_damage_of_every_kind_is_a_bad_picture() -> None:
    """Every truncation and many flips of several formats: a picture or a BadPicture, nothing else."""
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        data = noise(1, 12, 9, kind)
        for cut in range(0, len(data), max(1, len(data) // 60)):
            outcome(data[:cut])
        for at in range(0, len(data), max(1, len(data) // 120)):
            outcome(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])


def outcome(data: bytes) -> None:
    try:
        assert decode("p", data, 10**6).shape[0] == 3
    except BadPicture as bad:
        assert "\n" not in str(bad)
        copy = pickle.loads(pickle.dumps(bad))  # as it crosses processes
        assert (copy.name, copy.reason, str(copy)) == (bad.name, bad.reason, str(bad))


def test_a_line_that_was_not_finished_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"id": "a", "reason": "r"}\n{"id": "b", "rea')
    quarantine = Quarantine(path, 0.5, 10)
    assert quarantine.names() == {"a"}
    quarantine.add(BadPicture("c", "r"))
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "c"]
    path.write_text("[]\n")
    with pytest.raises(InputError, match="expected a JSON object with an id"):
        Quarantine(path, 0.5, 10).names()


def test_a_run_over_spoilt_pictures_completes_and_lists_the_same_after_a_resume(tmp_path: Path) -> None:
    def train(name: str, *lengths: int) -> dict[str, str]:
        cfg = spoilt(tmp_path / name / "set")
        recipe = tiny_recipe(tmp_path, tmp_path / name)
        recipe["data"] = {"name": "folder", "folder": cfg.folder, "heldout": 0.0, "max_bad": 0.06}
        recipe["base"]["stage"]["unet"] |= {"image_embed_dim": None}
        recipe["base"]["train"] |= {"workers": 2, "batch": 24, "log_images": 240, "save_images": 240}
        for part in ("clip", "prior", "sr256", "sr1024"):
            del recipe[part]
        path = tmp_path / name / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        for images in lengths:
            assert main([str(path), "--stage", "base", "--set", f"base.train.images={images}"]) == 0
        return listed(cfg)

    whole, resumed = train("whole", 2 * COUNT), train("resumed", 72, 2 * COUNT)
    # the last is whole, but too small for the stage, which does not ask for it
    assert whole == resumed and set(whole) == {f"p{i:03d}.png" for i in BAD if i != 119}
    weights = [load_file(p) for p in sorted(tmp_path.rglob("base/diffusion_pytorch_model.safetensors"))]
    assert len(weights) == 2 and all(weights[0][k].equal(weights[1][k]) for k in weights[0])
