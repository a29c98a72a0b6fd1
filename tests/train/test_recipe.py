"""Recipes: the one that ships, settings on top, and everything that is refused with one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cascade.errors import InputError
from cascade.nn.unet import UNet
from tests.train.conftest import tiny_recipe
from train.recipe import ORDER, Recipe, load_recipe

Tiny = Callable[..., Recipe]


def test_the_shipped_recipe_is_read_by_its_name() -> None:
    recipe = load_recipe("emoji")
    assert recipe.name == "emoji"
    for stage in ORDER:
        assert recipe.of(stage).train.images > 0
    for part in (recipe.base, recipe.sr256, recipe.sr1024):
        side = part.train.crop_px or part.stage.image_px
        assert side % UNet(part.stage.unet).size_multiple == 0


def test_settings_go_on_top(tiny: Tiny) -> None:
    recipe = tiny("base.train.lr=3e-4", "base.stage.sampling.guidance=2", "data.styles=[noto]")
    assert recipe.base.train.lr == 3e-4
    assert recipe.base.stage.sampling.guidance == 2.0
    assert recipe.data.styles == ("noto",)
    assert recipe.sr256 == tiny().sr256


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("base.trian.lr=1", r"unknown key 'trian' in recipe.base: .*did you mean 'train'\?"),
        ("base.train.learning_rat=1", "unknown key 'learning_rat' in recipe.base.train"),
        ("clip.model.embed_dims=8", "did you mean 'embed_dim'"),
        ("base.train.lr", "expected NAME=VALUE"),
        ("base.train.lr=[1,", "setting 'base.train.lr=.1,': not valid YAML .while parsing"),
        ("base.train.lr=2020-13-45", "setting 'base.train.lr=2020-13-45': not valid YAML .month"),
        ("base.train.lr=fast", "recipe.base.train.lr: expected a number"),
        ("base.train.lr=nan", "recipe.base.train.lr: expected a number"),
        ("base.train.lr=0", "recipe.base.train: lr 0.0: expected a number above 0"),
        ("base.train.images=0", "images 0: expected an integer of at least 1"),
        ("base.train.save_images=0", "save_images 0: expected an integer of at least 1"),
        ("base.train.workers=-1", "workers -1: expected an integer of at least 0"),
        ("base.train.ema=1.5", "ema 1.5: expected a number from 0 to 1"),
        ("base.train.text_drop=-0.1", "text_drop -0.1: expected a number from 0 to 1"),
        ("base.train.betas=[0.9, 1.0]", "betas .0.9, 1.0.: expected numbers"),
        ("base.train.precision=fp8", "unknown value 'fp8' in recipe.base.train.precision"),
        ("sr1024.train.batch=7", "batch 7: expected a multiple of crops_per_picture, 2"),
        ("sr1024.train.crop_px=33", "recipe.sr1024.train.crop_px 33: expected a multiple of"),
        ("sr1024.train.crop_px=128", "recipe.sr1024.train.crop_px 128: expected .* at most image_px 64"),
        ("base.stage.unet.image_embed_dim=8", "image_embed_dim 8: expected clip.model.embed_dim, 16"),
        ("prior.model.embed_dim=8", "recipe.prior.model.embed_dim 8: expected clip.model.embed_dim, 16"),
        ("base.stage.name=bass", "recipe.base.stage.name 'bass': expected 'base'"),
        ("base.stage.image_px=17", "image_px 17: expected a multiple of patch x strides, 2"),
        ("base.stage.image_px=8", "recipe.sr256.stage.lowres_px 16: expected image_px of base, 8"),
        ("base.stage.lowres_px=8", "recipe.base.stage.lowres_px 8: expected null in the first stage"),
        ("sr256.stage.lowres_px=null", "recipe.sr256.stage.lowres_px None: expected image_px of base, 16"),
        ("sr256.stage.image_px=40", "recipe.sr256.stage.image_px 40: expected a multiple of lowres_px, 16"),
        ("sr256.stage.augment=null", "recipe.sr256.stage.augment None: expected a mapping"),
        ("sr256.stage.unet.lowres_channels=0", "lowres_channels 0: expected 3 in this stage"),
        ("clip.train.guess_batch=8", "recipe.clip.train.guess_batch 8: expected 0, for guess_width 0"),
        ("base.train.guess_batch=8", "recipe.base.train.guess_batch 8: expected 0, for guess_width 0"),
        (
            "prior.model.guess_width=8",
            "prior.train.guess_batch 0: expected a multiple of batch, 8, for guess",
        ),
        ("sr256.train.image_blend=0.5", "recipe.sr256.train.image_blend 0.5: expected 0, or texts, image"),
        ("sr256.train.vary=0.5", "recipe.sr256.train.vary 0.5: expected 0, or whole pictures, image embeddi"),
        ("base.stage.unet.blocks=[1]", "unet.blocks has 1 entries, channels has 2"),
        ("base.stage.sampling.steps=0", "stage base.steps: expected an integer from 1"),
        ("data.styles=[]", "recipe.data: styles .*: expected at least one"),
        ("data.styles=[noto, noto]", "expected at least one, each once"),
        ("data.toned_period=0", "recipe.data: toned_period 0: expected"),
        ("data.caption_weights=[0, 0, 0, 0]", "recipe.data: caption_weights"),
        ("data.caption_weights=[1, -1, 1, 0]", "recipe.data: caption_weights"),
        ("grid_prompts=[]", "recipe: grid_prompts is empty"),
    ],
)
def test_bad_settings_are_refused_with_one_line(tiny: Tiny, setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        tiny(setting)
    assert "\n" not in str(caught.value)


def test_variants_are_of_whole_pictures(tiny: Tiny) -> None:
    assert tiny("base.train.vary=0.5").train_of("base").vary == 0.5
    with pytest.raises(InputError, match="recipe.base.train.vary 0.5: expected 0, or whole pictures"):
        tiny("base.train.vary=0.5", "base.train.crop_px=8")


def test_a_multiple_of_the_lowres_grid_is_asked_of_crops(tiny: Tiny) -> None:
    """A U-Net that would take the crop is not enough: its low-resolution picture must lie on whole pixels."""
    with pytest.raises(InputError, match="crop_px 34: expected a multiple of 4"):
        tiny(
            "sr256.stage.image_px=64",
            "sr256.train.crop_px=34",
            "sr1024.stage.lowres_px=64",
            "sr1024.stage.image_px=128",
        )


def test_a_setting_changes_one_place_also_where_yaml_shares_it(tmp_path: Path) -> None:
    text = yaml.safe_dump(tiny_recipe(tmp_path, tmp_path))
    assert "*id" in text  # the stages' training settings are written once
    (tmp_path / "r.yaml").write_text(text)
    recipe = load_recipe(str(tmp_path / "r.yaml"), ["base.train.lr=0.5"])
    assert recipe.base.train.lr == 0.5 and recipe.sr256.train.lr == 1e-3


def test_unknown_names_get_the_nearest(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown recipe 'emojy': .*did you mean 'emoji'"):
        load_recipe("emojy")
    with pytest.raises(InputError, match="unknown stage 'sr265': .*did you mean 'sr256'"):
        tiny().of("sr265")
    with pytest.raises(InputError, match="cannot read .*absent.yaml"):
        load_recipe(str(tmp_path / "absent.yaml"))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    data = tiny_recipe(tmp_path, tmp_path)
    del data["base"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(InputError, match="recipe: missing key 'base'"):
        load_recipe(str(tmp_path / "r.yaml"))
