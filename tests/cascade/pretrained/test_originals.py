"""The layouts of the original repositories, whole folders: DeepFloyd IF, Karlo, GLIDE, DALLE2-pytorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from cascade import Cascade, InputError, random
from cascade.cli import main
from cascade.conditioning import TextEmbedding, Tokens
from cascade.diffusion.schedule import linear_betas
from cascade.pretrained.model import open_model
from cascade.pretrained.unet import tensors_from_original, unet_from_original
from prior import LaionConfig
from prior.pretrained import KARLO, prior_from_karlo, tensors_to
from tests.cascade.pretrained.original import OriginalUNet, Spec
from tests.cascade.pretrained.test_unet_original import params
from tests.cascade.pretrained.unets import randomise
from tests.prior.test_laion import checkpoint as laion_weights

SMALL = Spec("floyd", head=64, pool_heads=4)


def network(spec: Spec, seed: int = 0) -> OriginalUNet:
    net = OriginalUNet(spec).eval()
    randomise(net, seed)
    net.requires_grad_(False)
    for parameter in net.out.parameters():
        parameter.data *= 0.1  # see `calm` of the folders
    return net


def prefixed(net: OriginalUNet, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: t for name, t in net.state_dict().items()}


def test_deepfloyd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, spec, px in (
        ("i", SMALL, 16),
        ("ii", replace(SMALL, inputs=6, told=True, residual=0.7071), 64),
    ):
        net, folder = network(spec), tmp_path / name
        folder.mkdir()
        torch.save(net.state_dict(), folder / "pytorch_model.bin")
        described = {**(params(spec) or {}), "image_size": px}
        (folder / "config.yml").write_text(yaml.safe_dump({"params": described}))
        assert main(["info", "--model", str(folder)]) == 2  # a pickle
        assert "--allow-legacy-checkpoint" in capsys.readouterr().err
        model = open_model(folder, allow_legacy=True)
        (part,) = model.parts.values()
        stage = part.stage
        assert (
            stage is not None and (stage.name, stage.image_px) == (("base", 16), ("sr64", 64))[name == "ii"]
        )
        ours = tensors_from_original(net.state_dict(), unet_from_original(net.state_dict(), params(spec)))
        read = part.read("cpu")
        assert read.keys() == ours.keys() and all(torch.equal(t, ours[n]) for n, t in read.items())
        assert stage.diffusion.learned_variance and stage.sampling.threshold == "dynamic"
    assert (stage.sampling.lowres_noise, stage.sampling.respacing) == ("step", "smart50")
    target = tmp_path / "both"
    assert main(["convert", *(str(tmp_path / name) for name in ("i", "ii")), str(target)]) == 0
    told = capsys.readouterr().out
    assert "DeepFloyd IF License" in told and "missing       a text encoder, T5" in told
    stages = Cascade.from_pretrained(target, dtype=torch.float32).stages
    text = TextEmbedding((Tokens(torch.randn(2, 6, SMALL.text), torch.ones(2, 6).bool()),))
    small = stages["base"].sample(text[[0]], negative=text[[1]], respacing="5,5")
    large = stages["sr64"].sample(text[[0]], negative=text[[1]], lowres=small, respacing="2,2")
    assert large.shape == (1, 3, 64, 64) and large.std() > 0.1


def save_karlo(folder: Path) -> dict[str, Any]:
    clip = 8
    hparams = dict(text_ctx=6, xf_width=12, xf_layers=1, xf_heads=3, xf_final_ln=True, clip_dim=clip)
    config = {
        "model": {"type": "prior", "hparams": {**hparams, "clip_xf_width": clip}},
        "diffusion": dict(
            steps=1000, learn_sigma=False, noise_schedule="squaredcos_cap_v2", predict_xstart=True
        ),
    }
    (folder / "prior_1B_vit_l.yaml").write_text(yaml.safe_dump(config))
    from prior import DiffusionPrior

    prior = DiffusionPrior(prior_from_karlo(config))
    randomise(prior, 0)
    weights = tensors_to(KARLO, prior.state_dict(), prior.config)
    statistics = weights.pop("clip_mean")[0], weights.pop("clip_std")[0]
    torch.save(statistics, folder / "ViT-L-14_stats.th")
    torch.save({"state_dict": weights}, folder / "prior-ckpt-step=01000000-of-01000000.ckpt")
    decoder = network(Spec("decoder", head=64, clip=clip, text=clip))
    torch.save(
        {"state_dict": prefixed(decoder, "model.")}, folder / "decoder-ckpt-step=01000000-of-01000000.ckpt"
    )
    spec = Spec("plain", 6, 3, mult=(1, 1, 1, 1), blocks=(1,) * 4, attends=(False,) * 4, scale_shift=False)
    first, last = network(spec, 1), network(spec, 2)
    both = prefixed(first, "model_first_steps.") | prefixed(last, "model_last_step.")
    torch.save({"state_dict": both}, folder / "improved-sr-ckpt-step=1.2M.ckpt")
    return {"prior": prior, "decoder": decoder, "first": first, "last": last}


def test_karlo(tmp_path: Path) -> None:
    saved = save_karlo(tmp_path)
    model = open_model(tmp_path, allow_legacy=True)
    assert list(model.parts) == ["prior", "base", "sr64"] and not model.missing
    (text,) = model.text
    assert text.reference["projection"] and text.reference["pad_id"] == 0
    base, sr = model.parts["base"].stage, model.parts["sr64"].stage
    assert base is not None and base.sampling.guidance == 8.0 and base.sampling.steps == 50
    assert sr is not None and sr.sampling.steps == 7 and sr.last_unet is not None
    prior = model.parts["prior"].read("cpu")
    assert all(torch.equal(t, prior[name]) for name, t in saved["prior"].state_dict().items())
    assert model.parts["prior"].config["clamp"] == 10.0

    from cascade.loading import build

    stage, lowres = build(model.parts["sr64"]), torch.rand(1, 3, 16, 16) * 2 - 1
    got = stage.sample(lowres=lowres, seed=4)  # type: ignore[operator]
    assert torch.allclose(got, seven_steps(saved, lowres), atol=1e-3)
    (tmp_path / "configs").mkdir()
    for width, expected in ((16, 16), (0, None)):
        described = {"model": {"hparams": {"num_head_channels": width}}}
        (tmp_path / "configs" / "decoder_900M_vit_l.yaml").write_text(yaml.safe_dump(described))
        if expected:
            config = open_model(tmp_path, allow_legacy=True).parts["base"].config
            assert config["unet"]["head_channels"] == expected
        else:
            with pytest.raises(InputError, match="num_head_channels 0: expected the width"):
                open_model(tmp_path, allow_legacy=True)
    (tmp_path / "configs" / "decoder_900M_vit_l.yaml").unlink()
    (tmp_path / "prior_1B_vit_l.yaml").unlink()
    with pytest.raises(InputError, match="expected prior_1B_vit_l.yaml"):
        open_model(tmp_path, allow_legacy=True)


def seven_steps(saved: dict[str, Any], lowres: Tensor) -> Tensor:
    """Improved DDPM's respaced chain by its own formulas, the last step by the second network."""
    size = (64, 64)
    enlarged = torch.nn.functional.interpolate(
        lowres, size, mode="bicubic", antialias=True, align_corners=False
    )
    alpha_bar, x = cosine_alpha_bar(), random.normal((3, *size), [4], "init", "sr64")
    kept = [999, 832, 666, 500, 333, 166, 0]
    for i, t in enumerate(kept):
        net = saved["last" if i == 6 else "first"]
        eps = net(torch.cat([x, enlarged], 1), torch.tensor([float(t)]))
        here, before = alpha_bar[t], alpha_bar[kept[i + 1]] if i < 6 else torch.tensor(1.0).double()
        x0 = ((x - (1 - here).sqrt() * eps) / here.sqrt()).clamp(-1, 1)
        beta = 1 - here / before
        x = before.sqrt() * beta / (1 - here) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - here) * x
        variance = beta * (1 - before) / (1 - here)
        x = (x + variance.sqrt() * random.normal((3, *size), [4], "step", "sr64", i)).float()
    return x.clamp(-1, 1)


