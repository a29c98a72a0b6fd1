"""Noise schedules: the log signal-to-noise ratio as a function of time.

One clock for every stage: t runs from 0 (data) to 1 (noise) and the log-SNR falls. All processes are
variance preserving, so a log-SNR is a complete description of a noise level. Schedules and grids are
float64; they live on the CPU unless the tensor they are asked about lives elsewhere.

A sampler grid is a float64 tensor of N + 1 log-SNRs, noisiest first; the last entry is +inf, the clean
picture, which is only ever a target and never evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from cascade.config import ScheduleConfig, Spacing
from cascade.errors import InputError, unknown

TRAIN_STEPS = 1000  # length of the discrete grids, and of the chain whose bound the hybrid loss takes
ZERO_SNR_LOGSNR = -100.0  # stands for -inf at the end of a zero-terminal-SNR grid: alpha is 2e-22, not 0
PURE_NOISE_LOGSNR = -20.0  # spacings in log-SNR start here at the earliest: nothing is decided before
EDM_RHO = 7.0  # Karras et al. 2022, equation 5 and table 1
EDM_SIGMA = (0.002, 80.0)
# Section counts by name, as DeepFloyd IF publishes them.
RESPACINGS = {
    "fast27": "10,10,3,2,2",
    "smart27": "7,4,2,1,2,4,7",
    "smart50": "10,6,4,3,2,2,3,4,6,10",
    "smart100": "1,1,1,1,2,2,2,2,2,2,3,3,4,4,5,5,6,7,7,8,9,10,13",
    "smart185": "1,1,2,2,2,3,3,3,4,5,6,7,8,9,10,11,12,13,14,15,16,18,20",
    "super27": "1,1,1,1,1,1,1,2,5,13",
    "super40": "2,2,2,2,2,2,3,4,6,15",
    "super100": "4,4,6,6,8,8,10,10,14,30",
}
GLIDE27 = "glide27"  # fast27 that starts at 997: GLIDE's upsampler with ddim


def alpha_sigma(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of x_t = alpha x_0 + sigma eps, with alpha^2 + sigma^2 = 1. A log-SNR of +inf gives (1, 0)."""
    return logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt()


