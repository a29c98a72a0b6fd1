"""The training loop: one for every stage and any number of processes."""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, set_seed
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from cascade import random
from cascade.errors import InputError
from cascade.images import save_png
from train.batches import Batch, Batches
from train.ema import EMA
from train.recipe import Recipe, TrainConfig
from train.state import load_state, save_state
from train.tasks import Task, make_task

BINS = 4  # quarters of t in which the loss is reported
FORK = "fork" if os.name == "posix" else None  # batch makers then share the memory maps
PATIENCE = timedelta(hours=2)  # of processes for the one that makes a cache or draws a grid


def learning_rate(cfg: TrainConfig, images: int) -> float:
    """Linear warm-up, constant, linear to zero at the end; in training images."""
    rise = min(1.0, (images + cfg.batch) / cfg.warmup_images) if cfg.warmup_images else 1.0
    left = (cfg.images - images) / cfg.cooldown_images if cfg.cooldown_images else 1.0
    return cfg.lr * rise * max(0.0, min(1.0, left))


def fit(recipe: Recipe, stage: str, out: Path, *, dry_run: bool = False, smoke: bool = False) -> Path | None:
    """Train one stage to its number of images, from its newest valid state if there is one, and write its
    component, OUT/STAGE. dry_run: only print the plan. smoke: train one step more, whatever the number.

    Raises InputError where the recipe, the data or OUT do not allow it or the loss is not finite, and
    KeyboardInterrupt after a SIGTERM, when the state is saved."""
    cfg = recipe.train_of(stage)
    AcceleratorState._reset_state()  # a stage before may differ in precision; the process group stays
    accelerator = Accelerator(
        mixed_precision=cfg.precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]
    )
    rank, world = accelerator.process_index, accelerator.num_processes
    console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not accelerator.is_main_process)
    if cfg.batch % world:
        raise InputError(f"{stage}.train.batch {cfg.batch}: expected a multiple of {world} processes")
    set_seed(random.key(recipe.seed, "init", stage) % 2**32)  # initial weights; every other draw is keyed
    with accelerator.local_main_process_first():  # which makes the caches
        task = make_task(recipe, out, stage, planning=dry_run)
    task.network.to(memory_format=torch.channels_last)
    flops = forward_flops(task)
    print_plan(console, task, cfg, accelerator, flops)
    if dry_run:
        return None

    folder = out / f"{stage}-training"
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.compile and not smoke:
        task.compile()
    optimizer = torch.optim.AdamW(
        task.network.parameters(), lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, fused=True
    )
    model, optimizer = accelerator.prepare(task, optimizer)
    task.processes = world
    ema = EMA(task.network, cfg.ema)
    identity = {"stage": stage, "network": task.identity(), "batch": cfg.batch, "seed": recipe.seed}
    counters, resumed, notes = load_state(folder, task.network, ema, optimizer.optimizer, identity)
    for note in notes:
        console.print(f"passed over {note}")
    if resumed is not None:
        console.print(f"resumed from {resumed.name}")

    total = counters.images + cfg.batch if smoke else cfg.images
    steps, first = -(-total // cfg.batch), counters.images // cfg.batch
    # batches are keyed by step and cut by rank already: the loader needs neither sampler state nor sharding
    loader = DataLoader(
        Batches(task.make, cfg.batch, rank, world, recipe.seed, stage, steps),
        batch_size=None,
        sampler=range(first, steps),
        num_workers=cfg.workers,
        prefetch_factor=4 if cfg.workers else None,
        worker_init_fn=settle_worker,
        multiprocessing_context=FORK if cfg.workers else None,
    )
    log = Log(folder / "log.jsonl", console, accelerator, stage, 3 * flops)
    model.train()
    with StopSignal() as stop:
        for batch in loader:
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
            log.data_ready()
            # what the network itself draws (dropout) does not depend on how often training was resumed
            torch.manual_seed(random.key(recipe.seed, "network", stage, counters.images, rank))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(cfg, counters.images)
            losses = model(batch)  # B
            accelerator.backward(losses.mean())
            norm = accelerator.clip_grad_norm_(task.network.parameters(), cfg.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update()
            before, counters.images = counters.images, counters.images + cfg.batch
            log.step(losses.detach(), batch, cfg.batch, norm)

            done = counters.images >= total
            last = stop.anywhere(accelerator) or done
            if crossed(before, counters.images, cfg.log_images) or last:
                counters.seconds += log.flush(counters.images, total, learning_rate(cfg, before))
            if accelerator.is_main_process and (crossed(before, counters.images, cfg.save_images) or last):
                save_state(folder, task.network, ema, optimizer.optimizer, counters, identity)
                task.save(ema.state_dict())
            if accelerator.is_main_process and (crossed(before, counters.images, cfg.grid_images) or done):
                if (sheet := task.grid(ema.state_dict())) is not None:
                    save_png(sheet, folder / f"grid-{counters.images:010d}.png")
            if last:
                break
            log.data_wanted()
    if first >= steps and accelerator.is_main_process:
        task.save(ema.state_dict())  # nothing left to train; the component may be missing
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    if stop.received:
        raise KeyboardInterrupt
    return out / stage


def crossed(before: int, after: int, every: int) -> bool:
    return before // every != after // every


def settle_worker(_: int) -> None:
    """Prepare a process that makes batches. It outlives a signal to the whole group, so that the last state
    can be saved; and its big buffers go back to the system at once: glibc would keep them on its heap,
    which then grows by gigabytes."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD of malloc.h, bytes


def forward_flops(task: Task) -> float:
    """FLOPs of one sample's forward pass, counted on a batch of the recipe's data."""
    batch = task.make([0, 1], [0, 1])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        task(batch)
    return counter.get_total_flops() / 2


def print_plan(
    console: Console, task: Task, cfg: TrainConfig, accelerator: Accelerator, flops: float
) -> None:
    parameters = sum(p.numel() for p in task.network.parameters())
    state_gib = parameters * 4 * 5 / 2**30  # weights, gradients, two moments, average: float32
    number = accelerator.num_processes
    processes = "1 process" if number == 1 else f"{number} processes"
    console.print(
        f"stage {task.name}: {processes} on {accelerator.device.type}, "
        f"batch {cfg.batch}, precision {cfg.precision}, {parameters / 1e6:.1f}M parameters "
        f"({state_gib:.2f} GiB with optimiser and average), {flops / 1e9:.2f} GFLOP a forward, "
        f"{len(task.pictures.train)} training pictures, {cfg.images:,} images to train"
    )


class StopSignal:
    """In its block, SIGTERM asks for a save and a clean end; one process that got it stops all."""

    def __init__(self) -> None:
        self.received = False
        self._former: Any = None

    def __enter__(self) -> Self:
        with suppress(ValueError):  # not in the main thread
            self._former = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)

    def _receive(self, *_: object) -> None:
        self.received = True

    def anywhere(self, accelerator: Accelerator) -> bool:
        if accelerator.num_processes > 1:
            flag = torch.tensor(float(self.received), device=accelerator.device)
            self.received = bool(cast(Tensor, accelerator.reduce(flag, "sum")) > 0)
        return self.received


class Log:
    """The status line and log.jsonl: images/s, loss by noise level, FLOP/s, share of time without data."""

    def __init__(
        self, path: Path, console: Console, accelerator: Accelerator, stage: str, flops: float
    ) -> None:
        self.path, self.console, self.accelerator = path, console, accelerator
        self.stage, self.flops = stage, flops
        self._reset(accelerator.device)
        self.data_wanted()

    def _reset(self, device: torch.device) -> None:
        self._sums, self._counts = torch.zeros(BINS, device=device), torch.zeros(BINS, device=device)
        self._images, self._waited, self._mark = 0, 0.0, time.perf_counter()
        self._norm: Tensor | float = 0.0

    def data_wanted(self) -> None:
        self._wanted = time.perf_counter()

    def data_ready(self) -> None:
        self._waited += time.perf_counter() - self._wanted

    def step(self, losses: Tensor, batch: Batch, images: int, norm: Tensor | float | None) -> None:
        losses = losses.float()
        t = batch["t"] if "t" in batch else torch.zeros(len(losses), device=losses.device)
        bins = (t * BINS).long().clamp(max=BINS - 1)
        self._sums.index_add_(0, bins, losses)
        self._counts.index_add_(0, bins, torch.ones_like(losses))
        self._images += images
        self._norm = norm if norm is not None else 0.0

    def flush(self, images: int, total: int, lr: float) -> float:
        """Print and write one record. Returns the seconds since the last. Raises InputError where the loss
        is not finite: a state of such a network is worth nothing."""
        sums, counts = (cast(Tensor, self.accelerator.reduce(x, "sum")) for x in (self._sums, self._counts))
        seconds = time.perf_counter() - self._mark
        rate = self._images / seconds
        by_level = (sums / counts.clamp(min=1)).tolist()
        loss = float(sums.sum() / counts.sum())
        if not math.isfinite(loss):
            raise InputError(f"the loss of stage {self.stage} is {loss} at image {images:,}: lower train.lr")
        waited, norm = self._waited / seconds, float(self._norm)
        record = {
            "images": images,
            "loss": loss,
            "loss_by_t": by_level,
            "images_per_s": rate,
            "flop_per_s": rate * self.flops,
            "data_wait": waited,
            "grad_norm": norm,
            "lr": lr,
            "seconds": seconds,
        }
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        levels = " ".join(f"{x:.4f}" for x, n in zip(by_level, counts.tolist(), strict=True) if n)
        self.console.print(
            f"{self.stage} {images:>9,}/{total:,}  loss {loss:.4f} (by t: {levels})  {rate:.1f} img/s  "
            f"{rate * self.flops / 1e9:,.0f} GFLOP/s  data {waited:.1%}  |g| {norm:.2f}  "
            f"lr {lr:.1e}  {(total - images) / rate / 60:.0f} min left"
        )
        self._reset(self._sums.device)
        return seconds
