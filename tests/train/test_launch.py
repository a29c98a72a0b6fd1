"""The launch files and the launcher: what they start, and what it ends with."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from cascade.errors import InputError
from train import zero
from train.launch import __main__ as launcher
from train.processes import make_accelerator
from train.recipe import TrainConfig
from train.signals import REQUEUE, SIGNALS

ROOT = Path(__file__).parents[2]
FILES = ROOT / "train" / "launch"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp", DistributedType.MULTI_GPU),
        ("fsdp2", DistributedType.FSDP),
        ("zero", DistributedType.DEEPSPEED),
    ],
)
def test_the_configuration_files_are_accelerates(name: str, kind: DistributedType) -> None:
    config = load_config_from_file(str(FILES / f"{name}.yaml"))
    assert config.distributed_type == kind and config.num_processes == 8
    assert config.mixed_precision == "no"  # the recipe's counts
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name == "zero":
        assert config.deepspeed_config["zero_stage"] in zero.STAGES
        assert config.deepspeed_config.keys().isdisjoint({"gradient_accumulation_steps", "gradient_clipping"})


def test_zero_wants_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(InputError, match="DeepSpeed: expected accelerate launch or torchrun"):
        make_accelerator(TrainConfig(images=1, batch=1, lr=1.0), "base")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="starts two processes on the CPU")
@pytest.mark.parametrize("launch", [["-m", "accelerate.commands.launch"], ["-m", "train.launch"]])
def test_a_launch_starts_sharded_processes_and_ends_with_their_status(
    recipe_file: Path, launch: list[str]
) -> None:
    """Of a batch that two processes cannot share, rank 0 says so in one line."""
    options = ["--config_file", str(FILES / "fsdp2.yaml"), "--num_processes", "2"]
    options += ["--main_process_port", "0"]  # a free one
    command = [str(recipe_file), "--stage", "sr256", "--dry-run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(*more: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, *launch, *options, "-m", "train", *command, *more]
        return subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    good = start()
    assert good.returncode == 0, good.stderr
    assert good.stdout.count("world size: 2 (FSDP2 on cpu)") == 1
    bad = start("--set", "sr256.train.batch=9")
    lines = [line for line in bad.stderr.splitlines() if line.startswith("train: ")]
    assert lines == ["train: sr256.train.batch 9: expected a multiple of 2 processes, such as 8 or 10"]
    if launch[1] == "train.launch":
        assert bad.returncode == 2 and "Traceback" not in bad.stderr
    else:
        assert bad.returncode == 1  # torch's launcher has no other


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (None, 0),
        (2, 2),
        (75, 75),
        (-9, 137),
        (SignalException("stopped", 15), 75),
        (ValueError("use one of --cpu, --multi_gpu\nat a time"), 2),
    ],
)
def test_the_exit_status_is_that_of_the_first_process_that_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ending: object, status: int
) -> None:
    seen = []

    def launch(arguments: object) -> None:
        seen.append(arguments)
        if isinstance(ending, int):
            failure = ProcessFailure(local_rank=0, pid=1, exitcode=ending, error_file="none")
            raise ChildFailedError("train", {0: failure})
        if isinstance(ending, BaseException):
            raise ending

    monkeypatch.setattr(launcher, "launch_command", launch)
    assert launcher.main(["-m", "train", "emoji"]) == status
    assert "SIGUSR1" in seen[0].signals_to_handle and seen[0].training_script_args == ["emoji"]
    assert capsys.readouterr().err.count("\n") == (1 if isinstance(ending, ValueError) else 0)


@pytest.mark.parametrize("status", [0, 2, REQUEUE])
def test_the_slurm_script_starts_a_launcher_a_node_and_requeues(tmp_path: Path, status: int) -> None:
    """With commands that write down what they are called with. Of two nodes the second ends with a status."""
    commands = {
        "scontrol": '[ "$1 $2" = "show hostnames" ] && echo alpha && echo beta || echo "$@" > requeued',
        "srun": 'echo "$1" > srun; shift; for i in 0 1; do SLURM_NODEID=$i "$@"; done',  # the second's status
        "python": 'printf "%s\\n" "$@" > launcher-$SLURM_NODEID; exit $((SLURM_NODEID * STATUS))',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CONFIG": "train/launch/zero.yaml",
        "STATUS": str(status),
        **{"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "[alpha,beta]"},
        **{"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"},
    }
    words = ["my recipe.yaml", "--stage", "base"]
    command = ["bash", FILES / "slurm.sh", *words]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (status, "")
    for node in (0, 1):
        found = (tmp_path / f"launcher-{node}").read_text().splitlines()
        launch, script = found[: found.index("train")], found[found.index("train") :]
        assert launch[:2] == ["-m", "train.launch"] and launch[-1] == "-m" and script == ["train", *words]
        options = dict(zip(launch[2:-1:2], launch[3:-1:2], strict=True))
        assert options == {
            "--config_file": "train/launch/zero.yaml",
            "--num_machines": "2",
            "--machine_rank": str(node),
            "--num_processes": "8",
            "--main_process_ip": "alpha",
            "--main_process_port": "29500",
        }
    assert (tmp_path / "srun").read_text() == "--kill-on-bad-exit=1\n"  # one that fails ends all
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() == "requeue 17\n") if status == REQUEUE else not requeued.exists()


def test_the_slurm_script_asks_for_a_signal_that_a_run_heeds() -> None:
    text = (FILES / "slurm.sh").read_text()
    (name,) = re.findall(r"^#SBATCH --signal=(\w+)@\d+$", text, re.M)
    assert f"SIG{name}" in launcher.SIGNALS.split(",") and getattr(signal, f"SIG{name}") in SIGNALS
    assert "#SBATCH --requeue" in text and "#SBATCH --open-mode=append" in text
