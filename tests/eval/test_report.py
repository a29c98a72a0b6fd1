"""The report as a reader gets it: what stands in the file, parsed as HTML, CSV and Markdown."""

from __future__ import annotations

import base64
import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cascade.errors import InputError
from eval.report import write_report
from eval.report.charts import MINUS, Scale, decimals, estimate, number, p_value, round_steps
from eval.report.gallery import Gallery
from eval.run import Run
from tests.eval.synthetic import NASTY, make_report, make_run


class Page(HTMLParser):
    """Elements with their attributes, text by data-figure, and the text of every prompt."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, str | None]] = []
        self.figures: dict[str, str] = {}
        self.bdi: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in (
            "img",
            "meta",
            "input",
            "link",
            "col",
            "br",
            "line",
            "polyline",
            "path",
            "circle",
            "rect",
        ):
            self.open.append((tag, found.get("data-figure")))
        if tag == "bdi":
            self.bdi.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in [name for name, _ in self.open]:
            while self.open.pop()[0] != tag:
                raise AssertionError(f"</{tag}> closes another element")

    def handle_data(self, data: str) -> None:
        self.text += data
        for _, figure in self.open:
            if figure is not None:
                self.figures[figure] = self.figures.get(figure, "") + data
        if self.open and self.open[-1][0] == "bdi":
            self.bdi[-1] += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any], Path]:
    run = make_run(tmp_path_factory.mktemp("run"), guidance=(1, 4))
    report = make_report(run)
    return run, report, write_report(run, report)


def test_the_page_needs_no_other_file(compared: tuple[Run, dict[str, Any], Path]) -> None:
    page = Page(compared[2].read_text())
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert all((image["src"] or "").startswith("data:image/webp;base64,") for image in page.all("img"))
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'")
    assert "url(" not in compared[2].read_text() and "@import" not in compared[2].read_text()


def test_headline_figures_are_those_of_report_json(compared: tuple[Run, dict[str, Any], Path]) -> None:
    _, report, path = compared
    page = Page(path.read_text())
    for side in "AB":
        cell = report["metrics"]["clip_score"]["values"][side]["default"]["overall"]
        text = " ".join(page.figures[f"clip_score/default/{side}"].split())
        value, low, high = re.fullmatch(r"([\d.]+) ([\d.]+) to ([\d.]+)", text).groups()  # type: ignore[union-attr]
        half = (cell["high"] - cell["low"]) / 2
        assert float(value) == pytest.approx(cell["mean"], abs=half / 20)
        assert float(low) == pytest.approx(cell["low"], abs=half / 20)
        assert float(high) == pytest.approx(cell["high"], abs=half / 20)
    assert "31.4" in page.figures["fid/default/A"] and "36.4" in page.figures["fid/default/B"]


def test_every_category_has_its_figures_and_verdict(compared: tuple[Run, dict[str, Any], Path]) -> None:
    run, report, path = compared
    page = Page(path.read_text())
    for name, metric in report["metrics"].items():
        for category in run.suite.categories:
            for setting in ("default", "base.guidance=1", "base.guidance=4"):
                cell = metric["values"]["B"][setting]["categories"][category]
                shown = page.figures[f"{name}/{setting}/B/{category}"]
                assert estimate(cell["mean"], cell["low"], cell["high"])[0] in shown
        difference = metric["comparison"]["default"]["overall"]
        assert difference["verdict"] in page.text
        assert f"{name}/default/difference/{category}" in page.figures


def test_prompts_are_shown_as_they_are_and_never_run(compared: tuple[Run, dict[str, Any], Path]) -> None:
    html = compared[2].read_text()
    page = Page(html)
    assert set(NASTY) <= set(page.bdi)
    assert "<b>bold" not in html and "</script>" not in html
    assert all(attributes.get("dir") == "auto" for attributes in page.all("bdi"))
    alts = [image["alt"] or "" for image in page.all("img")]
    assert all(any(text in alt for alt in alts) for text in NASTY) and all(alts)


def test_pictures_of_every_stage_setting_and_model_are_there(
    compared: tuple[Run, dict[str, Any], Path],
) -> None:
    run, _, path = compared
    page = Page(path.read_text())
    strips = [a for a in page.all("div") if "data-stage" in a]
    per = {(a["class"], a["data-stage"], a["data-pictured"]) for a in strips}
    assert per == {(f"strip {m}", str(s), str(p)) for m in "AB" for s in range(3) for p in range(3)}
    assert len(strips) == 18 * len(run.suite.prompts)
    for link in page.all("a"):
        target = link["href"] or ""
        assert target.startswith("#") or (run.folder / target).is_file(), target


def test_a_page_elsewhere_links_to_nothing(
    compared: tuple[Run, dict[str, Any], Path], tmp_path: Path
) -> None:
    run, report, _ = compared
    path = write_report(run, report, out=tmp_path / "docs" / "toy.html", px=8)
    page = Page(path.read_text())
    assert all((link["href"] or "").startswith("#") for link in page.all("a"))
    uri = page.all("img")[0]["src"] or ""
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert max(image.size) == 8
    assert path.with_suffix(".csv").is_file() and path.with_suffix(".md").is_file()
    with pytest.raises(InputError, match=r"ends in \.html"):
        write_report(run, report, out=tmp_path / "docs")


def test_the_same_run_gives_the_same_bytes(compared: tuple[Run, dict[str, Any], Path]) -> None:
    run, report, path = compared
    before = {p: p.read_bytes() for p in (path, path.with_suffix(".csv"), path.with_suffix(".md"))}
    write_report(run, report)
    assert before == {p: p.read_bytes() for p in before}


def test_csv_has_every_figure_at_full_precision(compared: tuple[Run, dict[str, Any], Path]) -> None:
    run, report, path = compared
    rows = list(csv.DictReader(io.StringIO(path.with_suffix(".csv").read_text())))
    categories, settings = len(run.suite.categories) + 1, 3
    assert len(rows) == 2 * categories * settings * (2 + 1) + 2 * settings  # metrics x (A, B, A - B) + sets
    row = next(r for r in rows if (r["name"], r["model"], r["category"]) == ("clip_score", "B", "Odd ones"))
    cell = report["metrics"]["clip_score"]["values"]["B"]["default"]["categories"]["Odd ones"]
    assert (float(row["value"]), float(row["low"]), int(row["count"])) == (cell["mean"], cell["low"], 3)
    difference = next(r for r in rows if r["kind"] == "A - B" and r["category"] == "Colors")
    cell = report["metrics"]["clip_score"]["comparison"]["default"]["categories"]["Colors"]
    assert float(difference["p"]) == cell["p_holm"] and difference["verdict"] == cell["verdict"]


def test_markdown_tables_are_whole(compared: tuple[Run, dict[str, Any], Path]) -> None:
    text = compared[2].with_suffix(".md").read_text()
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1
    assert "CLIP score (higher is better)" in text and "A - B" in text


def test_one_model_without_sweeps_or_sets_has_no_empty_sections(tmp_path: Path) -> None:
    run = make_run(tmp_path, sides="A", texts={"all": ["one", "two"]}, per_prompt=1)
    report = make_report(run) | {"sets": {}, "cascade": {}, "warnings": []}
    page = Page(write_report(run, report).read_text())
    headings = page.text
    for absent in ("Sweeps", "The cascade itself", "People", "Read with care", "A − B", "Verdict"):
        assert absent not in headings
    sections = {a["id"] for a in page.all("section")}
    assert sections == {"summary", "categories", "pictures", "extremes", "provenance"}
    assert {(a["href"] or "")[1:] for a in page.all("a") if (a["href"] or "#")[0] == "#"} == sections


def test_intervals_may_lack(tmp_path: Path) -> None:
    run = make_run(tmp_path, texts={"few": ["one"], "more": ["two", "three"]}, per_prompt=1)
    page = Page(write_report(run, make_report(run)).read_text())
    assert re.fullmatch(r"\s*A\s+[\d.]+\s*", page.figures["clip_score/default/A/few"])


def test_extremes_are_the_worst_and_the_best(tmp_path: Path) -> None:
    texts = {"all": [f"prompt {i}" for i in range(30)]}
    run = make_run(tmp_path, texts=texts, per_prompt=1, stages={"base": 4})
    report = make_report(run) | {"stage": "base"}
    metric = report["metrics"]["lettering"]  # lower is better
    values = {int(i): v for i, v in metric["values"]["A"]["default"]["prompts"].items()}
    other = {int(i): v for i, v in metric["values"]["B"]["default"]["prompts"].items()}
    first, _, apart = Gallery(run).extremes(metric, "base")
    (worst_title, worst), (best_title, best) = first.ends
    assert (worst_title, best_title) == ("Worst", "Best")
    assert [block.prompt for block in worst] == sorted(values, key=lambda i: -values[i])[:10]
    assert [block.prompt for block in best] == sorted(values, key=lambda i: values[i])[:10]
    ahead = apart.ends[0][1]
    assert [block.prompt for block in ahead] == sorted(values, key=lambda i: values[i] - other[i])[:10]


def test_the_gallery_keeps_to_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, sides="A", texts={"all": ["one", "two"]}, per_prompt=4, stages={"base": 300})
    gallery = Gallery(run)
    assert (gallery.shown, gallery.px) == (4, 256)
    monkeypatch.setattr("eval.report.gallery.BUDGET", 2 * 4 * 192**2)
    assert (Gallery(run).shown, Gallery(run).px) == (4, 192)
    monkeypatch.setattr("eval.report.gallery.BUDGET", 2 * 2 * 128**2)
    assert (Gallery(run).shown, Gallery(run).px) == (2, 128)
    monkeypatch.setattr("eval.report.gallery.BUDGET", 100)
    assert (Gallery(run).shown, Gallery(run).px) == (1, 64)


def test_pictures_made_elsewhere_stand_beside_every_stage(tmp_path: Path) -> None:
    run = make_run(tmp_path, elsewhere="B", texts={"all": ["one"]}, per_prompt=1)
    report = make_report(run)
    page = Page(write_report(run, report).read_text())
    inputs = {a["id"] for a in page.all("input") if a["name"] == "stage"}
    assert inputs == {"stage-0", "stage-1", "stage-2"}
    shown = [(a["class"], a.get("data-stage")) for a in page.all("div") if "data-pictured" in a]
    assert sorted(shown, key=str) == [("strip A", "0"), ("strip A", "1"), ("strip A", "2"), ("strip B", None)]


def test_a_large_suite_is_shown_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.report.gallery.PROMPTS", 4)
    texts = {"few": ["a"], "many": [f"prompt {i}" for i in range(5)]}
    run = make_run(tmp_path, sides="A", texts=texts, per_prompt=1, stages={"base": 4})
    assert Gallery(run).prompts == [0, 1, 2]
    report = make_report(run) | {"stage": "base"}
    assert "3 of 6" in Page(write_report(run, report).read_text()).text


def test_a_broken_picture_is_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path, sides="A", per_prompt=1)
    run.path(run.items[0]).write_bytes(b"\x89PNG broken")
    with pytest.raises(InputError, match=r"^cannot read .*0000-0\.png: "):
        write_report(run, make_report(run))
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.5, 1.0]),
        (0.21, 0.34, [0.2, 0.25, 0.3, 0.35]),
        (-3, 17, [-5, 0, 5, 10, 15, 20]),
        (29, 48.4, [25, 30, 35, 40, 45, 50]),
    ],
)
def test_round_steps(low: float, high: float, expected: list[float]) -> None:
    steps = round_steps(low, high, 4)
    assert steps == pytest.approx(expected)
    assert steps[0] <= low and steps[-1] >= high


def test_a_scale_of_one_value_has_width() -> None:
    scale = Scale([0.3, 0.3])
    assert 0 < scale(0.3) < 100 and len({tick.text for tick in scale.ticks()}) == len(scale.ticks())


def test_numbers_show_two_digits_of_their_uncertainty() -> None:
    assert estimate(0.271828, 0.2674, 0.2762) == ("0.2718", "0.2674 to 0.2762")
    assert estimate(31.415, 28.9, 34.1) == ("31.4", "28.9 to 34.1")
    assert estimate(-0.0123, -0.05, 0.03, sign=True) == (f"{MINUS}0.012", f"{MINUS}0.050 to +0.030")
    assert estimate(0.123456, None, None) == ("0.1235", "")
    assert estimate(0.0, 0.0, 0.0) == ("0", "0 to 0") and decimals(1234.0) == 0
    assert number(-0.0001, 2, sign=True) == "0.00" and number(1234567, 0) == "1,234,567"
    assert (p_value(0.0004), p_value(0.0312)) == ("< 0.001", "0.031")
