"""The training loop: one for every stage and any number of processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from cascade import random
from cascade.config import to_dict
from cascade.errors import InputError
from cascade.images import save_png
from cascade.nn.unet import UNet
from train import zero
from train.batches import Batch, Batches
from train.bundle import Bundle
from train.checkpoints import Checkpoints, record
from train.ema import EMA, PowerEMA
from train.guards import (
    BINS,
    Report,
    Skips,
    Spikes,
    by_noise_level,
    overflow_event,
    skip_event,
    skip_message,
)
from train.optim import MOMENT_BYTES, guarded_mean, learning_rate, make_optimizer, update
from train.plan import Plan, make_plan
from train.processes import SHARDED, Told, batches, in_turn, layout, make_accelerator, together
from train.recipe import Recipe
from train.signals import Preempted, StopSignal, settle_worker
from train.state import Tensors, Trained, gather
from train.status import Clock, Log, Reports
from train.tasks import Task, make_task
from train.trackers import Trackers
from train.validation import Validation

FORK = "fork" if os.name == "posix" else None  # batch makers then share the memory maps
GATHERED = ("ResBlock", "Block")  # modules whose parameters FSDP gathers together, when they are used
Kept = tuple[Tensor, Tensor | None]  # of a step: losses of this process's samples, their noise levels


def fit(recipe: Recipe, stage: str, out: Path, *, dry_run: bool = False, smoke: bool = False) -> Path | None:
    """Train one stage to its number of images, from its newest valid state if there is one, and write its
    component, OUT/STAGE. dry_run: only print the plan. smoke: train one step more, whatever the number.

    Raises InputError where the recipe, the launch, the data or OUT do not allow it; `Preempted` after a
    SIGTERM or SIGUSR1, when the state is saved; `Ended` and `Lost` where another process failed."""
    with StopSignal() as stop:
        accelerator = make_accelerator(recipe.train_of(stage), stage)
        console = Console(
            highlight=False, markup=False, soft_wrap=True, quiet=not accelerator.is_main_process
        )
        plan = make_plan(recipe, stage)
        print_plan(console, recipe, stage, accelerator, plan)
        if dry_run:
            return None
        with together(accelerator, stop):
            run = Run(recipe, stage, out, accelerator, console, plan, stop)
            run.train(smoke)
            run.trackers.finish()
            accelerator.wait_for_everyone()
    accelerator.free_memory()
    return out / stage


class Run:
    """One stage in training, on this process."""

    def __init__(
        self,
        recipe: Recipe,
        stage: str,
        out: Path,
        accelerator: Accelerator,
        console: Console,
        plan: Plan,
        stop: StopSignal,
    ) -> None:
        self.recipe, self.stage, self.cfg = recipe, stage, recipe.train_of(stage)
        self.accelerator, self.console, self.stop = accelerator, console, stop
        self.main, self.rank, self.world = (
            accelerator.is_main_process, accelerator.process_index, accelerator.num_processes,
        )  # fmt: skip
        self.folder = out / f"{stage}-training"
        self.task, self.trackers = in_turn(accelerator, lambda: self._make(out))
        self._prepare()
        self.validation = Validation(self.task, accelerator)
        self.clock = Clock(accelerator.device)
        self.log = Log(self.folder, console, stage, plan.step_flops, self.clock, self.trackers, self.main)
        self.skips, self.spikes = Skips(stage, self.cfg.skip_limit, accelerator.scaler is not None), Spikes()

    def _make(self, out: Path) -> tuple[Task, Trackers]:
        if self.main:
            record(self.recipe, out, self.folder)
        # initial weights; every other draw is keyed
        set_seed(random.key(self.recipe.seed, "init", self.stage) % 2**32)
        task = make_task(self.recipe, out, self.stage)
        return task, Trackers(self.recipe, self.stage, self.folder, self.main)

    def _prepare(self) -> None:
        """Network, optimiser and averages, spread over the processes."""
        cfg, task = self.cfg, self.task
        kind = self.accelerator.distributed_type
        if kind not in SHARDED:  # which take contiguous parameters alone
            task.network.to(memory_format=torch.channels_last)
        if isinstance(task.network, UNet):
            task.network.gradient_checkpointing = cfg.gradient_checkpointing
        if cfg.compile:
            task.compile()
        present = {type(module).__name__ for module in task.modules()}
        # where Accelerate looks; nn.Module's own __setattr__ is typed for parameters and modules alone
        vars(task)["_no_split_modules"] = [name for name in GATHERED if name in present]
        optimizer = make_optimizer(cfg, task.network.parameters())
        if kind == DistributedType.DEEPSPEED:
            self.model, self.optimizer = zero.prepare(self.accelerator, task, optimizer, cfg)
        else:
            self.model, self.optimizer = self.accelerator.prepare(task, optimizer)
        task.processes = self.world
        self.averages = [EMA(task.network, cfg.ema)]
        self.averages += [PowerEMA(task.network, sigma_rel) for sigma_rel in cfg.ema_sigma_rel]
        trained = Trained(task.network, self.averages, self.optimizer.optimizer)
        self.checkpoints = Checkpoints(self.folder, task, trained, cfg, self.accelerator, self.console)

    def train(self, smoke: bool) -> None:
        """From the newest state to the end; `smoke`: one step from there."""
        cfg, self.counters = self.cfg, self.checkpoints.resume()
        self.log.resume(self.counters.images)
        self.total = self.counters.images + cfg.batch if smoke else cfg.images
        steps, first = -(-self.total // cfg.batch), self.counters.images // cfg.batch
        if first >= steps:  # nothing left to train; the component may be missing
            component = gather(self.averages[0].state_dict(), self.main)
            if self.main:
                self.task.save(component)
            return
        reports = Reports(self.accelerator.device)
        self.model.train()
        self.clock.restart()
        with self.stop.deferred(), self.checkpoints.finishing():
            loader = self._loader(first, steps)
            for batch in batches(loader, self._complete, self.rank, self.world):
                self.clock.data_ready()
                self._count(batch, reports)
                due = self._due()
                stopped = False
                for report, kept in reports.ready(everything=any(due.values())):
                    stopped |= self._heed(report, kept)
                if stopped or any(due.values()):
                    self._pause(due, stopped)
                self.clock.data_wanted()

    def _loader(self, first: int, steps: int) -> DataLoader[Any]:
        # batches are keyed by step and cut by rank: the loader needs neither sampler state nor sharding
        cfg, recipe = self.cfg, self.recipe
        data = Batches(self.task.make, cfg.batch, self.rank, self.world, recipe.seed, self.stage, steps)
        return DataLoader(
            Told(data),
            batch_size=None,
            sampler=range(first, steps),
            num_workers=cfg.workers,
            prefetch_factor=4 if cfg.workers else None,
            worker_init_fn=settle_worker,
            multiprocessing_context=FORK if cfg.workers else None,
        )

    def _complete(self, bundle: Bundle) -> Batch:
        """A loader's batch as networks take it, on the device."""
        return self.task.make.complete(bundle.open(), self.accelerator.device)

    def _count(self, batch: Batch, reports: Reports) -> None:
        """Make a step of a batch, and count it."""
        before = self.counters.images
        with self.clock.computing():
            losses, norm = self._step(batch)
        self.checkpoints.join()  # before the step counts: a kill never costs more than a save interval
        for ema in self.averages:
            ema.update()
        self.counters.images += self.cfg.batch
        t = batch.get("t")
        own = torch.cat([losses.new_tensor([self.stop.received]).float(), by_noise_level(losses, t)])
        shared = cast(Tensor, self.accelerator.reduce(own, "sum"))
        reports.add(before, torch.cat([norm.float().view(1), shared]), (losses, t))

    def _step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One update. Returns the losses of this process's samples, and the norm of the gradient."""
        cfg, images, accelerator = self.cfg, self.counters.images, self.accelerator
        # what the network itself draws (dropout) does not depend on how often training was resumed
        torch.manual_seed(random.key(self.recipe.seed, "network", self.stage, images, self.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(cfg, images)
        losses = []
        for part in split(batch, cfg.accumulate):
            with accelerator.accumulate(self.model):  # gradients are shared with the last part alone
                losses.append(self.model(part))  # B
                accelerator.backward(guarded_mean(losses[-1]))
        norm = update(accelerator, self.optimizer, self.task.network.parameters(), cfg.grad_clip)
        return torch.cat(losses).detach(), norm

    def _due(self) -> dict[str, bool]:
        """What is to be done after the step that was just made."""
        cfg, now = self.cfg, self.counters.images
        every = {"state": cfg.save_images, "grid": cfg.grid_images}
        if self.validation:
            every["validation"] = cfg.validate_images
        if cfg.ema_sigma_rel:
            every["average"] = cfg.average_images
        return {what: now >= self.total or crossed(now - cfg.batch, now, n) for what, n in every.items()}

    def _heed(self, report: Report, kept: Kept) -> bool:
        """Log a step, look at its numbers, and tell whether a process was asked to stop."""
        cfg, after = self.cfg, report.images + self.cfg.batch
        self.stop.received |= report.stop
        self.log.add(report, cfg.batch)
        self.skips.add(report)
        if not report.finite:
            self._name_skip(report, *kept)
            self.skips.check()
        for quarter, loss, median in self.spikes.add(report):
            low, high = quarter / BINS, (quarter + 1) / BINS
            event = {
                "event": "spike",
                "images": after,
                "t": [low, high],
                "loss": loss,
                "median": median,
            }
            message = f"the loss jumped to {loss:.3g} at t {low} to {high}, where {median:.3g} is usual"
            self.log.event(event, f"{self.stage} {after:>9,}  {message}")
        if report.stop or after >= self.total or crossed(report.images, after, cfg.log_images):
            self.counters.seconds += self.log.flush(after, self.total, learning_rate(cfg, report.images))
        return report.stop

    def _name_skip(self, report: Report, losses: Tensor, t: Tensor | None) -> None:
        """Tell why an update was skipped, and which samples it was made of. Collective."""
        if self.skips.overflow(report):
            event = overflow_event(self.stage, report.images + self.cfg.batch)
            return self.log.event(event, skip_message(event))
        share = range(report.images + self.rank, report.images + self.cfg.batch, self.world)
        positions = torch.tensor(share, device=losses.device)
        gathered = [
            [] if x is None else cast(Tensor, self.accelerator.gather(x)).tolist()
            for x in (positions, t, losses)
        ]
        samples = self.task.make.samples(gathered[0])
        event = skip_event(self.stage, report.images + self.cfg.batch, samples, *gathered[1:])
        self.log.event(event, skip_message(event))

    def _pause(self, due: dict[str, bool], stopped: bool) -> None:
        """Save, then show. What is slow comes after the state is safe, and a signal ends it at once."""
        done = self.counters.images >= self.total
        if not self.skips.suspect:  # else the last state stays the newest: this one may be past help
            component = self.checkpoints.save(self.counters, averages=due.get("average", False))
            if done or stopped:
                self.checkpoints.finish()
            if not stopped:
                with self.stop.at_once(), self.clock.paused():
                    self._show(due, component)
        elif done:
            self.skips.check(last=True)
        if stopped:
            raise Preempted

    def _show(self, due: dict[str, bool], component: Tensors) -> None:
        """What the averaged weights are worth: their validation loss, and what they draw. Collective."""
        images = self.counters.images
        if due.get("validation"):
            self.log.event(*self.validation.run(self.averages[0].average).event(self.stage, images))
        if self.main and due["grid"] and (sheet := self.task.grid(component)) is not None:
            try:
                save_png(sheet, self.folder / f"grid-{images:010d}.png")
            except InputError as error:  # a full disk: the next one may fit
                self.console.print(str(error))
            self.trackers.grid("grid", sheet, images)


def crossed(before: int, after: int, every: int) -> bool:
    return before // every != after // every


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch in equal parts, sample after sample."""
    chunks = {name: x.chunk(parts) for name, x in batch.items()}
    return [{name: x[i] for name, x in chunks.items()} for i in range(parts)]


def print_plan(console: Console, recipe: Recipe, stage: str, accelerator: Accelerator, plan: Plan) -> None:
    """What is about to be trained, on what, and what it takes; then the recipe, complete."""
    cfg, world = recipe.train_of(stage), accelerator.num_processes
    share = cfg.batch // world // cfg.accumulate
    kind, averages = layout(accelerator), 4 * (1 + len(cfg.ema_sigma_rel))
    # of a parameter in float32: weight, gradient, moments and averages; ZeRO has master weights as well
    each = 4 + 4 + MOMENT_BYTES[cfg.optimizer] + averages + 4 * kind.startswith("ZeRO")
    whole = {"FSDP2": 0, "ZeRO-2": 4 + averages, "ZeRO-1": 8 + averages}.get(kind, each)
    state = plan.parameters * (whole + (each - whole) / world)
    memory = [x / 2**30 for x in (state, plan.casts, plan.activations * share)]
    device = f"{kind} on {accelerator.device.type}"
    lines = {
        "stage": stage,
        "world size": f"{world} ({device})",
        "global batch": f"{cfg.batch} = {world} x {cfg.accumulate} accumulated x {share}",
        "precision": cfg.precision,
        "parameters": f"{plan.parameters / 1e6:.1f}M",
        "FLOP per image": f"{plan.step_flops / 1e9:.2f}G (forward {plan.flops / 1e9:.2f}G)",
        "memory per process": f"{sum(memory):.2f} GiB estimated (weights, gradients, optimiser and averages "
        f"{memory[0]:.2f}, casts {memory[1]:.2f}, activations {memory[2]:.2f})",
        "images to train": f"{cfg.images:,}",
    }
    for name, value in lines.items():
        console.print(f"{name}: {value}")
    resolved = to_dict(recipe) | {name: None for name in ("clip", "prior", "base", "sr256", "sr1024")}
    resolved[stage] = to_dict(recipe.of(stage))
    plain = {name: value for name, value in resolved.items() if value is not None}
    console.print("recipe:")
    console.print(yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=110).rstrip())
