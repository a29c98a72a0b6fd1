"""Votes, unblinded: who is preferred, who is left out, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cascade.errors import InputError
from eval.__main__ import main
from eval.blind import Key, Trial, read_key, write_blind
from eval.report import TALLY, write_report
from eval.report.charts import percent
from tests.eval.synthetic import make_report, make_run

TEXTS = {"Colors": [f"colour {i}" for i in range(12)], "Counting": [f"{i} dogs" for i in range(8)]}
Chooser = Callable[[Trial, str], str]  # what a rater prefers: A, B, same, or in a control right or wrong


@pytest.fixture
def key(tmp_path: Path) -> Key:
    run = make_run(tmp_path / "run", texts=TEXTS, per_prompt=1, stages={"base": 8})
    write_blind(run, seed=3)
    return read_key(run.folder)


def ballot(key: Key, rater: str, choose: Chooser, folder: Path) -> Path:
    votes = []
    for trial in key.trials:
        for question in ("quality", "alignment"):
            choice = choose(trial, question)
            wants_first = choice in ("A", "right")
            answer = "same" if choice == "same" else "first" if wants_first != trial.swapped else "second"
            votes.append({"trial": trial.id, "question": question, "answer": answer, "left": "first"})
    return save(folder, rater, {"page": key.page, "run": key.run, "rater": rater, "votes": votes})


def save(folder: Path, name: str, data: Any) -> Path:
    path = folder / f"votes-{name}.json"
    path.write_text(json.dumps(data))
    return path


def always(choice: str) -> Chooser:
    return lambda trial, question: choice if trial.kind == "rated" else "right"


def tallied(tmp_path: Path, *votes: Path) -> dict[str, Any]:
    assert main(["tally", str(tmp_path / "run"), *map(str, votes)]) == 0
    return json.loads((tmp_path / "run" / TALLY).read_text())


def test_votes_are_given_back_to_their_models(key: Key, tmp_path: Path) -> None:
    """A rater who prefers A in Colors and B in Counting, whatever the side it stood on."""

    def choose(trial: Trial, question: str) -> str:
        if trial.kind != "rated":
            return "right"
        return "same" if question == "quality" else "A" if trial.category == "Colors" else "B"

    tally = tallied(tmp_path, ballot(key, "Ada", choose, tmp_path))
    alignment = tally["questions"]["alignment"]
    assert alignment["overall"]["score"]["mean"] == pytest.approx(12 / 20)
    assert alignment["categories"]["Colors"]["rates"]["A"]["mean"] == 1.0
    assert alignment["categories"]["Colors"]["verdict"] == "A better"
    assert alignment["categories"]["Counting"]["rates"]["B"]["mean"] == 1.0
    assert alignment["categories"]["Counting"]["verdict"] == "B better"
    assert alignment["overall"]["verdict"] == "not significant"
    quality = tally["questions"]["quality"]["overall"]
    assert quality["rates"]["indifferent"]["mean"] == 1.0 and quality["score"]["mean"] == 0.5
    assert quality["verdict"] == "not significant" and tally["questions"]["quality"]["alpha"] is None


def test_p_values_are_exact_and_corrected(key: Key, tmp_path: Path) -> None:
    """All 8 prompts of one category for A: 2 of 2^8 sign vectors, times 2 categories at most (Holm)."""
    cells = tallied(tmp_path, ballot(key, "Ada", always("A"), tmp_path))["questions"]["quality"]["categories"]
    assert cells["Counting"]["p"] == pytest.approx(2 / 2**8)
    assert cells["Counting"]["p_holm"] == pytest.approx(2 / 2**8)
    assert cells["Colors"]["p_holm"] == pytest.approx(2 * 2 / 2**12)


def test_raters_who_fail_the_controls_are_named_and_left_out(
    key: Key, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def careless(trial: Trial, question: str) -> str:
        return "B" if trial.kind == "rated" else "same"

    good = [ballot(key, name, always("A"), tmp_path) for name in ("Ada", "Bo")]
    tally = tallied(tmp_path, *good, ballot(key, "Cem", careless, tmp_path))
    assert [(r["name"], r["kept"]) for r in tally["raters"]] == [("Ada", True), ("Bo", True), ("Cem", False)]
    assert tally["questions"]["quality"]["overall"]["rates"]["A"]["mean"] == 1.0
    assert tally["questions"]["quality"]["overall"]["votes"] == 40
    assert "left out: Cem, 0 of 6 controls right" in capsys.readouterr().out


def test_one_slip_is_no_failure_and_quality_of_a_mismatch_is_not_judged(key: Key, tmp_path: Path) -> None:
    slips = [t.id for t in key.trials if t.kind == "noise"][:1]

    def choose(trial: Trial, question: str) -> str:
        if trial.kind == "mismatch":
            return "right" if question == "alignment" else "same"
        if trial.kind == "noise":
            return "wrong" if trial.id in slips and question == "quality" else "right"
        return "A"

    (rater,) = tallied(tmp_path, ballot(key, "Ada", choose, tmp_path))["raters"]
    assert (rater["right"], rater["controls"], rater["kept"]) == (5, 6, True)


def test_agreement_of_raters(key: Key, tmp_path: Path) -> None:
    def by_number(trial: Trial, question: str) -> str:
        return always(("A", "same", "B")[trial.prompt % 3])(trial, question)

    same = [ballot(key, name, by_number, tmp_path) for name in ("Ada", "Bo")]
    assert tallied(tmp_path, *same)["questions"]["quality"]["alpha"] == pytest.approx(1.0)
    opposed = [ballot(key, "Ada", always("A"), tmp_path), ballot(key, "Bo", always("B"), tmp_path)]
    assert tallied(tmp_path, *opposed)["questions"]["quality"]["alpha"] < 0


def test_unfinished_rounds_count(key: Key, tmp_path: Path) -> None:
    path = ballot(key, "Ada", always("A"), tmp_path)
    data = json.loads(path.read_text())
    rated = {trial.id for trial in key.trials if trial.kind == "rated"}
    data["votes"] = [vote for vote in data["votes"] if vote["trial"] in rated][:9]
    overall = tallied(tmp_path, save(tmp_path, "Ada", data))["questions"]["quality"]["overall"]
    assert (overall["votes"], overall["prompts"]) == (5, 5)


def test_the_report_shows_what_people_said(key: Key, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    run = make_run(run_folder, texts=TEXTS, per_prompt=1, stages={"base": 8})
    report = make_report(run) | {"stage": "base"}
    (run_folder / "report.json").write_text(json.dumps(report))
    assert "People" not in write_report(run, report).read_text()
    tally = tallied(tmp_path, ballot(key, "<b>Ada", always("A"), tmp_path))
    html = (run_folder / "report.html").read_text()
    assert 'id="people"' in html and "<b>Ada" not in html
    assert percent(tally["questions"]["quality"]["overall"]["rates"]["A"]) in html


def test_one_set_alone_is_scored(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", sides="A", texts=TEXTS, per_prompt=1, stages={"base": 8})
    write_blind(run, seed=3)
    key = read_key(run.folder)
    answers = {t.id: "no" if t.kind != "rated" else ("yes", "somewhat")[t.prompt % 2] for t in key.trials}
    votes = [{"trial": trial, "question": "alignment", "answer": a} for trial, a in answers.items()]
    data = {"page": key.page, "run": key.run, "rater": "Ada", "votes": votes}
    tally = tallied(tmp_path, save(tmp_path, "Ada", data))
    overall = tally["questions"]["alignment"]["overall"]
    assert overall["score"]["mean"] == pytest.approx(0.75) and "verdict" not in overall
    assert [overall["rates"][a]["mean"] for a in ("yes", "somewhat", "no")] == [0.5, 0.5, 0.0]
    assert tally["raters"][0]["right"] == tally["raters"][0]["controls"] == 4


def refusals(key: Key) -> dict[str, tuple[dict[str, Any], str]]:
    first = {"trial": key.trials[0].id, "question": "quality", "answer": "same"}
    whole = {"page": key.page, "run": key.run, "rater": "Ada", "votes": [first]}
    return {
        "run": (whole | {"run": "0" * 64}, "has votes of another run: expected run .*, got 000000000000"),
        "page": (whole | {"page": "1" * 32}, "has votes of another page"),
        "rater": (whole | {"rater": " "}, "expected a rater's name"),
        "trial": (whole | {"votes": [first | {"trial": "x"}]}, r"votes\[0\]: no trial 'x' on this page"),
        "question": (whole | {"votes": [first | {"question": "aligment"}]}, "did you mean 'alignment'"),
        "answer": (whole | {"votes": [first | {"answer": "A"}]}, "expected one of first, same, second"),
        "twice": (whole | {"votes": [first, first]}, r"votes\[1\]: a second answer"),
        "type": (whole | {"votes": {}}, r"votes: expected a list, got \{\}"),
        "extra": (whole | {"vote": []}, "did you mean 'votes'"),
        "nothing": (whole | {"votes": []}, "no votes to count"),
    }


@pytest.mark.parametrize(
    "name",
    ["run", "page", "rater", "trial", "question", "answer", "twice", "type", "extra", "nothing"],
)
def test_bad_votes_are_one_line_and_change_nothing(
    key: Key, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, message = refusals(key)[name]
    path = save(tmp_path, name, data)
    (tmp_path / "run" / TALLY).write_text("{}")
    assert main(["tally", str(tmp_path / "run"), str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(InputError, match=message):
        raise InputError(error.strip())
    assert (tmp_path / "run" / TALLY).read_text() == "{}"


def test_two_files_of_one_rater_and_missing_files(
    key: Key, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ballot(key, "Ada", always("A"), tmp_path)
    again = tmp_path / "again.json"
    again.write_bytes(path.read_bytes())
    run = str(tmp_path / "run")
    assert main(["tally", run, str(path), str(again)]) == 2
    assert "are both of rater 'Ada'" in capsys.readouterr().err
    assert main(["tally", run, str(tmp_path / "none.json")]) == 2
    assert main(["tally", str(tmp_path), str(path)]) == 2
    assert main(["tally", run]) == 2
    assert main(["tally", run, str(path), "--loud"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 4
    assert not (tmp_path / "run" / TALLY).exists()
