"""eval.judge: distances of sets that are known, networks on features that are known, and the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade import Cascade, random
from cascade.images import downsample, from_uint8, save_png, to_pil, to_uint8
from eval.captioned import Record, draw, load_picture, read_records
from eval.extractors.base import Extractor
from eval.extractors.vision import EfficientNetLite0
from eval.judge import __main__ as command
from eval.judge import features, measures, networks
from eval.judge import run as judging
from eval.judge.features import COLOURS, FINAL, HEADS, LEVELS, PIXELS, PooledLayers
from eval.judge.networks import Classifier, Matcher, Training, trained
from eval.judge.pictures import Workshop, data_sha256
from eval.judge.table import markdown
from tests.conftest import ToyEncoder

QUICK = Training(width=16, epochs=2, batch=32)
LEARNING = Training(width=64, epochs=60, batch=128, lr=3e-3, weight_decay=0.01, dropout=0.0, noise=0.05)
COUNT = 64  # pictures of each split
CPU = torch.device("cpu")


# -- features ------------------------------------------------------------------------------------------------


def test_rows_begin_with_the_features_of_distances_and_end_in_pixels() -> None:
    picture = random.normal((3, 128, 128), [0], "picture")[0].mul(0.3).clamp(-1, 1)
    look, plain = PooledLayers(64), EfficientNetLite0()
    for extractor in (look, plain):
        extractor.to("cpu")
    small = from_uint8(to_uint8(downsample(picture, 64)))  # as a file of 64 px would hold it
    (row,) = look.encode([look.prepare(picture)], [""])
    (expected,) = plain.encode([plain.prepare(small)], [""])
    assert torch.equal(row[FINAL], expected)
    assert torch.equal(row, look.encode([look.prepare(small)], [""])[0])
    assert len(row) == PIXELS.stop and FINAL.stop < COLOURS.start < COLOURS.stop == HEADS.stop == PIXELS.start
    assert COLOURS.stop - COLOURS.start == LEVELS**3
    flat = torch.full((3, 64, 64), 0.5), torch.full((3, 64, 64), -0.5)
    bright, dark = look.encode([look.prepare(x) for x in flat], ["", ""])[:, PIXELS]
    assert torch.allclose(bright - dark, torch.full((3 * features.PIXELS_PX**2,), 0.5), atol=1 / 255)
    assert torch.allclose(row[COLOURS].square().sum(), torch.ones(()), atol=1e-4)
    assert look.fingerprint() != plain.fingerprint() != PooledLayers(32).fingerprint()


def test_colours_are_counted_around_their_own() -> None:
    half = torch.tensor([0.5, 0.0, 1.0])[:, None, None].expand(3, 4, 4).clone()
    half[:, :, 0] = torch.tensor([1 / 16, 0.0, 1.0])[:, None]  # a quarter, half-way between two levels of red
    found = features.histogram(half[None])[0].unflatten(0, (LEVELS,) * 3)
    assert found[:, 0, 8].tolist() == [0.125, 0.125, 0, 0, 0.75, 0, 0, 0, 0] and found.sum() == 1


# -- measures ------------------------------------------------------------------------------------------------


def test_frechet_compares_at_equal_counts() -> None:
    real = random.normal((4,), range(400), "real")
    same = measures.frechet(real, real[:150], None)
    assert same["ratio"] == pytest.approx(1) and same["drawn_equal"] == same["floor_equal"] > 0
    assert [same[name] for name in ("count", "real_count", "equal_count", "half_count")] == [
        150,
        400,
        150,
        200,
    ]
    assert 0 < same["floor_half"] < same["floor_equal"], "more pictures, less bias"
    moved = measures.frechet(real, real[:300] + 2, real[:300] + 1)
    assert moved["equal_count"] == 200 and "half_count" not in moved
    apart = real[:200].mean(dim=0) - real[200:].mean(dim=0)
    for name, shift in (("drawn_equal", 2.0), ("enlarged_equal", 1.0)):
        expected = moved["floor_equal"] + ((apart + shift).square() - apart.square()).sum().item()
        assert moved[name] == pytest.approx(expected, rel=1e-4)  # moving a set changes its mean alone
    assert moved["ratio"] == pytest.approx(moved["drawn_equal"] / moved["floor_equal"])


def test_neighbours_find_copies() -> None:
    train = torch.arange(200.0)[:, None].repeat(1, 4) * 10
    sets = {
        "real, held out": train[:100] + torch.linspace(1, 4, 100)[:, None],
        "drawn, seen": train[:50] + torch.cat([torch.zeros(10), torch.full((40,), 4.0)])[:, None],
        "drawn, held out": train[:20] + 10 + 3.0,
    }
    found = measures.neighbours(train, sets)
    assert found["training, to the others"]["quantiles"]["0.5"] == 10
    assert found["real, held out"]["quantiles"]["0.5"] == pytest.approx(2.5, abs=1e-2)
    assert found["real, held out"]["near"]["hits"] == 1  # of a hundred
    assert found["drawn, seen"]["near"]["hits"] == 10 and found["drawn, seen"]["own"]["share"] == 1
    assert found["drawn, held out"]["near"]["hits"] == 0 and "own" not in found["drawn, held out"]
    assert found["drawn, held out"]["quantiles"]["0.01"] == pytest.approx(3, abs=1e-2)


def test_matches_are_picked_among_64() -> None:
    unit = torch.eye(150)
    ranks, best = measures.matches(unit, unit)
    assert ranks.tolist() == [0] * 150 and best.tolist() == list(range(150))
    pictures = unit.clone()
    pictures[3], pictures[140] = unit[40], unit[90]  # of other captions among the same 64
    pictures[5] = unit[140]  # of none among them: all tie
    ranks, best = measures.matches(pictures, unit)
    assert ranks[3] == 63 and best[3] == 40 and ranks[5] == 63
    assert ranks[140] > 0 and best[140] == 90, "the last ones are judged among the last 64"
    assert (ranks > 0).sum() == 3
    assert measures.hits(ranks == 0)["share"] == pytest.approx(147 / 150)


def test_attributes_count_only_what_a_picture_has() -> None:
    classes = {"style": ["a", "b"], "tone": ["dark", "light", "medium"]}
    records = [
        Record(Path("0"), "", "train", {"style": "a", "tone": "dark"}),
        Record(Path("1"), "", "train", {"style": "b", "tone": "light"}),
        Record(Path("2"), "", "train", {"style": "b", "tone": "dark+light"}),  # two people
        Record(Path("3"), "", "train", {"style": "b", "tone": "medium"}),
    ]
    assert networks.classes_of(records, ["style", "tone", "gender"]) == classes
    labels = networks.labels_of(records, classes)
    assert labels.tolist() == [[0, 0], [1, 1], [1, networks.IGNORED], [1, 2]]
    style, tone = torch.eye(2)[[0, 1, 1, 0]], torch.eye(3)[[0, 2, 0, 2]]
    found = measures.attributes([style, tone], labels, classes)
    assert (found["style"]["hits"], found["style"]["count"]) == (3, 4)
    assert (found["tone"]["hits"], found["tone"]["count"]) == (2, 3)
    assert found["tone"]["taken_for"]["light"] == {"dark": 0, "light": 0, "medium": 1}
    assert found["style"]["low"] < 3 / 4 < found["style"]["high"]


# -- networks ------------------------------------------------------------------------------------------------


def test_captions_are_pooled_over_their_own_tokens() -> None:
    captions = ["a red cat", "a dog"]
    rows = networks.caption_rows(ToyEncoder(), captions)
    for row, caption in zip(rows, captions, strict=True):
        states = torch.stack([random.normal((24,), [0], word)[0] for word in ["<start>", *caption.split()]])
        assert torch.allclose(row, torch.cat([states.mean(dim=0), states.amax(dim=0)]), atol=1e-6)


def mixed(count: int, width: int, what: str) -> Tensor:
    """Rows of one hidden cause a row, seen through a fixed random map, with other scales and offsets."""
    causes = random.normal((8,), range(count), "cause")
    return causes @ random.normal((width,), range(8), what) * 3 + 7


def test_matcher_learns_what_belongs_together_and_is_kept(tmp_path: Path) -> None:
    pictures, captions = mixed(600, 20, "pictures"), mixed(600, 12, "captions")
    before = torch.random.get_rng_state()

    def make(file: str, rows: int = 500) -> Matcher:
        data = lambda: (pictures[:rows], captions[:rows])  # noqa: E731
        path = tmp_path / file / "m.safetensors"
        return trained(lambda: Matcher(20, 12, LEARNING), data, LEARNING, path, CPU)

    judge = make("a")
    assert torch.equal(torch.random.get_rng_state(), before), "randomness of others is left alone"
    unit = judge.encode(pictures[500:], captions[500:])
    ranks, _ = measures.matches(*unit)
    assert (ranks == 0).float().mean() > 0.9, "rows that it has not seen"
    again, kept = make("b"), make("a", rows=0)  # what it was kept as needs no data
    for other in (again, kept):
        assert all(
            torch.equal(a, b)
            for a, b in zip(other.encode(pictures, captions), judge.encode(pictures, captions), strict=True)
        )
    (tmp_path / "a" / "m.safetensors").write_bytes(b"damaged")
    assert torch.equal(make("a").scale, judge.scale)


def test_classifier_learns_an_attribute(tmp_path: Path) -> None:
    rows, labels = mixed(600, 20, "pictures"), random.normal((8,), range(600), "cause")[:, 1:4].argmax(dim=1)
    file = tmp_path / networks.file_name("x", LEARNING, "data")
    data = rows[:500], labels[:500]
    judge = trained(lambda: Classifier(20, 3, LEARNING), lambda: data, LEARNING, file, CPU)
    assert (judge(rows[500:]).argmax(dim=1) == labels[500:]).float().mean() > 0.85
    names = {networks.file_name("c", c, s) for c in (LEARNING, QUICK) for s in ("one", "other")}
    assert len(names) == 4, "other data and other settings, another file"


# -- pictures ------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pictures of 64 px in three colours by tone and a corner mark by style; every second one of a grid."""
    folder, lines = tmp_path / "data", []
    for split in ("train", "heldout"):
        for k in range(COUNT if split == "heldout" else 2 * COUNT):
            pixels = random.normal((3, 8, 8), [k], split)[0].mul(0.2) + (k % 3 - 1) / 2
            pixels[:, :2, :2] = k % 2 * 2 - 1
            name = f"{split}-{k:03d}.png"
            save_png(to_pil(F.interpolate(pixels[None], scale_factor=8))[0], folder / name)
            row = {"file_name": name, "text": f"{split} number {k}", "split": split, "tags": ["x"]}
            row |= {"style": "ab"[k % 2], "tone": ("dark", "light", "medium")[k % 3], "gender": None}
            lines.append(row | {"cell": f"cell {k}" if k % 2 else None})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_attributes_of_records_are_their_texts(data: Path) -> None:
    first, second = read_records(data)[:2]
    assert first.attributes == {"style": "a", "tone": "dark"}
    assert second.attributes == {"style": "b", "tone": "light", "cell": "cell 1"}
    kinds = judging.kinds([first, second])
    assert kinds["tone x gender x base"].tolist() == [False, True] and list(kinds)[0] == "all"


