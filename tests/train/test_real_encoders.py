"""`python -m train.embed` with encoders of the real classes and small random weights: T5 and an open_clip."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cascade.images import from_uint8
from cascade.text import load_text_encoder
from prior.pretrained_clip import OpenCLIP, OpenClipConfig
from tests.cascade.text.test_huggingface import save_t5
from tests.train.conftest import tiny_recipe
from tests.train.picture_files import items, write
from tests.train.ranks import Ranks
from train import encoded
from train.__main__ import main
from train.components import clip_store
from train.data import open_pictures
from train.recipe import load_recipe

WORDS = ("red apple", "green pear", "cat and apple")
CLIP_DIM, TOKENS = 16, 8


def save_open_clip(folder: Path, seed: int = 0) -> Path:
    import open_clip

    torch.manual_seed(seed)
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": TOKENS, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    sizes = {"embed_dim": CLIP_DIM, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    shown = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    folder.mkdir(exist_ok=True)
    config = {"model_cfg": sizes, "preprocess_cfg": shown}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "open_clip_model.safetensors").unlink(missing_ok=True)  # else it is read
    network: Any = open_clip.create_model(f"local-dir:{folder}").eval()
    save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders t5 and clip. Shared: do not change it."""
    folder = tmp_path_factory.mktemp("encoders")
    save_t5(folder / "t5", "t5")
    save_open_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(tmp_path_factory.mktemp("ranks"), ["transformers", "open_clip"]) as found:
        yield found


def recipe_file(folder: Path, encoders: Path) -> Path:
    """The tiny recipe on 9 pictures, conditioned on tokens and embeddings of T5 and open_clip."""
    rows = [replace(item, text=WORDS[i % 3] + " a" * (i // 3)) for i, item in enumerate(items(9))]
    data = write(folder / "set", "folder", rows)
    plain = tiny_recipe(folder, folder / "runs")
    t5 = {"kind": "hf", "name": str(encoders / "t5"), "max_length": TOKENS}
    plain["text"] = {"kind": "pair", "encoders": [t5, {"kind": "open_clip", "name": str(encoders / "clip")}]}
    plain["data"] = {"name": "folder", "folder": data.folder, "heldout": 0.0}
    plain["clip"] = {"pretrained": {"model": f"local-dir:{encoders / 'clip'}", "embed_dim": CLIP_DIM}}
    plain["prior"]["model"] |= {"text_dim": 16, "text_length": TOKENS, "embed_dim": CLIP_DIM}
    for stage in ("base", "sr256", "sr1024"):
        unet = {"text_dims": [16, 8], "context_dim": 16, "image_embed_dim": CLIP_DIM}
        plain[stage]["stage"]["unet"] |= unet
    path = folder / "real.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def caches(folder: Path) -> dict[str, dict[str, bytes]]:
    """The files of each cache, by its kind."""
    cache = folder / "set" / "cache"
    found = [*cache.glob("text-*"), *cache.glob("image-*")]
    return {path.name.split("-")[0]: {p.name: p.read_bytes() for p in path.iterdir()} for path in found}


def test_embeddings_are_written_used_and_refused(
    ranks: Ranks,
    encoders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(encoded, "SHARD", 4)
    # two processes write what one does
    one, two = (recipe_file(tmp_path / name, encoders) for name in ("one", "two"))
    assert ranks.run(1, [one], fault=["embed", 4]).status == [0]
    result = ranks.run(2, [two], fault=["embed", 4])
    assert result.status == [0, 0], result.err
    assert caches(one.parent) == caches(two.parent) and caches(two.parent).keys() == {"text", "image"}
    assert len(caches(two.parent)["image"]) == 5  # three shards, their index and what they were made by
    assert "9 rows of text in" in result.out[0] and "9 rows of image in" in result.out[0]

    # it is what the encoders say
    recipe = load_recipe(str(two))
    pictures = open_pictures(recipe.data)
    store = encoded.TextStore(pictures, recipe.text)
    captions = [pictures.captions(i)[0] for i in range(9)]
    encoder = load_text_encoder(recipe.text)
    found, expected = store(captions), encoder(captions)
    for a, b, width in zip(found.sequences, expected.sequences, (16, 8), strict=True):
        assert torch.equal(a.mask, b.mask) and a.states.shape == (9, TOKENS, width)
        torch.testing.assert_close(a.states[a.mask], b.states[b.mask].float(), rtol=2e-3, atol=1e-3)
    images = clip_store(recipe, tmp_path, pictures)
    views = torch.stack([images.view(i) for i in range(9)])
    clip = OpenCLIP(OpenClipConfig(model=f"local-dir:{encoders / 'clip'}", embed_dim=CLIP_DIM))
    torch.testing.assert_close(images.sample(), clip.encode_image(from_uint8(views)), rtol=0, atol=1e-5)

    # training asks no encoder for what is there
    def encode(self: Any, captions: list[str]) -> Any:
        assert not any(captions), "a caption was encoded again"
        return originally(self, captions)

    def encode_images(*_: Any) -> None:
        raise AssertionError("a picture was encoded again")

    originally = encoded.TextStore.encode
    with monkeypatch.context() as patch:
        patch.setattr(encoded.TextStore, "encode", encode)
        patch.setattr(encoded.ImageStore, "encode", encode_images)
        for stage in ("prior", "base"):
            argv = [str(two), "--stage", stage, "--set", f"{stage}.train.images=8"]
            assert main([*argv, "--set", f"{stage}.train.workers=1"]) == 0

    # another encoder's is refused where the recipe names it
    other = tmp_path / "t5"
    shutil.copytree(encoders / "t5", other)
    weights = load_file(other / "model.safetensors")
    weights["shared.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    (folder,) = (two.parent / "set" / "cache").glob("text-*")
    changed = yaml.safe_load(two.read_text())
    changed["text"]["encoders"][0]["name"] = str(other)
    changed["data"]["text_cache"] = str(folder)
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(changed))
    capsys.readouterr()
    assert main([str(tmp_path / "other.yaml"), "--stage", "base", "--out", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train: {folder} is the cache of another encoder, ") and error.count("\n") == 1


def test_embeddings_of_other_weights_in_the_same_folder_are_others(encoders: Path, tmp_path: Path) -> None:
    shutil.copytree(encoders / "clip", tmp_path / "clip")
    shutil.copytree(encoders / "t5", tmp_path / "t5")
    recipe = load_recipe(str(recipe_file(tmp_path, tmp_path)))
    pictures = open_pictures(recipe.data)
    first = clip_store(recipe, tmp_path, pictures)
    assert clip_store(recipe, tmp_path, pictures).folder == first.folder
    save_open_clip(tmp_path / "clip", seed=1)
    assert clip_store(recipe, tmp_path, pictures).folder != first.folder
