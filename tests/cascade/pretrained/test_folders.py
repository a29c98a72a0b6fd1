"""Public folders: converted, described, mixed, exported, and refused when damaged. All weights are random."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascade import Cascade, InputError, hardware
from cascade.cli import main
from cascade.pretrained.model import open_model
from tests.cascade.pretrained.folders import PROMPTS, edit_json, floyd, karlo, unclip

UNET = "unet/diffusion_pytorch_model.safetensors"
QUICK: dict[str, Any] = dict(base=dict(steps=2))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """if-i, if-ii and karlo: do not change them."""
    root = tmp_path_factory.mktemp("published")
    floyd(root / "if-i", 16, lowres=False)
    floyd(root / "if-ii", 64, lowres=True)
    karlo(root / "karlo")
    return root


@pytest.fixture
def copied(published: Path, tmp_path: Path) -> Path:
    shutil.copytree(published / "if-i", tmp_path / "if-i")
    return tmp_path / "if-i"


def line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a refused command says."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("cascade: ")
    return captured.err


# -- convert and info --------------------------------------------------------------------------------------


def test_convert_makes_one_folder_of_both_stages(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "if"
    assert main(["convert", str(published / "if-i"), str(published / "if-ii"), str(target)]) == 0
    assert "licence       DeepFloyd IF License" in capsys.readouterr().out
    assert (target / "LICENSE").read_text().startswith("DeepFloyd IF License")
    files = {path.suffix for path in target.rglob("*") if path.is_file()}
    assert files <= {".json", ".safetensors", ""}
    direct = Cascade.from_pretrained(published / "if-i", dtype=torch.float32)
    pipe = Cascade.from_pretrained(target, dtype=torch.float32)
    assert list(pipe.stages) == ["base", "sr64"]
    assert torch.equal(
        direct(PROMPTS[0], seed=1, **QUICK).stages["base"],
        pipe(PROMPTS[0], seed=1, stop_at="base", **QUICK).stages["base"],
    )
    assert main(["info", "--model", str(target)]) == 0
    told = capsys.readouterr().out
    assert "files         verified" in told and "DeepFloyd IF License" in told


def test_info_tells_what_a_folder_holds_and_lacks(
    published: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copied / "text_encoder")
    assert main(["info", "--model", str(copied)]) == 0
    told = capsys.readouterr().out
    assert "family        DeepFloyd IF" in told
    assert "missing       a text encoder, T5 (v1.1 XXL in the published models), 24 wide" in told
    assert "noise -> 16 px, ddpm 100 steps, guidance 7, expects text tokens 24 wide" in told
    assert "no text encoder" in line(
        capsys, "sample", "a", "--model", str(copied), "--out", str(copied / "o")
    )
    assert main(["info", "--model", str(published / "karlo")]) == 0
    told = capsys.readouterr().out
    assert "prior         DiffusionPrior" in told and "image embedding of 16" in told
    assert "CreativeML Open RAIL-M" in told


def test_a_licence_beside_the_weights_comes_before_the_family_s(copied: Path, tmp_path: Path) -> None:
    (copied / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    (copied / "LICENSE").write_text("The licence in full.\n")
    assert main(["convert", str(copied), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "LICENSE").read_text() == "The licence in full.\n"
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_licence"] == "apache-2.0"


def test_shards_and_variants(published: Path, copied: Path) -> None:
    """fp16 files in two shards beside a text encoder in full precision."""
    tensors = {name: t.half() for name, t in load_file(copied / UNET).items()}
    names = sorted(tensors)
    halves = {"a": names[: len(names) // 2], "b": names[len(names) // 2 :]}
    stem = "diffusion_pytorch_model"
    for half, own in halves.items():
        save_file({n: tensors[n] for n in own}, copied / "unet" / f"{stem}.fp16-{half}.safetensors")
    weight_map = {n: f"{stem}.fp16-{half}.safetensors" for half, own in halves.items() for n in own}
    index = copied / "unet" / f"{stem}.safetensors.index.fp16.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (copied / UNET).unlink()
    pipe = Cascade.from_pretrained(copied, dtype=torch.float32)
    full = Cascade.from_pretrained(published / "if-i", dtype=torch.float32)
    for ours, theirs in zip(pipe.stages["base"].parameters(), full.stages["base"].parameters(), strict=True):
        assert torch.equal(ours, theirs.half().float())


# -- families together -------------------------------------------------------------------------------------


def test_deepfloyd_with_this_project_s_super_resolution(published: Path, tmp_path: Path) -> None:
    """Both text encoders stand side by side, and each stage reads its own."""
    from cascade.pipeline import EMBEDDED

    shutil.copytree(published / "if-i", tmp_path / "if-i")
    edit_json(tmp_path / "if-i" / "unet" / "config.json", sample_size=64)
    target = tmp_path / "mixed"
    assert main(["convert", str(tmp_path / "if-i"), f"{EMBEDDED}:sr256,sr1024", str(target)]) == 0
    pipe = Cascade.from_pretrained(target)
    assert list(pipe.stages) == ["base", "sr256", "sr1024"]
    assert pipe.stages["sr256"].config.text_sequences == (1,)
    assert pipe.text_encoder.dims == (24, 384)
    out = pipe("a red apple", seed=1, stop_at="sr256", base=dict(steps=1), sr256=dict(steps=1))
    assert out.images[0].size == (256, 256)


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (["if-i", "if-i"], "are a part 'base': expected one"),
        (["if-i", "karlo:sr64,base"], "are a part 'base': expected one"),
        (["if-ii", "karlo:prior,sr64"], "are a part 'sr64'"),
        (
            ["if-i", "EMBEDDED:sr256"],
            "stage sr256 takes pictures of 64 px: expected 16, what stage base draws",
        ),
        (["if-i", "karlo:sr46"], "unknown part 'sr46'"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    sources: list[str], words: str, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cascade.pipeline import EMBEDDED

    places = [s.replace("EMBEDDED", str(EMBEDDED)) if "EMB" in s else str(published / s) for s in sources]
    assert words in line(capsys, "convert", *places, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_prior_of_another_width_is_refused() -> None:
    from cascade.config import StageConfig, UNetConfig
    from cascade.fit import check_fit

    stage = StageConfig(name="base", image_px=64, unet=UNetConfig(image_embed_dim=768))
    check_fit([stage], (), 768)
    with pytest.raises(InputError, match="takes image embeddings of width 768, the prior gives 1280"):
        check_fit([stage], (), 1280)


def test_a_folder_in_the_way_is_left_alone(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for to in ("cascade", "diffusers"):
        assert "not empty" in line(capsys, "convert", str(published / "if-i"), str(tmp_path), "--to", to)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


# -- export ------------------------------------------------------------------------------------------------


def same_tensors(ours: nn.Module, theirs: nn.Module) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_deepfloyd_there_and_back(published: Path, tmp_path: Path) -> None:
    """diffusers -> ours -> diffusers -> ours, by folders on disk; diffusers loads what was written."""
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", str(published / "if-i"), str(published / "if-ii"), str(ours)]) == 0
    assert main(["convert", str(ours), str(back), "--to", "diffusers"]) == 0
    for name, source, cls in (
        ("base", "if-i", diffusers.IFPipeline),
        ("sr64", "if-ii", diffusers.IFSuperResolutionPipeline),
    ):
        first, second = (
            cls.from_pretrained(place, safety_checker=None, watermarker=None, requires_safety_checker=False)
            for place in (published / source, back / name)
        )
        same_tensors(first.unet, second.unet)
        same_tensors(first.text_encoder, second.text_encoder)
        for key in ("beta_schedule", "variance_type", "sample_max_value", "timestep_spacing", "thresholding"):
            assert first.scheduler.config[key] == second.scheduler.config[key]
    again = open_model(back / "base").parts["base"]
    assert again.config == open_model(ours).parts["base"].config
    first = open_model(ours).parts["base"].read("cpu")
    assert all(torch.equal(t, first[name]) for name, t in again.read("cpu").items())


def test_karlo_there_and_back(published: Path, tmp_path: Path) -> None:
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", str(published / "karlo"), str(ours)]) == 0
    assert main(["convert", str(ours), str(back), "--to", "diffusers"]) == 0
    for name, cls in (
        ("prior", diffusers.PriorTransformer),
        ("decoder", diffusers.UNet2DConditionModel),
        ("text_proj", unclip.UnCLIPTextProjModel),
        ("super_res_first", diffusers.UNet2DModel),
        ("super_res_last", diffusers.UNet2DModel),
    ):
        same_tensors(*(cls.from_pretrained(place, subfolder=name) for place in (published / "karlo", back)))
    again, first = open_model(back), open_model(ours)
    assert {name: part.config for name, part in again.parts.items()} == {
        name: part.config for name, part in first.parts.items()
    }


def test_what_diffusers_cannot_express_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cascade.pipeline import EMBEDDED

    said = line(capsys, "convert", f"{EMBEDDED}:base", str(tmp_path / "out"), "--to", "diffusers")
    assert "diffusers" in said and not (tmp_path / "out").exists()


# -- damage ------------------------------------------------------------------------------------------------

NAME = "down_blocks.1.resnets.0.conv1.weight"


def damaged(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    if kind == "missing":
        del tensors[NAME]
    elif kind == "unexpected":
        tensors["down_blocks.1.resnets.7.conv1.weight"] = torch.zeros(1)
    elif kind == "transposed":
        tensors["add_embedding.proj.weight"] = tensors["add_embedding.proj.weight"].T.contiguous()
    else:
        tensors[NAME] = tensors[NAME][:-1].contiguous()
    return tensors


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("missing", NAME),
        ("unexpected", "down_blocks.1.resnets.7.conv1.weight"),
        ("transposed", "add_embedding.proj.weight"),
        ("wrongly shaped", NAME),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    kind: str, name: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(damaged(load_file(copied / UNET), kind), copied / UNET)
    said = line(capsys, "info", "--model", str(copied))
    assert f"{copied / 'unet'}: " in said and f"{kind} tensor {name}" in said
    assert said == line(capsys, "convert", str(copied), str(copied.parent / "out"))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("unet/config.json", dict(block_out_channels=[32, 96]), "tensor "),
        ("unet/config.json", dict(act_fn="gelu_tanh"), "act_fn"),
        ("unet/config.json", dict(sample_size=None), "sample_size None"),
        ("unet/config.json", dict(in_channels=4), "works on latents"),
        ("scheduler/scheduler_config.json", dict(variance_type="fixed_small"), "variance_type"),
        ("scheduler/scheduler_config.json", dict(beta_schedule="scaled_linear"), "beta_schedule"),
        ("scheduler/scheduler_config.json", dict(_class_name="EulerScheduler"), "unknown scheduler"),
        ("model_index.json", dict(_class_name="StableDiffusionPipeline"), "unknown pipeline"),
    ],
)
def test_a_wrong_config_is_refused(
    file: str, changes: dict[str, Any], words: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(copied / file, **changes)
    assert words in line(capsys, "info", "--model", str(copied))


def test_a_truncated_shard_names_the_tensor_it_lacks(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (copied / UNET).read_bytes()
    (copied / UNET).write_bytes(whole[:-100])
    said = line(capsys, "convert", str(copied), str(copied.parent / "out"))
    assert str(copied / UNET) in said and "cut short: it ends before tensor up_blocks" in said


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_is_read_where_it_is_allowed_and_its_payload_never_run(
    published: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, pickled = load_file(copied / UNET), copied / "unet" / "diffusion_pytorch_model.bin"
    (copied / UNET).unlink()
    torch.save({**tensors, "payload": Payload(copied / "run")}, pickled)
    assert "--allow-legacy-checkpoint" in line(capsys, "info", "--model", str(copied))
    said = line(capsys, "info", "--model", str(copied), "--allow-legacy-checkpoint")
    assert str(pickled) in said and "system" in said
    assert not (copied / "run").exists()

    torch.save(tensors, pickled)
    assert main(["info", "--model", str(copied), "--allow-legacy-checkpoint"]) == 0
    assert (copied / UNET).is_file()  # converted once: no flag from here on
    pickled.unlink()
    read = open_model(copied).parts["base"].read("cpu")
    expected = open_model(published / "if-i").parts["base"].read("cpu")
    assert all(torch.equal(t, expected[name]) for name, t in read.items())


# -- memory ------------------------------------------------------------------------------------------------


def test_offload_keeps_one_part_on_the_device(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that `to` has put on the device and not taken back, at every step; the text encoder is gone."""
    on_device: set[int] = set()
    seen: dict[str, set[int]] = {}
    pipe = Cascade.from_pretrained(published / "karlo", offload=True, dtype=torch.float32)
    parts = {"prior": pipe.prior, **pipe.stages}
    moved = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if self in parts.values():
            place = args[0] if args else kwargs.get("device")
            (on_device.discard if place == "cpu" else on_device.add)(id(self))
        return moved(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", to)

    def watch(event: Any) -> None:
        seen.setdefault(event.stage, set()).update(on_device)
        assert pipe.text_encoder._loaded is None  # type: ignore[attr-defined]

    out = pipe("a red apple", seed=1, prior=dict(steps=2), base=dict(steps=2), on_event=watch)
    assert seen == {name: {id(part)} for name, part in parts.items()} and not on_device
    sizes = {name: hardware.tensor_bytes(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    assert {name: pipe.peak[name] for name in sizes} == sizes
    monkeypatch.undo()
    kept = Cascade.from_pretrained(published / "karlo", dtype=torch.float32)
    again = kept("a red apple", seed=1, prior=dict(steps=2), base=dict(steps=2))
    assert torch.equal(out.stages["sr64"], again.stages["sr64"]) and kept.peak == {}
