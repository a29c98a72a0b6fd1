"""A data set of 14 small pictures, a recipe that trains on it in seconds, and a run of that recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from cascade import random
from cascade.text import TextEncoder, load_text_encoder
from tests.conftest import EMBED, LENGTH, WIDTH, ToyEncoder
from train.__main__ import main
from train.data.emoji import EmojiPictures
from train.encoded import TextStore
from train.recipe import Recipe, load_recipe

SIDE = 64
LABELS = ("red apple", "blue car", "green leaf", "yellow sun", "black cat")
TONES = ("dark", "light")


def make_records() -> list[dict[str, Any]]:
    """Five plain pictures and two toned ones in each of two styles; the last plain one is held out."""
    records = []
    for style in ("noto", "fluent"):
        for i, label in enumerate(LABELS):
            split = "heldout" if i == len(LABELS) - 1 else "train"
            records.append(record(style, f"p{i}", label, None, split))
        for tone in TONES:
            records.append(record(style, tone, f"woman: {tone} skin tone", tone, "train"))
    return records


def record(style: str, code: str, label: str, tone: str | None, split: str) -> dict[str, Any]:
    return {
        "file_name": f"images/{style}-{code}.webp",
        "text": f"{label}, {style} style",
        "label": label,
        "tags": [label.split()[0].rstrip(":"), "thing"],
        "style": style,
        "tone": tone,
        "gender": None if tone is None else "woman",
        "split": split,
    }


def write_data(folder: Path, records: list[dict[str, Any]], side: int = SIDE) -> Path:
    """metadata.jsonl, and a noisy picture of its own (lossless WebP) for each record."""
    folder.mkdir(parents=True, exist_ok=True)
    for r in records:
        noise = np.random.default_rng(random.key(0, r["file_name"]))
        pixels = noise.integers(0, 256, (side, side, 3), dtype=np.uint8)
        pixels[: side // 2] = 255  # flat, as much of a drawing is
        path = folder / r["file_name"]
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path, lossless=True)
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return folder


def tiny_recipe(data: Path, out: Path) -> dict[str, Any]:
    train = {"images": 24, "batch": 8, "lr": 1e-3, "warmup_images": 8, "ema": 0.9, "compile": False}
    train |= {"precision": "fp32", "workers": 0, "log_images": 8, "save_images": 8, "grid_images": 1000}
    unet = {"channels": [16, 16], "blocks": [1, 1], "strides": [1, 2], "head_channels": 8, "pool_heads": 4}
    unet |= {"text_dims": [WIDTH], "text_attention": [False, True], "self_attention": [False, True]}
    sampling = {"steps": 2}

    def stage(name: str, px: int, lowres: int | None, **more: Any) -> dict[str, Any]:
        net = unet | ({"image_embed_dim": EMBED} if lowres is None else {"lowres_channels": 3})
        return {"name": name, "image_px": px, "lowres_px": lowres, "unet": net, "sampling": sampling, **more}

    text = {"text_dim": WIDTH, "text_width": 16, "text_layers": 1, "text_heads": 2}
    clip = {"embed_dim": EMBED, "image_px": 16, "patch": 8, "width": 16, "layers": 1, "heads": 2, **text}
    prior = {"width": 16, "layers": 1, "heads": 2, "text_dim": WIDTH, "text_length": LENGTH, "steps": 2}
    crops = {"crop_px": 32, "crops_per_picture": 2}
    return {
        "name": "tiny",
        "out": str(out / "{name}"),
        "text": {"kind": "toy"},
        "data": {"folder": str(data), "styles": ["noto", "fluent"], "toned_period": 2},
        "grid_prompts": ["red apple, noto style", "blue car"],
        "clip": {"model": clip, "train": train},
        "prior": {"model": prior | {"embed_dim": EMBED}, "train": train},
        "base": {"stage": stage("base", 16, None), "train": train},
        "sr256": {"stage": stage("sr256", 32, 16, augment={"blur_prob": 0.5}), "train": train},
        "sr1024": {"stage": stage("sr1024", 64, 32, augment={"degrade_prob": 0.5}), "train": train | crops},
    }


@pytest.fixture(scope="session", autouse=True)
def _toy_encoder_on_the_cpu() -> Iterator[None]:
    def load(reference: dict[str, Any], *places: Any, **settings: Any) -> TextEncoder:
        return (
            ToyEncoder() if reference["kind"] == "toy" else load_text_encoder(reference, *places, **settings)
        )

    with pytest.MonkeyPatch.context() as patch:
        for module in ("train.encoded", "train.components", "cascade.loading"):
            patch.setattr(f"{module}.load_text_encoder", load)
        patch.setattr("train.data.emoji.CACHED_PX", 32)  # the last stage decodes its pictures one by one
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr("cascade.checkpoint._flush", lambda path: None)  # slow, and no test cuts the power
        yield


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: do not change it."""
    return write_data(tmp_path_factory.mktemp("data"), make_records())


@pytest.fixture(scope="session")
def recipe_file(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(data_folder, folder), sort_keys=False))
    return path


@pytest.fixture(scope="session")
def tiny(recipe_file: Path) -> Callable[..., Recipe]:
    """`tiny("base.train.batch=4", ...)`: the recipe with settings on top."""
    return lambda *settings: load_recipe(str(recipe_file), list(settings))


@pytest.fixture(scope="session")
def pictures(tiny: Callable[..., Recipe]) -> EmojiPictures:
    return EmojiPictures(tiny().data)


@pytest.fixture(scope="session")
def text(pictures: EmojiPictures) -> TextStore:
    return TextStore(pictures, {"kind": "toy"}).prepare()


@pytest.fixture(scope="session")
def trained(recipe_file: Path) -> Path:
    """Every stage trained and the model folder put together, by the command. Shared: do not change it."""
    assert main([str(recipe_file)]) == 0
    return recipe_file.parent / "tiny"
