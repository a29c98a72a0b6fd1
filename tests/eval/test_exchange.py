"""Folders for scorers elsewhere, and what comes back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cascade.errors import InputError
from eval.__main__ import main
from eval.exchange import (
    export_geneval,
    export_vqascore,
    import_geneval,
    import_scores,
    import_vqascore,
)
from eval.run import Run
from tests.eval.synthetic import make_run

TEXTS = {"colors": ["a red apple", "a blue car"], "counting": ["two cats"]}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", texts=TEXTS)


def of_geneval(run: Run) -> Run:
    """With GenEval's description of each prompt."""
    prompts = tuple(
        replace(p, meta={"tag": p.category, "include": [{"class": p.text.split()[-1], "count": 1}]})
        for p in run.suite.prompts
    )
    return replace(run, plan=replace(run.plan, suite=replace(run.suite, prompts=prompts)))


def evaluate_images(folder: Path, correct: Any) -> None:
    """What GenEval's script does with a folder: one line a picture, in no particular order."""
    lines = []
    for place in sorted(folder.iterdir(), reverse=True):
        metadata = json.loads((place / "metadata.jsonl").read_text())
        for picture in sorted((place / "samples").iterdir()):
            row = {"filename": f"somewhere/else/{picture.relative_to(folder)}", "tag": metadata["tag"]}
            row |= {
                "prompt": metadata["prompt"],
                "correct": correct(picture),
                "metadata": json.dumps(metadata),
            }
            lines.append(json.dumps(row))
    (folder / "results.jsonl").write_text("\n".join(lines))


def test_geneval_there_and_back(run: Run, tmp_path: Path) -> None:
    run, folder = of_geneval(run), tmp_path / "geneval"
    export_geneval(run, folder)
    samples = folder / "B" / "default" / "00001" / "samples"
    assert (samples / "0001.png").read_bytes() == run.path(run.select("B")[3]).read_bytes()
    assert json.loads((samples.parent / "metadata.jsonl").read_text())["include"] == [
        {"class": "car", "count": 1}
    ]
    evaluate_images(
        folder / "A" / "default", lambda picture: "00002" in str(picture) or picture.stem == "0001"
    )
    assert import_geneval(run, folder) == {"geneval": {("A", "default"): [0, 1, 0, 1, 1, 1]}}


def test_vqascore_there_and_back(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "vqa"
    export_vqascore(run, folder, stage="base")
    entries = json.loads((folder / "A" / "default" / "dataset.json").read_text())
    assert [entry["texts"] for entry in entries] == [["a red apple"], ["a blue car"], ["two cats"]]
    assert entries[1]["images"] == [str(run.path(i, "base").resolve()) for i in run.select("A")[2:4]]
    scores = [[[0.1], [0.2]], [[0.3], [0.4]], [[0.5], [0.6]]]  # prompts, pictures, texts
    (folder / "A" / "default" / "scores.json").write_text(json.dumps(scores))
    assert import_vqascore(run, folder)["vqascore"] == {("A", "default"): [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}


def test_any_csv_of_figures(run: Run, tmp_path: Path) -> None:
    items = run.select("B")
    lines = ["file,dpg,other"] + [f"{i.files['sr1024']},{n},{-n}" for n, i in enumerate(items)]
    (tmp_path / "scores.csv").write_text("\ufeff" + "\r\n".join(lines[:1] + lines[:0:-1]))
    found = import_scores(run, tmp_path / "scores.csv")
    assert found == {
        name: {("B", "default"): [sign * n for n in range(6)]} for name, sign in (("dpg", 1), ("other", -1))
    }


def test_export_command(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run.folder), "vqascore", "--stage", "base"]) == 0
    assert (run.folder / "export" / "vqascore" / "B" / "default" / "dataset.json").is_file()
    assert "--metrics vqascore=" in capsys.readouterr().out
    assert main(["export", str(run.folder), "genval"]) == 2
    assert "unknown scorer 'genval'" in (line := capsys.readouterr().err) and line.count("\n") == 1


@pytest.mark.parametrize(
    ("bring_in", "file", "content", "message"),
    [
        (
            import_geneval,
            "results.jsonl",
            '{"filename": "00000/samples/0000.png", "correct": true}',
            "lacks 5 of 6",
        ),
        (import_geneval, "results.jsonl", "nonsense", "results.jsonl:1: expected a JSON object"),
        (import_geneval, "results.jsonl", '{"file": "x"}', "expected GenEval's filename and correct"),
        (import_vqascore, "scores.json", "[[[0.1], [0.2]]]", "expected a list of prompts, of pictures"),
        (import_vqascore, "scores.json", "[[[NaN], [1]], [[1], [1]], [[1], [1]]]", "not finite"),
        (import_vqascore, "other.json", "", "expected MODEL/SETTING/scores.json in it"),
    ],
)
def test_bad_results_are_one_line(
    run: Run, tmp_path: Path, bring_in: Any, file: str, content: str, message: str
) -> None:
    place = tmp_path / "results" / "A" / "default"
    place.mkdir(parents=True)
    (place / file).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        bring_in(run, tmp_path / "results")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,x\npictures/A/default/sr1024/0000-0.png,high", "all numbers"),
        ("", "expected CSV"),
        ("file,x\npictures/A/default/sr1024/0000-0.png,0", "lacks 5 of 6 pictures, as prompt 0 picture 1"),
        ("file,x\nelsewhere.png,1", "names no picture of the run"),
    ],
)
def test_bad_csv_is_one_line(run: Run, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "scores.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        import_scores(run, tmp_path / "scores.csv")


def test_exports_replace_nothing(run: Run, tmp_path: Path) -> None:
    export_vqascore(run, tmp_path / "vqa")
    with pytest.raises(InputError, match="exists: expected a folder to make"):
        export_vqascore(run, tmp_path / "vqa")
    with pytest.raises(InputError, match="expected GenEval's prompts"):
        export_geneval(run, tmp_path / "geneval")
    assert not (tmp_path / "geneval").exists()
