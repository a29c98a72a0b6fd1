"""How good and how fast a model folder is, against a folder of captioned pictures.

    python -m eval.quality MODEL_FOLDER DATA_FOLDER [--parts match,sr,speed] [--out report.json]

match  draws a picture of each of `--count` captions, of split train (seen in training) and of split heldout,
       and lets the model's own CLIP pick the caption of each picture among them. The same for the real
       pictures of those captions is the ceiling: what the CLIP can tell apart at all. This CLIP also gave the
       prior its targets, so the figure tells a cascade that draws what it was asked from one that does not,
       and is no measure against other models.
sr     gives each super-resolution stage real held-out pictures, downsampled, at augmentation level 0, and
       compares its pictures with the originals and with bicubic enlargement.
speed  times one picture with default settings, in this process (warm) and as a command of its own (cold).

The report is JSON; the pictures of `match` go beside it, with their captions.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade import Cascade, random
from cascade.arguments import Parser
from cascade.augment import upsample
from cascade.checkpoint import resolve_source
from cascade.errors import InputError, unknown
from cascade.images import downsample, save_png, to_pil
from cascade.progress import tracked
from cascade.stage import Stage
from eval.captioned import Record, draw, load_picture, read_records
from eval.process import ROOT, measure
from eval.sheet import captioned_sheet
from eval.statistics import bootstrap_mean, wilson

PARTS = ("match", "sr", "speed")
SPLITS = ("train", "heldout")
BATCH = 16  # captions a call
WARM_CALLS = 3  # of which the median counts
ROUNDING = 1 / (12 * 255**2)  # mean squared error of rounding [0, 1] to 8 bits: a picture has no less


# -- match ---------------------------------------------------------------------------------------------------


def match(pipe: Cascade, chosen: dict[str, list[Record]], seed: int, out: Path) -> dict[str, Any]:
    """By split: how often the model's CLIP picks the right caption for drawn and for real pictures.
    Saves OUT-SPLIT.png. Raises InputError where the model has no CLIP that encodes pictures."""
    encode_image = getattr(pipe.clip, "encode_image", None)
    if encode_image is None:
        raise InputError(f"model {pipe.name} has no CLIP that encodes pictures: match needs one")
    stage = next(iter(pipe.stages.values()))  # the base stage
    report = {}
    for split, records in chosen.items():
        captions = [record.text for record in records]
        seeds = picture_seeds(captions, seed)
        drawn = draw_pictures(pipe, captions, seeds, stage.config.name, split)
        real = torch.stack([load_picture(record, stage.config.image_px) for record in records])
        text = pipe.encode(captions).pooled
        assert text is not None  # there is a CLIP
        with torch.no_grad():
            ranks = {
                "drawn": caption_ranks(encode_image(drawn.to(pipe.device)), text),
                "real": caption_ranks(encode_image(real.to(pipe.device)), text),
            }
        path = out.with_name(f"{out.stem}-{split}.png")
        save_png(captioned_sheet(to_pil(drawn), captions), path, {"model": pipe.name, "seed": seed})
        report[split] = {
            **{name: hit_rate(r) for name, r in ranks.items()},
            "pictures": [
                {"caption": caption, "seed": s, "rank": rank}
                for caption, s, rank in zip(captions, seeds, ranks["drawn"].tolist(), strict=True)
            ],
            "sheet": path.name,
        }
    return report


def draw_pictures(pipe: Cascade, captions: list[str], seeds: list[int], stage: str, what: str) -> Tensor:
    """One picture a caption, of `stage` and with its default settings: B 3 H W in [-1, 1]."""
    parts = [slice(i, i + BATCH) for i in range(0, len(captions), BATCH)]
    pictures = [
        pipe(captions[part], seed=seeds[part], stop_at=stage).stages[stage]
        for part in tracked(parts, f"match {what}")
    ]
    return torch.cat(pictures)


def picture_seeds(captions: Sequence[str], seed: int) -> list[int]:
    """The seed of each caption's picture, whatever else is drawn."""
    return [random.key(seed, caption, 0) for caption in captions]


def caption_ranks(image: Tensor, text: Tensor) -> Tensor:
    """Rank of the right caption of each picture, 0 the best, of unit vectors B D whose rows belong together.
    A caption that ties with the right one counts as better, so that a CLIP that tells nothing apart fails."""
    scores = image.float() @ text.float().T  # B B
    return (scores >= scores.diagonal()[:, None]).sum(dim=1) - 1  # B