def step_log_variances(logsnr: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(smallest, largest) log variance of the reverse step from `logsnr` to the cleaner `target`.

    The smallest is that of q(x_s | x_t, x_0), the largest that of q(x_t | x_s): beta-tilde and beta of DDPM.
    """
    drop = torch.log(-torch.expm1(logsnr - target))  # log(1 - SNR_t / SNR_s)
    log_sigmoid = torch.nn.functional.logsigmoid
    return drop + log_sigmoid(-target), drop + log_sigmoid(-logsnr)


class Schedule:
    """A strictly falling map from t in [0, 1] to log-SNR. Build one with `make_schedule`."""

    discrete: bool
    kind: str  # what errors call it

    def logsnr(self, t: Tensor) -> Tensor:
        """log-SNR at time t, float64, shape and device of `t`."""
        raise NotImplementedError

    def t(self, logsnr: Tensor) -> Tensor:
        """Time of a log-SNR, float64; values beyond the ends are taken to the ends."""
        raise NotImplementedError

    def slope(self, logsnr: Tensor) -> Tensor:
        """-d logsnr / dt > 0 at a log-SNR, float64: one over the density of log-SNRs under uniform t."""
        raise NotImplementedError

    def previous(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """One step of 1/1000 towards the data in the chain whose variational bound the hybrid loss takes.

        Returns (logsnr of the step's target, True where the step is the chain's first, which ends in the
        clean picture). For the first step the returned log-SNR is only good for bounding the variance."""
        raise NotImplementedError

    def grid(self, steps: int, spacing: Spacing = "t") -> Tensor:
        """A sampler grid of `steps` evaluations, shape [steps + 1] (see the module's docstring).

        spacing "t": uniform in t, from t = 1 to t = 1/steps. "logsnr": uniform in log-SNR from t = 1 to
        t = 0. "edm": sigma^(1/7) uniform between 80 and 0.002 (within the schedule's range)."""
        if steps < 1:
            raise InputError(f"steps is {steps}: expected at least 1")
        if spacing == "t":
            points = self.logsnr(torch.arange(steps, 0, -1, dtype=torch.float64) / steps)
        elif spacing == "logsnr":
            noisy, clean = self.ends
            points = torch.linspace(max(noisy, PURE_NOISE_LOGSNR), clean, steps, dtype=torch.float64)
        elif spacing == "edm":
            points = self._edm_points(steps)
        else:
            raise unknown("spacing", spacing, ["t", "logsnr", "edm"], where=self.kind)
        return _with_clean(points)

    @property
    def ends(self) -> tuple[float, float]:
        """log-SNR at t = 1 and at t = 0."""
        ends = self.logsnr(torch.tensor([1.0, 0.0], dtype=torch.float64))
        return float(ends[0]), float(ends[1])

    def _edm_points(self, steps: int) -> Tensor:
        """Log-SNRs of EDM's sigma grid; sigma = exp(-logsnr / 2). Karras et al. 2022, equation 5."""
        noisy, clean = self.ends
        high = min(math.exp(-noisy / 2), EDM_SIGMA[1]) ** (1 / EDM_RHO)
        low = max(math.exp(-clean / 2), EDM_SIGMA[0]) ** (1 / EDM_RHO)
        return -2 * EDM_RHO * torch.linspace(high, low, steps, dtype=torch.float64).log()


class ContinuousSchedule(Schedule):
    """A closed-form log-SNR curve, shifted, then cut to [logsnr_min, logsnr_max] by narrowing its time range.

    Narrowing rather than clamping keeps the map strictly falling, hence invertible: t = 0 is the cleanest
    point left and t = 1 the noisiest."""

    discrete = False
    kind = "a continuous schedule"

    def __init__(self, curve: Curve, config: ScheduleConfig) -> None:
        if not config.logsnr_min < config.logsnr_max:
            raise InputError(
                f"schedule: logsnr_min {config.logsnr_min} is not below logsnr_max {config.logsnr_max}"
            )
        self._curve = curve
        self._high = config.shift
        self._low = config.shift if config.shift_low is None else config.shift_low
        self._check_falling()
        cleanest, noisiest = self._raw(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        limits = torch.tensor(
            [min(config.logsnr_max, cleanest), max(config.logsnr_min, noisiest)], dtype=torch.float64
        )
        if not limits[0] > limits[1]:
            raise InputError(
                f"schedule {config.name!r} spans log-SNR {noisiest:.2f} to {cleanest:.2f}, outside "
                f"[{config.logsnr_min}, {config.logsnr_max}]"
            )
        start, end = self._raw_inverse(limits).tolist()
        self._start, self._width = start, end - start

    def logsnr(self, t: Tensor) -> Tensor:
        return self._raw(self._start + self._width * precise(t))

    def t(self, logsnr: Tensor) -> Tensor:
        return ((self._raw_inverse(precise(logsnr)) - self._start) / self._width).clamp(0, 1)

    def slope(self, logsnr: Tensor) -> Tensor:
        u = self._start + self._width * self.t(logsnr)
        return self._width * (self._curve.slope(u) - (self._high - self._low))

    def previous(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        logsnr = precise(logsnr)
        t, step = self.t(logsnr), 1 / TRAIN_STEPS
        first = t < step
        # first step: as long as the one before it, so that its variance has a lower bound
        before = 2 * logsnr - self.logsnr(t + step)
        return torch.where(first, before, self.logsnr((t - step).clamp(min=0))), first

    def _raw(self, u: Tensor) -> Tensor:
        """Curve plus shift; the shift runs from `_low` at u = 0 to `_high` at u = 1 (simple diffusion)."""
        return self._curve.logsnr(u) + (1 - u) * self._low + u * self._high

    def _raw_inverse(self, logsnr: Tensor) -> Tensor:
        if self._low == self._high:
            return self._curve.inverse(logsnr - self._high)
        return _bisect(self._raw, logsnr)

    def _check_falling(self) -> None:
        u = torch.linspace(1e-3, 1 - 1e-3, 999, dtype=torch.float64)
        if not bool((self._curve.slope(u) > self._high - self._low).all()):
            raise InputError(
                f"schedule: shift {self._high} is too far above shift_low {self._low}: the log-SNR would "
                f"not fall; expected a difference below {float(self._curve.slope(u).min()):.2f}"
            )


class Curve:
    """A closed-form log-SNR of u in [0, 1], before shift and truncation; `slope` is -d logsnr / du."""

    def logsnr(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def inverse(self, logsnr: Tensor) -> Tensor:
        return _bisect(self.logsnr, logsnr)

    def slope(self, u: Tensor) -> Tensor:
        raise NotImplementedError


class CosineCurve(Curve):
    """alpha = cos(pi u / 2): logsnr = -2 log tan(pi u / 2). Nichol & Dhariwal 2021 without the offset s;
    the form of simple diffusion (arXiv:2301.11093), to which its resolution shifts are added."""

    def logsnr(self, u: Tensor) -> Tensor:
        angle = u * (math.pi / 2)
        # two logarithms, not log(tan): the cosine of an angle near pi/2 is taken as a sine of its complement
        return 2 * (((1 - u) * (math.pi / 2)).sin().log() - angle.sin().log())

    def inverse(self, logsnr: Tensor) -> Tensor:
        return torch.atan((-0.5 * logsnr).exp()) * (2 / math.pi)

    def slope(self, u: Tensor) -> Tensor:
        return 2 * math.pi / (u * math.pi).sin()


class LinearCurve(Curve):
    """beta linear in time, continuous: sigma^2 = 1 - exp(-(1e-4 + 10 u^2)). VDM (arXiv:2107.00630),
    Imagen's 256 -> 1024 stage."""

    def logsnr(self, u: Tensor) -> Tensor:
        return -(1e-4 + 10 * u**2).expm1().log()

    def inverse(self, logsnr: Tensor) -> Tensor:
        exponent = torch.nn.functional.softplus(-logsnr)  # log(1 + exp(-logsnr))
        return ((exponent - 1e-4).clamp(min=0) / 10).sqrt().clamp(max=1)

    def slope(self, u: Tensor) -> Tensor:
        return 20 * u / -(-(1e-4 + 10 * u**2)).expm1()


class SigmoidCurve(Curve):
    """alpha^2 falls along a sigmoid from its value at `start` to its value at `end`, rescaled to [0, 1].
    Chen 2023 (arXiv:2301.10972), with its defaults -3, 3 and temperature 1."""

    start, end = -3.0, 3.0

    def logsnr(self, u: Tensor) -> Tensor:
        here = (self.start + u * (self.end - self.start)).sigmoid()
        low, high = _sigmoid(self.start), _sigmoid(self.end)
        return (high - here).log() - (here - low).log()

    def slope(self, u: Tensor) -> Tensor:
        here = (self.start + u * (self.end - self.start)).sigmoid()
        low, high = _sigmoid(self.start), _sigmoid(self.end)
        rate = here * (1 - here) * (self.end - self.start)
        return rate * (1 / (high - here) + 1 / (here - low))


class DiscreteSchedule(Schedule):
    """The 1000-step grid of a DDPM checkpoint: networks trained on it know only these noise levels.

    `logsnrs` [1000] falls with the index. Time t covers index floor(1000 t), so uniform t draws every index
    equally often, `logsnr` always returns a level of the grid and `t` returns the middle of its cell."""

    discrete = True
    kind = "a discrete schedule"

    def __init__(self, betas: Tensor, config: ScheduleConfig) -> None:
        alpha_bar = (1 - betas).cumprod(0)
        if config.zero_terminal_snr:
            alpha_bar = rescale_zero_terminal_snr(alpha_bar)
        self.logsnrs = (alpha_bar.log() - torch.log1p(-alpha_bar)).clamp(min=ZERO_SNR_LOGSNR) + config.shift
        self._midpoints = (self.logsnrs[1:] + self.logsnrs[:-1]) / 2
        self._slopes = -torch.gradient(self.logsnrs)[0] * TRAIN_STEPS

    def logsnr(self, t: Tensor) -> Tensor:
        index = (precise(t) * TRAIN_STEPS).long().clamp(0, TRAIN_STEPS - 1)
        return _table(self.logsnrs, t)[index]

    def t(self, logsnr: Tensor) -> Tensor:
        return (precise(self.index(logsnr)) + 0.5) / TRAIN_STEPS

    def index(self, logsnr: Tensor) -> Tensor:
        """Index of the nearest level of the grid, int64, in [0, 999]."""
        return torch.bucketize(-precise(logsnr), -_table(self._midpoints, logsnr))

    def slope(self, logsnr: Tensor) -> Tensor:
        return _table(self._slopes, logsnr)[self.index(logsnr)]

    def previous(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        index = self.index(logsnr)
        first = index == 0
        levels = _table(self.logsnrs, logsnr)
        # first step: as long as the one before it, so that its variance has a lower bound
        before = torch.where(first, 2 * levels[0] - levels[1], levels[(index - 1).clamp(min=0)])
        return before, first

    def grid(self, steps: int, spacing: Spacing = "t") -> Tensor:
        """As `Schedule.grid`, on levels of the grid only: "t" takes the last of each of `steps` equal runs
        (arXiv:2305.08891's trailing steps), "leading" the first (diffusers' IF), "linspace" evenly from 0 to
        999 (improved DDPM, Karlo); the others the nearest levels that are still free, the first level 999."""
        if not 1 <= steps <= TRAIN_STEPS:
            raise InputError(f"steps is {steps}: expected 1 to {TRAIN_STEPS} on a discrete schedule")
        if spacing == "t":
            return self.respaced([round(TRAIN_STEPS * i / steps) - 1 for i in range(1, steps + 1)])
        if spacing == "leading":
            return self.respaced([TRAIN_STEPS // steps * i for i in range(steps)])
        if spacing == "linspace":
            last = TRAIN_STEPS - 1
            return self.respaced(
                [round(last / (steps - 1) * i) for i in range(steps)] if steps > 1 else [last]
            )
        wanted = self.index(super().grid(steps, spacing)[1:-1]).tolist()
        indices = [TRAIN_STEPS - 1]
        for left, index in zip(range(steps - 2, -1, -1), wanted, strict=True):
            indices.append(max(min(index, indices[-1] - 1), left))  # below the last, with room for those left
        return self.respaced(indices)

    def respaced(self, indices: Sequence[int] | str) -> Tensor:
        """A sampler grid of chosen indices, of section counts "10,10,5", or a name of `RESPACINGS`: the
        grid is cut into equal sections, data first, and that many evenly strided levels are kept of each
        (improved DDPM)."""
        chosen = section_indices(indices) if isinstance(indices, str) else indices
        kept = sorted(set(chosen), reverse=True)
        if not kept or kept[0] >= TRAIN_STEPS or kept[-1] < 0:
            raise InputError(f"respacing: expected indices in [0, {TRAIN_STEPS - 1}], got {list(chosen)[:5]}")
        return _with_clean(self.logsnrs[torch.tensor(kept)])


def section_indices(sections: str) -> list[int]:
    """Indices kept of the 1000-step grid by section counts such as "10,6,4" (lowest noise first)."""
    if sections == GLIDE27:
        return [*section_indices("fast27")[:-1], TRAIN_STEPS - 3]
    try:
        counts = [int(count) for count in RESPACINGS.get(sections, sections).split(",")]
    except ValueError:
        names = ", ".join([*RESPACINGS, GLIDE27])
        raise InputError(
            f"respacing {sections!r}: expected whole numbers separated by commas, or one of {names}"
        ) from None
    size, extra = divmod(TRAIN_STEPS, len(counts))
    indices: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if not 1 <= count <= length:
            raise InputError(
                f"respacing {sections!r}: section {section} has {length} steps, cannot keep {count}"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # summed, not multiplied: halves are rounded as in the published lists
        indices += [start + round(place) for place in accumulate([0.0, *[stride] * (count - 1)])]
        start += length
    return indices


def rescale_zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Move and scale sqrt(alpha_bar): the last becomes 0, the first stays. arXiv:2305.08891, algorithm 1."""
    root = alpha_bar.sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return root**2


def linear_betas() -> Tensor:
    """beta from 1e-4 to 0.02. Ho et al. 2020, section 4."""
    return torch.linspace(1e-4, 0.02, TRAIN_STEPS, dtype=torch.float64)


def cosine_betas() -> Tensor:
    """Nichol & Dhariwal 2021, equation 17: s = 0.008, beta at most 0.999."""
    u = torch.arange(TRAIN_STEPS + 1, dtype=torch.float64) / TRAIN_STEPS
    alpha_bar = ((u + 0.008) / 1.008 * (math.pi / 2)).cos() ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


CURVES: dict[str, Callable[[], Curve]] = {
    "cosine": CosineCurve,
    "linear": LinearCurve,
    "sigmoid": SigmoidCurve,
}
BETAS: dict[str, Callable[[], Tensor]] = {"discrete_cosine": cosine_betas, "discrete_linear": linear_betas}


def make_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule of a config. Raises InputError when the config describes none."""
    if config.name in BETAS:
        if config.shift_low is not None:
            raise InputError("schedule: shift_low needs a continuous schedule (cosine, linear, sigmoid)")
        return DiscreteSchedule(BETAS[config.name](), config)
    if config.name not in CURVES:
        raise unknown("schedule", config.name, [*CURVES, *BETAS])
    if config.zero_terminal_snr:
        raise InputError("schedule: zero_terminal_snr needs discrete_cosine or discrete_linear")
    return ContinuousSchedule(CURVES[config.name](), config)


def precise(x: Tensor) -> Tensor:
    """float64 where the device has it (MPS has not)."""
    return x.float() if x.device.type == "mps" else x.double()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy to the accelerator does not wait for it; a copy from it must."""
    return x.to(device, non_blocking=device.type == "cuda")


def _table(values: Tensor, like: Tensor) -> Tensor:
    """A float64 table of the CPU, where `like` lives."""
    return to_device(values.float() if like.device.type == "mps" else values, like.device)


def _with_clean(points: Tensor) -> Tensor:
    return torch.cat([points, points.new_tensor([math.inf])])


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _bisect(falling: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """The root u in [0, 1] of falling(u) = target, by 60 halvings (float64 is exhausted after 53)."""
    low, high = torch.zeros_like(target), torch.ones_like(target)
    for _ in range(60):
        middle = (low + high) / 2
        above = falling(middle) > target  # still too clean: the root lies at larger u
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2
