"""`accelerate launch -m train RECIPE --stage S` trains one stage, `python -m train RECIPE` all of them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from cascade.arguments import Parser
from cascade.errors import InputError
from train.recipe import ORDER, Recipe, load_recipe
from train.signals import REQUEUE, Preempted

SEVERAL = int(os.environ.get("WORLD_SIZE", "1")) > 1
MAIN = os.environ.get("RANK", "0") == "0"  # of several processes, the one that writes and speaks
GRACE_S = 5.0  # for the launcher to end the processes that one has left


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m train", description=__doc__)
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
    """Exit status: 0; 2 after bad input (one line on stderr, from the process that met it, or the main
    one where all did); 75 when stopped by SIGTERM or SIGUSR1 with the state saved, to be queued again; 1
    where another process failed, which says why; 130 when interrupted."""
    try:
        arguments = parse(argv)
        recipe = load_recipe(arguments.recipe, arguments.settings)
        if arguments.stage is not None:
            recipe.of(arguments.stage)  # refuses one that the recipe does not train
        return run(recipe, arguments)
    except InputError as error:
        if MAIN:
            print(f"train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run(recipe: Recipe, arguments: argparse.Namespace) -> int:
    from accelerate import PartialState

    from train.components import assemble
    from train.loop import fit
    from train.processes import Alone, Ended, Lost

    out = arguments.out or Path(recipe.out.replace("{name}", recipe.name))
    try:
        if not arguments.assemble:
            for stage in [arguments.stage] if arguments.stage else recipe.stages:
                fit(recipe, stage, out, dry_run=arguments.dry_run, smoke=arguments.smoke)
        if MAIN and (arguments.assemble or not (arguments.stage or arguments.dry_run)):
            print(f"model folder: {assemble(recipe, out)}")
    except Preempted:
        return REQUEUE
    except Ended:
        return 2
    except Alone as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    except Lost as error:
        time.sleep(GRACE_S)  # the process that failed has said why, and the launcher ends this one
        print(f"train: {error}", file=sys.stderr)
        return 1
    if PartialState._shared_state:  # a process group lives from the first stage to the last
        PartialState().destroy_process_group()
    return 0


if __name__ == "__main__":
    status = main()
    if status and SEVERAL:  # an orderly end would wait for processes that are gone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
