"""`python -m eval`: the whole in one command, one line for every mistake, real processes that are killed."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from cascade import Cascade
from cascade.text import load_text_encoder
from eval.__main__ import GRACE_S, main
from eval.launch import main as launcher
from eval.progress import Counter, said_once
from eval.run import read_run
from tests.conftest import tiny_stage
from tests.eval.small_models import save_open_clip

ROOT = Path(__file__).parents[2]


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "list.csv"
    path.write_text("prompt,category\na red owl,birds\na blue owl,birds\na jug,things\na big jug,things\n")
    return str(path)


# -- one command ---------------------------------------------------------------------------------------------


def test_one_command_draws_measures_and_reports(
    prompts, model_folder, own_process_state, tmp_path, capsys
) -> None:
    out = tmp_path / "run"
    argv = [
        "prompts",
        prompts,
        "--model",
        str(model_folder),
        "--per-prompt",
        "2",
        "--sweep",
        "sr256.aug_level=0.3",
    ]
    argv += ["--stop-at", "sr256", "--out", str(out)]
    assert main(argv) == 0
    assert "report.html" in capsys.readouterr().out and (out / "blind.html").is_file()
    report = json.loads((out / "report.json").read_text())
    assert report["command"].startswith("python -m eval prompts ") and report["stage"] == "sr256"
    assert set(report["metrics"]["own_clip_cosine"]["values"]["A"]) == {"default", "sr256.aug_level=0.3"}
    assert set(report["cascade"]) == {"stages", "sr256.aug_level"}
    before = (out / "report.json").read_bytes()
    run = read_run(out)
    run.path(run.items[5]).unlink()
    assert main(argv) == 0  # as after a kill
    assert (out / "report.json").read_bytes() == before
    assert main(["report", str(out), "--out", str(tmp_path / "elsewhere.html"), "--px", "16"]) == 0
    assert (tmp_path / "elsewhere.html").is_file()


# -- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: suite"),
        (["drawbnech"], "unknown suite 'drawbnech'.*did you mean 'drawbench'"),
        (["skills", "--guidence", "base=1"], "unknown argument '--guidence'.*did you mean '--guidance'"),
        (["skills", "--per-prompt", "0"], "expected at least 1"),
        (["skills", "--metrics", "nope"], "nope"),
        (["skills", "--metrics", "inception=PICKLE"], "is a pickle: .*--allow-legacy-checkpoint"),
        (["skills", "--model", "EMPTY"], "is not a model folder: expected model_index.json"),
        (["skills", "--model", "MIXED"], "expected pictures of one size"),
        (["prompts", "LIST", "--model", "MODEL", "--stop-at", "sr512"], "unknown stage 'sr512'"),
        (["prompts", "LIST", "--model", "MODEL", "--set", "base.stpes=3"], "did you mean 'steps'"),
        (
            ["emoji", "--model", "MODEL", "--references", "EMPTY"],
            "missing picture .*, which suite emoji names",
        ),
        (
            ["prompts", "LIST", "--model", "MODEL", "--out", "USED"],
            "no run and not empty: expected a new folder",
        ),
        (["measure", "EMPTY"], "is no run folder: expected run.json"),
        (["report", "EMPTY"], "is no run folder: expected run.json"),
        (["blind", "EMPTY"], "is no run folder: expected run.json"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(
    argv, message, prompts, model_folder, own_process_state, tmp_path, capsys
) -> None:
    places = {"LIST": prompts, "MODEL": str(model_folder)}
    for name in ("EMPTY", "MIXED", "USED"):
        (tmp_path / name).mkdir()
        places[name] = str(tmp_path / name)
    for number, px in enumerate([8, 9] + [8] * 218):
        Image.new("RGB", (px, 8)).save(tmp_path / "MIXED" / f"{number}.png")
    (tmp_path / "USED" / "thesis.txt").write_text("keep")
    (tmp_path / "weights.pth").touch()
    places["inception=PICKLE"] = f"inception={tmp_path / 'weights.pth'}"
    argv = [places.get(word, word) for word in argv]
    if argv and argv[0] in ("skills", "emoji", "prompts") and "--out" not in argv:
        argv += ["--out", str(tmp_path / "run")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("eval: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()
    assert [path.name for path in (tmp_path / "USED").iterdir()] == ["thesis.txt"]


def test_a_run_of_another_model_is_left_as_it_is(
    prompts, model_folder, own_process_state, tmp_path, capsys
) -> None:
    argv = ["prompts", prompts, "--model", str(model_folder), "--stop-at", "base", "--draw-only"]
    argv += ["--out", str(tmp_path / "run")]
    assert main(argv) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*") if path.is_file()}
    pipe = Cascade.from_pretrained(model_folder)
    with torch.no_grad():
        next(pipe.stages["base"].parameters()).add_(1e-2)
    pipe.save_pretrained(model_folder)
    assert main(argv) == 2
    assert "holds a run of model A model " in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


# -- several processes ---------------------------------------------------------------------------------------


def save_model(folder: Path) -> str:
    torch.manual_seed(0)
    stage = tiny_stage("base", 16, text_dims=(384,), image_embed_dim=None)
    Cascade([stage], load_text_encoder({"kind": "minilm"})).save_pretrained(folder)
    return str(folder)


def launch(folder: Path, launcher: list[str], *argv: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, *launcher, *argv]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stderr=subprocess.PIPE)


def test_a_killed_command_is_taken_up_by_two_processes(
    own_process_state, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL amid a real command; the rest is drawn by two processes, and measured. The manifest,
    which holds the hash of every picture, and the report are those of one process without a kill."""
    model, clip = save_model(tmp_path / "model"), tmp_path / "clip"
    clip.mkdir()
    save_open_clip(clip)
    (tmp_path / "list.txt").write_text("".join(f"an owl with {number} feathers\n" for number in range(20)))
    argv = ["prompts", str(tmp_path / "list.txt"), "--model", model, "--per-prompt", "2", "--out", "run"]
    argv += ["--metrics", f"clip=local-dir:{clip}"]

    folder = tmp_path / "killed"
    process, counter = launch(folder, ["-m", "eval"], *argv), Counter(folder / "run")
    while process.poll() is None and counter.read() < 3:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 3 <= counter.read() < 40
    process = launch(folder, ["-m", "eval.launch", "--nproc", "2"], *argv)
    process.communicate()
    assert process.returncode == 0

    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert main(argv) == 0
    for name in ("manifest.jsonl", "report.json"):
        both = [(place / "run" / name).read_text() for place in (folder, tmp_path / "whole")]
        found, expected = (re.sub('"code": "[^"]*"', "", text) for text in both)  # a commit may fall between
        assert found == expected, name
    assert json.loads((folder / "run" / "report.json").read_text())["metrics"]["clip_cosine"]["values"]["A"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["drawbnech"], "unknown suite 'drawbnech'.*did you mean 'drawbench'"),  # which all processes meet
        (["prompts", "LIST", "--model", "MODEL", "--out", "."], "no run and not empty"),  # and one alone
    ],
)
def test_a_mistake_of_many_is_one_line(prompts, tmp_path, argv: list[str], message: str) -> None:
    places = {"LIST": prompts, "MODEL": save_model(tmp_path / "model")}
    argv = [places.get(word, word) for word in argv]
    process = launch(tmp_path, ["-m", "eval.launch", "--nproc", "2"], *argv)
    _, error = process.communicate(timeout=300)  # returns once no process has stderr open
    assert process.returncode == 2
    assert re.fullmatch(f"eval: .*{message}.*\n", error), error


