"""`accelerate launch -m train.embed RECIPE` encodes every caption, and every picture by the run's CLIP, once.

Any number of processes share the work and write the same files; one that was interrupted goes on where it
stopped. Training finds them, and encodes online what is not there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cascade.arguments import Parser
from cascade.errors import InputError, unknown
from train.recipe import Recipe, load_recipe

KINDS = ("text", "images")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m train.embed", description=__doc__)
    add = parser.add_argument
    add("recipe", help="a name in train/recipes, or a YAML file")
    add(
        "--only", help="text or images; default: text, and images where the recipe has a CLIP that is trained"
    )
    add("--out", type=Path, help="where the run's CLIP is; default: the recipe's own, runs/NAME")
    add("--set", dest="settings", action="append", default=[], metavar="A.B=C", help="change a recipe key")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 2 after bad input (one line on stderr), 130 when interrupted."""
    try:
        arguments = parse(argv)
        if arguments.only not in (None, *KINDS):
            raise unknown("kind", arguments.only, KINDS, where="--only")
        recipe = load_recipe(arguments.recipe, arguments.settings)
        embed(recipe, arguments.out or Path(recipe.out.replace("{name}", recipe.name)), arguments.only)
    except InputError as error:
        print(f"train.embed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def embed(recipe: Recipe, out: Path, only: str | None = None) -> None:
    """Write the caches of captions and pictures, with all processes of the launch. Raises InputError for
    pictures, encoders and caches that are not as they should be."""
    from accelerate import PartialState

    from train.data import open_pictures
    from train.encoded import TextStore

    state = PartialState()
    try:
        with state.local_main_process_first():  # which makes the indices
            pictures = open_pictures(recipe.data)
        stores: list[Any] = []
        if only != "images":
            for padding in sorted({recipe.sees_padding(stage) for stage in recipe.stages}):
                stores.append(TextStore(pictures, recipe.text, padding))
        clip = recipe.clip is not None and (recipe.clip.pretrained is not None or (out / "clip").is_dir())
        if only == "images" or (only is None and clip):
            from train.components import clip_store

            stores.append(clip_store(recipe, out, pictures))
        for store in stores:
            store.to(state.device)
            store.write(state.process_index, state.num_processes, state.wait_for_everyone)
            state.print(f"{len(store.cache):,} rows of {store.about['kind']} in {store.folder}")
    finally:
        state.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
