"""Conditions to tokens and vector: learned nulls, row by row, input by input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cascade.conditioning import Conditioning, TextEmbedding
from cascade.errors import InputError
from cascade.nn.condition import ConditionEncoder, context_width
from tests.cascade.nn.helpers import EMBED, LENGTH, WIDTH, conditions, config, text

E = 20  # width of the conditioning vector
TWO = dict(text_dims=(WIDTH, 16), context_dim=28)


def encoder(**changes: Any) -> ConditionEncoder:
    torch.manual_seed(0)
    encoder = ConditionEncoder(config(**changes), E)
    for parameter in encoder.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return encoder


def two_texts(batch: int) -> TextEmbedding:
    return TextEmbedding((*text(batch).sequences, *text(batch, width=16, seed=1).sequences))


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({}, WIDTH),
        ({"context_dim": 28}, 28),
        ({"text_dims": ()}, 32),
        ({"text_attention": (False, False)}, 0),
    ],
)
def test_context_width(changes: dict[str, Any], width: int) -> None:
    assert context_width(config(**changes)) == width


def test_tokens_of_text_and_image_are_concatenated_and_their_vectors_added() -> None:
    net, cond = encoder(image_tokens=3), conditions(2)
    context, mask, vector = net(cond, 2)
    assert context.shape == (2, LENGTH + 3, WIDTH) and vector.shape == (2, E)
    assert mask.tolist() == [[True] + [False] * 4 + [True] * 3, [True] * 2 + [False] * 3 + [True] * 3]
    text_tokens, _, text_vector = net.text[0](cond.text.sequences[0], None)
    image_tokens, image_vector = net.image(cond.image_embed, None, 2)
    assert torch.equal(context, torch.cat([text_tokens, image_tokens], dim=1))
    torch.testing.assert_close(vector, text_vector + image_vector)


def test_no_text_is_the_null_of_a_dropped_row() -> None:
    net, cond = encoder(), conditions(2)
    context, mask, vector = net(cond.with_(text=None), 2)
    dropped_context, dropped_mask, dropped_vector = net(cond.with_(text_keep=torch.zeros(2, 1).bool()), 2)
    torch.testing.assert_close(vector, dropped_vector)
    for row in range(2):
        torch.testing.assert_close(context[row, mask[row]], dropped_context[row, dropped_mask[row]])


def test_no_image_is_the_null_of_a_dropped_row() -> None:
    net, cond = encoder(), conditions(2)
    expected = net(cond.with_(image_keep=torch.zeros(2).bool()), 2)
    for part, same in zip(net(cond.with_(image_embed=None), 2), expected, strict=True):
        assert torch.equal(part, same)


def test_each_sequence_is_dropped_on_its_own() -> None:
    net = encoder(**TWO)
    keep = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    _, mask, vector = net(Conditioning(text=two_texts(4), text_keep=keep), 4)
    counts = torch.stack([mask[:, :LENGTH].sum(1), mask[:, LENGTH : 2 * LENGTH].sum(1)], dim=1)
    assert counts.tolist() == [[5, 5], [5, 1], [1, 5], [1, 1]]
    _, _, kept = net(Conditioning(text=two_texts(4)), 4)
    torch.testing.assert_close(vector[0], kept[0])
    assert all(not torch.allclose(vector[row], kept[row]) for row in (1, 2, 3))


def test_a_dropped_text_does_not_show() -> None:
    net, keep = encoder(), torch.tensor([[True], [False]])
    one = net(conditions(2, text=text(2, [2, 2], seed=0), text_keep=keep), 2)
    two = net(conditions(2, text=text(2, [2, 2], seed=9), text_keep=keep), 2)
    for part, other in zip(one, two, strict=True):
        assert torch.equal(part[1], other[1])
    assert not torch.equal(one[2][0], two[2][0])


def test_image_embedding_is_scaled() -> None:
    net, cond = encoder(image_embed_scale=4.0), conditions(2, text=None)
    torch.testing.assert_close(net(cond, 2)[0], encoder()(cond.with_(image_embed=4 * cond.image_embed), 2)[0])


def test_aug_level_enters_the_vector_in_thousandths() -> None:
    net, cond = encoder(lowres_channels=3), conditions(2, aug_level=torch.tensor([0.0, 0.3]))
    _, _, vector = net(cond, 2)
    _, _, without = encoder_without_aug(net)(cond, 2)
    torch.testing.assert_close(vector - without, net.aug(torch.tensor([0.0, 300.0])))


def encoder_without_aug(net: ConditionEncoder) -> ConditionEncoder:
    same = encoder()
    same.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("aug.")})
    return same


def test_a_fresh_network_does_not_know_its_aug_level() -> None:
    net = ConditionEncoder(config(lowres_channels=3), E)
    low, high = (net(conditions(1, aug_level=torch.tensor([level])), 1)[2] for level in (0.0, 1.0))
    assert torch.equal(low, high)


@pytest.mark.parametrize("pool_projected", [False, True])
def test_text_is_pooled_before_or_after_its_projection(pool_projected: bool) -> None:
    reader = encoder(context_dim=28, pool_projected=pool_projected).text[0]
    assert reader.pool.q.in_features == (28 if pool_projected else WIDTH)
    context, _, pooled = reader(text(2).sequences[0], None)
    assert context.shape == (2, LENGTH, 28) and pooled.shape == (2, E)


def test_networks_that_attend_to_no_tokens_keep_the_vector() -> None:
    net = encoder(text_attention=(False, False), **TWO)
    context, mask, vector = net(Conditioning(text=two_texts(2), image_embed=torch.randn(2, EMBED)), 2)
    assert context is None and mask is None and vector.shape == (2, E)


def test_unconditional_networks_have_nothing() -> None:
    net = encoder(text_dims=(), image_embed_dim=None, text_attention=(False, False))
    assert net(Conditioning(), 2) == (None, None, None)


@pytest.mark.parametrize(
    ("changes", "cond", "message"),
    [
        ({}, Conditioning(text=two_texts(1)), "expected 1 token sequences, got 2"),
        ({"lowres_channels": 3}, conditions(1), "needs aug_level"),
        ({"learned_null": False}, Conditioning(), "no learned null text"),
        ({"learned_null": False}, conditions(1, text_keep=torch.ones(1, 1).bool()), "no learned null text"),
    ],
)
def test_bad_conditions_are_one_line(changes: dict[str, Any], cond: Conditioning, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        encoder(**changes)(cond, 1)
    assert "\n" not in str(error.value)
