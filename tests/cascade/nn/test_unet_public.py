"""What the public networks do that this project's own do not (DeepFloyd IF, Karlo, GLIDE)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cascade.conditioning import Conditioning, TextEmbedding, Tokens
from cascade.config import TextTransformerConfig, UNetConfig, from_dict, to_dict
from cascade.errors import InputError
from cascade.nn.attention import Attention2d, TokenGroupNorm
from cascade.nn.layers import ResBlock
from cascade.nn.transformer import TextTransformer
from cascade.nn.unet import Context, UNet
from tests.cascade.nn.helpers import EMBED, LENGTH, WIDTH, conditions, config, inputs, network, rows, text

FLOYD: dict[str, Any] = dict(
    layout="adm",
    context_norm="group",
    text_masked=False,
    learned_null=False,
    image_embed_dim=None,
    act="gelu",
)
KARLO: dict[str, Any] = dict(
    layout="adm",
    context_dim=20,
    context_norm="projected",
    text_pool="none",
    text_embed_dim=WIDTH,
    learned_null=False,
    pool_heads=1,
)
GLIDE: dict[str, Any] = dict(
    layout="adm",
    text_transformer=TextTransformerConfig(vocab=30, length=LENGTH, width=16, layers=2, heads=2),
    text_dims=(1,),
    context_norm="none",
    text_masked=False,
    text_pool="last",
    learned_null=False,
    image_embed_dim=None,
    inpaint_channels=4,
)


def clip_text(batch: int) -> TextEmbedding:
    embedding = text(batch, [1 + row for row in range(batch)])
    return TextEmbedding(embedding.sequences, embedding.sequences[0].states[:, 0].flip(1))


def token_ids(batch: int) -> TextEmbedding:
    ids = torch.arange(batch * LENGTH).reshape(batch, LENGTH, 1) % 30
    mask = torch.arange(LENGTH) < torch.arange(1, batch + 1)[:, None]
    return TextEmbedding((Tokens(ids, mask),))


CASES = {
    "floyd": (FLOYD, lambda b: conditions(b, image_embed=None)),
    "karlo": (KARLO, lambda b: conditions(b, text=clip_text(b))),
    "glide": (GLIDE, lambda b: Conditioning(text=token_ids(b))),
}


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_learns_and_rows_are_independent(name: str) -> None:
    changes, make = CASES[name]
    net, (x, time) = network(**changes), inputs(3)
    out = net(x, time, make(3))
    out.square().mean().backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12]
    # Without dropout the null embedding does not act; a softmax does not see a shift of all its keys.
    assert [n for n in idle if not n.endswith(("image.null", "pool.k.bias"))] == []
    part = rows(make(3), slice(0, 2))
    torch.testing.assert_close(out[:2], net(x[:2], time[:2], part), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_configuration_survives_a_file(name: str) -> None:
    cfg = config(**CASES[name][0])
    assert from_dict(UNetConfig, to_dict(cfg)) == cfg
    levels = config("adm", head_channels=(16, 8))
    assert from_dict(UNetConfig, to_dict(levels)) == levels


# -- text --------------------------------------------------------------------------------------------------


def test_padding_is_attended_to_and_pooled() -> None:
    net, (x, time) = network(**FLOYD), inputs(1)
    few, all_real = (conditions(1, image_embed=None, text=text(1, [n])) for n in (2, LENGTH))
    out = net(x, time, few)
    assert torch.equal(net(x, time, all_real), out)
    assert net.prepare(few, 1).mask is None
    few.text.sequences[0].states[0, -1] += 1
    assert (net(x, time, few) - out).abs().max() > 1e-3


def test_halves_of_different_lengths_are_refused() -> None:
    net = network(**FLOYD)
    short = Tokens(torch.randn(1, 3, WIDTH), torch.ones(1, 3, dtype=torch.bool))
    parts = [net.prepare(Conditioning(text=t), 1) for t in (text(1), TextEmbedding((short,)))]
    with pytest.raises(InputError, match=r"lengths \[3, 5\]: this network attends to padding"):
        Context.cat(parts)


def test_token_group_norm_takes_its_statistics_over_all_tokens() -> None:
    norm = TokenGroupNorm(2, 6)
    x = 5 * torch.randn(2, 4, 6) + 1
    groups = x.unflatten(-1, (2, 3))
    mean, var = groups.mean((1, 3), keepdim=True), groups.var((1, 3), keepdim=True, correction=0)
    expected = ((groups - mean) / (var + 1e-5).sqrt()).flatten(2)
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "size"), [("layer", 12), ("group", 12), ("none", 0), ("projected", 0)])
def test_context_norm_of_an_attention(kind: str, size: int) -> None:
    layer = Attention2d(16, 8, "group", self_attention=False, context_dim=6, context_norm=kind)
    assert sum(p.numel() for p in layer.norm_context.parameters()) == size


def test_clip_text_embedding_is_added_to_the_vector() -> None:
    net = network(**KARLO).condition
    cond = conditions(2, text=clip_text(2))
    zero = cond.with_(text=TextEmbedding(cond.text.sequences, torch.zeros(2, WIDTH)))
    linear = net.text_embed.to_vector
    torch.testing.assert_close(
        net(cond, 2)[2] - net(zero, 2)[2], cond.text.pooled @ linear.weight.T, atol=1e-5, rtol=1e-5
    )
    with pytest.raises(InputError, match="takes the CLIP text embedding"):
        net(cond.with_(text=text(2)), 2)


def test_a_dropped_text_adds_no_clip_text_embedding() -> None:
    net = network(text_embed_dim=WIDTH).condition
    cond = conditions(2, text=clip_text(2), text_keep=torch.tensor([[True], [False]]))
    other = cond.with_(text=TextEmbedding(cond.text.sequences, cond.text.pooled + 1))
    difference = (net(cond, 2)[2] - net(other, 2)[2]).abs().amax(1)
    assert difference[0] > 1e-3 and difference[1] == 0


@pytest.mark.parametrize("vector", ["linear", "mlp"])
def test_without_a_learned_null_no_image_is_a_zero_embedding(vector: str) -> None:
    net = network("adm", image_null=False, image_tokens=0, image_vector=vector, text_attention=(False, False))
    x, time = inputs(2)
    none = net(x, time, conditions(2, image_embed=None))
    torch.testing.assert_close(net(x, time, conditions(2, image_embed=torch.zeros(2, EMBED))), none)
    assert (net(x, time, conditions(2)) - none).abs().max() > 1e-3
    assert not any("null" in name for name in net.condition.image.state_dict())


def test_text_transformer_puts_learned_embeddings_at_padding() -> None:
    net = TextTransformer(GLIDE["text_transformer"]).eval()
    ids, mask = torch.arange(LENGTH)[None], torch.arange(LENGTH)[None] < 2
    out = net(ids, mask)
    assert out.shape == (1, LENGTH, 16)
    torch.testing.assert_close(net(torch.where(mask, ids, 7), mask), out)  # ids of padding do not matter
    with torch.no_grad():
        net.padding[2] += torch.randn(16)
    assert (net(ids, mask) - out)[:, 0].abs().max() > 1e-3  # but every token sees its embedding
    with pytest.raises(InputError, match="expected sequences of 5, got 4"):
        net(ids[:, :4], mask[:, :4])


# -- blocks ------------------------------------------------------------------------------------------------


def test_res_block_that_is_shifted_before_its_norm() -> None:
    block = ResBlock(8, 12, 6, norm="group", act="silu", dropout=0.0, scale=1.0, groups=4, modulation="shift")
    torch.nn.init.normal_(block.conv2.weight)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    h = block.conv1(torch.nn.functional.silu(block.norm1(x))) + block.emb(emb)[..., None, None]
    h = block.conv2(torch.nn.functional.silu(block.norm2(h)))
    torch.testing.assert_close(block(x, emb), block.shortcut(x) + h)
    assert block.norm1.num_groups == 4


@pytest.mark.parametrize(
    ("changes", "blocks", "attentions"),
    [
        ({}, 2, 1),
        (dict(middle_blocks=0), 0, 0),
        (dict(middle_blocks=1, middle_attention=(False, False)), 1, 0),
        (dict(middle_attention=(False, False)), 2, 0),
        (
            dict(self_attention=(False, False), text_attention=(False, False), middle_attention=(True, True)),
            2,
            1,
        ),
    ],
    ids=str,
)
def test_middle(changes: dict[str, Any], blocks: int, attentions: int) -> None:
    net, (x, time) = network("adm", **changes), inputs(2)
    assert net(x, time, conditions(2)).shape == x.shape
    middle = net.middle
    assert (0 if middle is None else len(middle.blocks)) == blocks
    assert sum(isinstance(m, Attention2d) for m in (middle.attentions if middle else [])) == attentions


def test_heads_may_differ_between_levels() -> None:
    net = network("adm", text_attention=(True, True), head_channels=(16, 8))
    assert [a.heads for a in net.token_attentions] == [1, 4, 4, 4, 4, 4, 4, 1, 1]


def test_inpainting_without_a_mask_knows_nothing() -> None:
    net, (x, time) = network("adm", inpaint_channels=4, lowres_channels=3), inputs(2)
    cond = conditions(2, lowres=torch.randn(2, 3, 8, 8), aug_level=torch.zeros(2))
    out = net(x, time, cond)
    assert torch.equal(net(x, time, cond.with_(inpaint=torch.zeros(2, 4, 8, 8))), out)
    known = cond.with_(inpaint=torch.ones(2, 4, 8, 8))
    both = Context.cat([net.prepare(c, 2) for c in (known, known)])
    assert (net(x, time, known) - out).abs().max() > 1e-3
    again = net(x.repeat(2, 1, 1, 1), time.repeat(2), both)
    torch.testing.assert_close(again[2:], net(x, time, known), atol=1e-5, rtol=1e-5)


def test_a_network_that_is_not_told_its_aug_level() -> None:
    net, (x, time) = network("adm", lowres_channels=3, aug_embedding=False), inputs(2)
    cond = conditions(2, lowres=torch.randn(2, 3, 8, 8))
    assert torch.equal(net(x, time, cond), net(x, time, cond.with_(aug_level=torch.ones(2))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(layout="adm", head_channels=(16,)), "unet.head_channels has 1 entries, channels has 2"),
        (dict(head_channels=(16, 0)), r"unet.head_channels \(16, 0\)"),
        (dict(layout="efficient", middle_blocks=1), "the efficient layout has no middle"),
        (dict(layout="adm", middle_blocks=0, middle_attention=(True, False)), "middle_blocks is 0"),
        (dict(layout="adm", middle_blocks=-1), "unet.middle_blocks -1"),
        (dict(text_masked=False), "unet.learned_null needs text_masked"),
        (dict(stem_kernel=4), "unet.stem_kernel 4: expected an odd number"),
        (dict(norm_groups=0), "unet.norm_groups 0"),
        (GLIDE | dict(text_dims=(16,)), r"unet.text_dims \(16,\): with a text_transformer expected \(1,\)"),
        (
            GLIDE | dict(text_transformer=TextTransformerConfig(vocab=9, width=16, heads=3)),
            "unet.text_transformer.heads 3 does not divide its width 16",
        ),
    ],
    ids=str,
)
def test_an_inconsistent_configuration_of_this_kind_is_one_line(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        UNet(config(**changes))
    assert "\n" not in str(error.value)
