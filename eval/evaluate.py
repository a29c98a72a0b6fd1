"""From what a command asks for to a finished run folder, in one process or several."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState

from cascade import Cascade
from cascade.errors import InputError
from eval.generate import draw_share, finish, run_folder
from eval.models import Found, code_version, find_pictures, is_model, load_model, take_in
from eval.processes import processes, together
from eval.progress import said_once, shown
from eval.run import Model, Plan, Run, Setting, append_items, read_items
from eval.settings import check_settings
from eval.suites import Suite

ACCELERATOR_BATCH = 16  # pictures drawn together; on the CPU they are drawn one by one


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw, and where."""

    out: Path
    suite: Suite
    model: str | None = None  # a folder, a hub id, a folder of pictures; None: the embedded default
    against: str | None = None
    settings: tuple[Setting, ...] = (Setting(),)
    per_prompt: int = 1
    seed: int = 0
    batch: int | None = None
    stop_at: str | None = None
    px: int | None = None  # stop at the stage of this size, where the model has one and stop_at is None
    references: str | None = None
    command: str = ""


def draw_run(request: Request) -> Run | None:
    """Draw what is missing of a run; every process of a launch calls it, and only the first gets the run.

    Raises InputError, one line and before anything is drawn, where something asked for cannot be."""
    state = processes()
    try:
        with together(state):
            return _draw(request, state)
    finally:
        state.destroy_process_group()


def _draw(request: Request, state: PartialState) -> Run | None:
    plan, pipes, made = _prepare(request, torch.device(str(state.device)))
    main, rank, world = state.is_main_process, state.process_index, state.num_processes
    with run_folder(request.out, plan) if main else nullcontext(plan) as plan:
        if main:
            there = {item.key for item in read_items(request.out)}
            for name, found in made.items():
                append_items(request.out, rank, take_in(request.out, plan, name, found, there))
        state.wait_for_everyone()
        total = sum(1 for _ in plan.keys())
        with said_once(), shown(request.out, total) if main else nullcontext(lambda: None) as report:
            draw_share(request.out, plan, pipes, code_version(), rank, world, report)
        state.wait_for_everyone()
        return finish(request.out, plan) if main else None


def _prepare(request: Request, device: torch.device) -> tuple[Plan, dict[str, Cascade], dict[str, Found]]:
    """(plan, models that draw, pictures made elsewhere), by the models' names in the run."""
    if request.per_prompt < 1 or (request.batch or 1) < 1:
        raise InputError("per-prompt and batch: expected at least 1")
    _check_references(request)
    stop_at = request.stop_at
    models: dict[str, Model] = {}
    pipes: dict[str, Cascade] = {}
    made: dict[str, Found] = {}
    sources = {"A": request.model} | ({} if request.against is None else {"B": request.against})
    for name, source in sources.items():
        if is_model(source):
            pipes[name], models[name] = load_model(source, device)
            stop_at = stop_at or _stage_of(models[name], request.px)
            check_settings(pipes[name], request.settings, stop_at, request.suite, request.references)
            models[name] = _until(models[name], stop_at)
        else:
            models[name], made[name] = find_pictures(str(source), request.suite, request.per_prompt)
    plan = Plan(
        suite=request.suite,
        models=models,
        settings=request.settings,
        per_prompt=request.per_prompt,
        seed=request.seed,
        batch=request.batch or (1 if device.type == "cpu" else ACCELERATOR_BATCH),
        stop_at=stop_at,
        references=request.references,
        code=code_version(),
        command=request.command,
    )
    return plan, pipes, made


def _check_references(request: Request) -> None:
    """Raises InputError where there is nothing at `references`, or no picture that a prompt names there."""
    place = None if request.references is None else Path(request.references)
    if place is not None and not place.exists():
        raise InputError(f"references {place}: expected real pictures, or their statistics")
    if place is not None and place.is_dir():
        named = [place / prompt.reference for prompt in request.suite.prompts if prompt.reference]
        lacking = next((path for path in named if not path.is_file()), None)
        if lacking is not None:
            raise InputError(f"missing picture {lacking}, which suite {request.suite.name} names")


def _stage_of(model: Model, px: int | None) -> str | None:
    return next((name for name, side in model.stages.items() if side == px), None)


def _until(model: Model, stop_at: str | None) -> Model:
    """The model with the stages that are drawn."""
    names = list(model.stages)
    names = names if stop_at is None else names[: names.index(stop_at) + 1]
    return replace(model, stages={name: model.stages[name] for name in names})
