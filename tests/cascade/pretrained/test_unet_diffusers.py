"""Networks of diffusers folders: the same pictures, the same tensors back, and what is refused."""

from __future__ import annotations

import importlib
import inspect
import json
import random
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cascade.conditioning import Conditioning
from cascade.config import UNetConfig
from cascade.errors import InputError
from cascade.nn.presets import IF_I_XL
from cascade.nn.unet import UNet
from cascade.pretrained.unet import (
    config_to_diffusers,
    tensors_from_diffusers,
    tensors_to_diffusers,
    unet_from_diffusers,
)
from cascade.pretrained.unet_keys import ConditionModel, PlainModel, TextProjection
from tests.cascade.pretrained.unets import (
    assert_same,
    conditioning,
    picture,
    randomise,
    some_mask,
    states,
)

diffusers = pytest.importorskip("diffusers")
FAMILIES = ["if I", "if II", "karlo decoder", "karlo sr", "any"]
SEEDS = range(10)
CLIP = 24


def text_projection(**config: Any) -> nn.Module:
    module = importlib.import_module("diffusers.pipelines.deprecated.unclip.text_proj")
    return module.UnCLIPTextProjModel(**config)


def random_config(family: str, rng: random.Random) -> dict[str, Any]:
    """A network of random depth, widths, head sizes, attention levels and conditions."""
    levels = rng.choice([1, 2, 2, 3])
    attends = [rng.random() < 0.6 and family != "karlo sr" for _ in range(levels)]
    widths = sorted(rng.choice([32, 64, 96]) for _ in range(levels))
    config: dict[str, Any] = dict(
        in_channels=3,
        out_channels=6,
        block_out_channels=widths,
        layers_per_block=rng.choice([1, 2]),
        down_block_types=["SimpleCrossAttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends],
        up_block_types=["SimpleCrossAttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in attends[::-1]],
        resnet_time_scale_shift=rng.choice(["scale_shift", "scale_shift", "default"]),
        norm_num_groups=rng.choice([8, 16, 32]),
    )
    if family == "karlo sr":
        return config | dict(in_channels=6, out_channels=3, add_attention=False)
    config |= dict(
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        attention_head_dim=rng.choice([8, 16, 32]),
        cross_attention_dim=rng.choice([32, 64]),
    )
    if family == "karlo decoder":
        return config | dict(class_embed_type="identity")
    if family == "any":
        return config | random_conditions(config, rng)
    config |= dict(
        act_fn="gelu",
        encoder_hid_dim=24,
        cross_attention_norm="group_norm",
        addition_embed_type="text",
        addition_embed_type_num_heads=rng.choice([2, 4, 8]),
    )
    if family == "if II":
        config |= dict(
            in_channels=6,
            class_embed_type="timestep",
            layers_per_block=[rng.choice([1, 2]) for _ in widths],
            time_embedding_act_fn="gelu",
            resnet_skip_time_act=True,
            resnet_out_scale_factor=1 / 0.7071,
            mid_block_scale_factor=1 / 0.7071,
            only_cross_attention=rng.random() < 0.7,
            time_embedding_dim=widths[-1],
        )
    return config


def random_conditions(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """What no published network combines, but the classes allow."""
    levels, act = len(config["block_out_channels"]), rng.choice(["silu", "swish", "mish", "relu"])
    middle = ["UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D", None]
    embeds = [{}, dict(class_embed_type="simple_projection"), dict(class_embed_type="projection")]
    return dict(
        act_fn=act,
        conv_in_kernel=rng.choice([1, 3, 5]),
        mid_block_type=rng.choice(middle if "Simple" in config["down_block_types"][0] else middle[:1]),
        only_cross_attention=[rng.random() < 0.5 for _ in range(levels)],
        mid_block_only_cross_attention=rng.choice([True, False, None]),
        attention_head_dim=[(head := rng.choice([8, 16, 32])), *[16] * (levels - 2), head][:levels],
        cross_attention_norm=rng.choice([None, "group_norm"]),
        resnet_out_scale_factor=(factor := rng.choice([1.0, 2.0])),
        mid_block_scale_factor=factor,
        dropout=0.1,
        projection_class_embeddings_input_dim=CLIP,
        **rng.choice(embeds),
        **rng.choice(
            [{}, dict(encoder_hid_dim=24, addition_embed_type="text", addition_embed_type_num_heads=4)]
        ),
    )


def reference(family: str, seed: int) -> tuple[nn.Module, nn.Module | None]:
    """A network of diffusers with random weights, and the text_proj beside Karlo's decoder."""
    rng = random.Random(f"{family} {seed}")
    config = random_config(family, rng)
    cls = diffusers.UNet2DModel if family == "karlo sr" else diffusers.UNet2DConditionModel
    net, beside = cls(**config).eval(), None
    if family == "karlo decoder":
        beside = text_projection(
            clip_extra_context_tokens=rng.choice([2, 4]),
            clip_embeddings_dim=CLIP,
            time_embed_dim=4 * config["block_out_channels"][0],
            cross_attention_dim=config["cross_attention_dim"],
        ).eval()
        randomise(beside, seed)
    randomise(net, seed)
    return net, beside


def read(net: nn.Module, beside: nn.Module | None) -> tuple[UNetConfig, dict[str, Tensor]]:
    configs = [None if n is None else json.loads(n.to_json_string()) for n in (net, beside)]
    cfg = unet_from_diffusers(*configs)
    return cfg, tensors_from_diffusers(net.state_dict(), cfg, None if beside is None else beside.state_dict())


def draw(net: nn.Module, beside: nn.Module | None, seed: int) -> tuple[Tensor, Tensor, Conditioning]:
    """What diffusers draws, and x and conditions for ours (at noise levels 7 and 993)."""
    rng, config = random.Random(seed), net.config
    x, time = picture(rng, 2, 3), torch.tensor([7, 993])
    ours: dict[str, Any] = {}
    if config.in_channels == 6:
        ours = dict(lowres=picture(rng, 2, 3), aug_level=torch.tensor([0.25, 0.5]))
    full = torch.cat([x, *([ours["lowres"]] if ours else [])], 1)
    if "UNet2DModel" in type(net).__name__:
        return net(full, time).sample, x, Conditioning(**ours)
    if beside is not None:
        tokens, mask = states(rng, 2, CLIP), some_mask(2)
        image, pooled = tokens[:, 1], tokens[:, 0].flip(1)
        context, vector = beside(
            image_embeddings=image,
            prompt_embeds=pooled,
            text_encoder_hidden_states=tokens,
            do_classifier_free_guidance=False,
        )
        extra = mask.new_ones(2, beside.config.clip_extra_context_tokens)
        out = net(full, time, context, class_labels=vector, attention_mask=torch.cat([extra, mask], 1)).sample
        return out, x, conditioning(tokens, mask, pooled, image_embed=image)
    tokens, labels = states(rng, 2, config.encoder_hid_dim or config.cross_attention_dim), None
    if config.class_embed_type == "timestep":
        labels = 1000 * ours["aug_level"]
    elif config.class_embed_type is not None:
        labels = tokens.flatten(1)[:, :CLIP]
        ours |= dict(image_embed=labels)
    out = net(full, time, tokens, class_labels=labels).sample
    return out, x, conditioning(tokens, some_mask(2), **ours)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_draws_what_diffusers_draws(family: str, seed: int) -> None:
    net, beside = reference(family, seed)
    cfg, tensors = read(net, beside)
    ours = UNet(cfg).eval()
    ours.load_state_dict(tensors)
    with torch.no_grad():
        theirs, x, cond = draw(net, beside, seed)
        assert_same(ours(x, torch.tensor([7.0, 993.0]), cond), theirs)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_goes_through_diffusers_and_back(family: str, seed: int, tmp_path: Path) -> None:
    """Ours, a diffusers folder, diffusers, ours: identical tensors and configuration, the same pictures."""
    net, beside = reference(family, seed)
    cfg, tensors = read(net, beside)
    configs, written = config_to_diffusers(cfg, image_px=64), tensors_to_diffusers(tensors, cfg)
    assert configs.keys() == written.keys()
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_file(
            {k: t.contiguous() for k, t in written[name].items()},
            tmp_path / name / "diffusion_pytorch_model.safetensors",
        )
    again = type(net).from_pretrained(tmp_path / "unet").eval()
    beside_again = None if beside is None else type(beside).from_pretrained(tmp_path / "text_proj").eval()
    read_again = read(again, beside_again)
    assert read_again[0] == cfg
    assert all(torch.equal(read_again[1][name], t) for name, t in tensors.items())
    with torch.no_grad():
        expected = draw(net, beside, seed)[0]
        torch.testing.assert_close(draw(again, beside_again, seed)[0], expected, atol=1e-6, rtol=1e-6)


XL = dict(
    _class_name="UNet2DConditionModel",
    _diffusers_version="0.16.0.dev0",
    sample_size=64,
    in_channels=3,
    out_channels=6,
    block_out_channels=[704, 1408, 2112, 2816],
    layers_per_block=3,
    down_block_types=["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3],
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    up_block_types=[*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
    resnet_time_scale_shift="scale_shift",
    act_fn="gelu",
    attention_head_dim=64,
    cross_attention_dim=2816,
    cross_attention_norm="group_norm",
    encoder_hid_dim=4096,
    encoder_hid_dim_type="text_proj",
    addition_embed_type="text",
    addition_embed_type_num_heads=64,
)


def test_if_i_xl_is_its_preset_and_has_its_parameters() -> None:
    cfg = unet_from_diffusers(XL)
    assert cfg == IF_I_XL.unet
    with torch.device("meta"):
        net = UNet(cfg)
        theirs = diffusers.UNet2DConditionModel.from_config(XL)
    assert sum(p.numel() for p in net.parameters()) == 4_304_695_110
    assert tensors_from_diffusers(theirs.state_dict(), cfg).keys() == net.state_dict().keys()


@pytest.mark.parametrize(
    ("cls", "keys", "required"),
    [
        ("UNet2DConditionModel", ConditionModel, {"down_block_types", "mid_block_type", "up_block_types"}),
        ("UNet2DModel", PlainModel, {"down_block_types", "up_block_types", "add_attention"}),
    ],
)
def test_every_key_is_known_with_its_default(cls: str, keys: type, required: set[str]) -> None:
    """A key that these classes do not list would be refused, and a default that differs would mislead."""
    signature = inspect.signature(getattr(diffusers, cls).__init__).parameters
    known = {f.name: f.default for f in fields(keys)}
    assert known.keys() == signature.keys() - {"self"}
    assert {name for name, default in known.items() if default is MISSING} == required
    for name in known.keys() - required:
        assert known[name] == signature[name].default, name


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(center_input_sample=True), "center_input_sample"),
        (dict(flip_sin_to_cos=False), "flip_sin_to_cos"),
        (dict(freq_shift=1), "freq_shift"),
        (dict(time_embedding_type="fourier"), "time_embedding_type"),
        (dict(class_embeddings_concat=True), "class_embeddings_concat"),
        (dict(num_class_embeds=10), "num_class_embeds"),
        (dict(conv_out_kernel=1), "conv_out_kernel"),
        (dict(addition_embed_type="image"), "addition_embed_type"),
        (dict(norm_eps=1e-6), "norm_eps 1e-06: expected 1e-05"),
        (dict(norm_num_groups=48), "norm_num_groups 48 does not divide"),
        (dict(act_fn="tanh"), "act_fn"),
        (dict(in_channels=4), "in_channels 4: expected 3.*latents"),
        (dict(down_block_types=["DownBlock2D"] * 4), r"down_block_types\[0\].*ResnetDownsampleBlock2D"),
        (dict(up_block_types=["ResnetUpsampleBlock2D"] * 4), "up_block_types: expected the down"),
        (dict(mid_block_type="UNetMidBlock2DCrossAttn"), "mid_block_type"),
        (dict(block_out_channels=[704]), "block_out_channels has 1 entries"),
        (dict(layers_per_block=[3, 3]), "layers_per_block has 2 entries"),
        (dict(attention_head_dim=[64, 64, 32, 32]), "attention_head_dim.*reads the same backwards"),
        (dict(attention_head_dim=100), "heads of 100 do not divide level 1's width 1408"),
        (dict(cross_attention_dim=[2816, 2816, 2816, 4]), "cross_attention_dim.*one width"),
        (dict(cross_attention_norm="layer_norm"), "cross_attention_norm 'layer_norm'"),
        (dict(mid_block_scale_factor=2.0), "mid_block_scale_factor 2.0"),
        (dict(resnet_skip_time_act=True), "time_embedding_act_fn None with resnet_skip_time_act True"),
        (dict(class_embed_type="identity"), "class_embed_type 'identity'.*text_proj"),
        (dict(class_embed_type="timestep"), "class_embed_type 'timestep': expected 6 in_channels"),
        (dict(class_embed_type="projection"), "projection_class_embeddings_input_dim"),
        (dict(layers_per_blok=3), "did you mean 'layers_per_block'"),
        (dict(block_out_channels="704"), "block_out_channels: expected a list"),
        (dict(_class_name="UNet3DConditionModel"), "_class_name 'UNet3DConditionModel'"),
    ],
    ids=str,
)
def test_a_key_that_cannot_be_followed_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        unet_from_diffusers(XL | change)
    assert "\n" not in str(error.value)


def test_a_text_proj_that_does_not_fit_is_named() -> None:
    projection = dict(time_embed_dim=2816, cross_attention_dim=2816)
    decoder = XL | dict(
        encoder_hid_dim=None,
        encoder_hid_dim_type=None,
        addition_embed_type=None,
        cross_attention_norm=None,
        class_embed_type="identity",
    )
    assert (
        unet_from_diffusers(decoder, projection).text_embed_dim
        == TextProjection(**projection).clip_embeddings_dim
    )
    for change in (dict(time_embed_dim=8), dict(cross_attention_dim=8)):
        with pytest.raises(InputError, match=f"text_proj: {next(iter(change))} 8: expected 2816"):
            unet_from_diffusers(decoder, projection | change)
    with pytest.raises(InputError, match="encoder_hid_dim 4096: expected null beside"):
        unet_from_diffusers(decoder | dict(encoder_hid_dim=4096), projection)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (dict(layout="efficient"), "layout 'efficient'"),
        (dict(learned_null=True), "learned_null True"),
        (dict(norm="rms"), "norm 'rms'"),
        (dict(patch=2), "patch 2"),
        (dict(skip_scale=0.5), "skip_scale 0.5"),
        (dict(text_masked=True), "text_masked True"),
        (dict(image_embed_dim=8), "image_tokens 4"),
        (dict(self_attention=(True,) * 4), "self_attention"),
        (dict(middle_attention=(False, False)), "middle_blocks 2"),
    ],
    ids=str,
)
def test_what_diffusers_cannot_express_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=f"unet.{field}") as error:
        config_to_diffusers(replace(IF_I_XL.unet, **change), image_px=64)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("mid_block.attentions.0.add_k_proj.bias"),
            "missing tensor mid_block.attentions.0.add_k_pr",
        ),
        (lambda t: t.update(ema=torch.ones(2)), r"unexpected tensor ema \[2\]"),
        (
            lambda t: t.update({"time_embedding.linear_1.weight": t["time_embedding.linear_1.weight"].T}),
            "transposed tensor time_embedding.linear_1.weight",
        ),
        (
            lambda t: t.update({"conv_in.weight": t["conv_in.weight"][:, :2]}),
            r"wrongly shaped tensor conv_in.weight, \[\d+, 2, 3, 3\] instead of \[\d+, 3, 3, 3\]",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(change, message: str) -> None:
    net, _ = reference("if I", 0)
    cfg, _ = read(net, None)
    tensors = dict(net.state_dict())
    change(tensors)
    with pytest.raises(InputError, match=message) as error:
        tensors_from_diffusers(tensors, cfg)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="U-Net: missing tensor"):
        tensors_to_diffusers({}, cfg)
