"""Networks of the original repositories against an implementation of their own layout."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade.conditioning import Conditioning
from cascade.config import UNetConfig
from cascade.errors import InputError
from cascade.nn.unet import UNet
from cascade.pretrained.unet import tensors_from_original, tensors_to_original, unet_from_original
from tests.cascade.pretrained.original import OriginalUNet, Spec
from tests.cascade.pretrained.unets import (
    LENGTH,
    assert_same,
    conditioning,
    picture,
    randomise,
    some_mask,
    states,
)

FAMILIES = ["floyd I", "floyd II", "karlo decoder", "karlo sr", "glide", "glide upsampler", "glide inpaint"]
KIND = {"floyd": "floyd", "glide": "glide", "karlo": "plain"}
SEEDS = range(10)


def random_spec(family: str, rng: random.Random) -> Spec:
    """A network of random depth, widths, head sizes and attention levels."""
    levels = rng.choice([1, 2, 2, 3])
    kind = "decoder" if family == "karlo decoder" else KIND[family.split()[0]]
    spec = Spec(
        kind=kind,
        width=32,
        mult=(1, *sorted(rng.choice([1, 2, 3]) for _ in range(levels - 1))),
        blocks=(rng.choice([1, 2]),) * levels,
        attends=tuple(kind != "plain" and rng.random() < 0.6 for _ in range(levels)),
        head=rng.choice([8, 16, 32]),
        scale_shift=rng.random() < 0.7,
        time_dim=128,
        context=rng.choice([32, 64]),
        text=rng.choice([24, 64]),
    )
    if kind == "floyd":
        act, heads = rng.choice(["gelu", "gelu_jit", "silu"]), rng.choice([2, 4])
        spec = replace(spec, act=act, pool_heads=heads, time_dim=32 * spec.mult[-1])
    if family == "floyd II":
        blocks = tuple(rng.choice([1, 2]) for _ in range(levels))
        spec = replace(
            spec, inputs=6, told=True, residual=0.7071, blocks=blocks, cross_only=rng.random() < 0.7
        )
    if kind == "plain":
        spec = replace(spec, inputs=6, outputs=3)
    if kind == "decoder":
        spec = replace(spec, extra_tokens=rng.choice([2, 4]))
    channels = {"glide upsampler": 6, "glide inpaint": rng.choice([7, 10])}
    return replace(spec, inputs=channels.get(family, spec.inputs))


def params(spec: Spec) -> dict[str, Any] | None:
    """What stands in DeepFloyd IF's config.yml."""
    if spec.kind != "floyd":
        return None
    return dict(
        image_size=64,
        in_channels=spec.inputs,
        out_channels=spec.outputs,
        model_channels=spec.width,
        channel_mult=",".join(map(str, spec.mult)),
        num_res_blocks=list(spec.blocks),
        attention_resolutions="32,16",
        activation=spec.act,
        encoder_dim=spec.text,
        encoder_channels=spec.context,
        att_pool_heads=spec.pool_heads,
        num_head_channels=spec.head,
        use_scale_shift_norm=spec.scale_shift,
        resblock_updown=True,
        scale_skip_connection=spec.residual != 1,
        precision=32,
    )


def original(family: str, seed: int) -> tuple[OriginalUNet, UNetConfig]:
    """A random network and its configuration as it is read."""
    spec = random_spec(family, random.Random(f"{family} {seed}"))
    net = OriginalUNet(spec).eval()
    randomise(net, seed)
    return net, unet_from_original(net.state_dict(), params(spec), head_channels=spec.head)


def inputs(spec: Spec, seed: int, batch: int = 2) -> tuple[dict[str, Any], Tensor, Conditioning]:
    """The same inputs for their network (as keywords), and x and conditions for ours."""
    rng, extra = random.Random(seed), spec.inputs - 3
    x, mask = picture(rng, batch, 3), some_mask(batch)
    beside = picture(rng, batch, extra) if extra else None
    theirs: dict[str, Any] = dict(x=x if beside is None else torch.cat([x, beside], 1))
    ours: dict[str, Any] = {}
    if extra in (3, 7):
        ours |= dict(lowres=beside[:, -3:], aug_level=torch.tensor([0.25, 0.5]))
    if extra in (4, 7):
        ours |= dict(inpaint=beside[:, :4])
    if spec.told:
        theirs |= dict(aug=torch.tensor([250.0, 500.0]))
    if spec.kind == "plain":
        return theirs, x, Conditioning(**ours)
    if spec.kind == "glide":
        ids = torch.randint(spec.vocab, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))
        return theirs | dict(ids=ids, mask=mask), x, conditioning(ids[..., None], mask, **ours)
    tokens, pooled = states(rng, batch, spec.text if spec.kind == "floyd" else spec.clip), None
    theirs |= dict(states=tokens)
    if spec.kind == "decoder":
        pooled = tokens[:, 0].flip(1)
        theirs |= dict(mask=mask, pooled=pooled, image=None if seed % 3 == 0 else tokens[:, 1])
        ours |= dict(image_embed=theirs["image"])
    return theirs, x, conditioning(tokens, mask, pooled, **ours)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_draws_what_the_original_draws(family: str, seed: int) -> None:
    net, cfg = original(family, seed)
    ours = UNet(cfg).eval()
    ours.load_state_dict(tensors_from_original(net.state_dict(), cfg))
    theirs, x, cond = inputs(net.spec, seed)
    time = torch.tensor([7.0, 993.0])
    with torch.no_grad():
        assert_same(ours(x, time, cond), net(time=time, **theirs))


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_go_there_and_back(family: str) -> None:
    net, cfg = original(family, 1)
    tensors = net.state_dict()
    back = tensors_to_original(tensors_from_original(tensors, cfg), cfg)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], t) for name, t in tensors.items())


