"""The judge's report in Markdown, as it goes into a model card."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from eval.distances import FEW

NAMES = {
    "all": "",
    "tone x gender x base": ", skin tone x gender x base",
    "style x object": ", style x object",
}


def markdown(report: dict[str, Any]) -> str:
    """Four tables, of `report` as `eval.judge` writes it."""
    parts = [_frechet(report), _match(report), _attributes(report), _neighbours(report)]
    return "\n\n".join(parts) + "\n"


def _frechet(report: dict[str, Any]) -> str:
    rows = []
    for px, r in report["frechet"].items():
        enlarged = f"{r['enlarged_equal']:.2f}" if "enlarged_equal" in r else ""
        rows.append(
            [
                f"{px} px",
                f"{r['drawn']:.2f} ({r['count']:,} and {r['real_count']:,})",
                f"{r['equal_count']:,}",
                f"{r['drawn_equal']:.2f}",
                f"{r['floor_equal']:.2f}",
                f"{r['ratio']:.2f}",
                enlarged,
            ]
        )
    head = [
        "",
        "drawn and all real (counts)",
        "at equal counts",
        "drawn and real",
        "real and real (floor)",
        "drawn / floor",
        "enlarged real and real",
    ]
    text = "Frechet distance, EfficientNet-Lite0 features (no FID), to real training pictures:\n\n"
    text += _table(head, rows)
    if min(r["equal_count"] for r in report["frechet"].values()) < FEW:
        text += f"\n\nUnder {FEW:,} pictures a distance is mostly bias: only equal counts compare."
    return text


def _match(report: dict[str, Any]) -> str:
    rows = [
        [name + NAMES[kind], *_share(found)]
        for name, kinds in report["match"].items()
        for kind, found in kinds.items()
        if kind == "all" or name.endswith("held out")
    ]
    text = "Right caption among 64, by a CLIP of another backbone trained on real pictures:\n\n"
    return text + _table(["pictures", "right", "95% interval", "count"], rows)


def _attributes(report: dict[str, Any]) -> str:
    rows = [
        [attribute, name + NAMES[kind], *_share(found)]
        for attribute in next(iter(report["attributes"].values()))["all"]
        for name, kinds in report["attributes"].items()
        for kind, by_attribute in kinds.items()
        if (kind == "all" or name.endswith("held out")) and (found := by_attribute.get(attribute))
    ]
    text = "Attributes, by a classifier trained on real pictures:\n\n"
    return text + _table(["attribute", "pictures", "right", "95% interval", "count"], rows)


def _neighbours(report: dict[str, Any]) -> str:
    rows, quantiles = [], []
    for space, sets in report["neighbours"].items():
        for name, r in sets.items():
            own = f"{r['own']['share']:.1%}" if "own" in r else ""
            quantiles = [f"{float(q):.0%}" for q in r["quantiles"]]
            distances = [f"{value:.3f}" for value in r["quantiles"].values()]
            rows.append([space, name, *distances, f"{r['near']['share']:.1%}", own])
    head = ["in", "pictures", *quantiles, "nearer than 99% of held-out real", "nearest is its own"]
    text = "Root mean square difference to the nearest training picture, quantiles:\n\n"
    return text + _table(head, rows)


def _share(found: dict[str, Any]) -> list[str]:
    return [f"{found['share']:.1%}", f"{found['low']:.1%} to {found['high']:.1%}", f"{found['count']:,}"]


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
