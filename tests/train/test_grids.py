"""Sheets of pictures: what stands where, and that it is what it says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from cascade import Stage
from cascade.images import downsample, from_pil, from_uint8
from tests.conftest import ToyEncoder
from tests.train.conftest import make_records, write_data
from train.components import load_stage
from train.grids import drawn_below, headed, tile
from train.recipe import Recipe
from train.tasks import make_task

Tiny = Callable[..., Recipe]
HEAD = 24  # px of the names of the columns


def test_a_base_grid_shows_the_prompts(tiny: Tiny, trained: Path) -> None:
    base = make_task(tiny(), trained, "base")
    sheet = base.grid(base.network.state_dict())
    assert sheet is not None and sheet.size == (8 * 18, 18)
    assert sheet.tobytes() == base.grid(base.network.state_dict()).tobytes()  # type: ignore[union-attr]


def test_an_upsampling_grid_shows_real_and_drawn_low_resolution_side_by_side(
    tiny: Tiny, trained: Path, pictures
) -> None:
    task = make_task(tiny(), trained, "sr256")
    weights = load_stage(tiny(), trained, "sr256").unet.state_dict()
    sheet = task.grid(weights)
    assert sheet is not None and sheet.size == (5 * 34, HEAD + 2 * 34)  # two held-out pictures

    def cell(column: int) -> torch.Tensor:
        return from_pil(sheet.crop((34 * column, HEAD, 34 * column + 32, HEAD + 32)))[None]

    index = pictures.heldout[0]
    real = from_uint8(pictures.resized(index, 32))[None]
    small = downsample(real, 16)
    close = {"rtol": 0, "atol": 0.01}  # of 8 bits
    torch.testing.assert_close(cell(0)[..., ::2, ::2], small, **close)
    torch.testing.assert_close(cell(4), real, **close)
    text = ToyEncoder()([pictures.captions(index)[0]])
    stage = Stage(tiny().pictures["sr256"].stage)
    stage.unet.load_state_dict(weights)
    stage = stage.eval().bfloat16()
    torch.testing.assert_close(cell(1), stage.sample(text, lowres=small, seed=0), **close)
    drawn = drawn_below(
        tiny(), trained, "sr256", ToyEncoder(), [pictures.captions(index)[0]], torch.device("cpu")
    )
    assert drawn is not None and drawn.shape == (1, 3, 16, 16)
    torch.testing.assert_close(cell(2)[..., ::2, ::2], drawn, **close)
    torch.testing.assert_close(cell(3), stage.sample(text, lowres=drawn, seed=0), **close)


def test_the_stages_below_draw_one_from_the_other(tiny: Tiny, trained: Path) -> None:
    drawn = drawn_below(tiny(), trained, "sr1024", ToyEncoder(), ["red apple"], torch.device("cpu"))
    assert drawn is not None and drawn.shape == (1, 3, 32, 32)


def test_while_the_stages_below_are_not_trained_there_are_three_columns(
    tiny: Tiny, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "sr256", tmp_path / "sr256")
    task = make_task(tiny(), tmp_path, "sr1024")
    sheet = task.grid(task.network.state_dict())
    assert sheet is not None and sheet.size == (3 * 66, HEAD + 2 * 66)


def test_without_held_out_pictures_the_grid_shows_training_pictures(
    tiny: Tiny, trained: Path, tmp_path: Path
) -> None:
    write_data(tmp_path / "data", [r | {"split": "train"} for r in make_records()[:3]])
    task = make_task(tiny(f"data.folder={tmp_path / 'data'}", "data.styles=[noto]"), tmp_path, "sr256")
    sheet = task.grid(task.network.state_dict())
    assert sheet is not None and sheet.size == (3 * 34, HEAD + 3 * 34)


def test_tile() -> None:
    x = torch.stack([torch.full((3, 4, 6), v) for v in (-1.0, 0.0, 1.0)])
    sheet = tile(x, 2)
    assert sheet.size == (2 * 8, 2 * 6)
    assert [sheet.getpixel(place) for place in ((0, 0), (8, 0), (0, 6))] == [(v,) * 3 for v in (0, 128, 255)]


def test_names_stand_over_their_columns() -> None:
    sheet = headed(Image.new("RGB", (240, 50), "grey"), ["left", "right"])
    assert sheet.size == (240, 50 + HEAD)
    assert sheet.getpixel((0, HEAD)) == (128, 128, 128) and sheet.getpixel((0, 0)) == (255, 255, 255)
    dark = [x for x in range(240) if min(sheet.getpixel((x, y)) for y in range(HEAD)) < (100,)]
    assert 40 < min(dark) < 80 and 160 < max(dark) < 200
