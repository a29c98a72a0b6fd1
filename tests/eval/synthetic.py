"""A finished run with pictures that say which model, prompt and stage they are of, and a report of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from cascade import random
from cascade.images import save_png
from eval.run import Item, Model, Plan, Run, Setting, read_run, write_manifest, write_plan
from eval.suites.suite import Prompt, make_suite

STAGES = {"base": 16, "sr256": 32, "sr1024": 64}
NASTY = [
    "a <b>bold</b> & \"quoted\" 'claim' </script>",
    "שלום עולם, a red apple 🍎",
    "`code` | pipe\\ {{ braces }}",
]
Draw = Callable[[str, int, int, int], Image.Image]  # model, prompt, k, px


def colour(model: str, prompt: int, k: int, px: int) -> Image.Image:
    red = 40 if model == "A" else 200
    return Image.new("RGB", (px, px), (red, (prompt * 37) % 256, (k * 90 + px) % 256))


def make_run(
    folder: Path,
    *,
    sides: str = "AB",
    texts: dict[str, list[str]] | None = None,  # by category
    per_prompt: int = 2,
    guidance: tuple[int, ...] = (),
    stages: dict[str, int] | None = None,
    elsewhere: str = "",  # sides that are folders of pictures
    draw: Draw = colour,
) -> Run:
    texts = texts or {"Colors": ["a red apple", "a blue car"], "Odd ones": NASTY}
    stages = stages or STAGES
    prompts = [Prompt(text=text, category=category) for category, group in texts.items() for text in group]
    settings = [Setting()] + [
        Setting(id=f"base.guidance={w}", overrides={"base": {"guidance": w}}, study="guidance", label=str(w))
        for w in guidance
    ]
    models = {
        side: Model(
            name=f"secret-{side}",
            path=f"models/{side}",
            sha256=side * 64,
            kind="pictures" if side in elsewhere else "cascade",
            stages={"pictures": 32} if side in elsewhere else stages,
        )
        for side in sides
    }
    plan = Plan(
        suite=make_suite("toy", "own", prompts),
        models=models,
        settings=tuple(settings),
        per_prompt=per_prompt,
        seed=0,
        batch=4,
        code="0.0",
        command="python -m eval toy --model models/A",
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_plan(folder, plan)
    items = [_item(folder, plan, key, draw) for key in plan.keys()]
    write_manifest(folder, items)
    return read_run(folder)


def _item(folder: Path, plan: Plan, key: tuple[str, str, int, int], draw: Draw) -> Item:
    model, setting, prompt, k = key
    files = {}
    for stage, px in plan.models[model].stages.items():
        name = f"pictures/{model}/{setting}/{stage}/{prompt:04d}-{k}.png"
        save_png(draw(model, prompt, k, px), folder / name, {"model": plan.models[model].name})
        files[stage] = name
    return Item(
        model=model,
        setting=setting,
        prompt=prompt,
        k=k,
        text=plan.suite.prompts[prompt].text,
        category=plan.suite.prompts[prompt].category,
        seed=k,
        files=files,
        sha256={s: hashlib.sha256((folder / f).read_bytes()).hexdigest() for s, f in files.items()},
        overrides={},
        model_sha256=plan.models[model].sha256,
        code="0.0",
    )


def make_report(run: Run) -> dict[str, Any]:
    """Made-up figures in the form of report.json."""
    metrics = {
        "clip_score": _metric(run, "CLIP score", True, 0.27, 0.02),
        "lettering": _metric(run, "Lettering error", False, 3.2, 0.8),
    }
    sides, settings = list(run.models), [s.id for s in run.settings]
    distances = {
        side: {
            setting: {
                "value": 31.4 + 5 * row + 3 * column**2,
                "low": 29.0 + 5 * row + 3 * column**2,
                "high": 34.0 + 5 * row + 3 * column**2,
                "count": 10,
                "warning": "10 pictures: under 2,048 the distance is biased",
            }
            for column, setting in enumerate(settings)
        }
        for row, side in enumerate(sides)
    }
    scores = metrics["clip_score"]["values"]
    sweeps = [
        {
            "over": "base.guidance",
            "x": "clip_score",
            "y": "fid",
            "model": side,
            "points": [
                {"setting": s.id, "label": s.label}
                | _ends("x", scores[side][s.id]["overall"], "mean")
                | _ends("y", distances[side][s.id], "value")
                for s in run.settings
                if s.study == "guidance"
            ],
        }
        for side in sides
    ]
    return {
        "suite": {
            "name": run.suite.name,
            "source": run.suite.source,
            "sha256": run.suite.sha256,
            "prompts": len(run.suite.prompts),
        },
        "models": {side: {"name": model.name} for side, model in run.models.items()},
        "settings": [{"id": setting} for setting in settings],
        "stage": "sr1024",
        "code": "0.0",
        "environment": {"torch": "0", "device": "cpu"},
        "references": None,
        "command": run.plan.command,
        "metrics": metrics,
        "sets": {"fid": {"title": "FID", "higher_is_better": False, "values": distances}},
        "sweeps": sweeps if len(settings) > 1 else [],
        "cascade": {
            "consistency": {
                "title": "Super-resolution against its input",
                "rows": [
                    {"model": side, "stage": stage, "psnr": 31.237, "psnr_low": 30.9, "psnr_high": 31.6}
                    for side in sides
                    for stage in ("sr256", "sr1024")
                ],
            }
        },
        "warnings": ["10 pictures: under 2,048 the distance is biased"],
    }


def _ends(axis: str, cell: dict[str, Any], value: str) -> dict[str, float]:
    return {axis: cell[value], f"{axis}_low": cell["low"], f"{axis}_high": cell["high"]}


def _metric(run: Run, title: str, higher: bool, mean: float, spread: float) -> dict[str, Any]:
    prompts = run.suite.prompts

    def draws(side: str, setting: str) -> list[float]:
        noise = random.normal((len(prompts),), [7], title, side, setting)[0].tolist()
        shift = spread if side == "A" else 0.0
        return [mean + shift + spread * z for z in noise]

    def cell(values: list[float]) -> dict[str, Any]:
        middle, half = sum(values) / len(values), 2 * spread / len(values) ** 0.5
        few = len(values) < 2
        low, high = (None, None) if few else (middle - half, middle + half)
        return {"mean": middle, "low": low, "high": high, "count": len(values)}

    def compare(values: list[float]) -> dict[str, Any]:
        entry = cell(values)
        difference = entry.pop("mean")
        clear = entry["low"] is not None and entry["low"] > 0
        better = ("A better" if higher else "B better") if clear else "not significant"
        return entry | {
            "difference": difference,
            "p": 0.004 if clear else 0.31,
            "effect": None if len(values) < 2 else 0.8,
            "verdict": better,
        }

    found, comparison = {}, {}
    groups = {c: [i for i, p in enumerate(prompts) if p.category == c] for c in run.suite.categories}
    for side in run.models:
        found[side] = {}
        for setting in [s.id for s in run.settings]:
            values = draws(side, setting)
            found[side][setting] = {
                "overall": cell(values),
                "categories": {c: cell([values[i] for i in rows]) for c, rows in groups.items()},
                "prompts": {str(i): value for i, value in enumerate(values)},
            }
    if len(run.models) == 2:
        for setting in [s.id for s in run.settings]:
            a, b = (found[side][setting]["prompts"] for side in "AB")
            apart = [a[i] - b[i] for i in a]
            categories = {c: compare([apart[i] for i in rows]) for c, rows in groups.items()}
            for entry in categories.values():
                entry["p_holm"] = min(1.0, entry["p"] * len(categories))
            comparison[setting] = {"overall": compare(apart), "categories": categories}
    metric = {
        "title": title,
        "unit": "cosine",
        "higher_is_better": higher,
        "model": "toy network",
        "resize": "bicubic, antialiased, 224 px",
        "values": found,
    }
    return metric | ({"comparison": comparison} if comparison else {})