def test_a_drawn_picture_depends_on_caption_and_seed_alone(
    tiny_cascade: Cascade, data: Path, tmp_path: Path
) -> None:
    records = draw(read_records(data), "train", 20, 0)
    few, all_ = (Workshop(tiny_cascade, "m", "d", tmp_path / name, 3) for name in ("few", "all"))
    some = few.draw(records[:5], 16, "")
    files = all_.draw(records, 32, "")
    assert len(files) == 20 and len({file.name for file in files}) == 20
    base = all_.draw(records, 16, "")
    assert [file.read_bytes() for file in some] == [file.read_bytes() for file in base[:5]]
    expected = tiny_cascade(records[7].text, seed=random.key(3, records[7].text, 0), stop_at="sr256")
    drawn = load_picture(Record(files[7], "", ""), 32)
    assert torch.allclose(drawn, expected.stages["sr256"][0].clamp(-1, 1), atol=1.1 / 127.5)
    kept, lost = base[0].stat().st_mtime_ns, base[18].read_bytes()
    base[18].unlink()
    assert all_.draw(records, 16, "")[18].read_bytes() == lost, "what is missing is drawn as it was"
    assert base[0].stat().st_mtime_ns == kept, "what is there is not drawn again"


def test_real_pictures_are_enlarged_from_the_first_size(
    tiny_cascade: Cascade, data: Path, tmp_path: Path
) -> None:
    records = draw(read_records(data), "train", 3, 0)
    shop = Workshop(tiny_cascade, "m", "d", tmp_path, 0)
    files = shop.enlarge(records, 64, "")
    seed = random.key(0, records[1].text, 0)
    lowres = load_picture(records[1], 16)[None]
    expected = tiny_cascade(records[1].text, seed=seed, start_at="sr256", images=lowres).stages["sr1024"][0]
    drawn = load_picture(Record(files[1], "", ""), 64)
    assert torch.allclose(drawn, expected.clamp(-1, 1), atol=1.1 / 127.5)
    assert set(files).isdisjoint(shop.draw(records, 64, ""))


