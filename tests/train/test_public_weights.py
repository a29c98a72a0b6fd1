"""Public weights trained further by a recipe, from a folder of diffusers to a folder of diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cascade import Cascade, InputError
from cascade.adapter import load_adapter
from cascade.checkpoint import LAST, WEIGHTS
from cascade.cli import main as cascade
from cascade.pretrained.model import open_model
from cascade.text import load_text_encoder
from tests.cascade.pretrained import folders
from tests.cascade.pretrained.folders import CLIP_DIM, LENGTH, edit_json
from tests.cascade.pretrained.test_originals import SMALL_GLIDE, network, save_words
from tests.prior.test_clip import MODEL
from tests.train.conftest import make_records, write_data
from train.__main__ import main
from train.batches import text_of
from train.components import source_component
from train.plan import make_plan
from train.recipe import load_recipe
from train.tasks import make_task

RANK = 2


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """if-i, if-ii, karlo, kandinsky, clip and data: do not change them. Second stages call themselves sr256,
    as those that are published; recipes make their pictures small."""
    root = tmp_path_factory.mktemp("public")
    folders.floyd(root / "if-i", 16, lowres=False)
    folders.floyd(root / "if-ii", 64, lowres=True)
    edit_json(root / "if-ii" / "unet" / "config.json", sample_size=256)
    folders.karlo(root / "karlo")
    for name in ("super_res_first", "super_res_last"):
        edit_json(root / "karlo" / name / "config.json", sample_size=256)
    folders.kandinsky(root / "kandinsky")
    save_clip(root / "clip")
    write_data(root / "data", make_records())
    return root


def save_clip(folder: Path) -> None:
    import open_clip

    folder.mkdir()
    config = MODEL | {"model_cfg": MODEL["model_cfg"] | {"embed_dim": CLIP_DIM}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file(
        open_clip.create_model(f"local-dir:{folder}").state_dict(), folder / "open_clip_model.safetensors"
    )


def recipe_of(public: Path, text: str, lora: bool, **parts: dict[str, Any]) -> dict[str, Any]:
    """`parts`: base, sr256 (keys of the stage) or prior (keys of its model), with the folder in `preset`."""
    train: dict[str, Any] = {"images": 8, "batch": 4, "lr": 1e-3, "warmup_images": 4, "ema": 0.9}
    train |= {"compile": False, "precision": "fp32", "workers": 0, "text_drop": 0.3}
    train |= {"lora": {"rank": RANK}} if lora else {}
    kind = dict(clean=True) if text.startswith("if") else dict(projection=True)
    places = dict(name=str(public / text), subfolder="text_encoder", tokenizer_subfolder="tokenizer")
    recipe: dict[str, Any] = {
        "name": "further",
        "text": {"kind": "hf", **places, "max_length": LENGTH, **kind},
        "data": {"folder": str(public / "data"), "styles": ["noto", "fluent"], "toned_period": 2},
        "grid_prompts": ["red apple"],
    }
    if not text.startswith("if"):
        model = f"local-dir:{public / 'clip'}"
        recipe["clip"] = {"pretrained": {"model": model, "embed_dim": CLIP_DIM, "unit_norm": False}}
    for name, config in parts.items():
        source = str(public / config["preset"])
        key = "model" if name == "prior" else "stage"
        recipe[name] = {key: config | {"preset": source}, "train": train | {"init_from": source}}
    return recipe


def trained(recipe: dict[str, Any], folder: Path) -> tuple[list[str], Path]:
    """By the command: (arguments, the assembled model)."""
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    argv = [str(path), "--out", str(folder / "out")]
    assert main(argv) == 0
    return argv, folder / "out" / "model"


def changed(model: Path, name: str, source: Path) -> set[str]:
    """Names of the tensors that training changed, by more than the rounding of what is assembled."""
    found, before = open_model(model).parts[name].read("cpu"), open_model(source).parts[name].read("cpu")
    assert found.keys() == before.keys()
    return {n for n, t in before.items() if not torch.equal(found[n].bfloat16(), t.bfloat16())}


SMALL = dict(sampling=dict(steps=2))


def floyd_recipe(public: Path, lora: bool) -> dict[str, Any]:
    second = dict(preset="if-ii", image_px=32, lowres_px=16, **SMALL)
    return recipe_of(public, "if-i", lora, base=dict(preset="if-i", **SMALL), sr256=second)


def karlo_recipe(public: Path, lora: bool) -> dict[str, Any]:
    second = dict(preset="karlo", image_px=32, lowres_px=16, **SMALL)
    recipe = recipe_of(public, "karlo", lora, base=dict(preset="karlo", **SMALL), sr256=second)
    if lora:  # a network without attention
        recipe["sr256"]["train"]["lora"] = {"rank": RANK, "targets": ["conv1", "conv2"]}
    return recipe


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_deepfloyd(public: Path, tmp_path: Path, lora: bool) -> None:
    """Both stages: hybrid loss of a learned variance, aug level in 1000 steps."""
    _, model = trained(floyd_recipe(public, lora), tmp_path / "run")
    for name, source in (("base", "if-i"), ("sr256", "if-ii")):
        names = changed(model, name, public / source)
        assert names and (not lora or all(".attentions." in n or ".text.0.pool." in n for n in names))
        assert (tmp_path / "run" / "out" / f"{name}-training" / "grid-0000000008.png").is_file()
    pipe = Cascade.from_pretrained(model, dtype=torch.float32)
    config = pipe.stages["base"].config
    assert config.diffusion.learned_variance and config.unet.out_channels == 6
    assert pipe("a red apple", seed=1).stages["sr256"].std() > 0.05

    assert cascade(["convert", str(model), str(tmp_path / "back"), "--to", "diffusers"]) == 0
    first = diffusers.IFPipeline.from_pretrained(
        tmp_path / "back" / "base", safety_checker=None, watermarker=None, requires_safety_checker=False
    )
    assert first.text_encoder is not None and first.unet.config.out_channels == 6
    (again,) = open_model(tmp_path / "back" / "sr256").parts.values()
    ours = open_model(model).parts["sr256"].read("cpu")
    assert again.stage is not None and again.stage.unet.aug_embedding
    assert all(torch.equal(t, ours[n]) for n, t in again.read("cpu").items())


def test_training_is_told_what_sampling_is(public: Path, tmp_path: Path) -> None:
    """States of padding, to which DeepFloyd IF attends, and for a dropped caption those of the empty one."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(floyd_recipe(public, False)))
    recipe = load_recipe(str(path), ["base.train.text_drop=0.5", "data.caption_weights=[0, 0, 1, 0]"])
    task = make_task(recipe, tmp_path, "base").eval()
    batch = task.make(list(range(8)), list(range(8)))
    text = text_of(batch)
    assert text is not None and "keep_text" not in batch
    encoder = load_text_encoder(recipe.text)
    labels = [task.pictures.captions(i) for i in task.make.samples(list(range(8)))]
    null, dropped = encoder([""]).sequences[0].states[0].float(), 0
    for states, captions in zip(text.sequences[0].states, labels, strict=True):
        known = encoder(captions).sequences[0].states.float()
        told = [torch.allclose(states, other, atol=2e-2, rtol=1e-2) for other in (null, *known)]
        assert any(told)
        dropped += told[0]
    assert 0 < dropped < 8
    assert torch.isfinite(task(batch)).all()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_karlo(public: Path, tmp_path: Path, lora: bool) -> None:
    """The decoder, and super-resolution whose network of the last step stays what it was."""
    argv, model = trained(karlo_recipe(public, lora), tmp_path / "run")
    for name in ("base", "sr256"):
        names = changed(model, name, public / "karlo")
        assert names and not any(n.startswith(LAST) for n in names)
        assert not lora or all(".attentions." in n if name == "base" else ".conv" in n for n in names)
    pipe = Cascade.from_pretrained(model, dtype=torch.float32)
    assert pipe.stages["sr256"].last is not None
    out = pipe("a red apple", seed=1, image_embed=torch.randn(1, CLIP_DIM))
    assert out.stages["sr256"].std() > 0.05

    assert cascade(["convert", str(model), str(tmp_path / "back"), "--to", "diffusers"]) == 0
    last = [
        diffusers.UNet2DModel.from_pretrained(place, subfolder="super_res_last").state_dict()
        for place in (public / "karlo", tmp_path / "back")
    ]
    assert all(torch.equal(t.bfloat16(), last[1][n].bfloat16()) for n, t in last[0].items())
    diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "back", subfolder="decoder")
    if not lora:
        the_last_network_is_kept_to_the_bit(argv, public, tmp_path)


