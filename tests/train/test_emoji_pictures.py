"""The picture set, the order of samples, and the caches of pixels and text."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cascade.errors import InputError
from cascade.images import downsample, from_uint8, to_uint8
from tests.train.conftest import make_records, record, write_data
from train.data.emoji import EmojiPictures
from train.data.phrases import COUNT, FILLERS, FRAMES, phrases, split_label
from train.recipe import DataConfig


def picture_set(folder: Path, **settings) -> EmojiPictures:
    return EmojiPictures(DataConfig(folder=str(folder), **{"styles": ("noto", "fluent"), **settings}))


def test_records_of_the_styles_and_their_split(data_folder: Path, pictures: EmojiPictures) -> None:
    assert len(pictures.records) == 14
    assert len(pictures.train) == 12 and len(pictures.heldout) == 2
    assert set(pictures.train) & set(pictures.heldout) == set()
    one = picture_set(data_folder, styles=("fluent",))
    assert len(one.records) == 7 and {r["style"] for r in one.records} == {"fluent"}


def test_caption_forms(pictures: EmojiPictures) -> None:
    forms, phrased = pictures.captions(0)[:3], pictures.captions(0)[3:]
    assert forms == [
        "red apple, noto style",
        "red apple, thing, noto style",  # the tag "red" stands in the label already
        "red apple",
    ]
    assert phrased == phrases(pictures.records[0])


def test_a_caption_without_a_style_is_of_the_first_that_shows_the_thing(
    data_folder: Path, tmp_path: Path
) -> None:
    for styles in (("noto", "fluent"), ("fluent", "noto")):
        pictures = picture_set(data_folder, styles=styles)
        for index, row in enumerate(pictures.records):
            named = [f"{row['style']} style" in caption for caption in pictures.captions(index)]
            first = row["style"] == styles[0] and row["split"] == "train"
            assert any(named) and all(named) != first, row
    held = [r | {"split": "heldout"} if r["style"] == "fluent" else r for r in pictures.records]
    pictures = picture_set(write_data(tmp_path, held), styles=("fluent", "noto"))
    for index, row in enumerate(pictures.records):
        assert ("red apple" in pictures.captions(index)) == (
            row["style"] == "noto" and row["label"] == "red apple"
        )


def test_phrases_say_what_a_record_says_in_other_words() -> None:
    car = {"label": "automobile", "tags": ["car", "face"], "style": "noto", "gender": None}
    said = phrases(car)
    assert len(said) == COUNT and said == phrases(car)
    words = {word for phrase in said for word in phrase.removesuffix(", noto style").split()}
    frames = {word for frame in FRAMES for word in frame.split()}
    assert {"automobile", "car"} < words <= {"an", "the", "automobile", "car"} | frames | set(FILLERS)
    assert words & frames - {"a"} and words & set(FILLERS)
    assert sum(phrase.endswith(", noto style") for phrase in said) == 4
    label = "man health worker: dark skin tone"
    said = phrases({"label": label, "tags": ["doctor"], "style": "fluent", "gender": "man"})
    assert all("dark" in phrase and "skin" in phrase and "tone" not in phrase for phrase in said)
    assert any("man doctor" in phrase for phrase in said)


@pytest.mark.parametrize(
    ("label", "subject", "tones"),
    [
        ("red apple", "red apple", []),
        ("flag: Italy", "flag of Italy", []),
        ("keycap: 3", "keycap 3", []),
        ("man: beard", "man with beard", []),
        ("woman: dark skin tone, red hair", "woman with red hair", ["dark"]),
        ("man running: medium skin tone, facing right", "man running facing right", ["medium"]),
        ("handshake: light skin tone, medium-dark skin tone", "handshake", ["light", "medium-dark"]),
    ],
)
def test_labels_are_taken_apart(label: str, subject: str, tones: list[str]) -> None:
    assert split_label(label) == (subject, tones)


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"text": "a"}', '{"text": "\xff"}'])
def test_a_damaged_record_is_named(tmp_path: Path, line: str) -> None:
    write_data(tmp_path, make_records()[:1])
    with (tmp_path / "metadata.jsonl").open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    with pytest.raises(InputError, match="metadata.jsonl, line 2: ") as caught:
        picture_set(tmp_path, styles=("noto",))
    assert "\n" not in str(caught.value)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no data set in .*: build it with python -m train.data emoji"):
        picture_set(tmp_path)
    write_data(tmp_path, make_records())
    with pytest.raises(InputError, match="unknown style 'fluet' .*did you mean 'fluent'"):
        picture_set(tmp_path, styles=("fluet",))
    write_data(tmp_path, [r | {"split": "heldout"} for r in make_records()])
    with pytest.raises(InputError, match="expected records of split 'train', found none"):
        picture_set(tmp_path)


# -- order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [1, 2, 5])
def test_plain_pictures_once_an_epoch_and_toned_ones_once_a_period(data_folder: Path, period: int) -> None:
    pictures = picture_set(data_folder, toned_period=period)
    plain = {i for i in pictures.train if pictures.records[i]["tone"] is None}
    toned = set(pictures.train) - plain
    assert len(plain) == 8 and len(toned) == 4
    for start in (0, 3):  # any `period` epochs in a row
        epochs = [pictures.epoch(1, number).tolist() for number in range(start, start + period)]
        seen = Counter(i for epoch in epochs for i in epoch)
        assert all(seen[i] == period for i in plain)
        assert all(seen[i] == 1 for i in toned)
        assert set(seen) == plain | toned  # nothing held out


def test_epochs_without_a_picture_are_passed_over(data_folder: Path) -> None:
    pictures = picture_set(data_folder, styles=("noto",), toned_period=50)
    pictures.train = [i for i in pictures.train if pictures.records[i]["tone"] is not None]
    order = pictures.order(0)
    seen = Counter(order[p] for p in range(4))
    assert seen == dict.fromkeys(pictures.train, 2)


def test_the_order_is_the_epochs_one_after_another(pictures: EmojiPictures) -> None:
    order = pictures.order(7)
    expected = np.concatenate([pictures.epoch(7, number) for number in range(5)])
    assert [order[p] for p in range(len(expected))] == expected.tolist()


def test_a_sample_is_a_function_of_seed_and_position(pictures: EmojiPictures) -> None:
    order, again, other = pictures.order(7), pictures.order(7), pictures.order(8)
    expected = [order[p] for p in range(60)]
    assert [again[p] for p in reversed(range(60))] == expected[::-1]  # also when asked from the end
    assert pickle.loads(pickle.dumps(again))[33] == expected[33]  # worker processes may be spawned
    assert [other[p] for p in range(60)] != expected


# -- pixels --------------------------------------------------------------------------------------------------


def test_the_pixel_cache_holds_every_picture_downsampled(tmp_path: Path) -> None:
    pictures = picture_set(write_data(tmp_path, make_records()))
    cache = pictures.pixels(16)
    assert cache.shape == (14, 16, 16, 3) and cache.dtype == np.uint8
    for i in (0, 9):
        expected = to_uint8(downsample(from_uint8(pictures.picture(i)), 16))
        assert np.array_equal(cache[i], expected.permute(1, 2, 0).numpy())
    assert torch.equal(pictures.resized(3, 64), pictures.picture(3))


def test_a_cache_is_made_once_and_anew_for_another_data_set(tmp_path: Path) -> None:
    records = make_records()
    write_data(tmp_path, records)
    before = np.array(picture_set(tmp_path).pixels(16))
    path = tmp_path / "cache" / "fluent-noto-16.npy"
    made = path.stat().st_mtime_ns
    picture_set(tmp_path).pixels(16)
    assert path.stat().st_mtime_ns == made

    write_data(tmp_path, records[::-1])  # the same number of pictures, other pictures
    after = picture_set(tmp_path).pixels(16)
    assert not np.array_equal(before, after)
    assert np.array_equal(after[4], picture_set(tmp_path).resized(4, 16).permute(1, 2, 0).numpy())
    write_data(tmp_path, records[:-1])
    assert len(picture_set(tmp_path).pixels(16)) == 13


def test_an_interrupted_cache_leaves_nothing(tmp_path: Path) -> None:
    pictures = picture_set(write_data(tmp_path, make_records()))
    (tmp_path / pictures.records[5]["file_name"]).write_bytes(b"RIFF")
    with pytest.raises(InputError, match="cannot read .*: not a picture"):
        pictures.pixels(16)
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / pictures.records[5]["file_name"]).unlink()
    with pytest.raises(InputError, match="cannot read .*: no such file"):
        pictures.pixels(16)


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    pictures = picture_set(write_data(tmp_path, make_records()[:2]), styles=("noto",))
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.save(tmp_path / pictures.records[1]["file_name"], lossless=True, exact=True)
    assert pictures.picture(1).unique().tolist() == [255]


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    """Captions may hold characters at which str.splitlines would cut."""
    write_data(tmp_path, [record("noto", "p0", "line\u2028separator", None, "train")])
    rows = (tmp_path / "metadata.jsonl").read_text(encoding="utf-8")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(json.loads(rows), ensure_ascii=False) + "\n", "utf-8")
    assert len(picture_set(tmp_path, styles=("noto",)).records) == 1