def test_the_hash_of_data_sees_captions_attributes_and_pictures(data: Path) -> None:
    records = read_records(data)
    whole = data_sha256(records)
    assert data_sha256(records[::-1]) == whole
    assert data_sha256([replace(records[0], text="other"), *records[1:]]) != whole
    assert data_sha256([replace(records[0], attributes={}), *records[1:]]) != whole
    records[0].path.write_bytes(records[1].path.read_bytes())
    assert data_sha256(records) != whole


# -- the command ---------------------------------------------------------------------------------------------


class ToyLook(Extractor):
    """A picture's own pixels in every part of a row."""

    network, resize, calls = "toy", "none", 0

    def __init__(self, px: int) -> None:
        self.module, self.px = nn.Identity(), px
        self.resize = f"{px} px"

    def prepare(self, picture: Tensor) -> Tensor:
        return downsample(picture, self.px)

    def encode(self, pictures: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        type(self).calls += len(pictures)
        pixels = F.interpolate(torch.stack(list(pictures)), (16, 16)).flatten(1)
        return pixels.repeat(1, 14)[:, : PIXELS.stop]


@pytest.fixture
def judge(model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command on the tiny model, with features and captions that are computed in no time."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in ("PooledLayers", "Sized"):
        monkeypatch.setattr(judging, name, ToyLook)
    for name in ("MATCHING", "CLASSIFYING"):
        monkeypatch.setattr(judging, name, QUICK)
    monkeypatch.setattr(judging, "load_text_encoder", lambda reference, device: ToyEncoder())
    out = str(tmp_path / "out" / "judge.json")
    return lambda *arguments: command.main([str(model_folder), str(data), "--out", out, *arguments])


def test_the_whole_report(
    judge: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert judge("--count", "70", "64", "--px", "16", "32") == 0
    captured, out = capsys.readouterr(), tmp_path / "out"
    report = json.loads((out / "judge.json").read_text())
    table = (out / "judge.md").read_text()
    assert captured.err == "" and table in captured.out and table == markdown(report)
    base, sr = report["frechet"]["16"], report["frechet"]["32"]
    assert (base["count"], base["real_count"], base["equal_count"]) == (70, 128, 64)
    assert sr["count"] == 64 and sr["enlarged_equal"] > 0 and "enlarged_equal" not in base
    for part in ("match", "attributes"):
        assert list(report[part]) == ["real, seen", "real, held out", "drawn, seen", "drawn, held out"]
    assert report["match"]["drawn, seen"]["all"]["count"] == 70
    held_out = report["match"]["drawn, held out"]
    assert held_out["all"]["count"] == 64
    assert held_out["tone x gender x base"]["count"] == held_out["style x object"]["count"] == 32
    tones = report["attributes"]["real, held out"]["all"]["tone"]
    assert tones["count"] == 64 and sum(sum(row.values()) for row in tones["taken_for"].values()) == 64
    assert set(report["neighbours"]) == {"features", "pixels"}
    assert (out / "judge-wrong-drawn-seen.png").exists(), "the tiny model draws noise"
    looked = ToyLook.calls
    monkeypatch.setattr(Cascade, "__call__", lambda *_, **__: pytest.fail("all pictures are there"))
    assert judge("--count", "70", "64", "--px", "16", "32") == 0
    assert ToyLook.calls == looked, "and so are their features"
    assert (out / "judge.md").read_text() == table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "63"], "--count 63: expected an integer of at least 64"),
        (["--count", "64", "0"], "--count 0: expected an integer of at least 64"),
        (["--count", "129"], "--count 129: expected at most 128, the captions of split train"),
        (["--count", "64", "--px", "17"], "--px 17: expected one of 16, 32, 64; did you mean 16?"),
        (["--seed", "-1"], "--seed -1: expected an integer of at least 0"),
        (["--count", "many"], "invalid int value: 'many'"),
        (["--out", "report"], "--out report: expected a name that ends in .json"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_input_is_one_line(
    judge: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert judge(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_too_few_pictures_are_one_line(judge: Any, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data / "metadata.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:150]))
    assert judge() == 2
    assert "split heldout has 22 different captions: expected at least 64" in capsys.readouterr().err