def the_last_network_is_kept_to_the_bit(argv: list[str], public: Path, folder: Path) -> None:
    """In the component that training writes, after going on from a state too, and never without a source."""
    source = open_model(public / "karlo").parts["sr256"].read("cpu")
    kept = {n: t for n, t in source.items() if n.startswith(LAST)}
    for more in ([], ["--stage", "sr256", "--set", "sr256.train.images=12"]):
        if more:
            assert main([*argv, *more]) == 0
        found = load_file(folder / "run" / "out" / "sr256" / WEIGHTS)
        assert kept and all(torch.equal(found[n], t) for n, t in kept.items())
        assert not torch.equal(found["stem.weight"], source["stem.weight"])
    shutil.copytree(public / "karlo", folder / "without")
    edit_json(folder / "without" / "model_index.json", super_res_last=[None, None])
    for setting, words in (
        (
            "train.init_from=null",
            "recipe.sr256.train.init_from None: expected a model, whose stage.last_unet",
        ),
        ("stage.last_unet=null", r"init_from: .*unexpected tensor last\."),
        (f"train.init_from={folder / 'without'}", r"init_from: .*missing tensor last\."),
    ):
        with pytest.raises(InputError, match=words):
            make_task(load_recipe(argv[0], [f"sr256.{setting}"]), folder, "sr256")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_kandinskys_prior(public: Path, tmp_path: Path, lora: bool) -> None:
    """A prior alone, without a stage that draws."""
    _, model = trained(recipe_of(public, "kandinsky", lora, prior=dict(preset="kandinsky")), tmp_path / "run")
    names = changed(model, "prior", public / "kandinsky")
    assert names and not any(n.startswith("statistics.") for n in names)
    assert not lora or all(".attention." in n for n in names)
    if lora:
        assert load_adapter(tmp_path / "run" / "out" / "prior").config.rank == RANK
        part, _ = source_component(str(tmp_path / "run" / "out" / "prior"), "prior")
        assert part.class_name == "DiffusionPrior"
    pipe = Cascade.from_pretrained(model)
    embed = pipe("a red apple", seed=1, stop_at="prior").image_embed
    assert (
        embed is not None and embed.shape == (1, CLIP_DIM) and abs(embed.norm() - 1) > 0.1
    )  # as CLIP emits it

    assert cascade(["convert", str(model), str(tmp_path / "back"), "--to", "diffusers"]) == 0
    network = diffusers.PriorTransformer.from_pretrained(tmp_path / "back", subfolder="prior")
    assert network.config.embedding_dim == CLIP_DIM


