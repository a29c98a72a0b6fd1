"""Readers of published suites in the formats their authors give them out in, and of any prompt list."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch

from cascade import random
from cascade.errors import InputError
from eval.suites.suite import Prompt, Suite, make_suite, normalise
from eval.suites.table import (
    CATEGORY_COLUMNS,
    TEXT_COLUMNS,
    column,
    hub_rows,
    is_hub_id,
    quoted,
    read_rows,
    read_text,
    texts,
)

PARTI = 1632
GENEVAL = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
COMPBENCH = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
COMPBENCH_EACH = 300
DPG = 1065
COCO_FID = 30_000  # prompts of the zero-shot protocol (Imagen, arXiv:2205.11487, section 3)
COCO_PX = 256  # side of its pictures


def read_prompts(source: str) -> Suite:
    """Any list: a table with a column prompt (and category, and reference, a file name), JSON lines of the
    same, one prompt a line, or a hub data set."""
    path = Path(source)
    rows = hub_rows(source) if not path.exists() and is_hub_id(source) else read_rows(path)
    name = column(rows, TEXT_COLUMNS, source)
    category = column(rows, CATEGORY_COLUMNS, source, required=False)
    assert name is not None  # required
    lines = texts(rows, name, source)
    categories = texts(rows, category, source) if category else ["all"] * len(rows)
    prompts = [
        Prompt(
            text=text,
            category=kind,
            rendered=row.get("rendered") or (quoted(text) if "text" in kind.lower().split() else None),
            reference=row.get("reference") or None,
        )
        for row, text, kind in zip(rows, lines, categories, strict=True)
    ]
    return make_suite(path.stem if path.exists() else source, source, prompts)


def read_parti(source: str) -> Suite:
    """PartiPrompts.tsv (arXiv:2206.10789): columns Prompt, Category, Challenge, Note."""
    rows = read_rows(Path(source))
    for name in ("prompt", "category", "challenge"):
        column(rows, (name,), source)
    lines, categories = texts(rows, "prompt", source), texts(rows, "category", source)
    prompts = [
        Prompt(
            text=text,
            category=category,
            rendered=quoted(text) if row["challenge"] == "Writing & Symbols" else None,
            meta={"challenge": normalise(row["challenge"]), "note": normalise(row.get("note") or "")},
        )
        for row, text, category in zip(rows, lines, categories, strict=True)
    ]
    return make_suite("parti", source, prompts, _unlike("prompts", len(rows), PARTI))


def read_geneval(source: str) -> Suite:
    """GenEval's evaluation_metadata.jsonl (arXiv:2310.11513): tag, include, exclude and prompt a line."""
    rows = read_rows(Path(source))
    for name in ("prompt", "tag", "include"):
        column(rows, (name,), source)
    lines, tags = texts(rows, "prompt", source), texts(rows, "tag", source)
    prompts = [
        Prompt(text=text, category=tag, meta=row) for row, text, tag in zip(rows, lines, tags, strict=True)
    ]
    counts = Counter(tags)
    warnings = [w for tag in GENEVAL for w in _unlike(f"prompts of {tag}", counts[tag], GENEVAL[tag])]
    return make_suite("geneval", source, prompts, warnings)


def read_compbench(source: str) -> Suite:
    """T2I-CompBench (arXiv:2307.06350): the folder of CATEGORY_val.txt files, or one of them."""
    folder = Path(source)
    wanted = [folder / f"{name}_val.txt" for name in COMPBENCH] if folder.is_dir() else [folder]
    files = [path for path in wanted if path.is_file()]
    if not files:
        raise InputError(f"{source}: expected T2I-CompBench files, as in {COMPBENCH[0]}_val.txt")
    prompts, warnings = [], []
    for path in files:
        category = path.stem.removesuffix("_val")
        lines = texts(read_rows(path), "prompt", str(path))
        prompts += [Prompt(text=line, category=category) for line in lines]
        warnings += _unlike(f"prompts of {category}", len(lines), COMPBENCH_EACH)
    lacking = sorted(path.name for path in wanted if path not in files)
    if lacking:
        warnings.append(f"{source} lacks {', '.join(lacking)}")
    return make_suite("compbench", source, prompts, warnings)


def read_dpg(source: str) -> Suite:
    """DPG-Bench (arXiv:2403.05135): the folder prompts/ of one ITEM.txt a prompt, or dpg_bench.csv."""
    path, found = Path(source), dict[str, str]()
    if path.is_dir():
        found = {file.stem: normalise(read_text(file)) for file in sorted(path.glob("*.txt"), key=_number)}
    else:
        rows = read_rows(path)
        column(rows, ("item_id",), source)
        column(rows, ("text",), source)
        for item, text in zip(texts(rows, "item_id", source), texts(rows, "text", source), strict=True):
            found.setdefault(item, text)  # a row is a question; the prompt stands in each
    empty = [item for item, text in found.items() if not text]
    if empty or not found:
        raise InputError(f"{source}: expected prompts, found {f'{empty[0]}.txt empty' if empty else 'none'}")
    prompts = [Prompt(text=text, meta={"item_id": item}) for item, text in found.items()]
    return make_suite("dpg", source, prompts, _unlike("prompts", len(prompts), DPG))


def read_coco(source: str, count: int = COCO_FID, seed: int = 0) -> Suite:
    """COCO captions (captions_val2014.json): `count` pictures at random, one caption of each at random, both
    functions of the seed; a smaller draw is the beginning of a larger one. References are the pictures."""
    captions: dict[int, list[str]] = {}
    try:
        data = json.loads(read_text(Path(source)))
        files = {image["id"]: str(image["file_name"]) for image in data["images"]}
        for row in sorted(data["annotations"], key=lambda row: row["id"]):
            captions.setdefault(row["image_id"], []).append(normalise(row["caption"]))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        captions, files = {}, {}
    pool = sorted(image for image in captions if image in files)
    if not pool:
        raise InputError(f"{source}: expected COCO captions, JSON with images and annotations")
    if len(pool) < count:
        raise InputError(f"{source} has captions of {len(pool)} pictures: expected at least {count}")
    order = torch.randperm(len(pool), generator=random.generator(seed, "coco")).tolist()[:count]
    chosen = [pool[index] for index in order]
    prompts = [
        Prompt(
            text=captions[image][random.key(seed, "coco", image) % len(captions[image])],
            reference=files[image],
            meta={"image_id": image},
        )
        for image in chosen
    ]
    return make_suite("coco", source, prompts)


def _unlike(what: str, found: int, published: int) -> list[str]:
    return [] if found == published else [f"{found} {what}: the published suite has {published}"]


def _number(path: Path) -> tuple[int, str]:
    """Files by number where their names are numbers."""
    return (int(path.stem) if path.stem.isdigit() else -1), path.stem