def hit_rate(ranks: Tensor) -> dict[str, float]:
    hits, count = int((ranks == 0).sum()), len(ranks)
    low, high = wilson(hits, count)
    return {"hits": hits, "count": count, "share": hits / count, "low": low, "high": high}


# -- sr ------------------------------------------------------------------------------------------------------


def super_resolution(pipe: Cascade, chosen: dict[str, list[Record]], seed: int) -> dict[str, Any]:
    """By super-resolution stage: peak signal-to-noise ratio against the real pictures, beside bicubic, and
    how far the downsampled output is from the input, as a mean absolute share of the range."""
    return {name: _enlarge_all(pipe, name, records, seed) for name, records in chosen.items()}


def _enlarge_all(pipe: Cascade, name: str, records: list[Record], seed: int) -> dict[str, Any]:
    config = pipe.stages[name].config
    assert config.lowres_px is not None
    settings: dict[str, Any] = {name: {"aug_level": 0.0}}
    rows = []
    for record in tracked(records, name):
        real = load_picture(record, config.image_px)[None]  # 1 3 H W
        lowres = downsample(real, config.lowres_px)
        bicubic = upsample(lowres, (config.image_px, config.image_px)).clamp(-1, 1)
        seeds = picture_seeds([record.text], seed)
        output = pipe(record.text, seed=seeds, start_at=name, stop_at=name, images=lowres, **settings)
        drawn = output.stages[name].cpu()
        rows.append([psnr(drawn, real), psnr(bicubic, real), disagreement(drawn, lowres)])
    drawn_db, bicubic_db, apart = torch.tensor(rows, dtype=torch.float64).T
    gain = drawn_db - bicubic_db
    low, high = bootstrap_mean(gain, seed)
    return {
        "count": len(rows),
        "psnr": drawn_db.mean().item(),
        "psnr_bicubic": bicubic_db.mean().item(),
        "gain": gain.mean().item(),
        "gain_low": low,
        "gain_high": high,
        "gain_worst": gain.min().item(),
        "disagreement": apart.mean().item(),
        "disagreement_worst": apart.max().item(),
    }


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two pictures in [-1, 1] brought to [0, 1], so that the peak is 1.
    An error below that of 8-bit rounding counts as that (58.9 dB)."""
    error = ((a - b).double() / 2).square().mean().item()
    return -10 * math.log10(max(error, ROUNDING))


def disagreement(picture: Tensor, lowres: Tensor) -> float:
    """Mean absolute difference of the downsampled picture and its input B 3 h w, as a share of the range."""
    height, width = lowres.shape[-2:]
    return ((downsample(picture, (height, width)) - lowres).abs().mean() / 2).item()


# -- speed ---------------------------------------------------------------------------------------------------


def speed(pipe: Cascade, folder: Path, prompt: str, seed: int) -> dict[str, Any]:
    """Seconds of a call with default settings after one to warm up (the median, and each), and seconds and
    peak memory of the same as a command. Raises InputError where the command fails."""
    size, calls = pipe(prompt, seed=seed).images[0].size, []
    for _ in tracked(range(WARM_CALLS), "speed"):
        start = time.perf_counter()
        pipe(prompt, seed=seed)  # the pictures come as PIL images: nothing is left to wait for
        calls.append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as out:
        sample = ["sample", prompt, "--model", str(folder.resolve()), "--seed", str(seed), "--out", out]
        cold = measure([sys.executable, "-m", "cascade.cli", *sample])
    if cold.status != 0:
        last = (cold.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"cascade sample ended with status {cold.status}: {last}")
    return {
        "px": list(size),
        "warm_seconds": sorted(calls)[WARM_CALLS // 2],
        "warm_calls": calls,
        "cold_seconds": cold.seconds,
        "cold_peak_bytes": cold.peak_bytes,
    }


# -- command line --------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m eval.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL_FOLDER", help="a model folder or a hub id owner/name")
    add("data", type=Path, metavar="DATA_FOLDER", help="metadata.jsonl (file_name, text, split) and pictures")
    add("--out", type=Path, default=Path("runs/quality.json"), help="the report (default: runs/quality.json)")
    add("--count", type=int, default=64, help="captions of each split in match (default: 64)")
    add(
        "--sr-count",
        type=int,
        nargs="+",
        default=[32, 12],
        help="pictures of each super-resolution stage in order, the last number for all further ones "
        "(default: 32 12)",
    )
    add("--seed", type=int, default=0, help="of captions, pictures and intervals (default: 0)")
    add("--parts", default=",".join(PARTS), help=f"any of {', '.join(PARTS)}, with commas (default: all)")
    arguments = parser.parse_args(argv)
    arguments.parts = arguments.parts.split(",")
    for part in arguments.parts:
        if part not in PARTS:
            raise unknown("part", part, PARTS)
    for name, low, values in (
        ("count", 2, [arguments.count]),
        ("sr-count", 1, arguments.sr_count),
        ("seed", 0, [arguments.seed]),
    ):
        for value in values:
            if value < low:
                raise InputError(f"--{name} {value}: expected an integer of at least {low}")
    return arguments


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report. What was asked is drawn up before anything is measured, so that it fails at once."""
    folder = resolve_source(arguments.model)
    records, seed = read_records(arguments.data), arguments.seed
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = Cascade.from_pretrained(folder, device=device)
    wanted = SPLITS if "match" in arguments.parts else ()
    captions = {split: draw(records, split, arguments.count, seed) for split in wanted}
    stages = [name for name, stage in pipe.stages.items() if stage.config.lowres_px]
    counts = arguments.sr_count + arguments.sr_count[-1:] * len(stages)
    enlarged = dict(zip(stages, counts, strict=False)) if "sr" in arguments.parts else {}
    pictures = {name: draw(records, "heldout", count, seed) for name, count in enlarged.items()}
    prompts = (
        [record.text for record in draw(records, "train", 1, seed)] if "speed" in arguments.parts else []
    )
    report: dict[str, Any] = {"model": arguments.model, "data": str(arguments.data), "seed": seed}
    report |= environment(pipe)
    if captions:
        report["match"] = match(pipe, captions, seed, arguments.out)
    if pictures:
        report["sr"] = super_resolution(pipe, pictures, seed)
    if prompts:
        report["speed"] = speed(pipe, folder, prompts[0], seed)
    return report


