"""The pages in a real browser, at phone and desk width: figures read, blind page driven by the keyboard.

Needs a Chromium (Debian: chromium-headless-shell or chromium) and the playwright package, which drives it.
The browser is $CHROMIUM, or the first of NAMES on the path; without one these tests are skipped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import main
from eval.blind import read_key, write_blind
from eval.report import TALLY, write_report
from tests.eval.synthetic import NASTY, make_report, make_run

playwright = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 800}
TEXTS = {"Colors": ["a red apple", "a blue car"], "Odd ones": NASTY}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the path or in $CHROMIUM")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to sandbox root
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


def visit(browser: Any, path: Path, size: dict[str, int], **options: Any) -> Any:
    """The page of a file, offline; `page.faults` lists what the browser complained about."""
    page = browser.new_context(viewport=size, offline=True, **options).new_page()
    page.faults = []
    page.on("console", lambda message: page.faults.append(message.text))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(path.as_uri())
    return page


def fits(page: Any) -> bool:
    """Whether the page is no wider than the screen."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_the_report_is_read(browser: Any, tmp_path: Path, size: dict[str, int]) -> None:
    run = make_run(tmp_path, texts=TEXTS, guidance=(1, 4))
    report = make_report(run)
    page = visit(browser, write_report(run, report), size)
    for side in "AB":
        cell = report["metrics"]["clip_score"]["values"][side]["default"]["overall"]
        shown = page.locator(f'[data-figure="clip_score/default/{side}"] .value').inner_text()
        assert float(shown) == pytest.approx(cell["mean"], abs=(cell["high"] - cell["low"]) / 20)
    compared = report["metrics"]["clip_score"]["comparison"]["default"]["overall"]
    assert compared["verdict"] in page.inner_text("#summary")
    for text in NASTY:
        assert page.locator("bdi", has_text=text).count() > 0
    assert fits(page) and page.faults == []
    page.context.close()


def test_switches_of_the_report_work_without_a_script(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path, texts=TEXTS, guidance=(1, 4))
    page = visit(browser, write_report(run, make_report(run)), DESK, java_script_enabled=False)
    shown = page.locator("#pictures details[open] .strip:visible")
    assert shown.count() == 2 * 2  # prompts x models, at one stage and setting
    assert "sr1024" in shown.first.locator("img").first.get_attribute("alt")
    page.get_by_label("base", exact=True).check(force=True)
    assert shown.count() == 2 * 2
    assert shown.first.locator("img").first.get_attribute("alt").endswith("base")
    figure = page.locator('[data-figure="lettering/base.guidance=4/A/Colors"]')
    assert not figure.is_visible()
    page.locator("#metric-1").check(force=True)
    page.locator("#setting-2").check(force=True)
    assert figure.is_visible()
    page.context.close()


def test_pictures_are_drawn(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path, texts=TEXTS, per_prompt=1)
    page = visit(browser, write_report(run, make_report(run)), PHONE)
    picture = page.locator("#pictures img:visible").first
    picture.scroll_into_view_if_needed()
    page.wait_for_function("image => image.complete", arg=picture.element_handle())
    assert picture.evaluate("image => image.naturalWidth") == 64
    page.context.close()


def vote(page: Any, keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)
    page.keyboard.press("Enter")


def test_the_blind_page_by_keyboard(browser: Any, tmp_path: Path) -> None:
    """From the name to the file of votes and its tally; the rater prefers A in both questions. A is told by
    its colour (see `synthetic.colour`), read from the screen."""
    run = make_run(tmp_path / "run", texts=TEXTS, stages={"base": 16})
    page = visit(browser, write_blind(run, seed=4), DESK, accept_downloads=True)
    key = read_key(run.folder)
    page.keyboard.type("Zoë <3")  # the field has the focus
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert "Still open" in page.inner_text("#missing")
    page.keyboard.press("1")
    page.reload()  # the browser keeps the name and the answer
    page.keyboard.press("Enter")
    assert (
        page.inner_text("#count") == f"1 of {len(key.trials)}" and page.locator("input:checked").count() == 1
    )
    seen = []
    while page.locator("#trial").is_visible():
        seen.append(page.inner_text("#caption"))
        vote(page, {"first": "14", "second": "36"}[preferred(page)])
    assert sorted(set(seen)) == sorted(prompt.text for prompt in run.suite.prompts)
    with page.expect_download() as download:
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
    votes = tmp_path / "votes.json"
    download.value.save_as(votes)
    assert download.value.suggested_filename == f"votes-Zoë-3-{key.page[:8]}.json"
    assert json.loads(votes.read_text())["rater"] == "Zoë <3"
    assert page.faults == []
    page.context.close()

    assert main(["tally", str(run.folder), str(votes)]) == 0
    tally = json.loads((run.folder / TALLY).read_text())
    assert tally["raters"] == [{"name": "Zoë <3", "votes": 10, "right": 6, "controls": 6, "kept": True}]
    for question in ("quality", "alignment"):
        assert tally["questions"][question]["overall"]["rates"]["A"]["mean"] == 1.0


