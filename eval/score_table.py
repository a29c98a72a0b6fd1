"""Scores of prompts as report.json has them: means with intervals by category, and A against B.

A column is one model at one setting: P numbers, the mean over each prompt's pictures, NaN where a prompt has
no score. `balanced` makes the overall figure the mean over categories, whatever their sizes, as GenEval has
it; else it is the mean over prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from eval.statistics import (
    bootstrap_means,
    effect_size,
    holm,
    percentiles,
    permutation_test,
    smallest_p,
    verdict,
    wilson,
)

Column = tuple[str, str]  # model, setting
Table = dict[str, Any]
LEVEL = 0.05


def estimate(
    columns: Mapping[Column, Tensor],
    categories: Sequence[str],
    seed: int,
    balanced: bool = False,
    share: bool = False,
) -> Table:
    """report.json's values, by model and setting. categories: P, of each prompt. share: scores are shares of
    hits, so that where all prompts have 0, or 1, there is an interval all the same (Wilson's)."""
    found: Table = {}
    for scored, group in groupby(
        sorted(columns, key=lambda c: _scored(columns[c])), lambda c: _scored(columns[c])
    ):
        names = list(group)  # the columns that score the same prompts are resampled together
        values = torch.stack([columns[name][list(scored)] for name in names], dim=1)  # n M
        parts = _by_category(scored, categories)
        overall, by_category = _summarise(values, parts, seed, balanced)
        if share:
            for cell in [*overall, *(cell for cells in by_category.values() for cell in cells)]:
                _widen(cell)
        for place, (model, setting) in enumerate(names):
            found.setdefault(model, {})[setting] = {
                "overall": overall[place],
                "categories": {name: cells[place] for name, cells in by_category.items()},
                "prompts": dict(zip(map(str, scored), values[:, place].tolist(), strict=True)),
            }
    return found


def compare(
    columns: Mapping[Column, Tensor],
    categories: Sequence[str],
    seed: int,
    higher_is_better: bool,
    balanced: bool = False,
) -> Table:
    """report.json's comparison, by setting: A - B over the prompts that both have scores of."""
    settings = [setting for model, setting in columns if model == "A" and ("B", setting) in columns]
    found: Table = {}
    for setting in settings:
        apart = columns["A", setting] - columns["B", setting]
        scored = _scored(apart)
        if scored:
            differences, parts = apart[list(scored)], _by_category(scored, categories)
            found[setting] = _compare(differences, parts, seed, higher_is_better, balanced)
    return found


def _compare(
    differences: Tensor, parts: Mapping[str, Tensor], seed: int, higher_is_better: bool, balanced: bool
) -> Table:
    (overall,), by_category = _summarise(differences[:, None], parts, seed, balanced)
    weights = torch.ones(len(differences), dtype=torch.float64)
    if balanced:
        for rows in parts.values():
            weights[rows] = 1 / len(rows)
    p = permutation_test((differences * weights)[:, None], seed).item()
    categories = {}
    for name, rows in parts.items():
        alone = permutation_test(differences[rows][:, None], seed).item()
        categories[name] = _entry(by_category[name][0], differences[rows], alone)
    corrected = holm([entry["p"] for entry in categories.values()])
    for entry, p_holm in zip(categories.values(), corrected, strict=True):
        entry["p_holm"] = p_holm
        entry["verdict"] = verdict(entry["difference"], p_holm, higher_is_better, LEVEL)
        count, least = entry["count"], smallest_p(entry["count"])
        if least * len(categories) >= LEVEL:
            entry["note"] = (
                f"{f'{count} prompts give' if count > 1 else '1 prompt gives'} p = {least:.2g} at best, "
                f"which corrected for {len(categories)} "
                f"categories is {min(1.0, least * len(categories)):.2g}: alone they cannot be significant"
            )
    entry = _entry(overall, differences, p)
    return {
        "overall": {**entry, "verdict": verdict(entry["difference"], p, higher_is_better, LEVEL)},
        "categories": categories,
    }


def _entry(cell: Table, differences: Tensor, p: float) -> Table:
    rest = {name: cell[name] for name in ("low", "high", "count")}
    return {"difference": cell["mean"], **rest, "p": p, "effect": effect_size(differences)}


def _summarise(
    values: Tensor, parts: Mapping[str, Tensor], seed: int, balanced: bool
) -> tuple[list[Table], dict[str, list[Table]]]:
    """Cells of n M values: (overall, by category), each a list of M."""
    replicates = {name: bootstrap_means(values[rows], seed) for name, rows in parts.items()}  # R M each
    means = {name: values[rows].mean(dim=0) for name, rows in parts.items()}
    if balanced:
        whole = torch.stack(list(replicates.values())).mean(dim=0)
        overall = _cells(torch.stack(list(means.values())).mean(dim=0), whole, len(values))
    else:
        overall = _cells(values.mean(dim=0), bootstrap_means(values, seed), len(values))
    return overall, {name: _cells(means[name], replicates[name], len(rows)) for name, rows in parts.items()}


def _cells(means: Tensor, replicates: Tensor, count: int) -> list[Table]:
    """One prompt has a mean and no interval."""
    low, high = percentiles(replicates, count).tolist() if count > 1 else ([None] * len(means),) * 2
    return [
        {"mean": mean, "low": low[place], "high": high[place], "count": count}
        for place, mean in enumerate(means.tolist())
    ]


def _widen(cell: Table) -> None:
    """No resample of hits alone has a miss: the bootstrap is sure where it should not be."""
    if cell["mean"] in (0.0, 1.0) and cell["low"] == cell["high"] and cell["count"] > 1:
        cell["low"], cell["high"] = wilson(round(cell["mean"] * cell["count"]), cell["count"])


def _scored(scores: Tensor) -> tuple[int, ...]:
    return tuple(scores.isnan().logical_not().nonzero().flatten().tolist())


def _by_category(scored: Sequence[int], categories: Sequence[str]) -> dict[str, Tensor]:
    """Places in `scored` of each category's prompts."""
    kinds = [categories[prompt] for prompt in scored]
    return {
        name: torch.tensor([i for i, kind in enumerate(kinds) if kind == name])
        for name in dict.fromkeys(kinds)
    }
