"""The loss of every stage over 20 steps, float32 on the CPU, against a file that was made when it was right.
`python -m tests.train.test_golden_training` writes that anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from train.__main__ import main
from train.recipe import ORDER

GOLDEN = Path(__file__).parents[1] / "golden" / "training_losses.json"
STEPS, BATCH = 20, 2


def curves(recipe_file: Path, folder: Path) -> dict[str, list[float]]:
    recipe: dict[str, Any] = yaml.safe_load(recipe_file.read_text())
    for stage in ORDER:
        train = {"images": STEPS * BATCH, "batch": BATCH, "log_images": BATCH, "save_images": 1000}
        recipe[stage]["train"] |= train
    path = folder / "golden.yaml"
    path.write_text(yaml.safe_dump(recipe))
    found = {}
    for stage in ORDER:
        assert main([str(path), "--stage", stage, "--out", str(folder)]) == 0
        lines = (folder / f"{stage}-training" / "log.jsonl").read_text().splitlines()
        found[stage] = [json.loads(line)["loss"] for line in lines]
    return found


def test_every_stage_follows_its_golden_curve(recipe_file: Path, tmp_path: Path) -> None:
    golden, found = json.loads(GOLDEN.read_text()), curves(recipe_file, tmp_path)
    assert golden.keys() == found.keys() == set(ORDER)
    for stage in ORDER:
        assert len(found[stage]) == STEPS
        assert found[stage] == pytest.approx(golden[stage], rel=1e-4), stage


def write() -> None:
    """Make the golden file, on the data and with the text encoder of the tests."""
    import tempfile

    from tests.train.conftest import make_records, tiny_recipe, write_data
    from tests.train.ranks import pretend

    pretend()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = tiny_recipe(write_data(folder / "data", make_records()), folder)
        (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
        found = curves(folder / "tiny.yaml", folder)
    GOLDEN.parent.mkdir(exist_ok=True)
    rounded = {stage: [float(f"{loss:.7g}") for loss in losses] for stage, losses in found.items()}
    GOLDEN.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    write()
