"""Moving averages of a network's parameters, and averages of other lengths made from them afterwards.

`python -m train.ema OUT STAGE --sigma-rel 0.1` writes the component of a stage averaged by a power-function
profile that was not tracked, out of the snapshots of those that were (EDM2, arXiv:2312.02696, section 3)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cascade.arguments import Parser
from cascade.checkpoint import load_component, save_component
from cascade.errors import InputError

YOUNG = 100  # steps: until then every one is averaged
SIGMA_RELS = (0.01, 0.28)  # of a power-function profile; beyond 1 / sqrt(12) = 0.289 its exponent is below 0


class EMA:
    """float32 average of the parameters that are trained; all else is the network's of now. The decay
    rises as (1 + n) / (10 + n) to its maximum, so that a young average forgets its random start.
    `updates`, the steps counted, is part of the training state. Of a sharded network each process averages
    its shards."""

    every = 4  # steps, of which one is averaged, with the decay of all: a quarter of the memory traffic

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._module = module
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone().float() for name, p in self._parameters.items()}

    def decay_of(self, update: int) -> float:
        """The decay at the n-th update, n from 1."""
        return min(self.decay, (1 + update) / (10 + update))

    @torch.no_grad()
    def update(self) -> None:
        """Count a step, and average its weights where it is one of those that are."""
        self.updates += 1
        span = 1 if self.updates <= YOUNG else self.every
        if self.updates % span:
            return
        decay = math.prod(self.decay_of(n) for n in range(self.updates - span + 1, self.updates + 1))
        average = [local(a) for a in self.average.values()]
        current = [local(p.detach()).float() for p in self._parameters.values()]
        # one kernel for all tensors
        torch._foreach_lerp_(average, current, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged network, under the network's own names."""
        network = {name: t.detach() for name, t in self._module.state_dict().items()}
        return network | self.average


class PowerEMA(EMA):
    """The average under the profile tau^gamma of relative width `sigma_rel` (EDM2 section 3.1): its
    length grows with training, and its initial weights count nothing."""

    every = 1  # other lengths are made from it: it is what it says, to the step

    def __init__(self, module: nn.Module, sigma_rel: float) -> None:
        super().__init__(module, 1.0)
        self.sigma_rel, self.gamma = sigma_rel, gamma_of(sigma_rel)

    def decay_of(self, update: int) -> float:
        """beta = (1 - dt / t)^(gamma + 1) (EDM2 equation 127), where every update is one dt."""
        return (1 - 1 / update) ** (self.gamma + 1)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# -- power-function profiles ---------------------------------------------------------------------------------


def sigma_rel_of(gamma: float) -> float:
    """Standard deviation of the profile tau^gamma on [0, t], in units of t (EDM2 equation 123)."""
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a profile of relative width `sigma_rel`: the largest root of (gamma + 2)^2 (gamma +
    3) = (gamma + 1) / sigma_rel^2 (EDM2 equation 126)."""
    low, high = SIGMA_RELS
    if not low <= sigma_rel <= high:
        raise InputError(f"sigma_rel {sigma_rel}: expected a number from {low} to {high}")
    t = sigma_rel**-2
    roots = np.roots([1, 7, 16 - t, 12 - t])
    return float(roots[np.isreal(roots)].real.max())


def overlap(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Inner product of two profiles of integral 1, (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t]: of
    tau^(gamma_a + gamma_b) up to the earlier t, written as a ratio so that no power overflows. Arrays
    broadcast."""
    early, late = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    gamma_late = np.where(t_a < t_b, gamma_b, gamma_a)
    norm = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return norm * (early / late) ** gamma_late / late


def solve(times: Sequence[float], gammas: Sequence[float], time: float, gamma: float) -> np.ndarray:
    """Coefficients of the snapshots (time, exponent) whose sum is nearest, in least squares over the
    history of the weights, to the profile of `gamma` at `time` (EDM2 section 3.2)."""
    t, g = np.asarray(times, float), np.asarray(gammas, float)
    a = overlap(t[:, None], g[:, None], t[None, :], g[None, :])
    b = overlap(t, g, np.asarray(float(time)), np.asarray(gamma))
    return np.linalg.lstsq(a, b, rcond=None)[0]


def reconstruct(folder: Path, sigma_rel: float, images: int | None = None) -> tuple[dict[str, Tensor], int]:
    """The weights averaged by `sigma_rel` at `images` (default: the newest snapshot), float32, and those
    images. `folder`: OUT/STAGE-training. Raises InputError where snapshots are missing or damaged."""
    from train.state import average_files, read_average

    files = average_files(folder)
    times = sorted({n for n, _ in files})
    if not files:
        raise InputError(f"no snapshots of averages in {folder}: expected a stage trained with ema_sigma_rel")
    at = times[-1] if images is None else images
    if at not in times:
        nearest = min(times, key=lambda n: abs(n - at))
        raise InputError(f"no snapshot at {at:,} images in {folder}; the nearest is at {nearest:,}")
    used = [(n, sigma) for n, sigma in files if n <= at]
    weights = solve([n for n, _ in used], [gamma_of(s) for _, s in used], at, gamma_of(sigma_rel))
    total: dict[str, Tensor] = {}
    for (n, sigma), weight in zip(used, weights, strict=True):
        for name, tensor in read_average(folder, n, sigma).items():
            term = tensor.double() * float(weight)
            total[name] = total[name] + term if name in total else term
    return {name: tensor.float() for name, tensor in total.items()}, at


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m train.ema", description=__doc__)
    parser.add_argument("out", type=Path, help="the run's folder")
    parser.add_argument("stage")
    parser.add_argument("--sigma-rel", type=float, required=True, help="relative width of the average")
    parser.add_argument("--images", type=int, help="at which snapshot; default: the newest")
    parser.add_argument("--to", type=Path, help="component folder to write; default: OUT/STAGE-ema-SIGMA")
    try:
        arguments = parser.parse_args(argv)
        out, stage, sigma_rel = arguments.out, arguments.stage, arguments.sigma_rel
        tensors, images = reconstruct(out / f"{stage}-training", sigma_rel, arguments.images)
        component = load_component(out / stage)
        target = arguments.to or out / f"{stage}-ema-{sigma_rel:g}"
        save_component(target, component.config, component.tensors | tensors, component.class_name)
    except InputError as error:
        print(f"train.ema: {error}", file=sys.stderr)
        return 2
    print(f"{target}: {stage} averaged by sigma_rel {sigma_rel:g} at {images:,} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
