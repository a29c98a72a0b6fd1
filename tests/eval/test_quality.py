"""eval.quality and what it stands on: intervals, data folders, sheets, process measurement, the report."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFont
from torch import Tensor

from cascade import Cascade, Stage, TextEmbedding, cli, random
from cascade.errors import InputError
from cascade.images import save_png, to_pil
from eval import quality, sheet
from eval.captioned import Record, draw, load_picture, read_records
from eval.process import Measured, measure
from eval.statistics import bootstrap_mean, wilson

# -- intervals -----------------------------------------------------------------------------------------------


def test_wilson_by_its_definition() -> None:
    """The ends are the shares p whose score statistic (hits/n - p) / sqrt(p (1 - p) / n) is -z and +z."""
    for hits, count in ((1, 64), (20, 64), (63, 64)):
        low, high = wilson(hits, count, z=2.0)
        for end, sign in ((low, 1), (high, -1)):
            score = (hits / count - end) / math.sqrt(end * (1 - end) / count)
            assert score == pytest.approx(2 * sign, abs=1e-9)


def test_wilson_known_values_and_ends() -> None:
    assert wilson(1, 10) == pytest.approx((0.01787, 0.40415), abs=1e-5)
    assert wilson(0, 64) == (0.0, pytest.approx(0.05662, abs=1e-4))
    assert wilson(64, 64)[1] == 1.0
    with pytest.raises(ValueError, match="3 of 2"):
        wilson(3, 2)


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 5
    mean, half = values.mean().item(), 1.96 * values.std().item() / 20
    assert bootstrap_mean(values, seed=1) == pytest.approx((mean - half, mean + half), abs=0.03)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)
    assert bootstrap_mean(torch.tensor([2.0])) == (2.0, 2.0)


# -- data folders --------------------------------------------------------------------------------------------


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """Six captioned pictures a split, 64 px, smooth so that enlarging them makes sense."""
    folder, lines = tmp_path / "data", []
    ramp = torch.linspace(-1, 1, 64)
    for split, other in (("train", ramp.flip(0)), ("heldout", ramp)):
        for k in range(6):
            pixels = torch.stack([ramp * (k - 3) / 3, other, torch.full((64,), k / 3 - 1)])  # 3 W
            name = f"images/{split}-{k}.png"
            save_png(to_pil(pixels[None, :, None, :].expand(1, 3, 64, 64))[0], folder / name)
            lines.append({"file_name": name, "text": f"{split} thing number {k}", "split": split})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_draw_is_keyed_distinct_and_nested() -> None:
    records = [Record(Path(str(i)), f"caption {i % 40}", "train") for i in range(80)]
    records += [Record(Path("other"), "other", "heldout")]
    chosen = draw(records, "train", 30, seed=3)
    assert chosen == draw(records, "train", 30, seed=3) != draw(records, "train", 30, seed=4)
    assert chosen[:10] == draw(records, "train", 10, seed=3)
    assert len({r.text for r in chosen}) == 30 and {r.split for r in chosen} == {"train"}
    with pytest.raises(InputError, match="split train has 40 different captions: expected at least 41"):
        draw(records, "train", 41, seed=3)


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"text": "a", "split": "train"}', '{"file_name": 1, "text": "", "split": ""}']
)
def test_a_bad_record_is_named(tmp_path: Path, line: str) -> None:
    good = '{"file_name": "a.png", "text": "a", "split": "train"}'
    (tmp_path / "metadata.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(InputError, match=r"metadata.jsonl:2: expected a JSON object"):
        read_records(tmp_path)


def test_load_picture(data_folder: Path) -> None:
    record = read_records(data_folder)[0]
    whole, half = load_picture(record, 64), load_picture(record, 32)
    assert whole.shape == (3, 64, 64) and whole.min() >= -1 and whole.max() <= 1
    assert torch.allclose(half, whole.unflatten(1, (32, 2)).unflatten(3, (32, 2)).mean((2, 4)), atol=1e-6)
    with pytest.raises(InputError, match="expected a square of at least 128 px, got 64x64"):
        load_picture(record, 128)
    record.path.write_bytes(record.path.read_bytes()[:90])
    with pytest.raises(InputError, match=r"train-0.png: not a whole picture"):
        load_picture(record, 64)
    record.path.unlink()
    with pytest.raises(InputError, match=r"train-0.png: No such file"):
        load_picture(record, 64)


# -- sheet ---------------------------------------------------------------------------------------------------


def test_sheet_shows_every_picture_with_ink_under_it() -> None:
    colours = ["red", "green", "blue"]
    pictures = [Image.new("RGB", (16, 16), colour) for colour in colours]
    made = sheet.captioned_sheet(pictures, ["a cat", "a dog", "a very long caption " * 9], columns=2)
    for index, picture in enumerate(pictures):
        x = sheet.GAP + index % 2 * (sheet.CELL + sheet.GAP)
        y = sheet.GAP + index // 2 * (sheet.CELL + sheet.LINES * sheet.LINE_PX + sheet.GAP)
        assert made.getpixel((x + 68, y + 68)) == picture.getpixel((0, 0))
        under = made.crop((x, y + sheet.CELL, x + sheet.CELL, y + sheet.CELL + sheet.LINE_PX))
        assert min(under.convert("L").tobytes()) < 64


def test_captions_are_wrapped_to_the_cell() -> None:
    font = ImageFont.load_default(sheet.TEXT_PX)
    assert sheet.wrap("red apple, noto style", font) == ["red apple, noto style"]
    long = sheet.wrap("woman firefighter: medium-dark skin tone, twemoji style", font)
    assert " ".join(long) == "woman firefighter: medium-dark skin tone, twemoji style" and len(long) > 1
    for caption in ("word " * 99, "x" * 99):
        lines = sheet.wrap(caption, font)
        assert len(lines) <= sheet.LINES and lines[-1].endswith("...")
        assert all(font.getlength(line) <= sheet.CELL for line in lines)


# -- measures ------------------------------------------------------------------------------------------------


def test_ranks_count_the_captions_that_are_no_worse() -> None:
    text = torch.eye(3)
    image = torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.5, 0.1], [0.4, 0.4, 0.2]])
    assert quality.caption_ranks(image, text).tolist() == [0, 1, 2]
    same = torch.ones(4, 2) / math.sqrt(2)
    assert quality.caption_ranks(same, same).tolist() == [3, 3, 3, 3]  # nothing told apart: no hit


def test_psnr_and_disagreement() -> None:
    flat = torch.zeros(1, 3, 8, 8)
    assert quality.psnr(flat + 0.2, flat) == pytest.approx(20)  # 0.1 of the range
    assert quality.psnr(flat, flat) == pytest.approx(20 * math.log10(255) + 10 * math.log10(12))
    assert quality.disagreement(flat + 0.2, torch.zeros(1, 3, 4, 4)) == pytest.approx(0.1)
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(1, 3, 4, 4)
    assert quality.disagreement(checks, torch.zeros(1, 3, 4, 4)) == 0  # detail that averages out agrees


def test_process_measures_the_child_not_the_caller() -> None:
    """This process has torch loaded and is larger than the small child; the large child is seen whole."""
    code = "import time; x = bytearray({}); time.sleep({})"
    small = measure([sys.executable, "-c", code.format(1, 0.3)])
    large = measure([sys.executable, "-c", code.format(300_000_000, 0)])
    assert small.status == 0 and 0.3 <= small.seconds < 30
    assert small.peak_bytes < 60e6 and 300e6 < large.peak_bytes < 360e6
    failed = measure([sys.executable, "-c", "import sys; print('a'); sys.exit('no such thing')"])
    assert failed.status == 1 and failed.stderr.strip() == "no such thing"


# -- parts ---------------------------------------------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


class Oracle:
    """A CLIP that knows every pair by heart: text and picture of record k are the unit vector e_k, and any
    other picture is that of the nearest record."""

    def __init__(self, pipe: Cascade, records: list[Record], px: int) -> None:
        self.states = pipe.text_encoder([r.text for r in records]).sequences[0].states.flatten(1)
        self.pixels = torch.stack([load_picture(r, px) for r in records]).flatten(1)

    def encode_text(self, text: TextEmbedding) -> Tensor:
        return one_hot(text.sequences[0].states.flatten(1), self.states)

    def encode_image(self, images: Tensor) -> Tensor:
        return one_hot(images.flatten(1), self.pixels)


def one_hot(x: Tensor, known: Tensor) -> Tensor:
    return torch.eye(len(known))[torch.cdist(x, known).argmin(dim=1)]


def test_match_counts_what_the_clip_recognises(
    tiny_cascade: Cascade, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = read_records(data_folder)
    chosen = {split: draw(records, split, 6, 0) for split in ("train", "heldout")}
    pipe = Cascade(tiny_cascade.stages.values(), tiny_cascade.text_encoder, tiny_cascade.prior)
    pipe.clip = Oracle(pipe, records, 16)  # type: ignore[assignment]
    real = {split: torch.stack([load_picture(r, 16) for r in chosen[split]]) for split in chosen}
    drawn = {"train": real["train"], "heldout": real["heldout"].clone()}
    drawn["heldout"][1] = drawn["heldout"][0]  # one picture shows another caption of the set
    monkeypatch.setattr(quality, "draw_pictures", lambda pipe, captions, seeds, stage, split: drawn[split])
    report = quality.match(pipe, chosen, 0, data_folder / "report.json")
    assert report["train"]["drawn"]["hits"] == report["train"]["real"]["hits"] == 6
    assert report["heldout"]["real"]["hits"] == 6
    low, high = wilson(5, 6)
    assert report["heldout"]["drawn"] == {"hits": 5, "count": 6, "share": 5 / 6, "low": low, "high": high}
    listed = report["heldout"]["pictures"]
    assert [row["caption"] for row in listed] == [r.text for r in chosen["heldout"]]
    assert [row["seed"] for row in listed] == [random.key(0, r.text, 0) for r in chosen["heldout"]]
    assert [row["rank"] > 0 for row in listed] == [False, True, False, False, False, False]
    for split in chosen:
        assert (data_folder / report[split]["sheet"]).name == f"report-{split}.png"
        assert (data_folder / f"report-{split}.png").exists()


def test_match_needs_a_clip_that_sees(tiny_cascade: Cascade) -> None:
    pipe = Cascade(tiny_cascade.stages.values(), tiny_cascade.text_encoder, tiny_cascade.prior)
    with pytest.raises(InputError, match="no CLIP that encodes pictures"):
        quality.match(pipe, {}, 0, Path("report.json"))


def test_a_drawn_picture_is_that_of_the_caption_and_seed_alone(
    tiny_cascade: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions, seeds = ["a cat", "a dog", "a car"], [5, 6, 5]
    together = quality.draw_pictures(tiny_cascade, captions, seeds, "base", "")
    monkeypatch.setattr(quality, "BATCH", 2)
    assert torch.equal(quality.draw_pictures(tiny_cascade, captions, seeds, "base", ""), together)
    alone = tiny_cascade("a car", seed=5, stop_at="base").stages["base"]
    assert torch.allclose(together[2:], alone, atol=1e-4)


def test_sr_compares_with_the_original_and_the_input(
    tiny_cascade: Cascade, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that repeats pixels agrees with its input exactly; its errors are computed here by hand."""

    def repeat_pixels(
        self: Stage, text: TextEmbedding, *, lowres: Tensor, aug_level: float, **_: Any
    ) -> Tensor:
        assert aug_level == 0
        return lowres.repeat_interleave(2, 2).repeat_interleave(2, 3)

    monkeypatch.setattr(Stage, "sample", repeat_pixels)
    records = draw(read_records(data_folder), "heldout", 5, 0)
    report = quality.super_resolution(tiny_cascade, {"sr256": records[:3], "sr1024": records}, 0)
    assert report["sr256"]["count"] == 3 and report["sr1024"]["count"] == 5
    real = torch.stack([load_picture(r, 32) for r in records[:3]]).double()
    small = real.unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean((3, 5))
    errors = ((small.repeat_interleave(2, 2).repeat_interleave(2, 3) - real) / 2).square().mean((1, 2, 3))
    found = report["sr256"]
    assert found["psnr"] == pytest.approx((-10 * errors.log10()).mean().item(), abs=1e-3)
    assert found["disagreement"] == pytest.approx(0, abs=1e-6)
    assert found["gain"] == pytest.approx(found["psnr"] - found["psnr_bicubic"])
    assert found["gain"] < -1, "bicubic is better than repeated pixels on a ramp"
    assert found["gain_worst"] <= found["gain_low"] <= found["gain"] <= found["gain_high"] < 0


