"""A disk that is full at any write: the old state stays and is named, in one line, and training goes on."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from cascade import checkpoint
from cascade.errors import InputError
from cascade.pretrained import source
from tests.train.test_state import FILES, Run, names, same
from train import state
from train.__main__ import main
from train.state import damaged, states

REASON = "No space left on device"
PAGE = 4096


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, REASON)


def full_for_tensors(*_: Any, **__: Any) -> Any:  # as safetensors 0.7 says it
    raise SafetensorError(f"Error while serializing: I/O error: {REASON} (os error {errno.ENOSPC})")


WRITERS: dict[str, tuple[list[Any], str, Callable[..., Any]]] = {
    ".safetensors": ([state, source], "save_file", full_for_tensors),
    ".json": ([state, checkpoint], "write_json", full),
    "flush": ([checkpoint], "_flush", full),
    "rename": ([os], "replace", full),
    "folder": ([checkpoint.tempfile], "mkdtemp", full),
}


def refuse(patch: pytest.MonkeyPatch, what: str, where: str = "", times: int = 1000) -> None:
    """No space for the file `what`, or for a flush, renaming or making of a folder, of a path with `where`;
    so many times."""
    left = times
    modules, function, error = WRITERS[what if what in WRITERS else Path(what).suffix]
    file = "" if what in WRITERS else what

    def patched(original: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(*arguments: Any, **more: Any) -> Any:
            nonlocal left
            paths = " ".join(str(a) for a in (*arguments, *more.values()) if isinstance(a, str | Path))
            refused = left > 0 and where in paths and paths.endswith(file)
            left -= refused
            return (error if refused else original)(*arguments, **more)

        return replaced

    for module in modules:
        patch.setattr(module, function, patched(getattr(module, function)))


STATE = [*FILES, "manifest.json", "flush", "rename", "folder"]


@pytest.mark.parametrize("what", STATE)
def test_a_state_without_space_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    run, other = Run(), Run(seed=1)
    run.steps()
    run.save(tmp_path, 8)
    before = run.save(tmp_path, 16)
    saved = {name: value.clone() for name, value in run.tensors().items()}
    run.steps()
    with monkeypatch.context() as patch:
        refuse(patch, what)
        with pytest.raises(InputError, match=f"^cannot write .*: {REASON}") as caught:
            run.save(tmp_path, 24)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["state-0000000008", "state-0000000016"]  # nothing is left of the other
    assert other.load(tmp_path) == (16, before, [])
    assert all((other.tensors()[name] == value).all() for name, value in saved.items())
    run.save(tmp_path, 24)
    assert other.load(tmp_path)[0] == 24 and same(run, other)


@pytest.mark.parametrize("what", STATE)
def test_nor_is_a_state_of_the_same_moment_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """One that exists is moved away for the new one, and comes back."""
    run, other = Run(), Run(seed=1)
    run.steps()
    folder = run.save(tmp_path, 8)
    saved = {path.name: path.read_bytes() for path in folder.iterdir()}
    run.steps()
    with monkeypatch.context() as patch:
        refuse(patch, what, ".new-" if what == "rename" else "")  # the second of two
        with pytest.raises(InputError, match=REASON):
            run.save(tmp_path, 8)
    assert names(tmp_path) == ["state-0000000008"] and other.load(tmp_path)[0] == 8
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == saved


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if os.name != "posix" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_real_disk_that_is_full_after_any_page(small_disk: Path) -> None:
    run, other, refused = Run(), Run(seed=1), 0
    run.steps()
    before = run.save(small_disk, 8)
    run.steps()
    for pages in range(1000):
        filler = small_disk / "filler"
        with filler.open("wb") as file:
            free = os.statvfs(small_disk).f_bavail - pages
            os.posix_fallocate(file.fileno(), 0, free * PAGE)
        try:
            run.save(small_disk, 16)
            break
        except InputError as error:
            assert re.fullmatch(f"cannot write .*: {REASON}(; what was there before stays)?", str(error))
            refused += 1
        assert names(small_disk) == ["filler", "state-0000000008"]
        assert other.load(small_disk) == (8, before, [])
        filler.unlink()
    assert refused >= len(FILES) and other.load(small_disk)[0] == 16 and same(run, other)


# -- in training ---------------------------------------------------------------------------------------------

WEIGHTS = "diffusion_pytorch_model.safetensors"
AT = {  # what cannot be written, and in the making of which folder
    "network.safetensors": "state-0000000016",
    "manifest.json": "state-0000000016",
    "rename": "state-0000000016",
    WEIGHTS: ".sr256.new",
    "config.json": ".sr256.new",
}


def argv(recipe_file: Path, out: Path) -> list[str]:
    return [str(recipe_file), "--stage", "sr256", "--out", str(out), "--set", "sr256.train.grid_images=16"]


def told(text: str) -> list[str]:
    return [line for line in text.splitlines() if REASON in line]


def logged(out: Path) -> list[int]:
    lines = (out / "sr256-training" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["images"] for line in lines]


@pytest.mark.parametrize("what", AT)
def test_training_goes_on_after_a_save_without_space(
    recipe_file: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    with monkeypatch.context() as patch:
        refuse(patch, what, AT[what], times=1)
        assert main(argv(recipe_file, tmp_path)) == 0
    (line,) = told(capsys.readouterr().out)
    assert line.startswith("cannot write ") and line.endswith("; what was there before stays")
    folder = tmp_path / "sr256-training"
    expected = ["state-0000000008", "state-0000000016"] if "sr256" in AT[what] else ["state-0000000008"]
    assert [path.name for path in states(folder)] == [*expected, "state-0000000024"][-2:]
    assert all(damaged(path, list(FILES[:4])) is None for path in states(folder))
    assert logged(tmp_path) == [8, 16, 24]
    assert (tmp_path / "sr256" / WEIGHTS).read_bytes() == (trained / "sr256" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("what", ["log.jsonl", "grid"])
def test_nor_does_a_record_without_space_end_it(
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    """Of a line that was written by half nothing stays."""
    refused = 0
    original = Path.open

    class Half:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Half:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, text: str) -> None:
            self.file.write(text[: len(text) // 2])
            full()

    def opened(self: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        nonlocal refused
        file = original(self, mode, *arguments, **more)
        log = what == "log.jsonl" and (self.name, mode) == (what, "a") and logged(tmp_path) == [8]
        if refused or not (log or (what == "grid" and mode == "xb")):
            return file
        refused += 1
        return Half(file)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        assert main(argv(recipe_file, tmp_path)) == 0
    assert refused == 1 and len(told(capsys.readouterr().out)) == 1
    assert logged(tmp_path) == ([8, 24] if what == "log.jsonl" else [8, 16, 24])
    grids = [path.name for path in (tmp_path / "sr256-training").glob("*grid-*")]
    assert sorted(grids) == ["grid-0000000016.png", "grid-0000000024.png"][what == "grid" :]


def test_a_disk_that_stays_full_ends_it_with_one_line_and_it_is_resumed(
    recipe_file: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        refuse(patch, "network.safetensors", "state-0000000016")
        refuse(patch, "network.safetensors", "state-0000000024")
        assert main(argv(recipe_file, tmp_path)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("train: cannot write ")
    assert len(told(captured.out)) == 1  # of the state before the last
    assert [path.name for path in states(tmp_path / "sr256-training")] == ["state-0000000008"]
    assert main(argv(recipe_file, tmp_path)) == 0
    assert "resumed from state-0000000008" in capsys.readouterr().out
    assert (tmp_path / "sr256" / WEIGHTS).read_bytes() == (trained / "sr256" / WEIGHTS).read_bytes()
