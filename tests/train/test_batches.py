"""Batches: what a step consumes, keyed by position, at any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cascade import random
from cascade.images import downsample, from_uint8
from cascade.nn.guess import Guess
from cascade.text.pair import PairEncoder
from tests.conftest import EMBED, ToyEncoder
from train.batches import (
    Batch,
    Batches,
    ClipMaker,
    Maker,
    PriorMaker,
    StageMaker,
    best_crop,
    blended,
    conditioning_of,
    guess_part,
    text_batch,
)
from train.data.emoji import EmojiPictures
from train.data.pictures import PictureSet
from train.encoded import ImageStore, TextStore
from train.recipe import ORDER, Recipe

Tiny = Callable[..., Recipe]
Make = Callable[..., Maker]


class ToyClip(torch.nn.Module):
    """Mean colours of a grid of patches."""

    image_px = 16

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(EMBED))

    def encode_image(self, images: Tensor) -> Tensor:
        patches = torch.nn.functional.adaptive_avg_pool2d(images, (2, 3)).flatten(1)[:, :EMBED]
        return torch.nn.functional.pad(patches, (0, EMBED - patches.shape[1])) * self.scale


def toy_images(pictures: EmojiPictures) -> ImageStore:
    return ImageStore(pictures, ToyClip(), {"kind": "toy"}).prepare()  # type: ignore[arg-type]


@pytest.fixture
def make(tiny: Tiny, pictures: EmojiPictures, text: TextStore) -> Make:
    """`make(stage, settings...)`: the stage's maker."""
    images = toy_images(pictures)

    def build(stage: str, *settings: str) -> Maker:
        recipe = tiny(*settings)
        own = EmojiPictures(recipe.data)
        if stage == "clip":
            return ClipMaker(recipe, own, text)
        if stage == "prior":
            return PriorMaker(recipe, own, text, images)
        return StageMaker(recipe, stage, own, text, images if stage == "base" else None)

    return build


def batch_of(
    maker: Any, step: int, *, seed: int = 0, rank: int = 0, world: int = 1, stage: str = "base"
) -> Batch:
    data = Batches(maker, maker.train.batch, rank, world, seed, stage, 100)
    return maker.complete(data[step].open())


@pytest.mark.parametrize("stage", ORDER)
def test_a_step_is_the_same_at_any_number_of_processes(make: Make, stage: str) -> None:
    maker = make(stage)
    for step in (0, 5):
        whole = batch_of(maker, step)
        for world in (2, 4):
            parts = [batch_of(make(stage), step, rank=rank, world=world) for rank in range(world)]
            assert parts[0].keys() == whole.keys()
            for name, value in whole.items():
                for rank, part in enumerate(parts):
                    assert torch.equal(part[name], value[rank::world]), name


@pytest.mark.parametrize("stage", ORDER)
def test_a_step_repeats_and_others_differ(make: Make, stage: str) -> None:
    maker = make(stage)
    first, again, later = (batch_of(maker, step) for step in (3, 3, 4))
    seed, other = batch_of(maker, 3, seed=1), batch_of(maker, 3, stage="other")
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    for name in {"noise", "aug_noise", "aug_level", "t"} & first.keys():
        for different in (later, seed, other):
            assert not torch.equal(first[name], different[name]), name


def test_stages_see_the_samples_in_orders_of_their_own(make: Make) -> None:
    def order(stage: str, *settings: str) -> tuple[int, ...]:
        maker = make(stage, f"{stage}.train.crops_per_picture=1", *settings)
        return tuple(maker.samples(list(range(24))))

    assert len({order(stage) for stage in ORDER}) == len(ORDER)
    assert order("base", "seed=1") != order("base")


def test_a_batch_of_the_base_stage_is_the_records_it_names(make: Make, pictures: EmojiPictures) -> None:
    maker = make("base", "data.caption_weights=[0, 1, 0, 0]")
    assert maker.images is not None
    batch = batch_of(maker, 2)
    cache = pictures.pixels(16)
    assert cache is not None
    for row, sample in enumerate(maker.samples(list(range(16, 24)))):
        expected = from_uint8(torch.from_numpy(np.array(cache[sample])).permute(2, 0, 1))
        assert torch.equal(batch["x"][row], expected)
        assert torch.equal(batch["image_embed"][row], maker.images(sample))
        caption = ToyEncoder()([pictures.captions(sample)[1]]).sequences[0]
        assert torch.equal(batch["states0"][row], caption.states[0].half().float())
        assert torch.equal(batch["mask0"][row], caption.mask[0])


