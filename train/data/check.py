"""`python -m train.data check RECIPE`: what a data set holds, before hours are spent on it.

Every picture is decoded and every principal caption is split into the tokens of the recipe's encoder. Writes
data-check.json and data-check.png to the run's folder, and prints the same as a table.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cascade.checkpoint import write_json
from cascade.progress import tracked
from cascade.text import clean_caption, load_text_encoder
from train.data import BadPicture, PictureSet, open_pictures
from train.files import whole_file
from train.recipe import Recipe

NAMED = 8  # bad pictures in the table; the report names all
CHUNK = 1024  # captions tokenised at a time
MOST = 200_000  # pictures that are looked at, evenly spread over the set
QUANTILES = {"least": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1.0}


def check(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Read a recipe's data set, report on it, and return the report. Raises InputError where the set cannot
    be opened at all, or the report cannot be written."""
    pictures = open_pictures(recipe.data)
    total = len(pictures)
    chosen = np.unique(np.linspace(0, total - 1, min(total, MOST)).astype(np.int64))
    sizes, bad = _look(pictures, chosen)
    captions = [pictures.captions(int(i))[0] for i in chosen]
    lengths = {e.reference()["kind"]: (token_counts(e, captions), e.max_length) for e in _encoders(recipe)}
    short, taken = sizes.min(1), np.isin(chosen, pictures.train)
    report = {
        "folder": str(pictures.folder),
        "pictures": total,
        "looked at": len(chosen),
        "training": len(pictures.train),
        "held out": len(pictures.heldout),
        "filtered out": total - len(pictures.train) - len(pictures.heldout),
        "training, large enough for": {
            name: int((taken & (short >= part.stage.image_px)).sum())
            for name, part in recipe.pictures.items()
        },
        "shorter side, px": _quantiles(short[short > 0]),
        "width / height": _quantiles(sizes[short > 0, 0] / sizes[short > 0, 1]),
        "without caption": captions.count(""),
        "caption tokens": {
            kind: _quantiles(counts) | {"cut": int((counts > most).sum()), "read": most}
            for kind, (counts, most) in lengths.items()
        },
        "bad": dict(Counter(_kind(reason) for reason in bad.values())),
        "bad pictures": bad,
    }
    with whole_file(out / "data-check.json") as part:
        write_json(part, report)
    with whole_file(out / "data-check.png") as part:
        _plot(part, recipe, sizes, lengths, report)
    _print(report, out)
    return report


def _look(pictures: PictureSet, chosen: np.ndarray) -> tuple[np.ndarray, dict[str, str]]:
    """Width and height of the chosen pictures, N 2, 0 where one is bad; name and reason of the bad ones."""
    sizes, bad = np.zeros((len(chosen), 2), np.int64), {}

    def look(place: int) -> BadPicture | None:
        try:
            height, width = pictures.picture(int(chosen[place])).shape[1:]
        except BadPicture as error:
            return error
        sizes[place] = width, height
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(look, range(len(chosen)))
        for error in tracked(found, "pictures", len(chosen)):
            if error is not None:
                bad[error.name] = error.reason
    return sizes, bad


def _encoders(recipe: Recipe) -> Sequence[Any]:
    """The recipe's text encoder, or those of its pair."""
    encoder: Any = load_text_encoder(recipe.text)
    return getattr(encoder, "encoders", (encoder,))


def token_counts(encoder: Any, captions: Sequence[str]) -> np.ndarray:
    """Tokens of each caption before it is cut, special tokens included, N."""
    if getattr(encoder.config, "clean", False):
        captions = [clean_caption(caption) for caption in captions]
    chunks = [list(captions[i : i + CHUNK]) for i in range(0, len(captions), CHUNK)]
    return np.array([count for part in chunks for count in encoder.tokenise(part).lengths], np.int64)


def _kind(reason: str) -> str:
    """A reason without the particulars that stand in brackets."""
    return reason.partition(" (")[0]


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return (
        {name: round(float(np.quantile(values, q)), 3) for name, q in QUANTILES.items()}
        if len(values)
        else {}
    )


def _print(report: dict[str, Any], out: Path) -> None:
    console, table = Console(), Table(box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    for name, value in report.items():
        if name == "bad pictures":
            continue
        if name == "caption tokens":
            for kind, row in value.items():
                table.add_row(f"{name}, {kind}", _row(row))
        else:
            table.add_row(name, _row(value) if isinstance(value, dict) else f"{value}")
    console.print(table)
    for name, reason in list(report["bad pictures"].items())[:NAMED]:
        console.print(f"bad: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if len(report["bad pictures"]) > NAMED:
        console.print(f"and {len(report['bad pictures']) - NAMED} more")
    console.print(f"{out / 'data-check.json'}, {out / 'data-check.png'}", soft_wrap=True)


def _row(values: dict[str, Any]) -> str:
    return "  ".join(f"{name} {value:g}" for name, value in values.items()) or "none"


def _plot(
    path: Path, recipe: Recipe, sizes: np.ndarray, lengths: dict[str, Any], report: dict[str, Any]
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(f"{report['folder']}: {report['pictures']:,} pictures, {len(report['bad pictures'])} bad")
    (side, shape), (tokens, bad) = figure.subplots(2, 2)
    good = sizes[sizes.min(1) > 0]
    side.hist(good.min(1), bins=50, color="tab:blue")
    stages = {name: part.stage.image_px for name, part in recipe.pictures.items()}
    for px in stages.values():
        side.axvline(px, color="black", linestyle=":")
    side.secondary_xaxis("top").set_xticks(list(stages.values()), list(stages), rotation=30)
    side.set(xlabel="shorter side (px)", ylabel="pictures")
    shape.hist(np.log2(good[:, 0] / good[:, 1]), bins=50, color="tab:blue")
    shape.set(xlabel="log2 (width / height)", ylabel="pictures")
    for kind, (counts, most) in lengths.items():
        drawn = tokens.hist(
            counts, bins=range(1, int(counts.max()) + 2), alpha=0.6, label=f"{kind}, reads {most}"
        )
        tokens.axvline(most, color=drawn[2][0].get_facecolor(), linestyle=":")
    tokens.set(xlabel="tokens of the principal caption", ylabel="pictures")
    tokens.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    bad.barh(list(report["bad"]), list(report["bad"].values()), color="tab:red")
    bad.set(xlabel="bad pictures")
    figure.savefig(path, format="png", dpi=100)
