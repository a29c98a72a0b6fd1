"""The launch files and the launcher: what they start, and what it ends with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from train.launch import __main__ as launcher

ROOT = Path(__file__).parents[2]
FILES = ROOT / "train" / "launch"


@pytest.mark.parametrize(
    ("name", "kind"), [("ddp", DistributedType.MULTI_GPU), ("fsdp2", DistributedType.FSDP)]
)
def test_the_configuration_files_are_accelerates(name: str, kind: DistributedType) -> None:
    config = load_config_from_file(str(FILES / f"{name}.yaml"))
    assert config.distributed_type == kind and config.num_processes == 8
    assert config.mixed_precision == "no"  # the recipe's counts
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


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


def test_the_slurm_script_is_whole() -> None:
    """bash reads it; it asks for a signal that a run heeds, and requeues on the status that it ends with."""
    script = FILES / "slurm.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    text = script.read_text()
    assert re.search(r"^#SBATCH --signal=USR1@\d+$", text, re.M) and "#SBATCH --requeue" in text
    assert f'-eq {launcher.REQUEUE} ] && scontrol requeue "$SLURM_JOB_ID"' in text
