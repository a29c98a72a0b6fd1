"""Votes of the blind page, unblinded.

    python -m eval tally RUN votes/*.json

Who prefers whom by question and category, with intervals over prompts, how far raters agree, and who failed
the control trials and so is left out. Writes RUN/tally.json and puts the result into the run's report.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from cascade.arguments import Parser
from cascade.config import from_dict, read_mapping, to_dict
from cascade.errors import InputError, unknown
from eval.agreement import clustered_share, krippendorff_alpha
from eval.blind import Key, Question, Trial, read_key
from eval.pages import write_text
from eval.report import TALLY, write_report
from eval.report.charts import OVERALL, percent
from eval.run import read_run
from eval.statistics import holm, permutation_test, verdict, wilson

PASS = 0.8  # share of right answers in control trials below which a rater does not count (Imagen, section 3)
REPORT = "report.json"


@dataclass(frozen=True, kw_only=True)
class Vote:
    trial: str
    question: str
    answer: str
    left: Literal["first", "second"] | None = None  # which set stood first on the screen, of two


@dataclass(frozen=True, kw_only=True)
class Ballot:
    """A file of votes, as the page saves it."""

    page: str
    run: str
    rater: str
    votes: tuple[Vote, ...]


@dataclass(frozen=True)
class Rater:
    name: str
    votes: int  # on trials that count
    right: int  # of control questions
    controls: int

    @property
    def kept(self) -> bool:
        return self.right >= PASS * self.controls


def main(argv: Sequence[str]) -> int:
    """Exit status 0. Raises InputError for bad input, before anything is written."""
    arguments = _parse(argv)
    folder = arguments.run
    key = read_key(folder)
    ballots = [read_ballot(path, key) for path in arguments.votes]
    _check_raters(ballots, arguments.votes)
    tally = count(key, ballots)
    run = read_run(folder) if (folder / REPORT).is_file() else None
    path = write_text(folder / TALLY, json.dumps(tally, indent=2, ensure_ascii=False) + "\n")
    show(tally, Console())
    print(path if run is None else write_report(run, read_mapping(folder / REPORT)))
    return 0


def read_ballot(path: Path, key: Key) -> Ballot:
    """The votes in a file. Raises InputError where it is malformed or of another run or page."""
    ballot = from_dict(Ballot, read_mapping(path), where=str(path))
    for kind, given, expected in [("run", ballot.run, key.run), ("page", ballot.page, key.page)]:
        if given != expected:
            raise InputError(
                f"{path} has votes of another {kind}: expected {kind} {expected[:12]}, got {given[:12]}"
            )
    if not ballot.rater.strip():
        raise InputError(f"{path}: expected a rater's name, got none")
    questions = {question.id: [value for value, _ in question.answers] for question in key.questions}
    trials, seen = {trial.id for trial in key.trials}, set()
    for number, vote in enumerate(ballot.votes):
        where = f"{path}: votes[{number}]"
        if vote.trial not in trials:
            raise InputError(f"{where}: no trial {vote.trial!r} on this page")
        if vote.question not in questions:
            raise unknown("question", vote.question, questions, where)
        if vote.answer not in questions[vote.question]:
            raise unknown("answer", vote.answer, questions[vote.question], where)
        if (vote.trial, vote.question) in seen:
            raise InputError(f"{where}: a second answer to the same question of the same trial")
        seen.add((vote.trial, vote.question))
    return ballot


def count(key: Key, ballots: Sequence[Ballot]) -> dict[str, Any]:
    """The contents of tally.json. Raises InputError where no rater passed the controls."""
    trials = {trial.id: trial for trial in key.trials}
    raters = [_judge(key, trials, ballot) for ballot in ballots]
    kept = [ballot for ballot, rater in zip(ballots, raters, strict=True) if rater.kept]
    if not any(rater.votes for rater in raters if rater.kept):
        names = ", ".join(rater.name for rater in raters)
        raise InputError(
            f"no votes to count: expected a rater with {PASS:.0%} of the controls right, got {names}"
        )
    tally = {
        "run": key.run,
        "page": key.page,
        "arms": [to_dict(arm) for arm in key.arms],
        "raters": [to_dict(rater) | {"kept": rater.kept} for rater in raters],
        "questions": {q.id: _question(key, trials, q, kept) for q in key.questions},
    }
    return tally | ({"shown_first": _shown_first(trials, kept)} if len(key.arms) == 2 else {})


def _judge(key: Key, trials: dict[str, Trial], ballot: Ballot) -> Rater:
    """How a rater did on the controls. A decoy of other pictures is not of lower quality: there the question
    of the caption alone has a right answer."""
    right = asked = 0
    for vote in ballot.votes:
        trial = trials[vote.trial]
        if trial.kind == "noise" or (trial.kind == "mismatch" and vote.question == "alignment"):
            asked += 1
            genuine = "second" if trial.swapped else "first"
            right += vote.answer == (genuine if len(key.arms) == 2 else "no")
    rated = sum(trials[vote.trial].kind == "rated" for vote in ballot.votes)
    return Rater(ballot.rater, rated, right, asked)


def _question(
    key: Key, trials: dict[str, Trial], question: Question, kept: Sequence[Ballot]
) -> dict[str, Any]:
    """Shares, score and agreement of one question, over all prompts and by category."""
    rated = [trial for trial in trials.values() if trial.kind == "rated"]
    columns = {trial.id: column for column, trial in enumerate(rated)}
    levels = [value for value, _ in question.answers]
    ratings = torch.full((len(kept), len(rated)), -1)  # R U, level 0 is that of the first arm
    for row, ballot in enumerate(kept):
        for vote in ballot.votes:
            if vote.question == question.id and vote.trial in columns:
                level = levels.index(vote.answer)
                flipped = trials[vote.trial].swapped and len(key.arms) == 2
                ratings[row, columns[vote.trial]] = len(levels) - 1 - level if flipped else level
    names = ["A", "indifferent", "B"] if len(key.arms) == 2 else levels
    groups = dict.fromkeys(trial.category for trial in rated)
    members = {c: [i for i, trial in enumerate(rated) if trial.category == c] for c in groups}
    cells = {c: _cell(ratings[:, chosen], names) for c, chosen in members.items()}
    categories = {c: cell for c, cell in sorted(cells.items()) if cell is not None}
    if len(key.arms) == 2 and categories:
        for cell, p in zip(categories.values(), holm([c["p"] for c in categories.values()]), strict=True):
            cell["p_holm"] = p
            cell["verdict"] = _verdict(cell["score"]["mean"], p)
    return {
        "text": question.text,
        "overall": _cell(ratings, names),
        "categories": categories,
        "alpha": krippendorff_alpha(ratings, len(levels)),
    }


def _cell(ratings: Tensor, names: Sequence[str]) -> dict[str, Any] | None:
    """ratings: R U levels, -1 where there is none. Each prompt counts alike, however many votes it has."""
    ratings = ratings[:, (ratings >= 0).any(dim=0)]
    votes = int((ratings >= 0).sum())
    if votes == 0:
        return None
    shares = torch.stack([(ratings == level).sum(dim=0) for level in range(len(names))]).double()
    shares /= shares.sum(dim=0)  # L U
    score = (shares * torch.linspace(1, 0, len(names), dtype=torch.float64)[:, None]).sum(dim=0)  # U
    cell: dict[str, Any] = {
        "prompts": ratings.shape[1],
        "votes": votes,
        "rates": {name: _share(share, votes) for name, share in zip(names, shares, strict=True)},
        "score": _share(score, votes),
    }
    if "indifferent" in names:  # two sets are compared
        cell["p"] = permutation_test((score - 0.5)[:, None])[0].item()
        cell["verdict"] = _verdict(cell["score"]["mean"], cell["p"])
    return cell


def _share(shares: Tensor, votes: int) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), clustered_share(shares, votes), strict=True))


def _verdict(score: float, p: float) -> str:
    return verdict(score - 0.5, p, higher_is_better=True)


def _shown_first(trials: dict[str, Trial], kept: Sequence[Ballot]) -> dict[str, float | int]:
    """How often the set that stood first on the screen was preferred, of the votes that preferred one."""
    decided = [
        vote.answer == vote.left
        for ballot in kept
        for vote in ballot.votes
        if trials[vote.trial].kind == "rated" and vote.answer != "same"
    ]
    if not decided:
        return {"mean": 0.5, "low": 0.0, "high": 1.0, "count": 0}
    low, high = wilson(sum(decided), len(decided))
    return {"mean": sum(decided) / len(decided), "low": low, "high": high, "count": len(decided)}


def show(tally: dict[str, Any], console: Console) -> None:
    """The result in the terminal; tally.json has every interval."""
    for name, arm in zip("AB", tally["arms"], strict=False):
        console.print(f"{name}: {arm['name']}", markup=False, highlight=False)
    for rater in tally["raters"]:
        if not rater["kept"]:
            text = f"left out: {rater['name']}, {rater['right']} of {rater['controls']} controls right"
            console.print(text, markup=False, highlight=False)
    for question in tally["questions"].values():
        if question["overall"] is None:
            continue
        title = f"{question['text']} ({question['overall']['votes']} votes)"
        table = Table("", *question["overall"]["rates"], "score", title=title, box=None, title_justify="left")
        if len(tally["arms"]) == 2:
            table.add_column()
        for label, cell in [(OVERALL, question["overall"]), *question["categories"].items()]:
            row = [label, *(f"{rate['mean']:.0%}" for rate in cell["rates"].values()), percent(cell["score"])]
            table.add_row(*map(escape, row), cell.get("verdict"))
        console.print(table)
        if question["alpha"] is not None:
            console.print(
                f"agreement of raters: Krippendorff's alpha {question['alpha']:.2f}", highlight=False
            )


def _check_raters(ballots: Sequence[Ballot], paths: Sequence[Path]) -> None:
    """One file a rater: a later save holds the votes of an earlier one."""
    seen: dict[str, Path] = {}
    for ballot, path in zip(ballots, paths, strict=True):
        name = ballot.rater.strip()
        if name in seen:
            raise InputError(f"{path} and {seen[name]} are both of rater {name!r}: expected one file a rater")
        seen[name] = path


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m eval tally", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("votes", type=Path, nargs="+", metavar="VOTES", help="files that raters sent")
    return parser.parse_args(argv)
