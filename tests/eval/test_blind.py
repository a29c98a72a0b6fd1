"""The blind page: what it holds, and what it keeps to itself."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cascade.errors import InputError
from eval.blind import HTML, KEY, read_key, write_blind
from eval.run import Run
from tests.eval.synthetic import NASTY, colour, make_run

TEXTS = {"Colors": [f"a {c} apple" for c in ("red", "blue", "green")], "Odd ones": NASTY}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("run"), texts=TEXTS)


def embedded(html: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The page's own data and its trials."""
    found = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.DOTALL)
    page, *trials = map(json.loads, found)
    return page, trials


def picture(uri: str) -> Image.Image:
    head, _, body = uri.partition(",")
    assert head == "data:image/webp;base64"
    image = Image.open(io.BytesIO(base64.b64decode(body)))
    image.load()
    return image


def is_of(uris: list[str], model: str) -> bool:
    """Whether the pictures are of a model: its red channel (see `synthetic.colour`)."""
    reds = [picture(uri).getpixel((5, 5))[0] for uri in uris]  # type: ignore[index]
    return all(abs(red - {"A": 40, "B": 200}[model]) < 20 for red in reds)


def test_the_key_opens_the_page(run: Run) -> None:
    """Every set is of the model that the key says, and a decoy is none of that prompt's."""
    html = write_blind(run, seed=5).read_text()
    key = read_key(run.folder)
    page, trials = embedded(html)
    assert (page["run"], page["page"], page["sets"]) == (key.run, key.page, 2)
    assert [trial["id"] for trial in trials] == [trial.id for trial in key.trials]
    for shown, trial in zip(trials, key.trials, strict=True):
        assert shown["text"] == run.suite.prompts[trial.prompt].text
        first, second = shown["sets"]
        assert len(first) == len(second) == 2
        if trial.kind == "rated":
            assert is_of(first, "B" if trial.swapped else "A") and is_of(
                second, "A" if trial.swapped else "B"
            )
        else:
            genuine, decoy = (second, first) if trial.swapped else (first, second)
            green = [picture(uri).getpixel((5, 5))[1] for uri in genuine]  # type: ignore[index]
            assert all(abs(g - trial.prompt * 37 % 256) < 20 for g in green)
            if trial.kind == "mismatch":
                other = picture(decoy[0]).getpixel((5, 5))[1]  # type: ignore[index]
                assert abs(other - trial.prompt * 37 % 256) > 20
            else:
                assert len(set(picture(decoy[0]).convert("L").tobytes())) > 50
    assert sorted(t.prompt for t in key.trials if t.kind == "rated") == list(range(6))
    assert sorted(t.kind for t in key.trials if t.kind != "rated") == ["mismatch"] * 2 + ["noise"] * 2


def test_the_page_does_not_tell_who_is_who(run: Run) -> None:
    path = write_blind(run, seed=5)
    html = path.read_text()
    bare = re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    names = [word for model in run.models.values() for word in (model.name, model.path, model.sha256)]
    files = [word for item in run.items for word in (*item.files.values(), *item.sha256.values())]
    for word in [*names, *files, ".png", "pictures/", "swapped", "rated", "mismatch", '"seed"', "Setting"]:
        assert word not in bare, word
    images = [picture(uri) for trial in embedded(html)[1] for side in trial["sets"] for uri in side]
    assert {image.size for image in images} == {(64, 64)}
    assert all(set(image.info) <= {"loop", "background", "timestamp", "duration"} for image in images)


