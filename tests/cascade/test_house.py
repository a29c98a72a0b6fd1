"""The rules of the house that an import statement can break (shared design, section 1)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = ["cascade", "prior", "eval", "train"]  # each may import itself and those before it
ROOMS = {  # foreign package -> where alone it may be imported
    "transformers": ["cascade/text", "eval/extractors"],
    "open_clip": ["cascade/text", "prior", "eval"],
    "datasets": ["train", "eval"],
    "accelerate": ["train", "eval"],
}
TRAIN_FROM_EVAL = "eval.metrics"  # pure metrics are all that train may take from eval
ORDER = [  # inside cascade: a module imports none that stands after it
    ["errors", "random", "conditioning"],
    ["config", "arguments"],
    ["diffusion", "nn", "images"],
    ["adapter", "augment", "text", "checkpoint", "hardware"],
    ["stage"],
    ["request"],
    ["pipeline"],
    ["cli"],
]
COMMAND_LINE = ("cascade/arguments.py", "cascade/cli.py")
SOURCES = sorted(p for floor in FLOORS for p in (ROOT / floor).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            module = node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def violations(path: str, source: str) -> list[str]:
    """What `source`, standing at `path` (relative to the root), imports against the rules."""
    floor = path.split("/")[0]
    above = FLOORS[FLOORS.index(floor) + 1 :]
    found = []
    for name in imports(ast.parse(source)):
        package = name.split(".")[0]
        if package in above or package == "tests":
            found.append(f"{path} imports {name}, a floor above")
        if floor == "train" and package == "eval" and name != "eval" and not name.startswith(TRAIN_FROM_EVAL):
            found.append(f"{path} imports {name}: train may take {TRAIN_FROM_EVAL} alone from eval")
        rooms = ROOMS.get(package)
        if rooms is not None and not any(path.startswith(f"{room}/") for room in rooms):
            found.append(f"{path} imports {package}, which belongs in {', '.join(rooms)}")
        if floor == "cascade" and package == "argparse" and path not in COMMAND_LINE:
            found.append(f"{path} imports argparse, which belongs in {' and '.join(COMMAND_LINE)}")
        if floor == "cascade" and package == "cascade" and 0 <= rank(path) < rank(name.replace(".", "/")):
            found.append(f"{path} imports {name}, which stands above it")
    if floor == "cascade":
        found += nn_knows_no_schedule(path, source)
    return found


def rank(path: str) -> int:
    """Place of a module of cascade in ORDER; -1 for one that is not listed, and for the package itself."""
    parts = path.removesuffix(".py").split("/")
    return next((i for i, level in enumerate(ORDER) if parts[1:2] and parts[1] in level), -1)


def nn_knows_no_schedule(path: str, source: str) -> list[str]:
    """Networks and diffusion maths do not import each other, but both may read config."""
    rooms = {"cascade/nn/": "cascade.diffusion", "cascade/diffusion/": "cascade.nn"}
    other = next((room for start, room in rooms.items() if path.startswith(start)), None)
    return [f"{path} imports {n}" for n in imports(ast.parse(source)) if other and n.startswith(other)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_keep_the_rules(path: Path) -> None:
    assert violations(path.relative_to(ROOT).as_posix(), path.read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cascade/stage.py", "from prior import CLIP"),
        ("cascade/stage.py", "def f():\n    import prior.clip"),
        ("prior/clip.py", "import eval.metrics"),
        ("prior/clip.py", "import accelerate"),
        ("eval/run.py", "from train import loop"),
        ("train/loop.py", "from eval.report import page"),
        ("cascade/pipeline.py", "import transformers"),
        ("cascade/nn/unet.py", "from open_clip import x"),
        ("cascade/text/t5.py", "import datasets"),
        ("cascade/stage.py", "import argparse"),
        ("cascade/nn/unet.py", "from cascade.diffusion import make_schedule"),
        ("cascade/diffusion/denoiser.py", "from cascade.nn.unet import UNet"),
        ("cascade/stage.py", "from cascade.pipeline import Cascade"),
        ("train/loop.py", "from tests import conftest"),
    ],
)
def test_the_rules_bite(path: str, source: str) -> None:
    assert len(violations(path, source)) > 0


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("prior/clip.py", "import open_clip\nfrom cascade.stage import Stage"),
        ("cascade/text/t5.py", "import transformers, open_clip"),
        ("train/loop.py", "import accelerate, datasets\nfrom eval.metrics import fid\nimport prior"),
        ("cascade/cli.py", "import argparse\nfrom cascade.pipeline import Cascade"),
        ("cascade/stage.py", "from cascade import random\nfrom cascade.nn.unet import UNet"),
    ],
)
def test_the_rules_allow_what_they_should(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_importing_does_no_work() -> None:
    """No encoder library and no network, and with torch there already, next to no time."""
    code = (
        "import sys, socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import cascade\n"
        "assert 'torch' not in sys.modules, 'import cascade pulls in torch'\n"
        "cascade.Cascade, cascade.Stage, cascade.TextEmbedding, cascade.Conditioning, cascade.InputError\n"
        "bad = {'transformers', 'open_clip', 'datasets', 'accelerate', 'prior', 'huggingface_hub'}\n"
        "bad &= set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_a_model_is_loaded_without_the_compiler() -> None:
    """On the meta device a plain product makes torch import its compiler, for a second: initial values are
    scaled in place."""
    load = "import sys; from cascade import Cascade; Cascade.from_pretrained()"
    command = [sys.executable, "-c", f"{load}; print('torch._dynamo' in sys.modules)"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False"]
