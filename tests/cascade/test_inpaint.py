"""A part of the picture is kept, the rest is drawn: what holds, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cascade import Cascade, InputError, Stage
from cascade.cli import main
from cascade.images import from_pil, to_pil
from cascade.inpaint import known_part
from tests.conftest import ToyEncoder, tiny_prior, tiny_stage


@pytest.fixture(scope="module")
def inpainting() -> Cascade:
    """16 -> 32 px, both with inpaint channels. Do not change it."""
    torch.manual_seed(0)
    stages = [tiny_stage("base", 16, inpaint_channels=4), tiny_stage("sr256", 32, 16, inpaint_channels=4)]
    prior, clip = tiny_prior()
    return Cascade(stages, ToyEncoder(), prior, clip).to("cpu")  # type: ignore[arg-type]


def picture(px: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(rows, 3, px, px, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def left(px: int, columns: int) -> Tensor:
    """Known in the first columns."""
    return (torch.arange(px) < columns).expand(1, 1, px, px)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun"])
def test_the_known_part_is_kept_to_the_bit_and_the_rest_is_drawn(inpainting: Cascade, sampler: str) -> None:
    stage, text = inpainting.stages["base"], inpainting.encode("a red apple")
    given, mask = picture(16), left(16, 7)
    drawn = stage.sample(text, seed=3, inpaint=(given, mask), sampler=sampler)
    assert torch.equal(drawn[..., :7], given[..., :7])
    # the network is told: it draws another rest for another known part, but not for what the mask hides
    other, hidden = picture(16, seed=1), torch.where(mask, given, 0.5)
    assert torch.equal(drawn, stage.sample(text, seed=3, inpaint=(hidden, mask), sampler=sampler))
    changed = stage.sample(text, seed=3, inpaint=(other, mask), sampler=sampler)
    assert (changed[..., 7:] - drawn[..., 7:]).abs().max() > 1e-3
    free = stage.sample(text, seed=3, sampler=sampler)
    assert torch.equal(free, stage.sample(text, seed=3, inpaint=(given, left(16, 0)), sampler=sampler))


def test_a_stage_of_residuals_keeps_it_too() -> None:
    from dataclasses import replace

    from cascade.config import AugmentConfig

    made = tiny_stage("sr256", 32, 16, inpaint_channels=4)
    stage = Stage(replace(made.config, augment=AugmentConfig(residual=True)), made.unet)
    drawn = stage.sample(lowres=picture(16), inpaint=(picture(32), left(32, 9)), aug_level=0.3)
    assert torch.allclose(drawn[..., :9], picture(32)[..., :9], atol=1e-6)


def test_rows_are_drawn_as_they_are_alone(inpainting: Cascade) -> None:
    stage, text = inpainting.stages["base"], inpainting.encode(["a red apple", "a cat"])
    given, mask = picture(16, rows=2), torch.cat([left(16, 3), left(16, 12)])
    both = stage.sample(text, seed=[3, 9], inpaint=(given, mask))
    for i, seed in enumerate((3, 9)):
        alone = stage.sample(text[[i]], seed=seed, inpaint=(given[[i]], mask[[i]]))
        assert torch.equal(both[[i]], alone)
    shared = stage.sample(text, seed=[3, 9], inpaint=(given, mask[:1]))
    assert torch.equal(shared[:1], both[:1]) and not torch.equal(shared[1:], both[1:])


def test_the_pipeline_inpaints_at_every_size(inpainting: Cascade) -> None:
    """A pixel of the small picture is known where all that it is made of is."""
    given, mask = picture(32), left(32, 11)
    out = inpainting(["a red apple", "a cat"], seed=5, num_images=2, inpaint=(given, mask))
    means = given.unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean((3, 5))
    for small, large in zip(out.stages["base"], out.stages["sr256"], strict=True):
        assert torch.allclose(small[..., :5], means[0, ..., :5], atol=1e-6)
        assert (small[..., 5] - means[0, ..., 5]).abs().max() > 1e-2
        assert torch.equal(large[..., :11], given[0, ..., :11])
    drawn = to_pil(given)[0], Image.fromarray(mask[0, 0].numpy())
    pil = inpainting("a cat", seed=5, inpaint=drawn)
    assert torch.equal(pil.stages["sr256"][..., :11], from_pil(drawn[0])[None, ..., :11])


def test_a_stage_without_the_channels_draws_as_it_can() -> None:
    stages = [tiny_stage("base", 16, inpaint_channels=4), tiny_stage("sr256", 32, 16)]
    pipe = Cascade(stages, ToyEncoder(), *tiny_prior())  # type: ignore[arg-type]
    request = pipe.request("a cat", inpaint=(picture(32), left(32, 8)))
    assert [run.known is None for run in request.runs] == [False, True]


@pytest.mark.parametrize(
    ("inpaint", "words"),
    [
        (picture(32), r"expected \(picture, mask\), got Tensor"),
        ((picture(32),), r"expected \(picture, mask\), got tuple"),
        (
            (picture(32)[0], left(32, 3)),
            r"picture: expected float B 3 H W .* got torch.float32 \(3, 32, 32\)",
        ),
        ((picture(32), picture(32)), r"mask: expected B 1 H W, 1 where kept, got .* \(1, 3, 32, 32\)"),
        (("a.png", left(32, 3)), "picture: expected float B 3 H W .* got str"),
        ((127 * picture(32), left(32, 3)), r"picture: expected values in \[-1, 1\]"),
        ((picture(32) * torch.nan, left(32, 3)), r"picture: expected values in \[-1, 1\]"),
        ((picture(32), left(32, 3) * 0.5), "mask: expected 1 where the picture is kept, 0 elsewhere"),
        ((picture(32), left(16, 3)), "the picture is 32 x 32, the mask 16 x 16: expected one size"),
        ((picture(32, 3), torch.cat([left(32, 3)] * 2)), "3 pictures and 2 masks: expected as many, or one"),
        ((picture(32, 3), left(32, 3)), r"inpaint: expected 1, 1 \(one a prompt\) or 2"),
        ((picture(16), left(16, 3)), "a picture of 16 x 16: expected .* at least their size, 32 x 32"),
        ((picture(64)[..., :32], left(64, 3)[..., :32]), "a picture of 64 x 32: expected the proportions"),
    ],
)
def test_what_cannot_be_is_one_line(inpainting: Cascade, inpaint: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        inpainting("a cat", num_images=2, inpaint=inpaint)
    assert "\n" not in str(caught.value)


def test_stages_refuse_other_sizes_counts_and_networks(inpainting: Cascade, tiny_cascade: Cascade) -> None:
    stage, text = inpainting.stages["base"], inpainting.encode(["a cat"] * 2)
    with pytest.raises(InputError, match="a picture of 8 x 8: expected 16 x 16, as is drawn"):
        stage.sample(text, inpaint=(picture(8), left(8, 3)))
    with pytest.raises(InputError, match="rows differ: text 2, inpaint 3"):
        stage.sample(text, inpaint=(picture(16, 3), left(16, 3)))
    with pytest.raises(InputError, match="stage base has no inpaint channels: expected no inpaint="):
        tiny_cascade.stages["base"].sample(text, inpaint=(picture(16), left(16, 3)))
    with pytest.raises(InputError, match="base, sr256, sr1024: no network has inpaint channels"):
        tiny_cascade("a cat", inpaint=(picture(64), left(64, 3)))


def test_one_mask_for_several_pictures() -> None:
    known = known_part((picture(4, rows=3), left(4, 2)))
    assert len(known) == 3 and known.mask.shape == (3, 1, 4, 4)
    assert known.channels().shape == (3, 4, 4, 4) and not known.channels()[:, :3, :, 2:].any()


def test_command(
    inpainting: Cascade,
    toy_encoders: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    model, out = tmp_path / "model", tmp_path / "out"
    inpainting.save_pretrained(model)
    given = to_pil(picture(32))[0]
    given.save(tmp_path / "a.png")
    Image.fromarray(left(32, 11)[0, 0].numpy()).save(tmp_path / "mask.png")
    argv = ["sample", "a cat", "--model", str(model), "--out", str(out), "--inpaint", str(tmp_path / "a.png")]
    assert main([*argv, "--mask", str(tmp_path / "mask.png")]) == 0
    with Image.open(next(out.iterdir())) as drawn:
        assert torch.equal(from_pil(drawn)[..., :11], from_pil(given)[..., :11])
    for more, words in (
        ([], "--inpaint and --mask: expected both"),
        (["--mask", str(tmp_path / "no.png")], "cannot read .*no.png: No such file"),
        (["--mask", str(model / "model_index.json")], "cannot read .*: not a whole picture"),
    ):
        capsys.readouterr()
        assert main([*argv, *more]) == 2
        import re

        assert re.search(words, capsys.readouterr().err)