def preferred(page: Any) -> str:
    """Which set on the screen is A's or, in a control trial, belongs to the caption: with noise, the even
    one; else the one whose colour is that of the prompt (green is 37 times its number)."""
    colours = page.evaluate(
        """() => Promise.all([...document.querySelectorAll("#sets .set")].map(async (set) => {
            const canvas = document.createElement("canvas");
            canvas.width = canvas.height = 16;
            const context = canvas.getContext("2d");
            await set.querySelector("img").decode();
            context.drawImage(set.querySelector("img"), 0, 0, 16, 16);
            return [...context.getImageData(0, 0, 16, 16).data];
        }))"""
    )
    spread = [max(pixels[0::4]) - min(pixels[0::4]) for pixels in colours]
    if max(spread) > 40:  # noise
        return "first" if spread[0] < spread[1] else "second"
    texts = [text for group in TEXTS.values() for text in group]
    green = texts.index(page.inner_text("#caption")) * 37 % 256
    away = [abs(pixels[1] - green) for pixels in colours]
    if max(away) > 20:  # pictures of another caption
        return "first" if away[0] < away[1] else "second"
    return "first" if colours[0][0] < colours[1][0] else "second"  # A has less red


def test_the_blind_page_by_touch(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path, texts=TEXTS, stages={"base": 16})
    page = visit(browser, write_blind(run, seed=4), PHONE, has_touch=True, is_mobile=True)
    page.locator("#rater").fill("Ada")
    page.get_by_role("button", name="Begin").tap()
    assert fits(page)
    for target in page.locator("#trial button:visible, .options label").all():
        box = target.bounding_box()
        assert box["height"] >= 44 and box["width"] >= 44
    shape = page.locator("#sets img").first.evaluate("image => getComputedStyle(image).objectFit")
    assert shape == "contain"  # a picture that is no square is not stretched
    page.locator("#sets img").nth(1).tap()
    assert page.locator("#which").inner_text() == "Set 1, picture 2 of 2"
    page.locator("#following").tap()
    assert page.locator("#which").inner_text() == "Set 2, picture 1 of 2"
    page.locator("#close").tap()
    page.locator(".options label", has_text="Prefer set 2").nth(0).tap()
    page.locator(".options label", has_text="Indifferent").nth(1).tap()
    page.locator("#next").tap()
    assert page.inner_text("#count").startswith("2 of")
    page.locator("#back").tap()
    chosen = page.locator("input:checked").evaluate_all("inputs => inputs.map((input) => input.value)")
    assert chosen == ["second", "same"]
    assert fits(page) and page.faults == []
    page.context.close()


def test_raters_see_sides_of_their_own(browser: Any, tmp_path: Path) -> None:
    """Two raters of one page: orders differ and some pairs are mirrored, yet one answer is one vote."""
    run = make_run(tmp_path, texts=TEXTS, per_prompt=1, stages={"base": 16})
    path = write_blind(run, seed=4)
    orders, sides = [], []
    for rater in ("Ada", "Bo"):
        page = visit(browser, path, DESK)
        page.locator("#rater").fill(rater)
        page.keyboard.press("Enter")
        order, first = [], {}
        while page.locator("#trial").is_visible():
            order.append(page.inner_text("#caption"))
            first[page.evaluate("shown.id")] = page.locator("#sets img").first.get_attribute("src")
            vote(page, "14")
        votes = page.evaluate("votes().votes")
        assert {v["answer"] == v["left"] for v in votes} == {True}  # always the set that stood first
        orders.append(order)
        sides.append(first)
        page.context.close()
    mirrored = sum(sides[0][trial] != sides[1][trial] for trial in sides[0])
    assert orders[0] != orders[1] and 0 < mirrored < len(sides[0])
