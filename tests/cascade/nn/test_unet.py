"""The whole network: shapes, start, conditions, batches, gradients, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cascade.conditioning import Conditioning, TextEmbedding
from cascade.errors import InputError
from cascade.nn.unet import Context, UNet
from tests.cascade.nn.helpers import EMBED, conditions, config, inputs, network, rows, text

LAYOUTS = ["efficient", "adm"]
# Networks that differ in which conditions they take and how.
KINDS: dict[str, dict[str, Any]] = {
    "efficient": dict(layout="efficient"),
    "adm": dict(layout="adm"),
    "two texts": dict(text_dims=(24, 16), context_dim=20, pool_projected=True),
    "cross-attention alone": dict(self_attention=(False, False), norm="rms", patch=2),
    "super-resolution": dict(lowres_channels=3, image_embed_dim=None),
    "position maps, adm": dict(layout="adm", position_grid=8),
    "no tokens": dict(text_attention=(False, False), context_dim=20),
    "position maps": dict(position_grid=8),
    "guess": dict(position_grid=8, guess_width=8),
    "guess, two texts": dict(position_grid=8, guess_width=8, text_dims=(24, 16), context_dim=20),
}


def conditions_for(net: UNet, batch: int, size: int = 8) -> Conditioning:
    """Everything that `net` takes."""
    cfg, generator = net.cfg, torch.Generator().manual_seed(2)
    cond = conditions(batch)
    if len(cfg.text_dims) == 2:
        second = text(batch, width=cfg.text_dims[1], seed=3).sequences
        cond = cond.with_(text=TextEmbedding((*cond.text.sequences, *second)))
    if not cfg.image_embed_dim:
        cond = cond.with_(image_embed=None)
    if cfg.lowres_channels:
        lowres = torch.randn(batch, 3, size, size, generator=generator)
        cond = cond.with_(lowres=lowres, aug_level=torch.linspace(0, 1, batch))
    return cond


def mixed_keep(net: UNet, cond: Conditioning, batch: int) -> Conditioning:
    """The same with rows kept and rows dropped, each input on its own."""
    row, column = torch.arange(batch)[:, None], torch.arange(len(net.cfg.text_dims))
    image_keep = torch.arange(batch) % 3 != 1 if net.cfg.image_embed_dim else None
    return cond.with_(text_keep=(row + column) % 2 == 0, image_keep=image_keep)


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def net(request: pytest.FixtureRequest) -> UNet:
    return network(**request.param)


# -- shapes and start --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "multiple"),
    [
        (dict(layout="efficient", strides=(1, 2)), 2),
        (dict(layout="efficient", strides=(2, 2)), 4),
        (dict(layout="efficient", strides=(1, 3), patch=2), 6),
        (dict(layout="efficient", strides=(1, 1)), 1),
        (dict(layout="adm", strides=(1, 2)), 2),
        (dict(layout="adm", strides=(1, 2), patch=4), 8),
    ],
    ids=str,
)
def test_size_multiple_is_what_the_network_can_draw(changes: dict[str, Any], multiple: int) -> None:
    """Multiples of it give an output of the input's size; no other size does."""
    net = network(norm="rms", **changes)
    assert net.size_multiple == multiple
    for size in range(1, 2 * multiple + 1):
        assert gives_its_own_size(net, size) == (size % multiple == 0), size


def gives_its_own_size(net: UNet, size: int) -> bool:
    x, time = inputs(1, (size, net.size_multiple))
    try:
        return net(x, time, Conditioning()).shape == x.shape
    except RuntimeError:
        return False