def environment(pipe: Cascade) -> dict[str, Any]:
    """What figures depend on beside the model: code, hardware, number format."""
    describe = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        commit = "unknown"
    stage: Stage = next(iter(pipe.stages.values()))
    cuda = pipe.device.type == "cuda"
    return {
        "commit": commit,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(stage.dtype).removeprefix("torch."),
    }


def summary(report: dict[str, Any]) -> list[str]:
    """The figures of a report, a line each."""
    lines = []
    for split, found in report.get("match", {}).items():
        for name in ("drawn", "real"):
            r = found[name]
            lines.append(
                f"match {split:<8} {name:<6} {r['hits']} of {r['count']}, {r['share']:.1%} "
                f"(95%: {r['low']:.1%} to {r['high']:.1%})"
            )
    for stage, r in report.get("sr", {}).items():
        lines.append(
            f"{stage}: PSNR {r['psnr']:.2f} dB, bicubic {r['psnr_bicubic']:.2f}, gain {r['gain']:+.2f} "
            f"(95%: {r['gain_low']:+.2f} to {r['gain_high']:+.2f}) over {r['count']} pictures; "
            f"downsampled output off by {r['disagreement']:.4f} of the range"
        )
    if r := report.get("speed"):
        width, height = r["px"]
        lines.append(
            f"one picture of {width}x{height} px: warm {r['warm_seconds']:.2f} s, "
            f"cold process {r['cold_seconds']:.2f} s and {r['cold_peak_bytes'] / 1e9:.2f} GB"
        )
    return lines


def write(report: dict[str, Any], path: Path) -> None:
    """The report as JSON, complete or absent."""
    write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """A file, complete or absent. Raises InputError where it cannot be written."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments = parse(argv)
        try:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make folder {arguments.out.parent}: {error.strerror}") from None
        report = run(arguments)
        write(report, arguments.out)
    except InputError as error:
        print(f"eval.quality: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print("\n".join([*summary(report), f"report: {arguments.out}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