def frequency(flags: Tensor) -> float:
    return flags.double().mean().item()


def test_caption_forms_follow_their_weights(tiny: Tiny) -> None:
    pictures = EmojiPictures(tiny("data.caption_weights=[5, 3, 0, 2]").data)
    count = 3000
    drawn = [pictures.caption(7, seed) for seed in range(count)]
    named, tagged, label, *phrases = pictures.captions(7)
    assert set(drawn) == {named, tagged, *phrases} and label not in phrases
    for caption, share in ((named, 0.5), (tagged, 0.3), (phrases[0], phrases.count(phrases[0]) / 40)):
        deviation = (share * (1 - share) / count) ** 0.5
        assert abs(drawn.count(caption) / count - share) < 4 * deviation


def test_a_weight_of_zero_takes_a_form_out(tiny: Tiny) -> None:
    for form in range(3):
        weights = [float(i == form) for i in range(4)]
        pictures = EmojiPictures(tiny(f"data.caption_weights={weights}").data)
        assert {pictures.caption(2, seed) for seed in range(50)} == {pictures.captions(2)[form]}


def test_text_and_image_are_dropped_independently(make: Make) -> None:
    keep = make("base", "base.train.text_drop=0.5", "base.train.image_drop=0.2").keep(list(range(2000)))
    text, image = keep["keep_text"][:, 0], keep["keep_image"]
    assert abs(frequency(text) - 0.5) < 0.05 and abs(frequency(image) - 0.8) < 0.04
    assert abs(frequency(text & image) - 0.4) < 0.05
    none = make("base", "base.train.text_drop=0", "base.train.image_drop=0").keep(list(range(200)))
    assert none["keep_text"].all() and none["keep_image"].all()