def cosine_alpha_bar() -> Tensor:
    t = torch.arange(1001).double() / 1000
    f = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
    return (1 - (1 - f[1:] / f[:-1]).clamp(max=0.999)).cumprod(0)


END = 49  # GLIDE's end token here
SMALL_GLIDE = Spec("glide", head=64, text=64)
LARGE_GLIDE = replace(SMALL_GLIDE, mult=(1, 1, 1, 2), blocks=(1,) * 4, attends=(False, False, False, True))


def save_words(folder: Path) -> None:
    """A tokeniser of few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<|endoftext|>": END, "?": 0, "a": 1, "red": 2, "apple": 3}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[attr-defined]
    words.save(str(folder / "tokenizer.json"))


@pytest.fixture
def glide_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_words(tmp_path)
    monkeypatch.setattr("cascade.text.glide.resolve", lambda *_: tmp_path)


def test_glide(tmp_path: Path, glide_words: None) -> None:
    spec, large = SMALL_GLIDE, replace(LARGE_GLIDE, inputs=6)
    for name, net in (("base", network(spec)), ("upsample", upsampler := network(large, 1))):
        torch.save(net.state_dict(), tmp_path / f"{name}.pt")
    pipe = Cascade.from_pretrained(tmp_path, allow_legacy=True, dtype=torch.float32)
    assert list(pipe.stages) == ["base", "sr64"] and pipe.text_encoder.max_length == spec.length
    text = pipe.encode(["a RED apple", ""])
    ids, mask = text.sequences[0].states[..., 0], text.sequences[0].mask
    assert ids.tolist() == [[1, 2, 3, 49, 49, 49], [49] * 6]
    assert mask.tolist() == [[True] * 3 + [False] * 3, [False] * 6]
    out = pipe("a red apple", seed=4, base=dict(steps=4))
    small = out.stages["base"]
    expected = glide_upsampled(upsampler, small, ids[:1].long(), mask[:1])
    assert torch.allclose(out.stages["sr64"], expected, atol=1e-3)


GLIDE27_STEPS = [997, 800, 799, 600, 599, 500, 400, 399, 377, 355, 333, 311, 288, 266, 244, 222, 200, 199]
GLIDE27_STEPS += [177, 155, 133, 111, 88, 66, 44, 22, 0]


def glide_upsampled(net: OriginalUNet, small: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """27 steps of DDIM on linear betas from 0.997 of the noise, on the picture rounded to 8 bits."""
    small = ((small + 1) * 127.5).round() / 127.5 - 1
    enlarged = torch.nn.functional.interpolate(small, (64, 64), mode="bilinear", align_corners=False)
    alpha_bar = (1 - linear_betas()).cumprod(0)
    x = 0.997 * random.normal((3, 64, 64), [4], "init", "sr64")
    for t, before in zip(GLIDE27_STEPS, [*GLIDE27_STEPS[1:], None], strict=True):
        output = net(torch.cat([x, enlarged], 1), torch.tensor([float(t)]), ids=ids, mask=mask)
        here, there = alpha_bar[t], alpha_bar[before] if before is not None else torch.tensor(1.0).double()
        x0 = ((x - (1 - here).sqrt() * output[:, :3]) / here.sqrt()).clamp(-1, 1)
        eps = (x - here.sqrt() * x0) / (1 - here).sqrt()
        x = (there.sqrt() * x0 + (1 - there).sqrt() * eps).float()
    return x


def test_glide_inpaints(tmp_path: Path, glide_words: None) -> None:
    """Both networks of the inpaint variant: 20 steps of the base with guidance, 27 of the upsampler."""
    small, large = network(replace(SMALL_GLIDE, inputs=7)), network(replace(LARGE_GLIDE, inputs=10), 1)
    for name, net in (("base-inpaint", small), ("upsample-inpaint", large)):
        torch.save(net.state_dict(), tmp_path / f"{name}.pt")
    pipe = Cascade.from_pretrained(tmp_path, allow_legacy=True, dtype=torch.float32)
    sampling = [stage.config.sampling for stage in pipe.stages.values()]
    assert [(s.guidance, s.sampler, s.respacing) for s in sampling] == [
        (5.0, "ddpm", None), (1.0, "ddpm", "glide27"),
    ]  # fmt: skip
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :20, 4:] = 1
    out = pipe("a red apple", seed=4, base=dict(steps=20), inpaint=(picture, mask))
    tokens = pipe.encode(["a red apple", ""]).sequences[0]
    ids, real = tokens.states[..., 0].long(), tokens.mask

    shrunk = picture.unflatten(2, (16, 4)).unflatten(4, (16, 4)).mean((3, 5))
    known = torch.cat([shrunk * mask[..., ::4, ::4], mask[..., ::4, ::4]], 1)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        eps, rest = small(torch.cat([x, known], 1).repeat(2, 1, 1, 1), t, ids=ids, mask=real).split(3, 1)
        return torch.cat([eps[1:] + 5.0 * (eps[:1] - eps[1:]), rest[:1]], 1)

    times = [round(999 * i / 19) for i in reversed(range(20))]
    expected = ancestral(guided, times, cosine_alpha_bar(), "base", 1.0, known)
    assert torch.allclose(out.stages["base"], expected, atol=1e-3)
    kept = torch.where(mask[..., ::4, ::4] > 0, out.stages["base"], shrunk)
    assert torch.allclose(kept, shrunk, atol=1e-6)  # means are summed in another order

    rounded = ((out.stages["base"] + 1) * 127.5).round() / 127.5 - 1
    enlarged = torch.nn.functional.interpolate(rounded, (64, 64), mode="bilinear", align_corners=False)
    known = torch.cat([picture * mask, mask], 1)
    beside = torch.cat([known, enlarged], 1)

    def upsampler(x: Tensor, t: Tensor) -> Tensor:
        return large(torch.cat([x, beside], 1), t, ids=ids[:1], mask=real[:1])

    alpha_bar = (1 - linear_betas()).cumprod(0)
    expected = ancestral(upsampler, GLIDE27_STEPS, alpha_bar, "sr64", 0.997, known)
    assert torch.allclose(out.stages["sr64"], expected, atol=1e-3)
    assert torch.equal(torch.where(mask > 0, out.stages["sr64"], picture), picture)

    torch.save(network(SMALL_GLIDE).state_dict(), tmp_path / "base.pt")
    with pytest.raises(InputError, match="found base.* and base-inpaint"):
        open_model(tmp_path, allow_legacy=True)


def ancestral(
    net: Callable[..., Tensor],
    times: list[int],
    alpha_bar: Tensor,
    stage: str,
    temperature: float,
    known: Tensor,
) -> Tensor:
    """Improved DDPM's respaced chain with learned variance (equation 15), the known part, B 4 H W, put into
    each estimate of x_0."""
    picture, mask = known.split([3, 1], 1)
    x = temperature * random.normal(tuple(picture.shape[1:]), [4], "init", stage)
    for i, t in enumerate(times):
        eps, share = net(x, torch.tensor([float(t)])).split(3, 1)
        here = alpha_bar[t]
        before = alpha_bar[times[i + 1]] if i + 1 < len(times) else torch.tensor(1.0).double()
        x0 = (x - (1 - here).sqrt() * eps) / here.sqrt()
        x0 = (x0 * (1 - mask) + picture).clamp(-1, 1)
        beta = 1 - here / before
        x = before.sqrt() * beta / (1 - here) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - here) * x
        if i + 1 < len(times):
            least = (beta * (1 - before) / (1 - here)).log()
            share = (share + 1) / 2
            deviation = ((share * beta.log() + (1 - share) * least) / 2).exp()
            x = x + deviation * random.normal(tuple(picture.shape[1:]), [4], "step", stage, i)
        x = x.float()
    return x


def test_laion(tmp_path: Path) -> None:
    """A training checkpoint, with the version of its program and an optimiser beside the weights."""
    from packaging.version import Version

    config = LaionConfig(width=12, layers=2, heads=3, head_width=8, inner=20, text_length=5)
    weights = laion_weights(config)
    torch.save(
        {"version": Version("1.15.6"), "step": 3, "optimizer": {"lr": 1e-3}, "model": weights},
        tmp_path / "latest.pth",
    )
    (tmp_path / "prior_config.json").write_text(json.dumps({"prior": {"predict_x_start": True}}))
    with pytest.raises(InputError, match="--allow-legacy-checkpoint"):
        open_model(tmp_path)
    model = open_model(tmp_path, allow_legacy=True)
    assert list(model.parts) == ["prior"] and model.licence is not None and model.licence.name == "MIT"
    assert model.parts["prior"].config["layers"] == 2
    assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 0  # now it is safetensors
    prior = Cascade.from_pretrained(tmp_path / "out").prior
    text = TextEmbedding((Tokens(torch.randn(1, 4, 12), torch.ones(1, 4).bool()),), torch.randn(1, 12))
    assert prior is not None and prior.sample(text, seed=1).shape == (1, 12)


def test_a_folder_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", str(tmp_path)]) == 2
    assert "is not a model folder" in capsys.readouterr().err
