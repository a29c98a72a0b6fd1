"""Several processes as one: what fails on one of them ends all, and one of them says why."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import Tensor, distributed
from torch.utils.data import Dataset

from cascade.errors import InputError
from train import zero
from train.recipe import TrainConfig
from train.signals import Preempted, StopSignal

T = TypeVar("T")
SHARDED = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}
PATIENCE = timedelta(hours=2)  # of processes for the one that makes a cache or draws a grid


class Alone(InputError):
    """Bad input that this process met and the others may not have: it speaks, whichever it is."""


class Ended(Exception):
    """Another process failed, and says why."""


class Lost(Exception):
    """The other processes cannot be reached."""


def make_accelerator(cfg: TrainConfig, stage: str) -> Accelerator:
    """The processes, device and precision of a stage. Raises InputError for settings that do not go
    together."""
    AcceleratorState._reset_state()  # a stage before may differ in precision; the process group stays
    if not torch.accelerator.is_available() and PartialState._shared_state.get("distributed_type") in SHARDED:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU  # before it became that
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_VERSION") != "2":
        raise InputError(f"launch settings: fsdp_version {os.environ.get('FSDP_VERSION', 1)}: expected 2")
    plugin = zero.make_plugin(cfg, f"{stage}.train") if zero.wanted() else None
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else several processes without a GPU stay strangers
            mixed_precision="no" if plugin or cfg.precision == "fp32" else cfg.precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=cfg.accumulate),
            deepspeed_plugin=plugin,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        if accelerator.device.type == "cpu":
            _allow_on_cpu(accelerator, plugin)
    except (ValueError, ImportError) as error:
        raise InputError(f"launch settings: {str(error).strip().splitlines()[0]}") from None
    try:
        _check(accelerator, cfg, stage)
    except InputError:
        accelerator.wait_for_everyone()  # one that left now would break the connection of those still to come
        raise
    return accelerator


def _allow_on_cpu(accelerator: Accelerator, plugin: DeepSpeedPlugin | None) -> None:
    """Accelerate shards, casts to fp16 and scales on GPUs alone, though torch and DeepSpeed do so on CPU
    processes as well: for trials, tests."""
    state = accelerator.state
    if plugin is not None:
        _become(accelerator, DistributedType.DEEPSPEED)
        zero.on_cpu(accelerator, plugin)
    elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
        _become(accelerator, DistributedType.FSDP)
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
    if accelerator.mixed_precision == "fp16":
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")


def _become(accelerator: Accelerator, kind: DistributedType) -> None:
    PartialState._shared_state["distributed_type"] = kind  # from which every AcceleratorState() takes it
    accelerator.state.distributed_type = kind


def _check(accelerator: Accelerator, cfg: TrainConfig, stage: str) -> None:
    where, world = f"{stage}.train", accelerator.num_processes
    sharded = SHARDED.get(accelerator.distributed_type)
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")  # which launchers set on their own
    if steps not in ("1", str(cfg.accumulate)):
        found = f"gradient_accumulation_steps {steps} of the launch"
        raise InputError(f"{found}: expected {where}.accumulate, {cfg.accumulate}; set it there alone")
    if sharded and cfg.precision == "fp16":
        raise InputError(f"{where}.precision fp16: expected bf16 under {sharded}")
    if sharded and cfg.optimizer != "adamw":
        raise InputError(f"{where}.optimizer {cfg.optimizer}: expected adamw under {sharded}")
    if cfg.gradient_checkpointing and stage in ("clip", "prior"):
        raise InputError(f"{where}.gradient_checkpointing: expected false, as this stage has no U-Net")
    if stage == "clip" and cfg.accumulate > 1:
        why = "as every caption is held against every picture of the batch"
        raise InputError(f"{where}.accumulate {cfg.accumulate}: expected 1, {why}")
    parts = world * cfg.accumulate
    if cfg.batch % parts:
        near = f"{max(1, cfg.batch // parts) * parts} or {-(-cfg.batch // parts) * parts}"
        processes = f"{world} processes" + (f" x {cfg.accumulate} parts" if cfg.accumulate > 1 else "")
        raise InputError(f"{where}.batch {cfg.batch}: expected a multiple of {processes}, such as {near}")


def layout(accelerator: Accelerator) -> str:
    """How a stage's weights lie on the processes, by name."""
    if (plugin := accelerator.deepspeed_plugin) is not None:
        return f"ZeRO-{plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "FSDP2"
    return "DDP" if accelerator.num_processes > 1 else "alone"


def in_turn(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """`make()` on every process, first on one of each machine, which makes the caches. Where it raises
    InputError on any, all end."""
    made, error = [], None
    for first in (True, False):
        if accelerator.is_local_main_process == first:
            try:
                made.append(make())
            except InputError as caught:
                error = caught
        accelerator.wait_for_everyone()
    agree(accelerator, error)
    return made[0]


def agree(accelerator: Accelerator, error: InputError | None) -> None:
    """End all processes where one has an error: the first of them raises it, the others `Ended`."""
    flag = torch.tensor([error is not None], device=accelerator.device)
    failed = cast(Tensor, accelerator.gather(flag)).nonzero().flatten().tolist()
    if not failed:
        return
    if error is None or failed[0] != accelerator.process_index:
        raise Ended
    raise error if accelerator.is_main_process else Alone(f"rank {accelerator.process_index}: {error}")


def chosen_by_main(accelerator: Accelerator, number: int) -> int:
    """The main process's number, on all."""
    flag = torch.tensor([number], device=accelerator.device)
    return int(cast(Tensor, accelerator.gather(flag))[0])


@contextmanager
def together(accelerator: Accelerator, stop: StopSignal) -> Iterator[None]:
    """Tell a process that has gone from an error of one's own. After a signal it has gone as it should."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        gone = isinstance(error, distributed.DistError) or "by peer" in str(error)
        if accelerator.num_processes > 1 and gone:
            if stop.received:
                raise Preempted from None
            raise Lost(f"rank {accelerator.process_index}: the other processes are gone ({reason})") from None
        raise


class Told(Dataset[Any]):
    """A dataset for worker processes that hands bad input over as a value: the loader would wrap what is
    raised in the worker's traceback."""

    def __init__(self, inner: Dataset[Any]) -> None:
        self._inner = inner

    def __getitem__(self, index: int) -> Any:
        try:
            return self._inner[index]
        except InputError as error:
            return str(error)


def batches(loader: Iterable[Any], complete: Callable[[Any], T], rank: int, world: int) -> Iterator[T]:
    """The batches of a loader of `Told` data, completed. Raises `Alone` for bad input."""
    for batch in loader:
        try:
            if isinstance(batch, str):
                raise InputError(batch)
            completed = complete(batch)
        except InputError as error:
            raise Alone(f"rank {rank}: {error}" if world > 1 else str(error)) from None
        yield completed
