"""`python -m train.data RECIPE` fetches and indexes a recipe's pictures; `check RECIPE` reports on them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cascade.arguments import Parser
from cascade.errors import InputError
from train.data import PictureSet, open_pictures
from train.recipe import Recipe, load_recipe


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m train.data", description=__doc__)
    add = parser.add_argument
    add("words", nargs="+", metavar="[check] RECIPE", help="a name in train/recipes, or a YAML file")
    add("--set", dest="settings", action="append", default=[], metavar="A.B=C", help="change a recipe key")
    add("--out", type=Path, help="of the report: default the recipe's own, runs/NAME")
    arguments = parser.parse_args(argv)
    arguments.check = arguments.words[0] == "check" and len(arguments.words) == 2
    if len(arguments.words) != 1 and not arguments.check:
        parser.error(f"expected RECIPE or check RECIPE, got {' '.join(arguments.words)}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 2 after bad input (one line on stderr), 130 when interrupted."""
    try:
        arguments = parse(argv)
        recipe = load_recipe(arguments.words[-1], arguments.settings)
        if arguments.check:
            from train.data.check import check

            check(recipe, arguments.out or Path(recipe.out.replace("{name}", recipe.name)))
        else:
            pictures = build(recipe)
            counts = f"{len(pictures.train)} training and {len(pictures.heldout)} held-out pictures"
            print(f"{counts} of {len(pictures)} in {pictures.folder}")
    except InputError as error:
        print(f"train.data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def build(recipe: Recipe) -> PictureSet:
    """Fetch, rasterise or index the recipe's set. Raises InputError where it is not whole."""
    if recipe.data.name == "emoji":
        from train import emoji

        folder = Path(recipe.data.folder)
        emoji.build(folder)
        emoji.check(folder)
    return open_pictures(recipe.data)


if __name__ == "__main__":
    sys.exit(main())
