"""`cascade sample`, `info` and `convert`. Exit status 0 on success, 2 on bad input with one line on stderr.

Heavy imports happen inside the commands, so that `cascade --help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade import __version__
from cascade.arguments import Parser
from cascade.errors import InputError, unknown

if TYPE_CHECKING:
    from PIL.Image import Image

    from cascade.pipeline import Cascade, Output
    from cascade.request import Request

SLUG_LENGTH = 48  # characters of the prompt in a file name


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status. Argument errors are one line too, without the usage text."""
    logging.basicConfig(format="cascade: %(message)s", level=logging.WARNING)
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        return arguments.run(arguments)
    except InputError as error:
        print(f"cascade: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cascade: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as in `cascade info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> Parser:
    parser = Parser(prog="cascade", description="Draw pictures from text with a cascade of diffusion models.")
    parser.add_argument("--version", action="version", version=f"cascade {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    sample = commands.add_parser("sample", help="draw pictures of prompts", allow_abbrev=False)
    add = sample.add_argument
    add("prompts", nargs="+", metavar="PROMPT", help="a description of a picture")
    _add_model(sample)
    add(
        "--out",
        type=Path,
        default=Path("pictures"),
        metavar="DIR",
        help="folder of the PNG files (default: pictures)",
    )
    add(
        "--seed", type=int, default=0, metavar="N", help="picture k of a prompt draws from N + k (default: 0)"
    )
    add("--num", type=int, default=1, metavar="N", help="pictures a prompt (default: 1)")
    add("--negative", metavar="TEXT", help="what the pictures should not show")
    add("--stop-at", metavar="STAGE", help="last stage to run (default: the last)")
    add("--size", metavar="HxW", help="height and width in px of the last stage's pictures")
    add("--inpaint", type=Path, metavar="PICTURE", help="a picture of which a part is kept, with a mask")
    add("--mask", type=Path, metavar="MASK", help="white where that picture is kept, else black")
    add("--save-stages", action="store_true", help="also save the pictures of the stages before")
    add(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.NAME=VALUE",
        help="a sampling setting, as in base.steps=25; may be repeated",
    )

    add(
        "--offload",
        action="store_true",
        help="keep each part on the device only while it works, and the text encoder nowhere after",
    )

    info = commands.add_parser("info", help="show what a model is made of", allow_abbrev=False)
    _add_model(info)

    convert = commands.add_parser(
        "convert", help="bring public weights into a folder of this project", allow_abbrev=False
    )
    add = convert.add_argument
    add(
        "places",
        nargs="+",
        metavar="SOURCE ... DEST",
        help="folders, hub ids or SOURCE:PART,PART whose parts become one model; the folder to write",
    )
    add("--to", choices=("cascade", "diffusers"), default="cascade", help="layout (default: cascade)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="number format of the stages (default: as they are)",
    )
    _add_legacy(convert)
    for command, run in ((sample, _sample), (info, _info), (convert, _convert)):
        command.set_defaults(
            run=run, options=[flag for flag in command._option_string_actions if flag[:2] == "--"]
        )
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="M", help="a model folder or a hub id owner/name (default: the embedded one)"
    )
    _add_legacy(parser)


def _add_legacy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-legacy-checkpoint",
        action="store_true",
        help="read pickles (.bin, .pt, .ckpt): their tensors alone, which are kept as safetensors",
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    arguments, extra = parser.parse_known_args(argv)
    if extra:
        raise unknown("argument", extra[0], arguments.options)
    return arguments


# -- cascade sample ----------------------------------------------------------------------------------------


def _sample(arguments: argparse.Namespace) -> int:
    import torch

    from cascade.pipeline import PRIOR, Cascade

    settings = _settings(arguments.set)
    size, inpaint = _size(arguments.size), _inpaint(arguments.inpaint, arguments.mask)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = Cascade.from_pretrained(
        arguments.model,
        device=device,
        offload=arguments.offload,
        allow_legacy=arguments.allow_legacy_checkpoint,
    )
    _draws(pipe)
    for name in settings:
        if name not in (PRIOR, *pipe.stages):
            raise unknown("stage", name, (PRIOR, *pipe.stages), where="--set")
    call: dict[str, Any] = dict(
        seed=arguments.seed,
        num_images=arguments.num,
        negative=arguments.negative,
        stop_at=arguments.stop_at,
        inpaint=inpaint,
        size=size,
        **settings,
    )
    request = pipe.request(arguments.prompts, **call)
    if not request.runs:
        raise InputError(
            f"stop-at {arguments.stop_at!r} draws no picture: expected one of {', '.join(pipe.stages)}"
        )
    _writable(arguments.out)
    output = _with_progress(pipe, arguments.prompts, call)
    _save(pipe, request, output, arguments)
    return 0


def _settings(given: list[str]) -> dict[str, dict[str, Any]]:
    """`--set` arguments as keyword arguments of the pipeline."""
    import yaml

    from cascade.config import override

    try:
        settings = override({}, given)
    except yaml.YAMLError as error:
        raise InputError(
            f"--set {given!r}: a value is not valid YAML ({str(error).splitlines()[0]})"
        ) from None
    for name, value in settings.items():
        if not isinstance(value, dict):
            raise InputError(f"--set {name}={value}: expected STAGE.NAME=VALUE, as in base.steps=25")
    return settings


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text.strip())
    if match is None:
        raise InputError(f"--size {text!r}: expected HxW in px, as in 1024x768, or one side of a square")
    return int(match[1]), int(match[2] or match[1])


