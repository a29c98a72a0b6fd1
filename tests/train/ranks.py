"""Real processes for tests of several of them, in a fraction of a second each.

`python -m tests.train.ranks MODULES` imports torch and the training room once, then forks the ranks of one
run after another as told on its standard input, a JSON line each. They train with the toy encoder, on the
CPU.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT_S = 240.0  # a run that takes longer hangs
# DeepSpeed 0.19 calls what torch 2.14 is about to rename
DEEPSPEED_IS_OLD = "ignore:`torch.distributed.all_gather_into_tensor` is deprecated:FutureWarning"


@dataclass
class Result:
    status: list[int]  # of each rank; minus the signal that killed it
    out: list[str]
    err: list[str]


class Ranks:
    """The process that forks. A context manager. modules: what it is to import as well, once for all."""

    def __init__(self, folder: Path, modules: Sequence[str] = ()) -> None:
        self.folder, self._runs = folder, 0
        settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-W", DEEPSPEED_IS_OLD, "-m", "tests.train.ranks", *modules],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # ends its input, and with it the process

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, number: int, argv: Sequence[str | Path], **more: Any) -> list[int]:
        """Start `python -m train ARGV` on so many ranks. env: variables; fault: a name in FAULTS and its
        arguments, installed on each rank. Returns the process ids."""
        self._runs += 1
        self._current = self.folder / f"run-{self._runs}"
        self._current.mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = [str(word) for word in argv]
        return self._ask(number=number, argv=words, folder=str(self._current), port=port, **more)

    def wait(self) -> Result:
        status = self._ask(wait=True)
        texts = [
            [(self._current / f"{rank}.{kind}").read_text() for rank in range(len(status))]
            for kind in OUTPUTS
        ]
        return Result(status, *texts)

    def run(self, number: int, argv: Sequence[str | Path], **more: Any) -> Result:
        self.start(number, argv, **more)
        return self.wait()


# -- on the other side ---------------------------------------------------------------------------------------

OUTPUTS = ("out", "err")


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.01)


def at_step(step: int, rank: int, act: Callable[[Any], None]) -> None:
    """Do something on one rank (-1: on each) before a step, counted from 1 since the process began."""
    from train.loop import Run

    original, count = Run._step, 0

    def patched(self: Run, batch: Any) -> Any:
        nonlocal count
        count += 1
        if count == step and rank in (-1, self.rank):
            act((self, batch))
        return original(self, batch)

    Run._step = patched  # type: ignore[method-assign]


def poison(step: int, rank: int) -> None:
    """A picture with a value that is not a number."""

    def act(what: Any) -> None:
        what[1]["x"][0].fill_(float("nan"))

    at_step(step, rank, act)


def crash(step: int, rank: int) -> None:
    def act(_: Any) -> None:
        raise ArithmeticError("this rank fails")

    at_step(step, rank, act)


def die(step: int, rank: int) -> None:
    at_step(step, rank, lambda _: os.kill(os.getpid(), signal.SIGKILL))


def terminate(step: int, rank: int, name: str = "SIGTERM") -> None:
    """A signal from outside, in the middle of a step."""
    at_step(step, rank, lambda _: os.kill(os.getpid(), getattr(signal, name)))


def unreadable(step: int, rank: int) -> None:
    """Bad input that one rank meets while it makes its batches."""
    from cascade.errors import InputError
    from train.batches import Maker

    original = Maker.read_at

    def read_at(self: Maker, positions: list[int]) -> Any:
        if positions[0] >= step * self.train.batch and os.environ.get("RANK", "0") == str(rank):
            raise InputError("cannot read a picture")
        return original(self, positions)

    Maker.read_at = read_at  # type: ignore[method-assign]


def slow_grid(seconds: float) -> None:
    """A grid that takes long, and says when it begins."""
    from train.tasks import StageTask

    def grid(self: StageTask, tensors: Any) -> None:
        (self.out / "drawing").touch()
        time.sleep(seconds)

    StageTask.grid = grid  # type: ignore[method-assign]


def slow_validation(seconds: float, rank: int) -> None:
    """A validation that takes long on one rank, and says when it begins; and a state whose writing is not
    done before there is a file `signalled`."""
    from train import checkpoints
    from train.validation import Validation

    run, save = Validation.run, checkpoints.save_state

    def slow(self: Validation, weights: Any) -> Any:
        if self.accelerator.process_index == rank:
            (self.task.out / "validating").touch()
            time.sleep(seconds)
        return run(self, weights)

    def late(folder: Path, *arguments: Any) -> Path:
        wait_until((folder / "signalled").exists)
        time.sleep(0.3)
        return save(folder, *arguments)

    Validation.run = slow  # type: ignore[method-assign]
    checkpoints.save_state = late


def remember(step: int = 0, rank: int = 0, name: str = "SIGTERM") -> None:
    """Write down which pictures each step is made of, known again by their pixels; and stop before a step."""
    from train.loop import Run

    if step:
        terminate(step, rank, name)
    original, known = Run._step, {}

    def step_of(self: Run, batch: Any) -> Any:
        make = self.task.make
        if not known:
            known.update({make.read(i, 0).pixels.numpy().tobytes(): i for i in make.pictures.train})
        rows = ((batch["x"] + 1) * 127.5).round().byte()
        record = {"images": self.counters.images, "rank": self.rank, "world": self.world}
        record["ids"] = [known[row.contiguous().numpy().tobytes()] for row in rows]
        with (self.task.out / f"seen-{self.rank}.jsonl").open("a") as file:
            file.write(json.dumps(record, default=int) + "\n")
        return original(self, batch)

    Run._step = step_of  # type: ignore[method-assign]


def embed(shard: int) -> None:
    """No fault: `python -m train.embed` instead of train, in shards of so many pictures."""
    from train import __main__ as command
    from train import embed as other
    from train import encoded

    encoded.SHARD = shard
    command.main = other.main


def bad_validation(rank: int) -> None:
    """One that fails on a rank, while the others compute their part."""
    from train.validation import Validation

    original = Validation.run

    def run(self: Validation, weights: Any) -> Any:
        if self.accelerator.process_index == rank:
            raise ArithmeticError("this rank fails")
        return original(self, weights)

    Validation.run = run  # type: ignore[method-assign]


KNOWN = (
    poison,
    crash,
    die,
    terminate,
    unreadable,
    slow_grid,
    slow_validation,
    bad_validation,
    remember,
    embed,
)
FAULTS = {f.__name__: f for f in KNOWN}


def child(request: dict[str, Any], rank: int) -> int:
    number, folder = request["number"], Path(request["folder"])
    os.setpgid(0, 0)
    for kind, descriptor in zip(OUTPUTS, (1, 2), strict=True):
        os.dup2(os.open(folder / f"{rank}.{kind}", os.O_WRONLY | os.O_CREAT), descriptor)
    if number > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": request["port"]}
        os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(request.get("env", {}))
    import torch

    from train import __main__ as command

    # makes the thread pool that the fork lost: two threads that find it missing at once crash
    torch.set_num_threads(1)
    command.MAIN, command.GRACE_S = rank == 0, request.get("grace", 0.5)
    if fault := request.get("fault"):
        FAULTS[fault[0]](*fault[1:])
    return command.main(request["argv"])


def fork(request: dict[str, Any], rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = child(request, rank)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def reap(pids: list[int]) -> list[int]:
    """Their exit statuses; -1 for each that had to be killed as it hung."""
    found: dict[int, int] = {}
    end = time.monotonic() + LIMIT_S
    while len(found) < len(pids) and time.monotonic() < end:
        for pid in set(pids) - found.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                found[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    for pid in set(pids) - found.keys():
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [found.get(pid, -1) for pid in pids]


def pretend() -> None:
    """As the fixtures of this room do: the toy encoder, and few pictures at once."""
    import torch

    import train.loop  # noqa: F401  # imported once, for all ranks to come
    from cascade.text import load_text_encoder
    from tests.conftest import ToyEncoder

    def load(reference: dict[str, Any], *places: Any, **settings: Any) -> Any:
        real = partial(load_text_encoder, reference, *places, **settings)
        return ToyEncoder() if reference["kind"] == "toy" else real()

    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    for name, module in list(sys.modules.items()):
        if name.startswith(("train", "cascade.pipeline")) and hasattr(module, "load_text_encoder"):
            module.load_text_encoder = load  # type: ignore[attr-defined]
        if name.startswith("train") and hasattr(module, "CACHED_PX"):
            module.CACHED_PX = 32  # type: ignore[attr-defined]


def warm_up() -> None:
    """What torch imports when it is first used: seconds, which every rank would spend again."""
    import torch._dynamo  # noqa: F401  # the optimisers do

    from cascade.config import from_dict
    from tests.train.conftest import tiny_recipe
    from train.plan import make_plan
    from train.recipe import Recipe

    make_plan(from_dict(Recipe, tiny_recipe(Path("data"), Path("runs"))), "sr256")


def serve(modules: Sequence[str]) -> None:
    pretend()
    warm_up()
    for name in modules:
        importlib.import_module(name)
    pids: list[int] = []
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = reap(pids)
        else:
            answer = pids = [fork(request, rank) for rank in range(request["number"])]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
