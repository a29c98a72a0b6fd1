"""Stage.sample: a picture depends on its own text, seed and input alone; what cannot be is refused."""

from __future__ import annotations

import math

import pytest
import torch

from cascade.augment import condition_lowres, upsample
from cascade.conditioning import TextEmbedding
from cascade.config import AugmentConfig, DiffusionConfig, SamplingConfig, StageConfig, UNetConfig
from cascade.errors import InputError
from cascade.pipeline import Cascade
from cascade.random import seed_list
from cascade.stage import Stage, resolve_settings
from tests.conftest import EMBED, ToyEncoder, tiny_stage

PROMPTS = ["a red apple", "a blue car", "two green leaves", "a cat"]


@pytest.fixture(scope="module")
def base(tiny_cascade: Cascade) -> Stage:
    return tiny_cascade.stages["base"]


@pytest.fixture(scope="module")
def sr(tiny_cascade: Cascade) -> Stage:
    return tiny_cascade.stages["sr256"]


def encode(prompts: list[str]) -> TextEmbedding:
    return ToyEncoder()(prompts)


def embeds(count: int) -> torch.Tensor:
    return torch.randn(count, EMBED, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun"])
def test_a_picture_is_the_same_bits_alone_and_in_a_batch(base: Stage, sampler: str) -> None:
    text, embed = encode(PROMPTS), embeds(4)
    batch = base.sample(text, image_embed=embed, seed=3, sampler=sampler)
    for i in range(4):
        alone = base.sample(text[i : i + 1], image_embed=embed[i : i + 1], seed=3 + i, sampler=sampler)
        assert torch.equal(alone[0], batch[i])


def test_the_order_of_the_batch_does_not_matter(sr: Stage) -> None:
    text, lowres, order = encode(PROMPTS), torch.rand(4, 3, 16, 16) * 2 - 1, [2, 0, 3, 1]
    seeds = [9, 8, 7, 6]
    batch = sr.sample(text, lowres=lowres, seed=seeds, aug_level=0.3)
    other = sr.sample(text[order], lowres=lowres[order], seed=[seeds[i] for i in order], aug_level=0.3)
    assert torch.equal(batch[order], other)


def test_the_micro_batch_changes_rounding_only(sr: Stage) -> None:
    text, lowres = encode(PROMPTS), torch.rand(4, 3, 16, 16) * 2 - 1
    one, three = (sr.sample(text, lowres=lowres, seed=1, micro_batch=n) for n in (1, 3))
    torch.testing.assert_close(one, three, atol=1e-4, rtol=0)


def test_every_input_shows_in_the_picture(base: Stage, sr: Stage) -> None:
    text, embed, lowres = encode(PROMPTS[:1]), embeds(2), torch.rand(2, 3, 16, 16) * 2 - 1
    reference = base.sample(text, image_embed=embed[:1], seed=1)
    assert not torch.equal(reference, base.sample(text, image_embed=embed[:1], seed=2))
    assert not torch.equal(reference, base.sample(encode(["a cat"]), image_embed=embed[:1], seed=1))
    assert not torch.equal(reference, base.sample(text, image_embed=embed[1:], seed=1))
    assert not torch.equal(
        reference, base.sample(text, image_embed=embed[:1], seed=1, negative=encode(["a car"]))
    )
    reference = sr.sample(text, lowres=lowres[:1], seed=1)
    assert not torch.equal(reference, sr.sample(text, lowres=lowres[1:], seed=1))
    assert not torch.equal(reference, sr.sample(text, lowres=lowres[:1], seed=1, aug_level=0.5))


def test_pictures_are_float32_in_range_and_training_mode_comes_back(base: Stage) -> None:
    base.train()
    picture = base.sample(encode(PROMPTS[:1]), image_embed=embeds(1), threshold="none")
    assert base.training and picture.dtype == torch.float32 and picture.abs().max() <= 1
    assert not picture.requires_grad
    base.eval()


def test_guidance_of_one_runs_the_condition_alone(base: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    forward = type(base.unet).forward

    def count(self, x, time, cond):
        rows.append(len(x))
        return forward(self, x, time, cond)

    monkeypatch.setattr(type(base.unet), "forward", count)
    base.sample(encode(PROMPTS[:1]), image_embed=embeds(1), guidance=1.0, steps=3)
    base.sample(encode(PROMPTS[:1]), image_embed=embeds(1), guidance=3.0, steps=2)
    base.sample(seed=1, guidance=3.0, steps=1)  # no condition, nothing to guide by
    assert rows == [1, 1, 1, 2, 2, 1]


def test_a_negative_prompt_equal_to_the_prompt_undoes_guidance_by_text() -> None:
    stage = tiny_stage("base", 16, image_embed_dim=None)
    text = encode(PROMPTS[:2])
    plain = stage.sample(text, guidance=1.0)
    torch.testing.assert_close(stage.sample(text, guidance=5.0, negative=text), plain, atol=1e-4, rtol=0)
    assert not torch.allclose(stage.sample(text, guidance=5.0), plain, atol=1e-3)


def test_lowres_reaches_the_network_as_training_makes_it(sr: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage adds nothing of its own to `augment.condition_lowres`."""
    seen = []
    prepare = type(sr.unet).prepare
    monkeypatch.setattr(type(sr.unet), "prepare", lambda self, c, b: (seen.append(c), prepare(self, c, b))[1])
    lowres = torch.rand(1, 3, 16, 16) * 2 - 1
    sr.sample(encode(PROMPTS[:1]), lowres=lowres, aug_level=0.0)
    assert sr.config.augment is not None
    zero = torch.zeros(1)
    expected = condition_lowres(lowres, (32, 32), sr.config.augment, zero, torch.zeros(1, 3, 32, 32))
    assert torch.equal(seen[0].lowres, expected) and torch.equal(seen[0].aug_level, zero)
    assert seen[1].text is None and torch.equal(seen[1].lowres, expected)  # unconditional in text only


def test_a_stage_without_a_learned_null_needs_the_encoded_empty_prompt() -> None:
    stage = tiny_stage("base", 16, learned_null=False)
    text, embed = encode(PROMPTS[:1]), embeds(1)
    with pytest.raises(InputError, match="learned null"):
        stage.sample(text, image_embed=embed, guidance=2.0)
    assert stage.sample(text, image_embed=embed, guidance=2.0, negative=encode([""])).shape == (1, 3, 16, 16)


def test_any_size_the_network_allows(base: Stage, sr: Stage) -> None:
    assert base.sample(encode(PROMPTS[:1]), image_embed=embeds(1), size=(12, 20)).shape == (1, 3, 12, 20)
    lowres = torch.zeros(1, 3, 12, 20)
    assert sr.sample(encode(PROMPTS[:1]), lowres=lowres).shape == (1, 3, 24, 40)
    assert sr.sample(encode(PROMPTS[:1]), lowres=lowres, size=(36, 60)).shape == (1, 3, 36, 60)


def test_steps_are_counted_over_micro_batches(base: Stage) -> None:
    calls: list[tuple[int, int, int, range]] = []
    base.sample(
        encode(PROMPTS[:3]),
        image_embed=embeds(3),
        micro_batch=2,
        on_step=lambda step, total, x0, rows: calls.append((step, total, len(x0), rows)),
    )
    assert calls == [(1, 4, 2, range(2)), (2, 4, 2, range(2)), (3, 4, 1, range(2, 3)), (4, 4, 1, range(2, 3))]


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_the_last_steps_see_the_estimate_before_them(
    base: Stage, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four steps, two so: nothing changes before them; there x_t is alpha times the estimate before, at
    the step's own level, and the last estimate is the picture. More than all is all but the first."""
    asked, real = [], base.denoiser.with_variance

    def watched(x_t: torch.Tensor, logsnr: torch.Tensor, cond: object) -> tuple:
        found = real(x_t, logsnr, cond)
        asked.append((x_t, logsnr, found[0].clamp(-1, 1)))
        return found

    monkeypatch.setattr(base.denoiser, "with_variance", watched)
    told = dict(text=encode(PROMPTS[:2]), image_embed=embeds(2), micro_batch=2, guidance=1.0, steps=4)
    base.sample(**told, sampler=sampler)
    plain, asked = asked, []
    picture = base.sample(**told, sampler=sampler, noise_free_steps=2)
    assert [torch.equal(a[1], b[1]) for a, b in zip(asked, plain, strict=True)] == [True] * 4
    assert all(torch.equal(a[0], b[0]) for a, b in zip(asked[:2], plain[:2], strict=True))
    for before, after in zip(asked[1:], asked[2:], strict=False):
        alpha = after[1].sigmoid().sqrt().float()[:, None, None, None]
        assert torch.allclose(after[0], alpha * before[2], atol=1e-6)
    assert torch.allclose(picture, asked[-1][2], atol=1e-6)
    most, more = (base.sample(**told, sampler=sampler, noise_free_steps=n) for n in (3, 9))
    assert torch.equal(most, more) and not torch.equal(most, picture)


BAD = [
    (dict(stepz=3), "unknown setting 'stepz' in stage base.*did you mean 'steps'"),
    (dict(sampler="dpm"), "unknown value 'dpm'"),
    (dict(guidance=math.nan), "guidance: expected a number, got nan"),
    (dict(guidance=math.inf), "guidance: expected a finite number"),
    (dict(guidance="strong"), "guidance: expected a number"),
    (dict(steps=0), "steps: expected an integer from 1"),
    (dict(steps=2.5), "steps: expected int"),
    (dict(eta=-1), "eta: expected"),
    (dict(guidance_interval=(0.8, 0.2)), "guidance_interval: expected"),
    (dict(guidance_rescale=2), "guidance_rescale"),
    (dict(threshold_percentile=0), "threshold_percentile"),
    (dict(threshold_cap=0.5), "threshold_cap"),
    (dict(noise_free_steps=-1), "noise_free_steps: expected an integer of at least 0"),
    (dict(noise_free_steps=0.5), "noise_free_steps: expected int"),
    (dict(flatten_rounds=0), "flatten_rounds: expected an integer of at least 1"),
    (dict(flatten=-0.1), "flatten: expected a number from 0 to 1"),
    (dict(aug_level=0.1), "aug_level: expected 0"),
    (dict(size=(63, 64)), "height 63 .* multiple of 2, the nearest is 64"),
    (dict(size=(64, 0)), "width 0 .* nearest is 2"),
    (dict(seed=-1), "seed -1: expected 0 to .* nearest is 0"),
    (dict(seed=2**63), "seed"),
    (dict(seed=[1, 2]), "rows differ"),
    (dict(seed=["x"]), "seed 'x': expected an integer"),
    (dict(lowres=torch.zeros(1, 3, 8, 8)), "starts from noise"),
    (dict(image_embed=torch.zeros(1, 3)), "image_embed of stage base: expected shape"),
    (dict(image_embed=torch.zeros(2, EMBED)), "rows differ: text 1, image_embed 2"),
    (dict(negative=ToyEncoder()(["a", "b"])), "negative prompt: expected 1 or 1 rows, got 2"),
    (dict(text=ToyEncoder(8)(["a"])), r"trained on token widths \[24\], the text encoder gives \[8\]"),
    (dict(micro_batch=0), "micro_batch"),
    (dict(text="a cat"), "expected encoded prompts, from Cascade.encode, got 'a cat'"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=[next(iter(a)) + str(i) for i, (a, _) in enumerate(BAD)]
)
def test_bad_input_is_one_line(base: Stage, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        base.sample(**{"text": encode(PROMPTS[:1]), **arguments})
    assert "\n" not in str(error.value)


def test_bad_lowres_is_refused(sr: Stage) -> None:
    for lowres, message in [
        (None, "needs lowres="),
        (torch.zeros(3, 8, 8), "expected shape"),
        (torch.zeros(1, 1, 8, 8), "expected shape"),
    ]:
        with pytest.raises(InputError, match=message):
            sr.sample(encode(PROMPTS[:1]), lowres=lowres)


def test_seed_list() -> None:
    assert seed_list(7, 3) == [7, 8, 9]
    assert seed_list([5, 5], 2) == [5, 5]
    with pytest.raises(InputError, match="expected one integer or 2"):
        seed_list([1], 2)
    for wrong in (True, "7", 1.5, None, [True]):
        with pytest.raises(InputError, match="expected an integer"):
            seed_list(wrong, 1)  # type: ignore[arg-type]


def test_settings_replace_the_defaults_and_keep_the_rest(base: Stage) -> None:
    chosen = resolve_settings(base.config, {"steps": 7})
    assert chosen.steps == 7 and chosen.guidance == base.config.sampling.guidance


def test_a_residual_stage_starts_from_its_enlarged_input() -> None:
    """With an untrained network (zero output) and EDM preconditioning the residual stays small."""
    network = UNetConfig(
        channels=(16,),
        blocks=(1,),
        strides=(1,),
        self_attention=(False,),
        text_attention=(False,),
        lowres_channels=3,
    )
    stage = Stage(
        StageConfig(
            name="sr",
            image_px=32,
            lowres_px=8,
            unet=network,
            diffusion=DiffusionConfig(prediction="edm", sigma_data=0.05),
            augment=AugmentConfig(residual=True),
            sampling=SamplingConfig(steps=20),
        )
    )
    lowres = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    seen: list[torch.Tensor] = []
    out = stage.sample(lowres=lowres, seed=0, on_step=lambda step, total, x0, rows: seen.append(x0))
    apart = out - upsample(lowres, (32, 32))
    assert 0 < apart.std() < 0.1
    assert (seen[-1] - out).abs().max() < 0.2  # previews are pictures, not residuals
