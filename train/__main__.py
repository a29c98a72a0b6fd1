"""`accelerate launch -m train RECIPE --stage S` trains one stage, `python -m train RECIPE` all of them."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import yaml

from cascade.config import to_dict
from cascade.errors import InputError
from train.recipe import ORDER, Recipe, load_recipe

MAIN = os.environ.get("RANK", "0") == "0"  # of several processes, the one that writes and speaks


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train", description=__doc__)
    add = parser.add_argument
    add("recipe", help="a name in train/recipes, or a YAML file")
    add("--stage", help=f"one of {', '.join(ORDER)}; default: all in this order, then the model folder")
    add("--out", type=Path, help="default: the recipe's own, runs/NAME")
    add("--set", dest="settings", action="append", default=[], metavar="A.B=C", help="change a recipe key")
    add("--dry-run", action="store_true", help="print the plan and stop")
    add("--smoke", action="store_true", help="one step, one sample grid, one save")
    add("--assemble", action="store_true", help="only write OUT/model from the stages trained so far")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 2 after bad input (one line on stderr), 130 when interrupted or stopped by SIGTERM."""
    arguments = parse(argv)
    try:
        recipe = load_recipe(arguments.recipe, arguments.settings)
        if arguments.stage is not None:
            recipe.of(arguments.stage)  # refuses one that the recipe does not train
        run(recipe, arguments)
    except InputError as error:
        if MAIN:
            print(f"train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    from accelerate import PartialState

    from train.loop import fit
    from train.tasks import assemble

    out = arguments.out or Path(recipe.out.replace("{name}", recipe.name))
    try:
        if not arguments.assemble:
            for stage in [arguments.stage] if arguments.stage else recipe.stages:
                if MAIN and not arguments.dry_run:
                    record(recipe, out, out / f"{stage}-training")
                fit(recipe, stage, out, dry_run=arguments.dry_run, smoke=arguments.smoke)
        if MAIN and (arguments.assemble or not (arguments.stage or arguments.dry_run)):
            print(f"model folder: {assemble(recipe, out)}")
    finally:
        if PartialState._shared_state:  # a process group lives from the first stage to the last
            PartialState().destroy_process_group()


def record(recipe: Recipe, *folders: Path) -> None:
    """The resolved recipe and the code's version, beside the checkpoints."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        version = subprocess.run(git, capture_output=True, text=True, check=False).stdout
    except OSError:  # no git here
        version = ""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "recipe.yaml").write_text(yaml.safe_dump(to_dict(recipe), sort_keys=False))
            (folder / "version.txt").write_text(version or "unknown\n")
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
