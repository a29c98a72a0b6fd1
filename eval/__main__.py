"""`python -m eval SUITE` draws, measures, reports and makes the page for people, in one command.

python -m eval skills --out runs/skills                              the embedded default on the own prompts
python -m eval.launch --nproc 8 drawbench DrawBench.csv --model A --against B --per-prompt 8 --out RUN
python -m eval.launch --nproc 8 coco captions_val2014.json --references val2014 --model A --out RUN
python -m eval measure|report|blind RUN, python -m eval tally RUN votes/*.json     one part of it again
python -m eval export RUN geneval|vqascore                           pictures for scorers elsewhere
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.arguments import Parser
from cascade.errors import InputError, unknown

if TYPE_CHECKING:
    from eval.run import Run

RANK = int(os.environ.get("RANK", "0"))  # among several processes
GRACE_S = 20.0  # for the first process to speak, and for the launcher to end the others then


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 after bad input (one line on stderr); 1 where another process failed, which says why;
    130 when interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parts = {"measure": _measure, "report": _report, "blind": _blind, "tally": _tally, "export": _export}
    try:
        name = argv[0] if argv else ""
        if name not in parts:
            return _evaluate(argv)
        return 0 if RANK else parts[name](argv[1:])  # several processes only draw together
    except InputError as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        return 130


def _say(message: str) -> None:
    """One line on stderr. Processes mostly meet the same mistake: the first speaks, and when it has gone the
    launcher ends the others. One that still lives then met it alone."""
    if RANK:
        time.sleep(GRACE_S)
        message = f"process {RANK}: {message}"
    print(f"eval: {message}", file=sys.stderr, flush=True)


# -- the whole ---------------------------------------------------------------------------------------------


def _evaluate(argv: list[str]) -> int:
    arguments = _parse(_suite_parser(), argv)
    from eval.evaluate import Request, draw_run
    from eval.measure import check
    from eval.processes import Lost
    from eval.settings import make_settings
    from eval.suites import COCO_PX, first, load_suite

    check(arguments.metrics, arguments.allow_legacy_checkpoint)
    settings = make_settings(arguments.set, arguments.guidance, arguments.sweep, arguments.ablate)
    suite = load_suite(arguments.suite, arguments.list, count=arguments.count, seed=arguments.seed)
    if arguments.limit is not None:
        suite = first(suite, arguments.limit)
    request = Request(
        out=arguments.out or Path("runs") / f"eval-{suite.name}",
        suite=suite,
        model=arguments.model,
        against=arguments.against,
        settings=settings,
        per_prompt=arguments.per_prompt,
        seed=arguments.seed,
        batch=arguments.batch,
        stop_at=arguments.stop_at,
        px=COCO_PX if suite.name == "coco" else None,
        references=arguments.references,
        command=f"python -m eval {shlex.join(argv)}",
    )
    try:
        run = draw_run(request)
    except Lost as error:
        _say(f"the other processes are gone ({error})")
        return 1
    if run is not None and not arguments.draw_only:
        from eval.blind import write_blind

        _conclude(run, arguments)
        print(f"page for people: {write_blind(run, stage=arguments.stage)}")
    return 0


def _conclude(run: Run, arguments: argparse.Namespace) -> None:
    """Measure a run and report it."""
    import torch

    from eval.measure import measure
    from eval.processes import processes
    from eval.report import write_report

    references = arguments.references or run.plan.references
    report = measure(
        run,
        metrics=arguments.metrics,
        references=None if references is None else Path(references),
        stage=arguments.stage,
        seed=run.plan.seed,
        device=torch.device(str(processes().device)).type,  # the same words for one process and many
        allow_legacy=arguments.allow_legacy_checkpoint,
    )
    print(f"report: {write_report(run, report)}")


def _suite_parser() -> Parser:
    parser = Parser(
        prog="python -m eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("suite", help="skills, emoji, drawbench, parti, geneval, compbench, dpg, coco, prompts, or a file")
    add(
        "list",
        nargs="?",
        help="the suite's prompts: a path, or for drawbench and prompts also a hub data set",
    )
    add(
        "--out",
        type=Path,
        metavar="RUN",
        help="run folder, new or to be continued (default: runs/eval-SUITE)",
    )
    add(
        "--model",
        metavar="A",
        help="model folder, hub id, or folder of pictures (default: the embedded model)",
    )
    add("--against", metavar="B", help="another one, to compare with")
    add("--per-prompt", type=int, default=1, metavar="N", help="pictures of each prompt (default: 1)")
    add("--guidance", action="append", default=[], metavar="STAGE=W,W", help="weights to draw with")
    add("--sweep", action="append", default=[], metavar="STAGE.NAME=V,V", help="values beside the default")
    add("--ablate", action="append", default=[], metavar="WHAT", help="prior, or lowres")
    add(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.NAME=V",
        help="a sampling setting of every picture",
    )
    add("--stop-at", metavar="STAGE", help="last stage to draw (default: the last; coco: that of 256 px)")
    add("--seed", type=int, default=0, metavar="N")
    add("--batch", type=int, metavar="N", help="pictures drawn together (default: 1 on the CPU, else 16)")
    add("--limit", type=int, metavar="N", help="only the first N prompts of each category")
    add("--count", type=int, metavar="N", help="coco: captions to draw (default: 30000)")
    add("--draw-only", action="store_true", help="draw, and measure another time")
    _add_measures(parser)
    return parser


# -- its parts ---------------------------------------------------------------------------------------------


def _measure(argv: list[str]) -> int:
    parser = _part_parser("measure", "measure the pictures of a run again; writes report.json and the report")
    _add_measures(parser)
    arguments = _parse(parser, argv)
    from eval.measure import check
    from eval.run import read_run

    check(arguments.metrics, arguments.allow_legacy_checkpoint)
    _conclude(read_run(arguments.run), arguments)
    return 0


def _report(argv: list[str]) -> int:
    parser = _part_parser("report", "write the report of a measured run again")
    parser.add_argument(
        "--out", type=Path, metavar="HTML", help="elsewhere, to be read without the run folder"
    )
    parser.add_argument("--px", type=int, metavar="N", help="longest side of its pictures")
    arguments = _parse(parser, argv)
    from cascade.config import read_mapping
    from eval.report import write_report
    from eval.run import read_run

    run = read_run(arguments.run)
    print(write_report(run, read_mapping(arguments.run / "report.json"), out=arguments.out, px=arguments.px))
    return 0


def _blind(argv: list[str]) -> int:
    parser = _part_parser("blind", "make the blind page of a run")
    parser.add_argument(
        "--setting", metavar="ID", help="setting whose pictures are shown (default: the first)"
    )
    parser.add_argument(
        "--against", metavar="ID", help="of a run of one model: the setting to compare it with"
    )
    parser.add_argument("--stage", metavar="STAGE", help="default: the last")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of the sides (default: drawn, and kept secret)"
    )
    arguments = _parse(parser, argv)
    from eval.blind import write_blind
    from eval.run import read_run

    choice = {name: getattr(arguments, name) for name in ("setting", "against", "stage", "seed")}
    print(write_blind(read_run(arguments.run), **choice))
    return 0


def _export(argv: list[str]) -> int:
    parser = _part_parser("export", "write the folders that a scorer elsewhere takes (see eval.exchange)")
    parser.add_argument("scorer", metavar="SCORER", help="geneval or vqascore")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/export/SCORER")
    parser.add_argument("--stage", metavar="STAGE", help="whose pictures (default: the last)")
    arguments = _parse(parser, argv)
    from eval.exchange import EXPORTS
    from eval.run import read_run

    run, scorer = read_run(arguments.run), arguments.scorer
    if scorer not in EXPORTS:
        raise unknown("scorer", scorer, EXPORTS)
    out = arguments.out or run.folder / "export" / scorer
    EXPORTS[scorer](run, out, arguments.stage)
    print(f"{out}: once it is scored, python -m eval measure {run.folder} --metrics {scorer}={out}")
    return 0


def _tally(argv: list[str]) -> int:
    from eval.tally import main as tally

    return tally(argv)


def _add_measures(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--references", metavar="DIR", help="real pictures: of the suite's prompts, and to measure against")
    add("--metrics", nargs="+", default=[], metavar="NAME[=SOURCE]", help="default: what needs no download")
    add("--stage", metavar="STAGE", help="whose pictures are measured (default: the last)")
    add(
        "--allow-legacy-checkpoint",
        action="store_true",
        help="read a metric's weights from a pickle, tensors alone, and keep a safetensors copy",
    )


def _part_parser(name: str, description: str) -> Parser:
    parser = Parser(prog=f"python -m eval {name}", description=description, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN")
    return parser


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    arguments, extra = parser.parse_known_args(argv)
    if extra:
        known = [flag for flag in parser._option_string_actions if flag.startswith("--")]
        raise unknown("argument", extra[0], known)
    return arguments


if __name__ == "__main__":
    status = main()
    if status and "RANK" in os.environ:  # an orderly end would wait for processes that are gone
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
