"""The judge's figures, of features, ranks and classes alone: nothing here draws or trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eval.judge.networks import IGNORED
from eval.metrics.frechet import frechet_distance, moments
from eval.quality import caption_ranks, hit_rate

CANDIDATES = 64  # captions that the right one is picked from
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75)
SEEN, REAL = "drawn, seen", "real, held out"  # sets by name
ROWS = 512  # of distances at a time
TINY = 1e-12  # floor of sets that are all one picture


# -- sets ---------------------------------------------------------------------------------------------------


def frechet(real: Tensor, drawn: Tensor, enlarged: Tensor | None) -> dict[str, float]:
    """Frechet distances of `drawn` (N D), and what they would be of real pictures.

    real: R D, the real pictures in the order in which captions were drawn, so that row i of `drawn` is of the
    caption of row i. enlarged: N D, the real pictures of these captions, enlarged by super-resolution alone.
    A distance grows as sets get smaller (its bias falls with one over the count), so those to be compared are
    of equal counts: n pictures of the first n captions against the last n real ones, which have other
    captions; the floor is the same with the real pictures of the first n captions."""
    count, half = len(drawn), len(real) // 2
    equal = min(count, half)
    rest = moments(real[len(real) - equal :])
    floor = frechet_distance(moments(real[:equal]), rest)
    found = {
        "count": count,
        "real_count": len(real),
        "drawn": frechet_distance(moments(drawn), moments(real)),
        "equal_count": equal,
        "drawn_equal": frechet_distance(moments(drawn[:equal]), rest),
        "floor_equal": floor,
    }
    found["ratio"] = found["drawn_equal"] / max(floor, TINY)
    if enlarged is not None:
        found["enlarged_equal"] = frechet_distance(moments(enlarged[:equal]), rest)
    if equal < half:
        found["half_count"] = half
        found["floor_half"] = frechet_distance(moments(real[:half]), moments(real[len(real) - half :]))
    return found


def neighbours(train: Tensor, sets: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Distances to the nearest training picture of each set of rows (M D), and of the training pictures (N D)
    to all others. Row i of the set SEEN is of the caption of training row i.

    Beside quantiles: `near`, how often a picture is nearer than all but 1% of REAL are (so 1% of that set
    itself); `own`, how often the nearest training picture is that of the drawn caption."""
    found = {"training, to the others": _nearest(train, train, itself=False)}
    found |= {name: _nearest(rows, train) for name, rows in sets.items()}
    limit = found[REAL][0].quantile(QUANTILES[0])
    report: dict[str, dict[str, Any]] = {}
    for name, (distances, places) in found.items():
        quantiles = distances.quantile(torch.tensor(QUANTILES)).tolist()
        report[name] = {
            "count": len(distances),
            "quantiles": dict(zip(map(str, QUANTILES), quantiles, strict=True)),
            "near": hits(distances < limit),
        }
        if name == SEEN:
            report[name]["own"] = hits(places == torch.arange(len(places)))
    return report


def _nearest(rows: Tensor, others: Tensor, itself: bool = True) -> tuple[Tensor, Tensor]:
    """Root mean square difference to the nearest of `others`, and its place, N each. itself: False where row
    i is row i of `others`, which then does not count."""
    found = []
    for start in range(0, len(rows), ROWS):
        distances = torch.cdist(rows[start : start + ROWS], others)
        if not itself:
            distances.diagonal(start).fill_(torch.inf)
        found.append(distances.min(dim=1))
    values, places = (torch.cat(same) for same in zip(*found, strict=True))
    return values / rows.shape[1] ** 0.5, places


# -- pictures -----------------------------------------------------------------------------------------------


def hits(right: Tensor) -> dict[str, float]:
    """The share of N booleans, with its 95% interval."""
    return hit_rate((~right).long())


def matches(pictures: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
    """The rank of each picture's own caption, 0 the best, and the place of the caption that it matches best,
    of unit vectors N D, N of which belong together. A caption is picked among CANDIDATES, neighbours in the
    order given; the last pictures are judged among the last CANDIDATES."""
    ranks, best = [], []
    for start in range(0, len(pictures), CANDIDATES):
        first = max(0, min(start, len(pictures) - CANDIDATES))
        group = slice(first, first + CANDIDATES)
        ranks.append(caption_ranks(pictures[group], captions[group])[start - first :])
        best.append(first + (pictures[group] @ captions[group].T).argmax(dim=1)[start - first :])
    return torch.cat(ranks), torch.cat(best)


def attributes(
    scores: Sequence[Tensor], labels: Tensor, classes: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """By attribute: how often the class of the highest score is the picture's own, and which class was taken
    for which. scores: N C each; labels: N A, IGNORED where a picture does not have the attribute."""
    report: dict[str, dict[str, Any]] = {}
    for (name, values), score, label in zip(classes.items(), scores, labels.T, strict=True):
        has = label != IGNORED
        if not has.any():
            continue
        guess, label = score[has].argmax(dim=1), label[has]
        counts = torch.zeros(len(values), len(values), dtype=torch.long)
        counts.index_put_((label, guess), torch.ones_like(label), accumulate=True)
        rows = (dict(zip(values, row, strict=True)) for row in counts.tolist())
        report[name] = {**hits(guess == label), "taken_for": dict(zip(values, rows, strict=True))}
    return report