@pytest.mark.parametrize(
    ("ending", "status"), [(None, 0), (2, 2), (-9, 137), (SignalException("stopped", 15), 143)]
)
def test_the_launcher_ends_as_the_first_process_that_failed(
    monkeypatch: pytest.MonkeyPatch, ending: object, status: int
) -> None:
    seen = []

    def run(arguments: list[str]) -> None:
        seen.append(arguments)
        if isinstance(ending, int):
            failure = ProcessFailure(local_rank=0, pid=1, exitcode=ending, error_file="none")
            raise ChildFailedError("eval", {0: failure})
        if isinstance(ending, BaseException):
            raise ending

    monkeypatch.setattr("torch.distributed.run.main", run)
    assert launcher(["--nproc", "3", "skills", "--out", "run"]) == status
    assert seen[0][-5:] == ["-m", "eval", "skills", "--out", "run"] and "3" in seen[0]


@pytest.mark.parametrize(
    ("argv", "message"), [(["skills"], "--nproc"), (["--nproc", "0", "skills"], "expected at least 1")]
)
def test_the_launcher_needs_a_number(argv: list[str], message: str, capsys) -> None:
    assert launcher(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("eval.launch: ") and message in error and error.count("\n") == 1


def test_a_process_that_meets_a_mistake_alone_says_so(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """After a while, for the first process to speak of the same."""
    waited = []
    monkeypatch.setattr("eval.__main__.RANK", 1)
    monkeypatch.setattr("eval.__main__.time.sleep", waited.append)
    assert main(["drawbnech"]) == 2
    assert capsys.readouterr().err.startswith("eval: process 1: unknown suite 'drawbnech'")
    assert waited == [GRACE_S]


def test_progress_counts_the_lines_of_all_processes(tmp_path) -> None:
    counter = Counter(tmp_path)
    assert counter.read() == 0
    (tmp_path / "manifest-0.jsonl").write_text("{}\n{}\n")
    (tmp_path / "manifest-1.jsonl").write_text("{}\n{")
    assert counter.read() == 3 and counter.read() == 3
    with (tmp_path / "manifest-1.jsonl").open("a") as file:
        file.write("}\n")
    assert counter.read() == 4


def test_a_long_prompt_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("cascade")
    for _ in range(2):
        with said_once():
            for prompt in ("an owl", "a jug", "an owl"):
                log.warning("prompt %r is too long", prompt)
    said = ["prompt 'an owl' is too long", "prompt 'a jug' is too long"]
    assert caplog.messages == [*said, *said]