def test_pictures_keep_their_shape(tmp_path: Path) -> None:
    """And sets of different sizes are brought to one."""

    def draw(model: str, prompt: int, k: int, px: int) -> Image.Image:
        return colour(model, prompt, k, px).resize((px, px // 2) if k else (px // 2, px))

    run = make_run(tmp_path, texts=TEXTS, stages={"base": 16}, elsewhere="B", draw=draw)  # B has 32 px
    _, trials = embedded(write_blind(run, seed=5).read_text())
    sizes = {tuple(picture(uri).size for uri in side) for trial in trials for side in trial["sets"]}
    assert sizes == {((16, 32), (32, 16)), ((32, 32), (32, 32))}  # drawn, and noise


def test_sides_and_order_are_a_function_of_the_seed(run: Run, tmp_path: Path) -> None:
    first = write_blind(run, seed=5).read_bytes()
    assert write_blind(run, seed=5).read_bytes() == first  # the same seed, and no seed: that of the key
    assert write_blind(run).read_bytes() == first
    other = make_run(tmp_path, texts=TEXTS)
    assert write_blind(other, seed=6).read_bytes() != first
    a, b = read_key(run.folder), read_key(other.folder)
    assert a.run == b.run and a.page != b.page and not {t.id for t in a.trials} & {t.id for t in b.trials}


def test_sides_are_even() -> None:
    from eval.blind import _coin

    swapped = sum(_coin(11, "side", i) for i in range(2000))
    assert 900 < swapped < 1100


def test_a_key_with_votes_out_is_not_replaced(run: Run) -> None:
    write_blind(run, seed=5)
    before = (run.folder / KEY).read_bytes(), (run.folder / HTML).read_bytes()
    with pytest.raises(InputError, match="belongs to another page"):
        write_blind(run, seed=6)
    with pytest.raises(InputError, match="belongs to another page"):
        write_blind(run, stage="base")
    assert ((run.folder / KEY).read_bytes(), (run.folder / HTML).read_bytes()) == before


def test_prompts_cannot_break_out_of_the_page(run: Run) -> None:
    html = write_blind(run, seed=5).read_text()
    assert html.count("</script>") == html.count("<script")
    _, trials = embedded(html)
    assert set(NASTY) <= {trial["text"] for trial in trials}
    assert "http://" not in html and "https://" not in html and "src=" not in html.replace("img-src", "")


def test_an_unguessable_seed_where_none_is_given(tmp_path: Path) -> None:
    seeds = []
    for name in ("one", "two"):
        run = make_run(tmp_path / name, sides="A", per_prompt=1)
        write_blind(run)
        seeds.append(read_key(run.folder).seed)
    assert seeds[0] != seeds[1] and max(seeds) > 2**40


def test_one_model_is_rated_or_compared_between_settings(tmp_path: Path) -> None:
    run = make_run(tmp_path, sides="A", guidance=(4,), per_prompt=9, stages={"base": 8})
    page, trials = embedded(write_blind(run, seed=1).read_text())
    assert page["sets"] == 1 and [q["id"] for q in page["questions"]] == ["alignment"]
    assert {len(trial["sets"]) for trial in trials} == {1}
    assert {len(trial["sets"][0]) for trial in trials} == {8}  # of nine drawn
    (tmp_path / KEY).unlink()
    page, trials = embedded(write_blind(run, seed=1, against="base.guidance=4").read_text())
    assert page["sets"] == 2 and {len(trial["sets"]) for trial in trials} == {2}
    assert [arm.setting for arm in read_key(tmp_path).arms] == ["default", "base.guidance=4"]


def test_a_large_suite_is_drawn_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.blind.PROMPTS", 5)
    run = make_run(tmp_path, texts={"all": [str(i) for i in range(20)]}, per_prompt=1, stages={"base": 4})
    write_blind(run, seed=1)
    rated = [trial.prompt for trial in read_key(tmp_path).trials if trial.kind == "rated"]
    assert len(set(rated)) == len(rated) == 5 and sorted(rated) != list(range(5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"setting": "base.guidance=3"}, "did you mean 'base.guidance=4'"),
        ({"against": "default"}, "two settings to compare, got default twice"),
        ({"stage": "sr25"}, "unknown stage 'sr25'.*did you mean 'sr256'"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: dict[str, str], message: str) -> None:
    run = make_run(tmp_path, sides="A", guidance=(4,), per_prompt=1)
    with pytest.raises(InputError, match=message) as caught:
        write_blind(run, seed=1, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and not (tmp_path / KEY).exists()
