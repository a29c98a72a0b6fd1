"""Model folders: what is written is read back; what is damaged, missing or foreign is refused in one line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cascade import checkpoint
from cascade.checkpoint import CONFIG, INDEX, WEIGHTS
from cascade.errors import InputError
from cascade.pipeline import Cascade
from tests.conftest import ToyEncoder, tiny_stage

SHARDS = f"{WEIGHTS}.index.json"


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        Cascade.from_pretrained(folder)
    assert "\n" not in str(error.value)


def edit_json(path: Path, **changes) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


def forget_hashes(folder: Path) -> None:
    edit_json(folder / INDEX, sha256={})


# -- components --------------------------------------------------------------------------------------------


def test_a_component_comes_back(tmp_path: Path) -> None:
    tensors = {
        "conv": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
        "half": torch.randn(5).bfloat16(),
        "index": torch.arange(3),
    }
    tensors["shared"] = tensors["half"][:2]
    checkpoint.save_component(tmp_path / "a", {"width": 3, "names": ["x"]}, tensors, "Thing")
    loaded = checkpoint.load_component(tmp_path / "a", "Thing")
    assert (loaded.class_name, loaded.config) == ("Thing", {"width": 3, "names": ["x"]})
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype and torch.equal(loaded.tensors[name], tensor)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]  # no temporary folder stays


def test_a_failed_save_leaves_the_old_component(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save_component(tmp_path / "a", {"n": 1}, {"w": torch.ones(2)}, "Thing")

    def full_disk(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full_disk)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save_component(tmp_path / "a", {"n": 2}, {"w": torch.zeros(2)}, "Thing")
    assert checkpoint.load_component(tmp_path / "a").config == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_saving_again_replaces(tmp_path: Path) -> None:
    for n in (1, 2):
        checkpoint.save_component(tmp_path / "a", {"n": n}, {"w": torch.full((2,), n)}, "Thing")
    assert checkpoint.load_component(tmp_path / "a").config == {"n": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_another_class_is_refused(tmp_path: Path) -> None:
    checkpoint.save_component(tmp_path / "a", {}, {"w": torch.ones(1)}, "Thing")
    with pytest.raises(InputError, match="expected class Stage, found 'Thing'"):
        checkpoint.load_component(tmp_path / "a", "Stage")


def sharded(folder: Path, weight_map: dict[str, str]) -> Path:
    folder.mkdir()
    (folder / CONFIG).write_text("{}")
    save_file({"a": torch.ones(1)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(2)}, folder / "two.safetensors")
    (folder / SHARDS).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_are_joined(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "s", {"a": "one.safetensors", "b": "two.safetensors"})
    assert checkpoint.load_component(folder).tensors.keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors", "c": "two.safetensors"}, "lack tensors .*: c"),
        ({"a": "one.safetensors", "b": "three.safetensors"}, "missing file .*three"),
        ({"a": "../one.safetensors"}, "without a folder"),
    ],
)
def test_wrong_shards_are_refused(tmp_path: Path, weight_map: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        checkpoint.load_component(sharded(tmp_path / "s", weight_map))


def test_tensors_must_fit_whole_or_nothing_is_loaded() -> None:
    module = nn.Linear(2, 3)
    before = module.weight.clone()
    wrong = {"weight": torch.ones(3, 4), "extra": torch.ones(1)}
    with pytest.raises(
        InputError,
        match=r"^here: missing tensor bias \[3\]; unexpected tensor extra \[1\]; "
        r"wrongly shaped tensor weight, \[3, 4\] instead of \[3, 2\]$",
    ):
        checkpoint.load_tensors(module, wrong, "here")
    assert torch.equal(module.weight, before)


def test_only_the_first_name_is_listed() -> None:
    with pytest.raises(InputError, match=r"missing tensor 0.weight \[1, 1\] and 9 more"):
        checkpoint.load_tensors(nn.Sequential(*(nn.Linear(1, 1) for _ in range(5))), {}, "here")


def test_loading_keeps_the_modules_own_number_format() -> None:
    module = nn.Linear(2, 3)
    checkpoint.load_tensors(
        module, {"weight": torch.ones(3, 2).bfloat16(), "bias": torch.ones(3).bfloat16()}, "here"
    )
    assert module.weight.dtype == torch.float32 and module.weight.requires_grad
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    checkpoint.load_tensors(
        module, {"weight": torch.ones(3, 2).bfloat16(), "bias": torch.ones(3).bfloat16()}, "here"
    )
    assert module.weight.dtype == torch.bfloat16 and not module.weight.is_meta


# -- whole models ------------------------------------------------------------------------------------------


def test_a_model_folder_draws_the_same_pictures(tiny_cascade: Cascade, model_folder: Path) -> None:
    loaded = Cascade.from_pretrained(model_folder, dtype=torch.float32)
    a, b = (pipe("a red apple", seed=7) for pipe in (tiny_cascade, loaded))
    assert torch.equal(a.stages["sr1024"], b.stages["sr1024"])
    assert (
        a.image_embed is not None and b.image_embed is not None and torch.equal(a.image_embed, b.image_embed)
    )


def test_the_autoregressive_prior_and_open_clip_come_back(toy_encoders: None, tmp_path: Path) -> None:
    from prior import AutoregressiveConfig, AutoregressivePrior, OpenCLIP, OpenClipConfig

    config = AutoregressiveConfig(
        width=16, layers=1, heads=2, text_dim=24, text_length=6, embed_dim=16, codes=4, buckets=8
    )
    clip = OpenCLIP(OpenClipConfig(model="ViT-B-32", embed_dim=16))
    prior = AutoregressivePrior(config)
    pipe = Cascade([tiny_stage("base", 16)], ToyEncoder(), prior, clip)
    pipe.save_pretrained(tmp_path / "m")
    loaded = Cascade.from_pretrained(tmp_path / "m")
    assert isinstance(loaded.prior, AutoregressivePrior) and loaded.prior.config == config
    assert isinstance(loaded.clip, OpenCLIP) and loaded.clip.config == clip.config
    for name, tensor in loaded.prior.state_dict().items():
        assert torch.equal(tensor, prior.state_dict()[name])


def test_the_layout_of_a_model_folder(model_folder: Path) -> None:
    files = {p.relative_to(model_folder).as_posix() for p in model_folder.rglob("*") if p.is_file()}
    parts = ["base", "clip", "prior", "sr1024", "sr256"]
    assert files == {INDEX, *(f"{part}/{file}" for part in parts for file in (CONFIG, WEIGHTS))}
    index = json.loads((model_folder / INDEX).read_text())
    assert index["base"] == ["cascade", "Stage"] and index["prior"] == ["prior", "DiffusionPrior"]
    assert index["_class_name"] == "Cascade" and index["text_encoder"] == {"kind": "toy", "width": 24}
    assert set(index["sha256"]) == files - {INDEX}


def test_save_casts_parameters_but_no_statistics(tiny_cascade: Cascade, tmp_path: Path) -> None:
    tiny_cascade.save_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    prior = checkpoint.load_component(tmp_path / "m" / "prior").tensors
    assert prior["statistics.mean"].dtype == torch.float32
    assert {t.dtype for n, t in prior.items() if not n.startswith("statistics")} == {torch.bfloat16}
    assert {p.dtype for p in tiny_cascade.stages["base"].parameters()} == {torch.float32}


def test_saving_over_a_model_keeps_its_card(tiny_cascade: Cascade, model_folder: Path) -> None:
    (model_folder / "README.md").write_text("card")
    (model_folder / "old").mkdir()
    tiny_cascade.save_pretrained(model_folder)
    assert (model_folder / "README.md").read_text() == "card" and (model_folder / "old").is_dir()
    Cascade.from_pretrained(model_folder)


def test_saving_over_anything_else_is_refused(tiny_cascade: Cascade, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="expected a new or empty folder"):
        tiny_cascade.save_pretrained(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_text_encoder_kept_in_the_model_folder_stays_and_is_named_relative_to_it(
    tiny_cascade: Cascade, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = model_folder / "text_encoder" / "model.safetensors"
    weights.parent.mkdir()
    save_file({"w": torch.ones(1)}, weights)
    reference = {"kind": "toy", "width": 24, "encoders": [{"name": str(weights.parent)}]}
    monkeypatch.setattr(tiny_cascade.text_encoder, "reference", lambda: reference)
    tiny_cascade.save_pretrained(model_folder)
    index = json.loads((model_folder / INDEX).read_text())
    assert index["text_encoder"]["encoders"] == [{"name": "text_encoder"}]
    assert "text_encoder/model.safetensors" in index["sha256"]
    weights.write_bytes(b"")
    refused(model_folder, "text_encoder/model.safetensors differs")


def test_a_folder_that_cannot_be_written_is_one_line(tiny_cascade: Cascade, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to .*file"):
        tiny_cascade.save_pretrained(tmp_path / "file" / "model")


def test_a_link_to_a_model_stays_a_link(tiny_cascade: Cascade, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model_folder)
    before = (model_folder / INDEX).stat().st_ino
    tiny_cascade.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (model_folder / INDEX).stat().st_ino != before


def test_missing_folder_or_index_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "expected a folder with model_index.json, or a hub id")
    refused(tmp_path, "is not a model folder: expected model_index.json")


def test_a_hub_id_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_, **__):
        raise OSError("no network\nand a long explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refused(Path("owner/model"), r"cannot be had from the hub \(no network\)")


@pytest.mark.parametrize("part", ["base", "prior", "clip"])
def test_changed_truncated_and_missing_files_are_named(model_folder: Path, part: str) -> None:
    path = model_folder / part / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(model_folder, f"{part}/{WEIGHTS} differs from model_index.json: expected sha256")
    path.write_bytes(whole[: len(whole) // 2])
    refused(model_folder, f"{part}/{WEIGHTS} differs")
    path.unlink()
    refused(model_folder, f"missing file .*{part}/{WEIGHTS}")


def test_a_truncated_file_is_refused_without_hashes_too(model_folder: Path) -> None:
    forget_hashes(model_folder)
    path = model_folder / "base" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    refused(model_folder, "damaged or not safetensors")


def test_pickled_weights_are_never_read(model_folder: Path) -> None:
    forget_hashes(model_folder)
    path = model_folder / "base" / WEIGHTS
    path.write_bytes(pickle.dumps({"weight": 1}))
    refused(model_folder, "damaged or not safetensors")


def test_a_file_the_index_does_not_list_is_refused(model_folder: Path) -> None:
    (model_folder / "base" / SHARDS).write_text(json.dumps({"weight_map": {}}))
    refused(model_folder, f"{SHARDS} is not listed")


def test_a_path_out_of_the_folder_is_refused(model_folder: Path) -> None:
    edit_json(model_folder / INDEX, sha256={"../secret": "0" * 64})
    refused(model_folder, "outside the model folder")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"base": ["os", "system"]}, "unknown library 'os'"),
        ({"base": ["cascade", "Stagee"]}, "unknown class 'Stagee'.*did you mean 'Stage'"),
        ({"base": "Stage"}, r"expected \[library, class\]"),
        ({"../base": ["cascade", "Stage"]}, "expected letters, digits"),
        ({"text_encoder": None}, "missing key 'text_encoder'"),
    ],
)
def test_wrong_index_entries_are_refused(model_folder: Path, entry: dict, message: str) -> None:
    edit_json(model_folder / INDEX, **entry)
    refused(model_folder, message)


def test_a_stage_in_a_folder_of_another_name_is_refused(model_folder: Path) -> None:
    forget_hashes(model_folder)
    edit_json(model_folder / "base" / CONFIG, name="bass")
    refused(model_folder, "base: expected a stage of that name, found 'bass'")


def test_a_broken_index_is_refused(model_folder: Path) -> None:
    (model_folder / INDEX).write_text("{")
    refused(model_folder, "not valid JSON")


def test_config_keys_are_strict(model_folder: Path) -> None:
    forget_hashes(model_folder)
    edit_json(model_folder / "base" / CONFIG, image_pxx=64)
    refused(model_folder, "unknown key 'image_pxx'.*did you mean 'image_px'")


def test_weights_that_do_not_fit_the_config_are_named(model_folder: Path) -> None:
    forget_hashes(model_folder)
    config = json.loads((model_folder / "base" / CONFIG).read_text())
    edit_json(model_folder / "base" / CONFIG, unet={**config["unet"], "channels": [32, 64]})
    refused(model_folder, "base: wrongly shaped tensor")


def test_a_text_encoder_of_another_width_is_refused(model_folder: Path) -> None:
    edit_json(model_folder / INDEX, text_encoder={"kind": "toy", "width": 32})
    refused(model_folder, r"stage base was trained on token widths \[24\], the text encoder gives \[32\]")
