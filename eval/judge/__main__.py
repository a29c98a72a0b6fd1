"""Judge a model folder against the pictures it was trained on, without the model's own CLIP.

    python -m eval.judge MODEL DATA_FOLDER [--count 5000 1000 200] [--px 64 256 1024] [--out runs/judge.json]

frechet     distance of drawn pictures to the real training pictures, in features of EfficientNet-Lite0 (no
            FID), beside the same between real pictures, and of real pictures that super-resolution enlarged
neighbours  distance to the nearest training picture, in features and in pixels, beside that of held-out ones
match       how often a CLIP trained here, with another backbone and seed than the model's, picks the right
            caption among 64, for pictures of seen and of held-out captions
attributes  how often a classifier trained here finds the style, skin tone and gender that the caption names

Both networks see real training pictures alone; how often they are right about real held-out pictures stands
beside. All but frechet is at the size of the first stage. Captions are those of metadata.jsonl, drawn at
random. Features, drawn pictures and networks are kept in a folder beside --out that has its name, so that
an interrupted or a larger run goes on where the last one ended.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cascade.arguments import Parser
from cascade.errors import InputError
from eval.captioned import Record, draw, read_records
from eval.judge.run import Judge
from eval.judge.table import markdown
from eval.models import load_model
from eval.quality import environment, write, write_text

LEAST = 64  # pictures: the captions that the right one is picked from


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m eval.judge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model folder or a hub id owner/name")
    add("data", type=Path, metavar="DATA_FOLDER", help="metadata.jsonl (file_name, text, split) and pictures")
    add("--out", type=Path, default=Path("runs/judge.json"), help="the report (default: runs/judge.json)")
    add(
        "--count",
        type=int,
        nargs="+",
        default=[5000],
        help="pictures at each size, smallest first, the last number for all further ones (default: 5000)",
    )
    add("--px", type=int, nargs="+", help="sizes of frechet, of the model's stages (default: all)")
    add("--seed", type=int, default=0, help="of captions and pictures (default: 0)")
    arguments = parser.parse_args(argv)
    if arguments.out.suffix != ".json":
        raise InputError(f"--out {arguments.out}: expected a name that ends in .json")
    for name, low, values in (("count", LEAST, arguments.count), ("seed", 0, [arguments.seed])):
        for value in values:
            if value < low:
                raise InputError(f"--{name} {value}: expected an integer of at least {low}")
    return arguments


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report. What was asked is checked before anything is drawn."""
    records, seed = read_records(arguments.data), arguments.seed
    train, heldout = (_shuffled(records, split, seed) for split in ("train", "heldout"))
    most = max(arguments.count)
    if most > len(train):
        raise InputError(f"--count {most}: expected at most {len(train)}, the captions of split train")
    pipe, model = load_model(arguments.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    sizes = list(model.stages.values())
    for px in arguments.px or []:
        if px not in sizes:
            nearest = min(sizes, key=lambda size: abs(size - px))
            expected = f"one of {', '.join(map(str, sizes))}; did you mean {nearest}?"
            raise InputError(f"--px {px}: expected {expected}")
    wanted = sorted(set(arguments.px or sizes))
    counts = dict(zip(wanted, arguments.count + arguments.count[-1:] * len(wanted), strict=False))
    identity = f"{model.sha256[:12]}-{model.device}-{model.dtype}"
    judge = Judge(pipe, identity, arguments.out.with_suffix(""), train, heldout, seed)
    return {
        "model": arguments.model,
        "model_sha256": model.sha256,
        "data": str(arguments.data),
        "data_sha256": judge.data,
        "seed": seed,
        **environment(pipe),
        **judge.report(counts, arguments.out),
    }


def _shuffled(records: list[Record], split: str, seed: int) -> list[Record]:
    """The records of a split in a keyed order, each caption once."""
    captions = {record.text for record in records if record.split == split}
    return draw(records, split, max(len(captions), LEAST), seed)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments = parse(argv)
        try:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make folder {arguments.out.parent}: {error.strerror}") from None
        report = run(arguments)
        write(report, arguments.out)
        text, table = markdown(report), arguments.out.with_suffix(".md")
        write_text(text, table)
    except InputError as error:
        print(f"eval.judge: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{text}\nreport: {arguments.out}, {table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