# -- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(model_folder: Path, data_folder: Path, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command on the tiny model and data; its cold process runs in this one, where the toy encoder is."""

    def measure_here(command: list[str]) -> Measured:
        assert command[:3] == [sys.executable, "-m", "cascade.cli"]
        return Measured(seconds=1.5, peak_bytes=900_000_000, status=cli.main(command[3:]), stderr="")

    monkeypatch.setattr(quality, "measure", measure_here)
    out = str(data_folder / "out" / "report.json")
    return lambda *arguments: quality.main([str(model_folder), str(data_folder), "--out", out, *arguments])


def test_the_whole_report(evaluate: Any, data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--count", "4", "--sr-count", "3", "2", "--seed", "1") == 0
    captured = capsys.readouterr()
    names = sorted(path.name for path in (data_folder / "out").iterdir())
    assert names == ["report-heldout.png", "report-train.png", "report.json"]
    report = json.loads((data_folder / "out" / "report.json").read_text())
    assert report["seed"] == 1 and report["dtype"] in ("float32", "bfloat16") and report["commit"]
    for split in ("train", "heldout"):
        for pictures in report["match"][split]["drawn"], report["match"][split]["real"]:
            assert pictures["count"] == 4 and pictures["low"] <= pictures["share"] <= pictures["high"]
    assert [report["sr"][name]["count"] for name in ("sr256", "sr1024")] == [3, 2]
    speed = report["speed"]
    assert speed["px"] == [64, 64] and 0 < speed["warm_seconds"] <= max(speed["warm_calls"])
    assert speed["cold_seconds"] == 1.5 and speed["cold_peak_bytes"] == 900_000_000
    assert captured.err == "" and len(captured.out.splitlines()) == 4 + 2 + 1 + 1 + 1  # one path is cascade's


def test_parts_can_be_chosen(evaluate: Any, data_folder: Path) -> None:
    assert evaluate("--parts", "sr", "--sr-count", "2") == 0
    report = json.loads((data_folder / "out" / "report.json").read_text())
    assert report["sr"]["sr1024"]["count"] == 2 and "match" not in report and "speed" not in report


def test_a_failing_cold_process_is_told(
    tiny_cascade: Cascade, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        quality, "measure", lambda command: Measured(1.0, 1, 2, "a warning\ncascade: no model\n")
    )
    with pytest.raises(InputError, match="cascade sample ended with status 2: cascade: no model"):
        quality.speed(tiny_cascade, tmp_path, "a cat", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "mach"], "unknown part 'mach': expected one of match, sr, speed; did you mean 'match'?"),
        (["--count", "1"], "--count 1: expected an integer of at least 2"),
        (["--sr-count", "3", "0"], "--sr-count 0: expected an integer of at least 1"),
        (["--seed", "-1"], "--seed -1: expected an integer of at least 0"),
        (["--count", "7"], "split train has 6 different captions: expected at least 7"),
        (["--parts", "sr", "--sr-count", "3", "9"], "split heldout has 6 different captions"),
        (["--count", "many"], "invalid int value: 'many'"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_input_is_one_line(
    evaluate: Any, data_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert evaluate(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    out = data_folder / "out"
    assert not out.exists() or not list(out.iterdir())


def test_missing_folders_are_one_line(
    model_folder: Path, tmp_path: Path, on_cpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "report.json")]
    assert quality.main([str(model_folder), str(tmp_path / "none"), *out]) == 2
    assert quality.main([str(tmp_path / "none"), str(tmp_path), *out]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "metadata.jsonl: No such file" in lines[0] and "none" in lines[1]
