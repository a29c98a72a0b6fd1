"""`python -m eval`: the whole in one command, one line for every mistake, and kills of real processes."""

from __future__ import annotations

import json
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

from cascade import Cascade
from cascade.text import load_text_encoder
from eval.__main__ import main
from eval.evaluate import Request, draw_run
from eval.progress import Counter
from eval.run import read_run
from eval.suites import load_suite
from tests.conftest import tiny_stage

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


# -- kills ---------------------------------------------------------------------------------------------------


def test_a_killed_command_is_taken_up_by_two_processes(own_process_state, tmp_path) -> None:
    """SIGKILL in the middle of a real command; the rest is drawn by two processes. The manifest, which holds
    the hash of every picture, is that of a run without a kill."""
    torch.manual_seed(0)
    stage = tiny_stage("base", 16, text_dims=(384,), image_embed_dim=None)
    Cascade([stage], load_text_encoder({"kind": "minilm"})).save_pretrained(tmp_path / "model")
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"an owl with {number} feathers\n" for number in range(20)))
    argv = ["prompts", str(listed), "--model", str(tmp_path / "model"), "--per-prompt", "2", "--draw-only"]
    command = ["-m", "eval", *argv, "--out", str(tmp_path / "run")]
    counter = Counter(tmp_path / "run")

    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    while process.poll() is None and counter.read() < 3:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 3 <= counter.read() < 40

    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, *command], cwd=ROOT, env=environment, check=True)

    suite = load_suite("prompts", str(listed))
    whole = draw_run(
        Request(out=tmp_path / "whole", suite=suite, model=str(tmp_path / "model"), per_prompt=2)
    )
    assert whole is not None and read_run(tmp_path / "run").items == whole.items


def test_progress_counts_the_lines_of_all_processes(tmp_path) -> None:
    counter = Counter(tmp_path)
    assert counter.read() == 0
    (tmp_path / "manifest-0.jsonl").write_text("{}\n{}\n")
    (tmp_path / "manifest-1.jsonl").write_text("{}\n{")
    assert counter.read() == 3 and counter.read() == 3
    with (tmp_path / "manifest-1.jsonl").open("a") as file:
        file.write("}\n")
    assert counter.read() == 4