def test_each_token_sequence_is_dropped_on_its_own(
    tiny: Tiny, pictures: EmojiPictures, monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    pair = PairEncoder([ToyEncoder(), ToyEncoder(8)])
    monkeypatch.setattr("train.encoded.load_text_encoder", lambda reference: pair)
    store = TextStore(pictures, {"kind": "pair"}).prepare()
    maker = StageMaker(tiny("base.train.text_drop=0.5"), "base", pictures, store, None)
    keep = maker.keep(list(range(2000)))["keep_text"]
    assert keep.shape == (2000, 2)
    assert abs(frequency(keep[:, 0] & keep[:, 1]) - 0.25) < 0.05
    alone = make("base", "base.train.text_drop=0.5").keep(list(range(2000)))["keep_text"]
    assert torch.equal(keep[:, :1], alone)  # one more encoder does not change the first one's draws

    batch = batch_of(maker, 0)
    cond = conditioning_of(batch, None)
    assert cond.text is not None and len(cond.text.sequences) == 2
    assert cond.text_keep is not None and cond.text_keep.shape == (8, 2)


@pytest.mark.parametrize("world", [1, 2])
def test_times_are_stratified_over_the_whole_batch(make: Make, world: int) -> None:
    maker = make("base")
    for step in (0, 7):
        t = torch.cat([batch_of(maker, step, rank=rank, world=world)["t"] for rank in range(world)])
        assert t.dtype == torch.float64
        assert (t.sort().values * 8).floor().tolist() == list(range(8))


# -- crops ---------------------------------------------------------------------------------------------------


def coordinates(side: int) -> Tensor:
    """A picture whose pixels say where they are."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8)


def test_crops_lie_on_the_low_resolution_grid_and_reach_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.batches.CROP_CANDIDATES", 1)
    picture, places = coordinates(64), set()
    for seed in range(300):
        crop = best_crop(picture, 48, 4, seed)
        assert crop.shape == (3, 48, 48)
        top, left = int(crop[0, 0, 0]), int(crop[1, 0, 0])
        assert torch.equal(crop, picture[:, top : top + 48, left : left + 48])
        assert torch.equal(crop, best_crop(picture, 48, 4, seed))
        places.add((top, left))
    assert places == {(4 * i, 4 * j) for i in range(5) for j in range(5)}


def test_the_crop_with_more_contrast_is_kept() -> None:
    picture = torch.full((3, 128, 128), 255, dtype=torch.uint8)
    picture[:, 64:] = torch.randint(0, 256, (3, 64, 128), generator=random.generator(0)).to(torch.uint8)
    flat = sum(bool((best_crop(picture, 32, 4, seed) == 255).all()) for seed in range(200))
    # one crop in three is all flat: nearly half of single draws would be, of the better of two a sixth
    alone = 9 / 25
    assert flat / 200 < alone**2 + 0.08


def test_a_crop_of_the_whole_picture_is_the_picture() -> None:
    assert torch.equal(best_crop(coordinates(64), 64, 4, 3), coordinates(64))


def test_the_crops_of_a_picture_follow_each_other(make: Make) -> None:
    maker = make("sr1024")
    samples = maker.samples(list(range(8)))
    assert samples[::2] == samples[1::2] and len(set(samples)) == 4


def windows(picture: Tensor, side: int) -> list[Tensor]:
    places = range(picture.shape[-1] - side + 1)
    return [picture[:, i : i + side, j : j + side] for i in places for j in places]


def test_the_lowres_of_a_crop_is_the_crop_of_the_lowres(make: Make, pictures: EmojiPictures) -> None:
    maker = make("sr1024", "sr1024.stage.augment.degrade_prob=0")
    batch = batch_of(maker, 1)
    assert batch["x"].shape == (8, 3, 32, 32) and batch["lowres"].shape == (8, 3, 16, 16)
    for row, sample in enumerate(maker.samples(list(range(8, 16)))):
        whole = from_uint8(pictures.picture(sample))  # 3 64 64
        assert any(torch.equal(batch["x"][row], w) for w in windows(whole, 32))
        assert any(torch.equal(batch["lowres"][row], w) for w in windows(downsample(whole, 32), 16))


def test_low_resolution_pictures_are_corrupted_in_their_shares(make: Make) -> None:
    maker = make("sr256", "sr256.stage.augment.blur_prob=0.5", "sr256.train.batch=64")
    batch = batch_of(maker, 0)
    clean = downsample(batch["x"], 16)
    same = (batch["lowres"] == clean).flatten(1).all(1)
    assert 16 < int(same.sum()) < 48
    assert 0 <= float(batch["aug_level"].min()) and 0.8 < float(batch["aug_level"].max()) < 1
    half = batch_of(make("sr256", "sr256.stage.augment.max_level=0.5", "sr256.train.batch=64"), 0)
    assert torch.allclose(half["aug_level"], batch["aug_level"] / 2)


def test_cached_and_decoded_pictures_are_the_same(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in ((), ("sr1024.train.crop_px=null",)):
        decoded = batch_of(make("sr1024", *settings), 2)
        with monkeypatch.context() as patch:
            patch.setattr("train.data.emoji.CACHED_PX", 64)
            cached = batch_of(make("sr1024", *settings), 2)
        assert all(torch.equal(cached[name], value) for name, value in decoded.items())


def test_pictures_larger_than_the_stage_are_downsampled(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage of 32 px whose pictures are decoded one by one sees whole pictures, not their corners."""
    cached = batch_of(make("sr256"), 0)
    monkeypatch.setattr("train.data.emoji.CACHED_PX", 16)
    assert torch.equal(batch_of(make("sr256"), 0)["x"], cached["x"])


def test_groups_are_equal_for_the_same_caption_alone(pictures: EmojiPictures) -> None:
    names = [(r["label"], r["style"]) for r in pictures.records]
    groups = [pictures.group(i) for i in range(len(names))]
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            assert (groups[i] == groups[j]) == (a == b)


GUESS = ["base.stage.unet.position_grid=16", "base.stage.unet.guess_width=8", "base.train.guess_batch=16"]


def test_a_guess_learns_from_the_same_pictures_at_any_number_of_processes(make: Make) -> None:
    whole = batch_of(make("base", *GUESS), 3)
    parts = [batch_of(make("base", *GUESS), 3, rank=rank, world=2) for rank in range(2)]
    for name in [n for n in whole if n.startswith("guess_")]:
        rows = [p[name].unflatten(0, (-1, 2)) for p in parts]  # two a position
        assert torch.equal(torch.stack(rows, dim=1).flatten(0, 2), whole[name]), name
    assert len(whole["guess_x"]) == 2 * len(whole["x"])
    assert not torch.equal(whole["guess_x"][: len(whole["x"])], whole["x"])


def test_a_fine_network_learns_the_same_at_any_number_of_processes(make: Make) -> None:
    settings = ["base.stage.unet.patch=4", "base.stage.unet.fine_channels=[8, 8]"]
    whole = batch_of(make("base", *settings), 3)
    parts = [batch_of(make("base", *settings), 3, rank=rank, world=2) for rank in range(2)]
    for name in ("fine_noise", "fine_draws"):
        assert torch.equal(torch.stack([p[name] for p in parts], dim=1).flatten(0, 1), whole[name]), name
    assert not torch.equal(whole["fine_noise"], whole["noise"])
    assert "fine_noise" not in batch_of(make("base"), 3)


def test_a_guess_is_told_the_mean_token_which_is_all_it_takes(make: Make, pictures: EmojiPictures) -> None:
    maker = make("base", *GUESS, "data.caption_weights=[1, 0, 0, 0]", "base.train.image_noise=0")
    assert isinstance(maker, StageMaker)
    part = guess_part(batch_of(maker, 3))
    assert part["states0"].shape[1] == 1 and part["mask0"].all()
    texts = [pictures.captions(s)[0] for s in maker.samples(list(range(48, 64)))]
    torch.manual_seed(0)
    guess = Guess(maker.cfg.unet)
    found = guess(conditioning_of(part, None), 16)
    expected = guess(conditioning_of(part | text_batch(maker.text(texts)), None), 16)
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(found[0], found[1], atol=1e-3)


def test_image_noise_is_of_the_embeddings_own_scale(make: Make) -> None:
    clean, noised = (batch_of(make("base", *GUESS, f"base.train.image_noise={n}"), 3) for n in (0.0, 0.5))
    assert "embed_noise" not in noised
    for name in ("image_embed", "guess_image_embed"):
        gap = (noised[name] - clean[name]) * EMBED**0.5 / 0.5  # unit Gaussian
        assert gap.mean().abs() < 0.3 and 0.8 < gap.std() < 1.2, name
        assert not torch.equal(gap[0], gap[1])


def test_a_blended_embedding_lies_between_its_own_and_one_of_the_likest() -> None:
    turn = torch.arange(40) * 0.05  # angles on a circle
    others = torch.stack([turn.cos(), turn.sin()], dim=1)
    near = torch.tensor([0.0, 0.999])  # of picture 0: the next, at 0.05, and the sixteenth, at 0.8
    for far in (0.25, 0.999):
        # of length 3, as not every CLIP's are unit vectors
        found = blended(
            3 * others[:1].expand(2, 2), others, torch.stack([near, torch.full((2,), far)], dim=1)
        )
        for row, angle in zip(found, (0.05, 0.8), strict=True):
            chord = torch.lerp(others[0], torch.tensor([np.cos(angle), np.sin(angle)]).float(), far)
            torch.testing.assert_close(row, 3 * chord / chord.norm(), atol=1e-5, rtol=0)
    alone = blended(others[:3], others, torch.tensor([[0.5, 0.0]]).expand(3, 2))
    assert torch.equal(alone, others[:3])


def test_what_is_told_a_blended_embedding_is_told_its_text(make: Make) -> None:
    plain = batch_of(make("base", *GUESS, "base.train.image_noise=0"), 3)
    setting = "base.train.image_blend=0.5"
    batch = batch_of(make("base", *GUESS, "base.train.image_noise=0", setting), 3)
    for part in ("", "guess_"):
        moved = (batch[f"{part}image_embed"] != plain[f"{part}image_embed"]).any(1)  # B
        assert 0 < moved.sum() < len(moved)
        assert batch[f"{part}keep_text"][moved].all()
        for name in ("x", "keep_image"):
            assert torch.equal(batch[part + name], plain[part + name]), name
        assert torch.equal(batch[f"{part}keep_text"][~moved], plain[f"{part}keep_text"][~moved])
    parts = [batch_of(make("base", "base.train.image_noise=0", setting), 3, rank=r, world=2) for r in (0, 1)]
    rows = torch.stack([p["image_embed"] for p in parts], dim=1).flatten(0, 1)
    torch.testing.assert_close(rows, batch["image_embed"], atol=1e-5, rtol=0)


def weights_of_siblings(maker: Maker, sample: int, embed: Tensor) -> dict[int, float]:
    """What each picture of the sample's subject adds to an embedding that is a mean over them."""
    assert maker.images is not None
    places = maker.pictures.siblings(sample)
    assert sample in places and all(p in maker.pictures.train for p in places)
    rows = torch.stack([maker.images(p).float() for p in places])
    weights = torch.linalg.lstsq(rows.T, embed[:, None].float()).solution[:, 0]
    torch.testing.assert_close(weights @ rows, embed.float(), atol=2e-3, rtol=0)
    return dict(zip(places, weights.tolist(), strict=True))


def test_a_base_is_told_a_mean_over_the_other_pictures_of_a_subject(make: Make) -> None:
    settings = ("base.train.image_noise=0", "base.train.image_siblings=0.6")
    maker, plain = make("base", *GUESS, *settings), batch_of(make("base", *GUESS, settings[0]), 3)
    batch = batch_of(maker, 3)
    mixed = 0
    for part, positions in (("", range(24, 32)), ("guess_", range(48, 64))):
        samples = maker.read_at(list(positions))
        for row, sample in enumerate(samples):
            found, own = batch[f"{part}image_embed"][row], plain[f"{part}image_embed"][row]
            assert found.norm() == pytest.approx(float(own.norm()), abs=1e-3)
            if torch.equal(found, own):
                continue
            mixed += 1
            assert batch[f"{part}keep_text"][row].all()
            weights = weights_of_siblings(maker, sample.index, found)
            assert abs(weights.pop(sample.index)) < 0.01 and all(w > 0 for w in weights.values())
        for name in ("x", "keep_image"):
            assert torch.equal(batch[part + name], plain[part + name]), name
    assert 0 < mixed < 24
    halves = [batch_of(make("base", *settings), 3, rank=r, world=2) for r in (0, 1)]
    rows = torch.stack([h["image_embed"] for h in halves], dim=1).flatten(0, 1)
    assert torch.equal(rows, batch["image_embed"])


def test_where_no_subject_has_several_pictures_nothing_changes(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmojiPictures, "siblings", PictureSet.siblings)
    plain, batch = (batch_of(make("base", *GUESS, f"base.train.image_siblings={s}"), 3) for s in (0, 1))
    assert plain.keys() == batch.keys()
    assert all(torch.equal(plain[name], batch[name]) for name in plain)


def test_a_prior_is_asked_for_means_over_siblings(make: Make) -> None:
    settings = ["prior.model.guess_width=8", "prior.train.guess_batch=16"]
    plain = batch_of(make("prior", *settings), 3)
    maker = make("prior", *settings, "prior.train.image_siblings=1")
    batch = batch_of(maker, 3)
    for sample, embed in zip(maker.samples(list(range(24, 32))), batch["image_embed"], strict=True):
        assert all(w > 0 for w in weights_of_siblings(maker, sample, embed).values())
    for part in ("", "guess_"):
        assert not torch.equal(batch[f"{part}image_embed"], plain[f"{part}image_embed"])
        assert torch.equal(batch[f"{part}states0"], plain[f"{part}states0"])
        assert part or torch.equal(batch["keep_text"], plain["keep_text"])


@pytest.mark.parametrize("blend", [0.0, 0.5])
def test_of_a_variant_only_its_own_embedding_is_told(make: Make, blend: float) -> None:
    settings = (*GUESS, "base.train.image_noise=0", f"base.train.image_blend={blend}")
    plain = batch_of(make("base", *settings), 3)
    maker = make("base", *settings, "base.train.vary=0.5")
    assert isinstance(maker, StageMaker) and maker.images is not None
    batch = batch_of(maker, 3)
    for part in ("", "guess_"):
        varied = (batch[f"{part}x"] != plain[f"{part}x"]).flatten(1).any(1)  # B
        assert 0 < varied.sum() < len(varied)
        assert not batch[f"{part}keep_text"][varied].any() and batch[f"{part}keep_image"][varied].all()
        embeds = maker.images.clip.encode_image(batch[f"{part}x"][varied])
        torch.testing.assert_close(batch[f"{part}image_embed"][varied], embeds, atol=2e-3, rtol=0)
        for name in ("x", "keep_text", "keep_image", "image_embed"):
            assert torch.equal(batch[part + name][~varied], plain[part + name][~varied]), name


def test_variants_are_the_same_at_any_number_of_processes(make: Make) -> None:
    setting = "base.train.vary=0.5"
    whole = batch_of(make("base", setting), 3)
    parts = [batch_of(make("base", setting), 3, rank=rank, world=2) for rank in range(2)]
    for name in ("x", "image_embed", "keep_text"):
        rows = torch.stack([p[name] for p in parts], dim=1).flatten(0, 1)
        torch.testing.assert_close(rows, whole[name], atol=1e-5, rtol=0)