def test_published_sizes_are_read_off_their_tensors() -> None:
    """GLIDE's base and upsampler, and IF-I-XL, by the sizes that facts and papers give; no memory is used."""
    text = dict(context=512, layers=16, length=128, vocab=50_257, head=64)
    base = Spec("glide", 3, 6, 192, (1, 2, 3, 4), (3,) * 4, (False, *[True] * 3), time_dim=768, **text)
    mult, attends = (1, 1, 2, 2, 4, 4), (False,) * 3 + (True,) * 3
    upsampler = replace(base, inputs=6, mult=mult, blocks=(2,) * 6, attends=attends)
    with torch.device("meta"):
        nets = OriginalUNet(base), OriginalUNet(upsampler)
    configs = [unet_from_original(net.state_dict()) for net in nets]
    assert configs[0].channels == (192, 384, 576, 768) and configs[0].blocks == (3,) * 4
    assert configs[1].channels == (192, 192, 384, 384, 768, 768) and configs[1].lowres_channels == 3
    assert configs[1].text_attention == attends and configs[1].self_attention == attends
    for net, cfg in zip(nets, configs, strict=True):
        assert cfg.text_transformer is not None and cfg.text_transformer.heads == 8
        assert tensors_from_original(net.state_dict(), cfg).keys() == UNet(cfg).state_dict().keys()


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("input_blocks.1.0.emb_layers.1.bias"),
            "missing tensor input_blocks.1.0.emb_layers.1.bias",
        ),
        (lambda t: t.update(ema=torch.ones(2)), r"unexpected tensor ema \[2\]"),
        (
            lambda t: t.update({"time_embed.0.weight": t["time_embed.0.weight"].T}),
            r"transposed tensor time_embed.0.weight, \[32, 64\] instead of \[64, 32\]",
        ),
        (
            lambda t: t.update({"out.0.weight": t["out.0.weight"][:-1]}),
            r"wrongly shaped tensor out.0.weight, \[31\] instead of \[32\]",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(change, message: str) -> None:
    spec = Spec("floyd")
    net = OriginalUNet(spec)
    cfg, tensors = unet_from_original(net.state_dict(), params(spec)), dict(net.state_dict())
    change(tensors)
    with pytest.raises(InputError, match=message) as error:
        tensors_from_original(tensors, cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_res_blocks=2), r"config.yml: num_res_blocks means \(2, 2\), the tensors hold \(1, 1\)"),
        (dict(channel_mult="1,3"), "config.yml: channel_mult means"),
        (dict(encoder_dim=25), "config.yml: encoder_dim means 25"),
        (dict(use_scale_shift_norm=False), "config.yml: use_scale_shift_norm"),
        (dict(activation="tanh"), "config.yml.activation"),
        (dict(resblock_updown=False), "config.yml.resblock_updown"),
        (dict(num_head_channels=24), "heads of 24 do not divide level 1's width 64"),
        (dict(num_head_chanels=16), "did you mean 'num_head_channels'"),
        (dict(channel_mult="1,x"), "config.yml: channel_mult '1,x'"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_one_line(change: dict[str, Any], message: str) -> None:
    spec = Spec("floyd")
    with pytest.raises(InputError, match=message) as error:
        unet_from_original(OriginalUNet(spec).state_dict(), params(spec) | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["time_embed.0.bias", "out.2.bias", "middle_block.0.emb_layers.1.bias"])
def test_tensors_without_what_tells_the_configuration(missing: str) -> None:
    tensors = dict(OriginalUNet(Spec("plain", 6, 3)).state_dict())
    del tensors[missing]
    with pytest.raises(InputError, match=f"missing tensor {missing}"):
        unet_from_original(tensors)


def test_other_networks_are_refused() -> None:
    with pytest.raises(InputError, match="expected a guided-diffusion U-Net"):
        unet_from_original({"weight": torch.ones(2)})
    with pytest.raises(InputError, match="config.yml: expected beside"):
        unet_from_original(OriginalUNet(Spec("floyd")).state_dict())