@pytest.mark.parametrize("layout", LAYOUTS)
def test_learned_variance_doubles_the_output(layout: str) -> None:
    x, time = inputs(2, (8, 12))
    assert network(layout, out_channels=6, patch=2)(x, time, conditions(2)).shape == (2, 6, 8, 12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fresh_network_predicts_zero(layout: str) -> None:
    x, time = inputs(2)
    assert not UNet(config(layout))(x, time, conditions(2)).any()


def test_every_input_shows_in_the_output(net: UNet) -> None:
    x, time = inputs(3)
    cond = conditions_for(net, 3)
    out = net(x, time, cond)
    assert out.shape == x.shape
    assert changed(net(x + 0.1, time, cond), out) and changed(net(x, time + 50, cond), out)
    for name in ("image_embed", "lowres", "aug_level"):
        if getattr(cond, name) is not None:
            assert changed(net(x, time, cond.with_(**{name: getattr(cond, name) + 0.5})), out), name
    for i in range(len(net.cfg.text_dims)):
        keep = torch.ones(3, len(net.cfg.text_dims), dtype=torch.bool)
        keep[:, i] = False
        assert changed(net(x, time, cond.with_(text_keep=keep)), out), f"text {i}"


def changed(one: Tensor, other: Tensor) -> bool:
    """Every row differs visibly."""
    return bool(((one - other).flatten(1).abs().amax(1) > 1e-4).all())


def test_skip_and_residual_scales_act() -> None:
    x, time = inputs(2)
    outs = [
        network(**scales)(x, time, conditions(2))
        for scales in ({}, {"skip_scale": 0.5}, {"residual_scale": 0.5})
    ]
    assert changed(outs[0], outs[1]) and changed(outs[0], outs[2])


# -- conditions --------------------------------------------------------------------------------------------


def test_prepared_conditions_give_the_same(net: UNet) -> None:
    x, time = inputs(3)
    cond = mixed_keep(net, conditions_for(net, 3), 3)
    context = net.prepare(cond, 3)
    assert isinstance(context, Context)
    assert torch.equal(net(x, time, context), net(x, time, cond))


def test_concatenated_contexts_give_what_each_gives_alone(net: UNet) -> None:
    """The conditional half has LENGTH tokens, the null half one: padding must not be attended to."""
    x, time = inputs(3)
    cond = conditions_for(net, 3)
    null = cond.with_(text=None, image_embed=None)
    parts = [net.prepare(c, 3) for c in (null, cond)]
    both = net(x.repeat(2, 1, 1, 1), time.repeat(2), Context.cat(parts))
    alone = torch.cat([net(x, time, part) for part in parts])
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-5)
    assert changed(both[:3], both[3:])


@pytest.mark.parametrize("masked", [True, False])
def test_tokens_added_to_a_multiple_do_not_matter(masked: bool) -> None:
    net = network(text_masked=masked, learned_null=masked)
    context = net.prepare(conditions(2), 2)
    aligned = context.aligned(8)
    assert {kv.shape[1] for kv in context.kv} == {9} and {kv.shape[1] for kv in aligned.kv} == {16}
    torch.testing.assert_close(net(*inputs(2), aligned), net(*inputs(2), context))
    assert aligned.aligned(8).kv[0] is aligned.kv[0]


