"""`accelerate launch -m train RECIPE --stage S` trains one stage; `python -m train RECIPE` trains them all in order."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import yaml

from cascade.config import to_dict
from cascade.errors import InputError, unknown
from train.recipe import ORDER, Recipe, load_recipe


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train", description=__doc__)
    parser.add_argument("recipe", help="a name in train/recipes, or a YAML file")
    parser.add_argument("--stage", help=f"one of {', '.join(ORDER)}; default: all in this order, then the model folder")
    parser.add_argument("--out", type=Path, help="default: the recipe's own, runs/NAME")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="A.B=C", help="change a recipe key")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--smoke", action="store_true", help="one step, one sample grid, one save")
    parser.add_argument("--assemble", action="store_true", help="only write OUT/model from the stages trained so far")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        recipe = load_recipe(arguments.recipe, arguments.settings)
        if arguments.stage is not None and arguments.stage not in ORDER:
            raise unknown("stage", arguments.stage, ORDER)
        run(recipe, arguments)
    except InputError as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    from train.loop import fit
    from train.tasks import assemble

    out = arguments.out or Path(recipe.out.format(name=recipe.name))
    if not arguments.assemble:
        out.mkdir(parents=True, exist_ok=True)
        record(recipe, out)
        for stage in [arguments.stage] if arguments.stage else ORDER:
            fit(recipe, stage, out, dry_run=arguments.dry_run, smoke=arguments.smoke)
    if arguments.assemble or not (arguments.stage or arguments.dry_run):
        print(f"model folder: {assemble(recipe, out)}")


def record(recipe: Recipe, out: Path) -> None:
    """The resolved recipe and the code's version, beside the checkpoints."""
    (out / "recipe.yaml").write_text(yaml.safe_dump(to_dict(recipe), sort_keys=False))
    version = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    (out / "version.txt").write_text(version.stdout or "unknown\n")


if __name__ == "__main__":
    sys.exit(main())
