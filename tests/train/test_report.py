"""The report: the numbers on the page are those of the logs, and the page needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from train.figures import _quarter, loss_by_level_figure
from train.report import main, read_lines, spread, write_report

Tables = dict[str, list[list[str]]]


class Page(HTMLParser):
    """Cells of the tables by table id, pictures, and whatever would be fetched from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: Tables = {}
        self.pictures: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.text = ""
        self._table: list[list[str]] | None = None
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "table":
            name = found.get("id") or f"{found.get('class')}{len(self.tables)}"
            self._table = self.tables.setdefault(name, [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")
            self._cell = True
        elif tag == "img":
            self.pictures.append(found)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._table = None
        elif tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell and self._table:
            self._table[-1][-1] += data.strip()


def record(images: int, loss: float, **more: Any) -> dict[str, Any]:
    return {
        "images": images,
        "loss": loss,
        "loss_by_t": [loss, 2 * loss, loss / 2, loss],
        "images_per_s": 50.0,
        "flop_per_s": 1e9,
        "data_wait": 0.02,
        "outside": 0.03,
        "grad_norm": 0.5,
        "skipped": 0,
        "lr": 1e-3,
        "seconds": 900.0,
        **more,
    }


def validation(images: int, loss: float) -> dict[str, Any]:
    return {"event": "validation", "images": images, "loss": loss, "by_t": [loss] * 8}


def make_run(out: Path) -> Path:
    """Two stages of a run: one with all there can be, one that has only begun."""
    base, clip = out / "base-training", out / "clip-training"
    for folder in (base, clip):
        folder.mkdir(parents=True)
    lines = [record(1000 * i, 1 / i, data_wait=0.01 * i, skipped=int(i == 2)) for i in range(1, 5)]
    lines.insert(2, record(2000, 9.0))  # made again after a kill: the last counts
    lines[2], lines[1] = lines[1], lines[2]
    (base / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"images": 50')
    events = [validation(2000, 0.75), validation(4000, 0.8125), {"event": "spike", "images": 3000}]
    (base / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    for i in range(1, 11):
        Image.new("RGB", (300, 20), (25 * i, 0, 0)).save(base / f"grid-{1000 * i:010d}.png")
    (base / "recipe.yaml").write_text("name: tiny\ngrid_prompts: ['<script>alert(1)</script>']\n")
    (clip / "log.jsonl").write_text(json.dumps(record(512, 4.5, loss_by_t=[4.5, 0.0, 0.0, 0.0])) + "\n")
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of that run."""
    run = make_run(tmp_path_factory.mktemp("report") / "run")
    return write_report(run, run / "report.html").read_text(encoding="utf-8")


def test_the_summary_has_the_numbers_of_the_logs(text: str) -> None:
    header, clip, base = Page(text).tables["summary"]
    assert dict(zip(header, base, strict=True)) == {
        "stage": "base",
        "images": "4,000",
        "loss": "0.2500",
        "validation": "0.8125",
        "best": "0.7500",
        "images/s": "50.00",
        "data wait": "2.5%",  # mean of 1, 2, 3 and 4%
        "hours": "1.000",
        "skipped": "1",
        "spikes": "1",
    }
    assert dict(zip(header, clip, strict=True)) | {
        "images": "512",
        "loss": "4.500",
        "validation": "–",
    } == dict(zip(header, clip, strict=True))


def test_every_record_is_in_the_numbers_once(text: str) -> None:
    _, _, (header, *rows) = Page(text).tables.values()
    assert header[:3] == ["images", "loss", "validation"]
    assert [row[:3] for row in rows] == [
        ["1,000", "1.000", "–"],
        ["2,000", "0.5000", "0.7500"],
        ["3,000", "0.3333", "–"],
        ["4,000", "0.2500", "0.8125"],
    ]


def test_grids_are_inside_the_page_newest_in_view(text: str) -> None:
    pictures = Page(text).pictures
    assert [p["data-images"] for p in pictures] == [
        "1,000", "2,000", "4,000", "5,000", "6,000", "7,000", "9,000", "10,000",
    ]  # fmt: skip
    assert ["hidden" in p for p in pictures] == [True] * 7 + [False]
    data = base64.b64decode((pictures[-1]["src"] or "").removeprefix("data:image/webp;base64,"))
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    assert picture.size == (300, 20) and abs(picture.getpixel((9, 9))[0] - 250) < 4  # type: ignore[index]
    assert pictures[-1]["style"] == "max-width: 600px"


def test_the_page_fetches_nothing_and_escapes_what_it_shows(text: str) -> None:
    assert all(link.startswith(("data:", "#")) for link in Page(text).links)
    assert not re.search(r"url\((?!#)|@import|<link", text)
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


def test_curves_are_there_with_their_points(text: str) -> None:
    assert text.count("<svg") == 4 + 3  # a stage without noise levels has no curves by level
    svg = loss_by_level_figure([record(1, 0.5), record(2, 0.25)], [validation(2, 0.5)])
    assert svg is not None and "t 0.75–1" in svg and "validation" in svg
    assert "width=" not in svg.split(">")[0]  # it fills its place
    assert loss_by_level_figure([record(1, 0.5, loss_by_t=[0.5, 0.0, 0.0, 0.0])], []) is None


def test_validation_levels_are_averaged_in_quarters() -> None:
    assert [_quarter([1, 3, 5, 7, 2, 4, 6, 8], i) for i in range(4)] == [2, 6, 3, 7]
    assert [_quarter([1.0, 2.0], i) for i in range(4)] == [None, 1.0, None, 2.0]


def test_spread_keeps_the_ends() -> None:
    assert spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert spread([1, 2], 4) == [1, 2]


def test_half_a_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"images": 1}\n[1]\n{"loss": 2}\n{"ima')
    assert read_lines(path) == [{"images": 1}]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert main([str(run), "--html", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_bytes() == (run / "report.html").read_bytes()
    assert list(tmp_path.rglob("*.part")) == []


@pytest.mark.parametrize(("name", "message"), [("absent", "no run in"), ("run/empty", "no stage has logged")])
def test_no_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    run = make_run(tmp_path / "run")
    (run / "empty").mkdir()
    assert main([str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train.report: {message}") and error.count("\n") == 1
    (run / "base-training" / "grid-0000001000.png").write_bytes(b"no picture")
    assert main([str(run)]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_a_trained_run_has_all_its_stages(trained: Path, tmp_path: Path) -> None:
    found = Page(write_report(trained, tmp_path / "report.html").read_text(encoding="utf-8"))
    header, *rows = found.tables["summary"]
    assert [row[0] for row in rows] == ["clip", "prior", "base", "sr256", "sr1024"]
    for row in rows:
        stage = dict(zip(header, row, strict=True))
        folder = trained / f"{stage['stage']}-training"
        last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
        (event,) = (json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines())
        assert stage["images"] == "24" and float(stage["loss"]) == pytest.approx(last["loss"], rel=1e-3)
        assert float(stage["validation"]) == pytest.approx(event["loss"], rel=1e-3)
    assert len(found.pictures) == 3
    assert "grid_prompts" in found.text