def test_a_row_does_not_depend_on_its_batch(net: UNet) -> None:
    """Keep flags act row by row, and no layer looks across rows."""
    x, time = inputs(4)
    cond = mixed_keep(net, conditions_for(net, 4), 4)
    out = net(x, time, cond)
    for row in range(4):
        part = slice(row, row + 1)
        torch.testing.assert_close(
            net(x[part], time[part], rows(cond, part)), out[part], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_tokens_do_not_matter(layout: str) -> None:
    net, (x, time) = network(layout), inputs(2)
    cond = conditions(2, text=text(2, [1, 3]))
    states = cond.text.sequences[0].states
    out = net(x, time, cond)
    states[1, 3:] += 100.0
    states[0, 1:] += 100.0
    torch.testing.assert_close(net(x, time, cond), out)
    states[1, 2] *= -1
    assert changed(net(x, time, cond)[1:], out[1:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_conditions_are_the_nulls_of_dropped_rows(layout: str) -> None:
    net, (x, time), cond = network(layout), inputs(2), conditions(2)
    no_text = net(x, time, cond.with_(text=None))
    torch.testing.assert_close(
        no_text, net(x, time, cond.with_(text_keep=torch.zeros(2, 1, dtype=torch.bool))), atol=1e-5, rtol=1e-5
    )
    no_image = net(x, time, cond.with_(image_embed=None))
    torch.testing.assert_close(
        no_image, net(x, time, cond.with_(image_keep=torch.zeros(2, dtype=torch.bool))), atol=1e-5, rtol=1e-5
    )
    assert changed(no_text, no_image)


def test_two_texts_drop_each_on_its_own() -> None:
    net, (x, time) = network(**KINDS["two texts"]), inputs(1)
    cond = conditions_for(net, 1)
    outs = [
        net(x, time, cond.with_(text_keep=torch.tensor([[first, second]])))
        for first in (True, False)
        for second in (True, False)
    ]
    assert all(changed(a, b) for i, a in enumerate(outs) for b in outs[:i])


# -- fully convolutional stages ----------------------------------------------------------------------------


def crop_error(net: UNet) -> float:
    """Largest difference, in the middle, between a picture's crop drawn alone and as part of the whole."""
    x, time = inputs(1, 128)
    lowres = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(4))
    cond = conditions(1, image_embed=None, lowres=lowres, aug_level=torch.tensor([0.2]))
    whole = net(x, time, cond)
    crop = (..., slice(32, 112), slice(16, 96))
    alone = net(x[crop], time, cond.with_(lowres=lowres[crop]))
    middle = (..., slice(32, -32), slice(32, -32))  # the receptive field reaches less than 32 px
    return float((whole[crop] - alone)[middle].detach().abs().max())


def test_a_stage_without_self_attention_draws_a_crop_as_the_whole() -> None:
    """Why the 1024 px stage can train on crops."""
    stage = dict(
        blocks=(1, 1), self_attention=(False, False), lowres_channels=3, image_embed_dim=None, patch=2
    )
    assert crop_error(network(**stage, norm="rms")) < 1e-5
    assert crop_error(network(**stage, norm="group")) > 1e-3
    assert crop_error(network(**{**stage, "self_attention": (False, True)}, norm="rms")) > 1e-3


# -- training ----------------------------------------------------------------------------------------------


def test_every_parameter_learns(net: UNet) -> None:
    """With kept and dropped rows in the batch no parameter is left out, as data-parallel training needs."""
    x, time = inputs(4)
    cond = mixed_keep(net, conditions_for(net, 4), 4)
    loss = net(x, time, cond).square().mean()
    if net.guess is not None:
        loss = loss + (net.guess(cond, 4) - x).square().mean()
    loss.backward()
    trained = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    assert [name for name, grad in trained.items() if grad is None] == []
    # A softmax does not see a shift of all its keys.
    zero = [name for name, grad in trained.items() if grad is not None and grad.abs().max() < 1e-12]
    assert [name for name in zero if not name.endswith("pool.k.bias")] == []
    idle = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert all(name.endswith("null_token") and not any(net.cfg.text_attention) for name in idle)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_checkpointing_changes_no_gradient(layout: str) -> None:
    x, time = inputs(2)
    gradients = []
    for checkpointing in (False, True):
        net = network(layout)
        net.gradient_checkpointing = checkpointing
        net(x, time, conditions(2)).square().mean().backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_bf16_runs_by_autocast_and_by_casting(net: UNet) -> None:
    x, time = inputs(2)
    cond = mixed_keep(net, conditions_for(net, 2), 2)
    out = net(x, time, cond)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = net(x, time, cond)
        autocast.float().square().mean().backward()
    cast = net.to(torch.bfloat16)(x.to(torch.bfloat16), time, cond)
    assert cast.dtype == torch.bfloat16
    for low in (autocast, cast):
        error = (low.float() - out).square().mean().sqrt() / out.square().mean().sqrt()
        assert error < 0.1, error


# -- refusals ----------------------------------------------------------------------------------------------


def test_a_super_resolution_network_needs_its_picture() -> None:
    net, (x, time) = network(**KINDS["super-resolution"]), inputs(2)
    cond = conditions_for(net, 2)
    with pytest.raises(InputError, match="needs lowres"):
        net(x, time, cond.with_(lowres=None))
    with pytest.raises(InputError, match="needs aug_level"):
        net(x, time, cond.with_(aug_level=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(channels=()), "channels is empty"),
        (dict(blocks=(1, 1, 1)), "unet.blocks has 3 entries, channels has 2"),
        (dict(strides=(1,)), "unet.strides has 1 entries, channels has 2"),
        (dict(self_attention=(True,)), "unet.self_attention has 1 entries"),
        (dict(text_attention=(True,)), "unet.text_attention has 1 entries"),
        (dict(blocks=(1, 0)), "unet.blocks"),
        (dict(strides=(0, 2)), "unet.strides"),
        (dict(channels=(-16, 32)), "unet.channels"),
        (dict(channels=(15, 32)), "starts with 15"),
        (dict(channels=(16, 40), head_channels=13), "head_channels 13 does not divide level 1's width 40"),
        (dict(patch=0), "unet.patch 0"),
        (dict(position_grid=9), "unet.position_grid 9: expected 0 or a multiple of 2"),
        (dict(position_grid=-2), "unet.position_grid -2"),
        (dict(guess_width=8), "unet.guess_width 8: expected 0, or with a position_grid that 2 divides"),
        (dict(fine_channels=(7, 8)), r"unet.fine_channels \(7, 8\): .* the first of them even"),
        (dict(fine_channels=(8, 8)), "fine_channels has 2 levels: sides of 2 px times any number allow 1"),
        (dict(patch=4, fine_channels=(8, 8), lowres_channels=3), "fine_channels: expected a base network"),
        (dict(patch=4, fine_channels=(8, 8), out_channels=6), "fine_channels: .* without learned variance"),
        (dict(image_tokens=-1), "unet.image_tokens -1"),
        (dict(layout="adm", strides=(2, 2)), r"unet.strides \(2, 2\): the adm layout needs \(1, 2\)"),
        (dict(text_dims=(), image_embed_dim=None), "neither text_dims nor image_embed_dim"),
        (dict(text_dims=(), image_embed_dim=None, context_dim=8), "neither text_dims nor image_embed_dim"),
        (dict(text_dims=(24, 16)), "set context_dim"),
        (dict(pool_heads=7), "pool_heads 7 does not divide the pooled text width 24"),
        (
            dict(pool_projected=True, context_dim=20, pool_heads=8),
            "pool_heads 8 does not divide the pooled text width 20",
        ),
        (dict(pool_projected=True), "there is no context_dim"),
    ],
    ids=str,
)
def test_an_inconsistent_configuration_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        UNet(config(**changes))
    assert "\n" not in str(error.value)


def test_pool_heads_are_held_to_the_width_that_is_pooled() -> None:
    """Heads that divide the projected width are enough where that is what is pooled."""
    UNet(config(pool_projected=True, context_dim=28, pool_heads=7, image_embed_dim=EMBED))


# -- position maps -----------------------------------------------------------------------------------------


def test_position_maps_tell_places_apart_and_stretch_to_other_sizes() -> None:
    """Without noise and conditions a convolutional network draws nearly the same everywhere."""
    net = network(position_grid=8)
    assert [tuple(p.shape) for p in net.positions] == [(1, 16, 8, 8), (1, 32, 4, 4)]
    x, time = torch.zeros(1, 3, 8, 8), torch.tensor([500.0])
    before = net(x, time, Conditioning())
    with torch.no_grad():
        net.positions[0][..., 0, 0] += 1.0
    change = (net(x, time, Conditioning()) - before).abs().sum(1)[0]  # H W
    assert change[:3, :3].mean() > 2 * change[5:, 5:].mean()
    assert net(torch.zeros(1, 3, 12, 16), time, Conditioning()).shape == (1, 3, 12, 16)


def test_the_guess_reaches_the_network_and_learns_from_its_own_loss_alone() -> None:
    net = network(position_grid=8, guess_width=8)
    assert net.guess is not None
    cond, x, time = conditions_for(net, 2), torch.zeros(2, 3, 8, 8), torch.tensor([999.0, 999.0])
    guess = net.guess(cond, 2)
    assert guess.shape == (2, 3, 8, 8)
    assert torch.equal(net.prepare(cond, 2).guess, guess)
    out = net(x, time, cond)
    out.square().mean().backward()
    assert all(p.grad is None for p in net.guess.parameters())
    with torch.no_grad():
        net.guess.conv_out.bias += 1.0
    assert not torch.allclose(net(x, time, cond), out)
    assert net(torch.zeros(2, 3, 12, 16), time, cond).shape == (2, 3, 12, 16)


def test_the_guess_of_a_dropped_condition_is_that_of_an_absent_one() -> None:
    net = network(position_grid=8, guess_width=8)
    assert net.guess is not None
    with torch.no_grad():
        for null in (*net.guess.text_nulls, net.guess.image_null):
            assert null is not None
            null.normal_()
    cond, none, drop = conditions_for(net, 2), Conditioning(), torch.zeros(2, dtype=torch.bool)
    dropped = cond.with_(text_keep=drop[:, None], image_keep=drop)
    assert torch.equal(net.guess(dropped, 2), net.guess(none, 2))
    assert not torch.allclose(net.guess(cond.with_(text=None), 2), net.guess(cond, 2))
    assert not torch.allclose(net.guess(cond.with_(image_embed=None), 2), net.guess(cond, 2))
