"""Pictures that other systems made, and what a run records of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from cascade.errors import InputError
from eval.evaluate import Request, draw_run
from eval.models import find_pictures, is_model, load_model
from eval.run import read_run
from eval.settings import make_settings
from eval.suites.suite import Prompt, make_suite

SUITE = make_suite("tiny", "own", [Prompt(text=text) for text in ("an owl", "a jug", "a red jug")])


def fill(folder: Path, names: list[str], px: int = 24) -> str:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (px, px), (number * 20, 0, 0)).save(path)
    return str(folder)


@pytest.mark.parametrize(
    "names",
    [
        [f"{prompt:04d}-{k}.png" for prompt in range(3) for k in range(2)],
        [f"{prompt:05d}/samples/{k:04d}.png" for prompt in range(3) for k in range(2)],
    ],
    ids=["own", "geneval"],
)
def test_names_tell_the_prompt(tmp_path, names: list[str]) -> None:
    model, found = find_pictures(fill(tmp_path / "x", names), SUITE, 2)
    assert [path.relative_to(tmp_path / "x").as_posix() for path in found.values()] == names
    assert list(found) == [(prompt, k) for prompt in range(3) for k in range(2)]
    assert (model.kind, model.stages) == ("pictures", {"picture": 24})
    assert list(find_pictures(str(tmp_path / "x"), SUITE, 1)[1]) == [(0, 0), (1, 0), (2, 0)]


def test_names_of_t2i_compbench_and_plain_numbers(tmp_path) -> None:
    names = [f"{prompt.text}_{index:06d}.png" for index, prompt in enumerate(SUITE.prompts)]
    assert list(find_pictures(fill(tmp_path / "a", names), SUITE, 1)[1]) == [(0, 0), (1, 0), (2, 0)]
    _, found = find_pictures(fill(tmp_path / "b", ["2.jpg", "0.jpg", "1.jpg"]), SUITE, 1)
    assert [path.name for path in found.values()] == ["0.jpg", "1.jpg", "2.jpg"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0.png", "1.png"], "has no picture 0 of prompt 2: expected 1 of each"),
        (["0.png", "1.png", "owl.png"], "expected names that tell the prompt, all as"),
        (["0.png", "0.jpg", "1.png", "2.png"], "are both picture 0 of prompt 0"),
    ],
)
def test_pictures_that_do_not_fit_the_suite(tmp_path, names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_pictures(fill(tmp_path / "x", names), SUITE, 1)


def test_mixed_sizes_and_broken_files(tmp_path) -> None:
    source = fill(tmp_path / "x", ["0.png", "1.png", "2.png"])
    Image.new("RGB", (24, 30)).save(tmp_path / "x" / "1.png")
    with pytest.raises(InputError, match="1.png is 24x30 px, .*0.png 24x24: expected pictures of one size"):
        find_pictures(source, SUITE, 1)
    (tmp_path / "x" / "1.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="not a whole picture"):
        find_pictures(source, SUITE, 1)


def test_an_empty_folder_is_no_model(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    assert is_model(str(tmp_path / "empty"))
    with pytest.raises(InputError, match="is not a model folder: expected model_index.json"):
        load_model(str(tmp_path / "empty"), torch.device("cpu"))


def test_a_model_is_known_by_its_files(model_folder) -> None:
    _, model = load_model(str(model_folder), torch.device("cpu"))
    assert (model.name, model.kind, model.stages) == (
        "model",
        "cascade",
        {"base": 16, "sr256": 32, "sr1024": 64},
    )
    assert model.config["sampling"]["base"]["guidance"] == 2.0 and model.device == "cpu"
    pipe, _ = load_model(str(model_folder), torch.device("cpu"))
    with torch.no_grad():
        next(pipe.stages["base"].parameters()).add_(1e-2)
    pipe.save_pretrained(model_folder)
    _, other = load_model(str(model_folder), torch.device("cpu"))
    assert other.sha256 != model.sha256


def test_a_model_against_pictures(model_folder, own_process_state, tmp_path) -> None:
    """B's pictures stand in every setting of A; the run is found complete when it is taken up again."""
    names = [f"{prompt:04d}-0.png" for prompt in range(3)]
    request = Request(
        out=tmp_path / "run",
        suite=SUITE,
        model=str(model_folder),
        against=fill(tmp_path / "theirs", names),
        settings=make_settings(sweeps=["base.guidance=1"]),
        stop_at="base",
    )
    run = draw_run(request)
    assert run is not None and len(run.items) == 2 * 2 * 3
    ours, theirs = run.select("A", "default"), run.select("B", "base.guidance=1")
    assert theirs[1].files == {"picture": "pictures/B/default/picture/0001-0.png"}
    assert [item.seed for item in ours] == [item.seed for item in theirs]
    with Image.open(run.path(theirs[1], "base")) as image:
        assert image.getpixel((0, 0)) == (20, 0, 0)
    before = (tmp_path / "run" / "manifest.jsonl").read_bytes()
    damaged = run.path(theirs[2])
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:40])
    draw_run(request)
    assert (tmp_path / "run" / "manifest.jsonl").read_bytes() == before and damaged.read_bytes() == whole
    assert read_run(tmp_path / "run").models["A"].stages == {"base": 16}
