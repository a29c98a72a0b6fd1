"""The recipes that ship: each loads, fits together, and costs what its comments say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from cascade.checkpoint import load_component
from cascade.config import to_dict
from cascade.errors import InputError
from cascade.nn.presets import IMAGEN_BASE_2B, IMAGEN_SR_400M, IMAGEN_SR_600M
from cascade.nn.unet import UNet
from prior.diffusion import PriorNet
from train.optim import MOMENT_BYTES
from train.plan import make_plan
from train.recipe import RECIPES, Recipe, StageRecipe, load_recipe, merge
from train.tasks import make_task

Tiny = Callable[..., Recipe]
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
H100 = 0.4 * 989e12  # FLOP/s: what the comments assume
ROW = re.compile(
    r"^#   (?P<stage>\w+) +(?P<parameters>\d+)M +(?P<gflop>\d+) +(?P<state>[\d.]+) "
    r"+(?P<activations>\d+) +(?P<rate>\d+)$",
    re.M,
)


def rows(name: str) -> list[dict[str, str]]:
    return [match.groupdict() for match in ROW.finditer((RECIPES / f"{name}.yaml").read_text())]


def test_the_recipes_are_those_promised() -> None:
    assert set(NAMES) >= {"emoji", "finetune", "imagen-64m", "imagen-400m", "imagen-2b", "unclip"}


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads_and_says_so_again(name: str, tmp_path: Path) -> None:
    """What stands beside the checkpoints is read back as the same recipe."""
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.stages
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(to_dict(recipe)))
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


COSTS = [(name, row) for name in NAMES for row in rows(name)]
FIRST = [(name, rows(name)[0]) for name in NAMES if rows(name)]  # a plan takes seconds


@pytest.mark.parametrize(("name", "row"), COSTS, ids=[f"{name}-{row['stage']}" for name, row in COSTS])
def test_sizes_are_those_in_the_comments(name: str, row: dict[str, str]) -> None:
    part = load_recipe(name).of(row["stage"])
    with torch.device("meta"):
        network = UNet(part.stage.unet) if isinstance(part, StageRecipe) else PriorNet(part.model)  # type: ignore[union-attr, arg-type]
    parameters = sum(p.numel() for p in network.parameters())
    assert float(row["parameters"]) == round(parameters / 1e6)
    each = 12 + MOMENT_BYTES[part.train.optimizer]  # weights, gradients, average, moments
    assert float(row["state"]) == pytest.approx(each * parameters / 2**30, abs=0.051)


@pytest.mark.parametrize(("name", "row"), FIRST, ids=[name for name, _ in FIRST])
def test_costs_are_those_in_the_comments(name: str, row: dict[str, str]) -> None:
    """Planned without the memory that the network would take."""
    recipe, stage = load_recipe(name), row["stage"]
    plan = make_plan(recipe, stage)
    passes = 4 if recipe.train_of(stage).gradient_checkpointing else 3
    assert float(row["gflop"]) == round(plan.flops / 1e9)
    # what an operation keeps differs a little between versions of torch
    assert float(row["activations"]) == pytest.approx(plan.activations / 2**20, rel=0.03, abs=0.5)
    assert float(row["rate"]) == pytest.approx(H100 / (passes * plan.flops), rel=0.001, abs=0.5)


def test_every_stage_of_the_large_recipes_has_its_cost_there() -> None:
    for name in ("imagen-64m", "imagen-400m", "imagen-2b", "unclip"):
        assert tuple(row["stage"] for row in rows(name)) == load_recipe(name).stages


def test_imagen_is_the_paper() -> None:
    """Appendix F and section 4.1."""
    recipe = load_recipe("imagen-2b")
    presets = {"base": IMAGEN_BASE_2B, "sr256": IMAGEN_SR_600M, "sr1024": IMAGEN_SR_400M}
    for name, part in recipe.pictures.items():
        assert part.stage == presets[name]
        train = part.train
        assert (train.batch, train.images / train.batch, train.warmup_images / train.batch) == (
            2048, 2.5e6, 10_000,
        )  # fmt: skip
        assert (train.lr, train.betas, train.weight_decay, train.text_drop) == (1e-4, (0.9, 0.999), 0, 0.1)
        assert train.optimizer == ("adafactor" if name == "base" else "adamw")
    assert recipe.sr1024 is not None and recipe.sr1024.train.crop_px == 256


def test_unclip_is_the_paper() -> None:
    """Table 3 and appendix C."""
    recipe = load_recipe("unclip")
    assert recipe.stages == ("prior", "base", "sr256", "sr1024")
    steps = {name: recipe.train_of(name).images / recipe.train_of(name).batch for name in recipe.stages}
    assert steps == {"prior": 600e3, "base": 800e3, "sr256": 1e6, "sr1024": 1e6}
    assert [recipe.train_of(name).batch for name in recipe.stages] == [4096, 2048, 1024, 512]
    assert [recipe.train_of(name).lr for name in recipe.stages] == [1.1e-4, 1.2e-4, 1.2e-4, 1.0e-4]
    prior = recipe.train_of("prior")
    assert (prior.betas, prior.eps, prior.weight_decay) == ((0.9, 0.96), 1e-6, 6e-2)
    assert recipe.base.stage.diffusion.learned_variance and recipe.base.stage.unet.out_channels == 6
    assert (recipe.base.train.text_drop, recipe.base.train.image_drop) == (0.5, 0.1)


def test_a_stage_with_learned_variance_trains_by_the_hybrid_loss(tiny: Tiny, tmp_path: Path) -> None:
    """The variance half of the output gets a gradient; without the setting six channels are refused."""
    settings = ["sr256.stage.unet.out_channels=6", "sr256.stage.diffusion.learned_variance=true"]
    discrete = "sr256.stage.diffusion.schedule.name=discrete_cosine"
    task = make_task(tiny(*settings, discrete), tmp_path, "sr256")
    task(task.make([0, 1], [0, 1])).mean().backward()
    grad = task.network.get_parameter("conv_out.bias").grad
    assert grad is not None and grad[:3].abs().min() > 0 and grad[3:].abs().min() > 0
    with pytest.raises(InputError, match="out_channels 6: expected 3, as diffusion.learned_variance says"):
        tiny(settings[0])


def test_the_recipe_for_ones_own_pictures_is_short_and_fits_the_default() -> None:
    text = (RECIPES / "finetune.yaml").read_text()
    assert len(text.splitlines()) < 10
    recipe, model = load_recipe("finetune"), Path(__file__).parents[2] / "cascade" / "models" / "emoji"
    assert recipe.data.name == "folder" and recipe.data.styles == load_recipe("emoji").data.styles
    for name in recipe.stages:
        train = recipe.train_of(name)
        assert train.init_from is not None and Path(train.init_from).parts == model.parts[-3:]
    for name, part in recipe.pictures.items():
        assert (
            load_component(model / name, "Stage").config["unet"].items() <= to_dict(part.stage.unet).items()
        )


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: emoji\nname: mine\ndata: {name: folder, folder: x}\nbase: {train: {lr: 3.0e-4}}\n"
    )
    mine, emoji = load_recipe(str(path)), load_recipe("emoji")
    assert mine.base.train.lr == 3e-4 and mine.base.stage == emoji.base.stage
    assert mine.sr256 == emoji.sr256
    assert mine.data.toned_period != emoji.data.toned_period  # nothing of another kind of data is left
    path.write_text(f"extends: {path}\n")
    with pytest.raises(InputError, match="expected the name of a recipe that does not extend it"):
        load_recipe(str(path))
    path.write_text("extends: emojy\n")
    with pytest.raises(InputError, match="unknown recipe 'emojy': .*did you mean 'emoji'"):
        load_recipe(str(path))


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(
        InputError, match="unknown preset 'imagen-base-3b' in recipe.base.stage: .*'imagen-base-2b'"
    ):
        load_recipe("imagen-2b", ["base.stage.preset=imagen-base-3b"])


def test_merge() -> None:
    below = {"a": {"x": 1, "y": [1, 2]}, "data": {"kind": "old", "left": 1}}
    above = {"a": {"y": [3], "z": 4}, "data": {"kind": "new"}, "b": 5}
    assert merge(below, above, ("data",)) == {
        "a": {"x": 1, "y": [3], "z": 4}, "data": {"kind": "new"}, "b": 5,
    }  # fmt: skip
    assert below["a"] == {"x": 1, "y": [1, 2]}


def test_recipes_without_some_stages() -> None:
    recipe = load_recipe("imagen-64m")
    assert recipe.stages == ("base", "sr256", "sr1024") and recipe.clip is None
    with pytest.raises(InputError, match="unknown stage 'clip': expected one of base, sr256, sr1024"):
        recipe.of("clip")
    with pytest.raises(InputError, match="recipe: sr1024 without sr256: expected the stage below it"):
        load_recipe("imagen-64m", ["sr256=null"])
    with pytest.raises(InputError, match="recipe: missing key 'clip', whose embeddings"):
        load_recipe("unclip", ["clip=null"])
    with pytest.raises(InputError, match="recipe.clip: expected either train or pretrained"):
        load_recipe("unclip", ["clip.pretrained=null"])
