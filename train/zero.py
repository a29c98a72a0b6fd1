"""DeepSpeed's ZeRO through Accelerate: the optimiser's moments and master weights are spread over the
processes (stage 1), the gradients as well (stage 2), and the network is whole on each.

The engine keeps float32 weights and casts nothing; autocast is the trainer's own, so that it trains what DDP
does. Accelerate's `backward` makes the step at once. The guard holds all the same: the engine makes none
on any process where a gradient is not finite on one. Its checkpoints are pickles, which are neither written
nor read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, convert_outputs_to_fp32
from torch import Tensor, nn

from cascade.errors import InputError
from train.recipe import TrainConfig

STAGES = (1, 2)
BUCKET = 50_000_000  # gradients that travel together: 200 MB, of DeepSpeed's 2 GB
STEP = "step"  # AdamW's count, one for all weights


def wanted() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def make_plugin(cfg: TrainConfig, where: str) -> DeepSpeedPlugin:
    """ZeRO as the launch asks for it, with clipping and accumulation as the recipe does. Raises InputError
    for what would be another training."""
    env = os.environ
    if "LOCAL_RANK" not in env:
        raise InputError("launch settings: DeepSpeed: expected accelerate launch or torchrun, found neither")
    stage = int(env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    if stage not in STAGES:
        raise InputError(f"launch settings: zero_stage {stage}: expected 1 or 2, or train/launch/fsdp2.yaml")
    for name in ("offload_optimizer_device", "offload_param_device", "config_file"):
        if (found := env.get(f"ACCELERATE_DEEPSPEED_{name.upper()}", "none")) != "none":
            raise InputError(f"launch settings: DeepSpeed's {name} {found}: expected none")
    clip = env.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
    if clip != "auto" and float(clip) != cfg.grad_clip:
        found = f"gradient_clipping {clip} of the launch"
        raise InputError(f"{found}: expected {where}.grad_clip, {cfg.grad_clip:g}; set it there alone")
    plugin = DeepSpeedPlugin(
        zero_stage=stage, gradient_accumulation_steps=cfg.accumulate, gradient_clipping=cfg.grad_clip
    )
    plugin.deepspeed_config["zero_optimization"]["reduce_bucket_size"] = BUCKET
    return plugin


def on_cpu(accelerator: Accelerator, plugin: DeepSpeedPlugin) -> None:
    """What Accelerate does where there are GPUs."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo's will do; it would be compiled now
    accelerator.state.deepspeed_plugins = plugin
    plugin.set_mixed_precision("no")
    plugin.select(_from_accelerator_state=True)


def prepare(
    accelerator: Accelerator, task: nn.Module, optimizer: torch.optim.Optimizer, cfg: TrainConfig
) -> tuple[Any, Any]:
    """The engine and the optimiser."""
    share = cfg.batch // accelerator.num_processes // cfg.accumulate
    plugin = accelerator.deepspeed_plugin
    assert plugin is not None
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = share
    if cfg.precision == "bf16":
        cast = torch.autocast(accelerator.device.type, torch.bfloat16)
        task.forward = convert_outputs_to_fp32(cast(task.forward))
    for p in task.parameters():
        if p.ndim == 0:  # the engine cannot broadcast it, but for this mark, nor needs to: all begin alike
            vars(p)["ds_optim_param"] = False
    engine, prepared = accelerator.prepare(task, optimizer)
    prepared.optimizer.check_grad_overflow = True  # which it does for 16 bits alone
    return engine, prepared


def is_zero(optimizer: Any) -> bool:
    """Told without importing DeepSpeed, which takes seconds."""
    return type(optimizer).__module__.startswith("deepspeed.")


class Moments(Mapping[str, Tensor]):
    """The optimiser's state as NAME/SLOT. A tensor is put together from the processes' parts when it is asked
    for: collective."""

    def __init__(self, network: nn.Module, optimizer: Any) -> None:
        self._parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._slots = optimizer.optimizer.state.get(flat_part(optimizer), {})

    def __iter__(self) -> Iterator[str]:
        return (f"{name}/{slot}" for name in self._parameters for slot in self._slots)

    def __len__(self) -> int:
        return len(self._parameters) * len(self._slots)

    def __getitem__(self, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        name, slot = key.rsplit("/", 1)
        if slot == STEP:
            return self._slots[STEP]
        whole = safe_get_full_optimizer_state(self._parameters[name], slot)
        assert whole is not None
        return whole


def load(network: nn.Module, optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Take this process's part of whole `tensors` (NAME/SLOT), and of the network's weights, as they are now,
    for its master weights."""
    from deepspeed.utils import safe_set_full_optimizer_state

    flat, slots = flat_part(optimizer), {key.rsplit("/", 1)[1] for key in tensors}
    if slots:
        count = next(value for key, value in tensors.items() if key.endswith(f"/{STEP}"))
        optimizer.optimizer.state[flat] = {STEP: count.to(flat.device)} | {
            slot: torch.zeros_like(flat, requires_grad=False) for slot in slots - {STEP}
        }
        optimizer._lazy_init_hp_params_optimizer_state()  # lets each weight know its part of them
    parameters = dict(network.named_parameters())
    for key, value in tensors.items():
        name, slot = key.rsplit("/", 1)
        if slot != STEP:
            safe_set_full_optimizer_state(parameters[name], value.to(flat.device), slot)
    optimizer.refresh_fp32_params()


def flat_part(optimizer: Any) -> Tensor:
    """The master weights of this process, one after the other: what the inner optimiser knows of."""
    (group,) = optimizer.optimizer.param_groups
    (flat,) = group["params"]
    return flat
