"""The training loop: one for every stage and any number of processes."""

from __future__ import annotations

import json
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from cascade import random
from cascade.errors import InputError
from train.batches import Batch, Batches
from train.ema import EMA
from train.recipe import Recipe, TrainConfig
from train.state import load_state, save_state
from train.tasks import Task, make_task

BINS = 4  # quarters of t in which the loss is reported


def learning_rate(cfg: TrainConfig, images: int) -> float:
    """Linear warm-up, constant, linear to zero at the end; in training images."""
    rise = min(1.0, (images + cfg.batch) / cfg.warmup_images) if cfg.warmup_images else 1.0
    left = (cfg.images - images) / cfg.cooldown_images if cfg.cooldown_images else 1.0
    return cfg.lr * rise * max(0.0, min(1.0, left))


def fit(recipe: Recipe, stage: str, out: Path, *, dry_run: bool = False, smoke: bool = False) -> Path | None:
    """Train one stage to its number of images, from its newest valid state if there is one, and write its component."""
    cfg = recipe.of(stage).train
    accelerator = Accelerator(mixed_precision=cfg.precision)
    console = Console(highlight=False, soft_wrap=True, quiet=not accelerator.is_main_process)
    if cfg.batch % accelerator.num_processes:
        raise InputError(f"{stage}.train.batch {cfg.batch} is not a multiple of {accelerator.num_processes} processes")
    set_seed(random.key(recipe.seed, "init", stage) % 2**32)  # initial weights; every other draw is keyed
    task = make_task(recipe, out, stage)
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
    ema = EMA(task.network, cfg.ema)
    identity = {"stage": stage, "network": task.identity(), "batch": cfg.batch, "seed": recipe.seed}
    counters, resumed, notes = load_state(folder, task.network, ema, optimizer.optimizer, identity)
    for note in notes:
        console.print(f"passed over {note}")
    if resumed is not None:
        console.print(f"resumed from {resumed.name}")

    total = counters.images + cfg.batch if smoke else cfg.images
    steps, first = -(-total // cfg.batch), counters.images // cfg.batch
    batches = Batches(
        task.make, cfg.batch, accelerator.process_index, accelerator.num_processes, recipe.seed, stage, steps
    )
    # batches are already keyed by step and cut by rank, so the loader needs neither sampler state nor sharding
    loader = DataLoader(
        batches, batch_size=None, sampler=range(first, steps), num_workers=cfg.workers, prefetch_factor=4 if cfg.workers else None,
        worker_init_fn=ignore_signals,
    )
    log = Log(folder / "log.jsonl", console, accelerator, stage, 3 * flops)
    stop = StopSignal()
    model.train()
    for batch in loader:
        batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
        log.data_ready()
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
        stopping = stop.anywhere(accelerator)
        if crossed(before, counters.images, cfg.log_images) or done:
            counters.seconds += log.flush(counters.images, total, learning_rate(cfg, before))
        if accelerator.is_main_process and (crossed(before, counters.images, cfg.save_images) or done or stopping):
            save_state(folder, task.network, ema, optimizer.optimizer, counters, identity)
            task.save(ema.state_dict())
        if accelerator.is_main_process and (crossed(before, counters.images, cfg.grid_images) or done):
            if (sheet := task.grid(ema.state_dict())) is not None:
                sheet.save(folder / f"grid-{counters.images:010d}.png")
            log.data_ready()  # time spent looking is not the loader's
        if done or stopping:
            break
    if first >= steps and accelerator.is_main_process:
        task.save(ema.state_dict())  # nothing left to train; the component may be missing
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if stop.received:
        raise KeyboardInterrupt
    return out / stage


def ignore_signals(_: int) -> None:
    """A signal to the process group must not kill the workers before the last state is saved."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


def crossed(before: int, after: int, every: int) -> bool:
    return before // every != after // every


def forward_flops(task: Task) -> float:
    """FLOPs of one sample's forward pass, counted on a batch of the recipe's data."""
    batch = task.make([0, 1], [0, 1])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        task(batch)
    return counter.get_total_flops() / 2


def print_plan(console: Console, task: Task, cfg: TrainConfig, accelerator: Accelerator, flops: float) -> None:
    parameters = sum(p.numel() for p in task.network.parameters())
    state_gib = parameters * 4 * 5 / 2**30  # weights, gradients, two moments, average: float32
    console.print(
        f"stage {task.name}: {accelerator.num_processes} processes on {accelerator.device.type}, batch {cfg.batch}, "
        f"precision {cfg.precision}, {parameters / 1e6:.1f}M parameters ({state_gib:.2f} GiB with optimiser and average), "
        f"{flops / 1e9:.2f} GFLOP a forward, {len(task.pictures.train)} training pictures, {cfg.images:,} images to train"
    )


class StopSignal:
    """SIGTERM asks for a save and a clean end; one process that got it stops all."""

    def __init__(self) -> None:
        self.received = False
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_: Any) -> None:
        self.received = True

    def anywhere(self, accelerator: Accelerator) -> bool:
        if accelerator.num_processes > 1:
            flag = torch.tensor(float(self.received), device=accelerator.device)
            self.received = bool(accelerator.reduce(flag, "sum") > 0)
        return self.received


class Log:
    """The status line and log.jsonl: images/s, loss by noise level, FLOP/s, share of time waiting for data."""

    def __init__(self, path: Path, console: Console, accelerator: Accelerator, stage: str, flops: float) -> None:
        self.path, self.console, self.accelerator, self.stage, self.flops = path, console, accelerator, stage, flops
        self._start = self._ready = self._mark = time.perf_counter()
        self._waited = 0.0
        self._reset(accelerator.device)

    def _reset(self, device: torch.device) -> None:
        self._sums, self._counts = torch.zeros(BINS, device=device), torch.zeros(BINS, device=device)
        self._images, self._waited, self._mark = 0, 0.0, time.perf_counter()
        self._norm: Tensor | float = 0.0

    def data_ready(self) -> None:
        now = time.perf_counter()
        self._waited += now - self._ready
        self._ready = now

    def step(self, losses: Tensor, batch: Batch, images: int, norm: Tensor | float | None) -> None:
        losses = losses.float()
        t = batch["t"] if "t" in batch else torch.zeros(len(losses), device=losses.device)
        bins = (t * BINS).long().clamp(max=BINS - 1)
        self._sums.index_add_(0, bins, losses)
        self._counts.index_add_(0, bins, torch.ones_like(losses))
        self._images += images
        self._norm = norm if norm is not None else 0.0
        self._ready = time.perf_counter()

    def flush(self, images: int, total: int, lr: float) -> float:
        """Print and write one record. Returns the seconds since the last."""
        sums, counts = (self.accelerator.reduce(x, "sum") for x in (self._sums, self._counts))
        seconds = time.perf_counter() - self._mark
        rate = self._images / seconds
        by_level = (sums / counts.clamp(min=1)).tolist()
        loss = float(sums.sum() / counts.sum())
        record = {
            "images": images, "loss": loss, "loss_by_t": by_level, "images_per_s": rate, "flop_per_s": rate * self.flops,
            "data_wait": self._waited / seconds, "grad_norm": float(self._norm), "lr": lr, "seconds": seconds,
        }  # fmt: skip
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        levels = " ".join(f"{x:.4f}" for x, n in zip(by_level, counts.tolist(), strict=True) if n)
        eta = (total - images) / rate / 60
        self.console.print(
            f"{self.stage} {images:>9,}/{total:,}  loss {loss:.4f} (by t: {levels})  {rate:.1f} img/s  "
            f"{rate * self.flops / 1e9:,.0f} GFLOP/s  data {record['data_wait']:.1%}  |g| {record['grad_norm']:.2f}  "
            f"lr {lr:.1e}  {eta:.0f} min left"
        )
        self._reset(self._sums.device)
        return seconds