def test_glides_token_ids_stay_whole(public: Path, tmp_path: Path) -> None:
    """Its networks embed the text themselves: what is cached and padded is numbers of tokens."""
    folder = tmp_path / "glide"
    folder.mkdir()
    save_file(network(SMALL_GLIDE).state_dict(), folder / "base.safetensors")
    save_words(folder)
    recipe = recipe_of(public, "if-i", False, base=dict(preset=str(folder), **SMALL))
    recipe["text"] = {"kind": "glide", "name": str(folder), "max_length": SMALL_GLIDE.length}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    task = make_task(load_recipe(str(path), ["base.train.text_drop=0"]), tmp_path, "base")
    batch = task.make(list(range(12)), list(range(12)))  # every picture, the red apples too
    ids = load_text_encoder(recipe["text"])(["a red apple"]).sequences[0].states
    assert batch["states0"].dtype == torch.int64 == ids.dtype and batch["states0"].max() == ids[0, 2] == 3
    loss = task(batch).mean()
    loss.backward()
    assert loss.isfinite() and make_plan(load_recipe(str(path)), "base").flops > 0


def test_what_a_preset_cannot_be(public: Path, tmp_path: Path) -> None:
    def refused(words: str, **parts: Any) -> None:
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe_of(public, "karlo", False, **parts)))
        with pytest.raises(InputError, match=words):
            load_recipe(str(tmp_path / "r.yaml"))

    refused("unknown part 'base' in .*kandinsky: expected one of prior", base=dict(preset="kandinsky"))
    refused("is no model|is not a model folder", base=dict(preset="data"))