def _draws(pipe: Cascade) -> None:
    """Raise InputError for a model that draws no picture from text alone."""
    first = next(iter(pipe.stages.values()), None)
    add = "cascade convert puts models together"
    if first is None:
        raise InputError(f"model {pipe.name} holds a prior alone: expected a stage that draws; {add}")
    if first.config.lowres_px is not None:
        name, px = first.config.name, first.config.lowres_px
        raise InputError(
            f"model {pipe.name}: its first stage, {name}, enlarges pictures of {px} px: expected a base "
            f"stage below it; {add}"
        )


def _inpaint(picture: Path | None, mask: Path | None) -> tuple[Image, Image] | None:
    if picture is None and mask is None:
        return None
    if picture is None or mask is None:
        raise InputError("--inpaint and --mask: expected both, a picture and where it is kept")
    from cascade.images import open_picture

    return open_picture(picture), open_picture(mask)


def _writable(folder: Path) -> None:
    """Make the output folder now: a place that cannot be written to should not cost minutes of sampling."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make folder {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write to folder {folder}: permission denied")


def _with_progress(pipe: Cascade, prompts: list[str], call: dict[str, Any]) -> Output:
    """Run the pipeline with one progress bar a stage, on stderr, when that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from cascade.pipeline import Event

    columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bars: dict[str, Any] = {}

        def show(event: Event) -> None:
            if event.stage not in bars:
                bars[event.stage] = progress.add_task(event.stage, total=event.total)
            progress.update(bars[event.stage], completed=event.step)

        return pipe(prompts, on_event=show, **call)


def _save(pipe: Cascade, request: Request, output: Output, arguments: argparse.Namespace) -> None:
    """Write one PNG a picture (and a stage, with --save-stages) and print their paths."""
    from cascade.config import to_dict
    from cascade.images import save_png, to_pil
    from cascade.stage import resolve_settings

    used = {
        run.stage.config.name: to_dict(resolve_settings(run.stage.config, run.settings))
        for run in request.runs
    }
    if request.prior is not None:
        used["prior"] = request.prior
    last = request.runs[-1].stage.config.name
    for index, seed in enumerate(request.seeds):
        prompt = request.prompts[index // request.num_images]
        metadata = {
            "prompt": prompt,
            "negative": arguments.negative or "",
            "seed": seed,
            "model": pipe.name,
            "settings": json.dumps(used),
            "software": f"cascade {__version__}",
        }
        stem = f"{index:03d}-{_slug(prompt)}-{seed}"
        for name, pictures in output.stages.items():
            if name == last:
                print(save_png(output.images[index], arguments.out / f"{stem}.png", metadata))
            elif arguments.save_stages:
                image = to_pil(pictures[index : index + 1])[0]
                print(save_png(image, arguments.out / f"{stem}-{name}.png", {**metadata, "stage": name}))


def _slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:SLUG_LENGTH].rstrip("-") or "picture"


# -- cascade info ------------------------------------------------------------------------------------------


def _info(arguments: argparse.Namespace) -> int:
    from cascade import checkpoint
    from cascade.describe import describe
    from cascade.loading import find_model
    from cascade.pipeline import EMBEDDED
    from cascade.pretrained.model import is_own

    model = find_model(arguments.model or EMBEDDED, allow_legacy=arguments.allow_legacy_checkpoint)
    for label, text in describe(model):
        print(f"{label:<13} {text}")
    hashes = is_own(model.folder) and checkpoint.read_index(model.folder).sha256
    print("files         verified" if hashes else "files         not verified: the index lists no sha256")
    return 0


# -- cascade convert ---------------------------------------------------------------------------------------


def _convert(arguments: argparse.Namespace) -> int:
    import torch

    from cascade.describe import unused
    from cascade.pretrained.convert import convert, open_sources
    from cascade.pretrained.export import export

    *sources, target = arguments.places
    if not sources:
        raise InputError(f"convert {target}: expected SOURCE and DEST, the folder to write")
    legacy = arguments.allow_legacy_checkpoint
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    model = open_sources(sources, legacy)
    if model.licence is not None:
        print(f"licence       {model.licence.name}")
    if arguments.to == "diffusers":
        for folder in export(model, Path(target), dtype):
            print(folder)
    else:
        convert(model, Path(target), dtype, legacy)
        print(target)
    for need in model.missing:
        print(f"missing       {need}")
    if names := unused(model):
        print(f"not used      {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
