"""Both priors: what each position may see, what a sample depends on, and that they learn."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.conditioning import TextEmbedding, Tokens
from cascade.config import from_dict, to_dict
from cascade.errors import InputError
from prior import AutoregressiveConfig, AutoregressivePrior, DiffusionPrior, PriorConfig
from prior.autoregressive import draw
from prior.base import pick_best

TEXT_DIM, LENGTH, EMBED = 12, 6, 8
SIZES: dict[str, Any] = dict(
    width=32, layers=2, heads=4, text_dim=TEXT_DIM, text_length=LENGTH, embed_dim=EMBED
)
KINDS = ["diffusion", "autoregressive"]
LOSS_ROWS = 6

Prior = DiffusionPrior | AutoregressivePrior


def unit(rows: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(rows, EMBED, generator=torch.Generator().manual_seed(seed)), dim=-1)


def make_text(rows: int, seed: int = 0) -> TextEmbedding:
    """Random text of 2, 3, 4, 5, 2, ... real tokens a row, padded to LENGTH."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, LENGTH, TEXT_DIM, generator=generator)
    mask = torch.arange(LENGTH) < torch.tensor([2 + i % (LENGTH - 2) for i in range(rows)])[:, None]
    return TextEmbedding((Tokens(states, mask),), unit(rows, seed + 1))


def change(text: TextEmbedding, position: int) -> TextEmbedding:
    """The same text with another token at one position of every row."""
    states = text.sequences[0].states.clone()
    states[:, position] = -states[:, position]
    return replace(text, sequences=(Tokens(states, text.sequences[0].mask),))


def randomise(module: nn.Module) -> None:
    """Every parameter random: zero-initialised outputs would hide what stands before them."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def build(kind: str, **changes) -> Any:  # of either class
    if kind == "diffusion":
        prior = DiffusionPrior(PriorConfig(**{**SIZES, "steps": 6, **changes}))
    else:
        prior = AutoregressivePrior(AutoregressiveConfig(**{**SIZES, "codes": 5, "buckets": 32, **changes}))
    randomise(prior)
    prior.fit_statistics(unit(64) * 0.9 + 0.05)
    return prior


def loss(prior: Prior, text: TextEmbedding, keep: Tensor | None = None) -> Tensor:
    rows = len(text)
    t = torch.linspace(0.1, 0.9, rows, dtype=torch.float64)
    return prior.loss(unit(rows, 5), text, keep, t, unit(rows, 6))


# -- the mask ------------------------------------------------------------------------------------------------


def test_causal_mask_lets_no_position_see_a_later_one():
    prior = build("diffusion")
    text = make_text(4)
    before = prior.net.prepare(text).past
    after = prior.net.prepare(change(text, 1)).past
    for (k0, v0), (k1, v1) in zip(before, after, strict=True):
        assert torch.equal(k0[:, :, 0], k1[:, :, 0]) and torch.equal(v0[:, :, 0], v1[:, :, 0])
    k0, k1 = before[-1][0], after[-1][0]
    assert not torch.allclose(k0[:, :, -1], k1[:, :, -1])  # the last position sees them all


def test_autoregressive_logits_depend_on_earlier_codes_only():
    net = build("autoregressive").net
    text, dot = make_text(2), torch.tensor([3, 4])
    codes = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
    other = codes.clone()
    other[:, 2] += 7
    dots, logits = net(text, None, dot, codes)
    other_dots, other_logits = net(text, None, dot, other)
    assert torch.equal(dots, other_dots)
    assert torch.equal(logits[:, :3], other_logits[:, :3])
    assert not torch.allclose(logits[:, 3], other_logits[:, 3])
    assert not torch.allclose(net(text, None, dot + 1, codes)[1][:, 0], logits[:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_never_seen(kind):
    prior, text = build(kind), make_text(3)  # 2, 3 and 4 real tokens
    expected = loss(prior, text)
    torch.testing.assert_close(loss(prior, change(text, 5)), expected)
    assert not torch.allclose(loss(prior, change(text, 1)), expected)
    cut = replace(text, sequences=(Tokens(text.sequences[0].states[:, :4], text.sequences[0].mask[:, :4]),))
    torch.testing.assert_close(loss(prior, cut), expected)


def test_cached_prefix_equals_one_full_pass():
    prior = build("autoregressive")
    text, dot = make_text(3), torch.tensor([1, 2, 3])
    codes = torch.randint(0, 32, (3, 5), generator=torch.Generator().manual_seed(0))
    dots, logits = prior.net(text, None, dot, codes)
    prefix, cached_dots = prior.net.prepare(text)
    torch.testing.assert_close(cached_dots, dots)
    x = prior.net.embed_dot(dot)
    for k in range(5):
        step, prefix = prior.net.step(x, prefix)
        torch.testing.assert_close(step, logits[:, k])
        if k < 4:
            x = prior.net.code(codes[:, k]) + prior.net.positions[k + 1]


# -- dropped text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_text_leaves_no_trace(kind):
    prior = build(kind)
    keep = torch.tensor([True, False, True, False, True, False])
    one, two = make_text(LOSS_ROWS, 1), make_text(LOSS_ROWS + 1, 2)[1:]  # of other lengths, too
    first, second = loss(prior, one, keep), loss(prior, two, keep)
    torch.testing.assert_close(first[~keep], second[~keep])
    assert not torch.isclose(first[keep], second[keep]).any()
    torch.testing.assert_close(first[keep], loss(prior, one)[keep])


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind):
    prior = build(kind)
    loss(prior, make_text(4), torch.tensor([True, True, True, False])).mean().backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# -- samples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_sample_depends_on_its_own_row_only(kind, guidance):
    prior, text = build(kind), make_text(5)
    seeds = [11, 12, 13, 14, 15]
    batch = prior.sample(text, seeds=seeds, guidance=guidance)
    assert batch.shape == (5, EMBED) and batch.dtype == torch.float32
    torch.testing.assert_close(batch.norm(dim=-1), torch.ones(5))
    alone = torch.cat([prior.sample(text[[i]], seeds=[seeds[i]], guidance=guidance) for i in range(5)])
    torch.testing.assert_close(alone, batch, atol=1e-4, rtol=0)
    order = [3, 1, 4, 0, 2]
    shuffled = prior.sample(text[order], seeds=[seeds[i] for i in order], guidance=guidance)
    torch.testing.assert_close(shuffled, batch[order], atol=1e-4, rtol=0)
    assert torch.equal(batch, prior.sample(text, seed=11, guidance=guidance))  # seed + i
    assert not torch.allclose(batch, prior.sample(text, seed=12, guidance=guidance))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun"])
def test_every_sampler_repeats(sampler):
    prior, text = build("diffusion"), make_text(2)
    first = prior.sample(text, sampler=sampler, guidance=1.5)
    assert torch.equal(first, prior.sample(text, sampler=sampler, guidance=1.5))
    assert torch.isfinite(first).all()


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_off_in_sampling_and_the_mode_is_restored(kind):
    prior, text = build(kind, dropout=0.5), make_text(2)
    prior.train()
    torch.testing.assert_close(prior.sample(text), prior.sample(text), rtol=0, atol=0)
    assert prior.training and prior.net.training


@pytest.mark.parametrize("kind", KINDS)
def test_more_candidates_come_nearer_to_the_text(kind):
    prior, text = build(kind), make_text(4)
    one, many = prior.sample(text, num_candidates=1), prior.sample(text, num_candidates=6)
    assert text.pooled is not None
    gain = ((many - one) * text.pooled).sum(-1)
    assert (gain >= 0).all() and gain.max() > 1e-3  # candidate 0 is the same draw in both


def test_pick_best_takes_the_highest_dot_product_of_its_row():
    pooled = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    candidates = torch.tensor([[0.0, 2.0], [3.0, 4.0], [0.0, 5.0], [9.0, 1.0]])
    expected = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    torch.testing.assert_close(pick_best(candidates, pooled, 2), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_one_is_off_and_negative_replaces_the_null(kind):
    prior, text = build(kind), make_text(3)
    plain = prior.sample(text)
    assert torch.equal(plain, prior.sample(text, guidance=1.0, negative=make_text(3, 9)))
    null = prior.sample(text, guidance=3.0)
    negative = prior.sample(text, guidance=3.0, negative=make_text(1, 9))
    itself = prior.sample(text, guidance=3.0, negative=text)  # uncond + w (cond - uncond) = cond
    assert not torch.allclose(null, plain) and not torch.allclose(negative, null)
    torch.testing.assert_close(itself, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_reported(kind):
    prior, text, seen = build(kind), make_text(2), []
    prior.sample(text, on_step=lambda step, total, embed: seen.append((step, total, embed.shape)))
    total = 6 if kind == "diffusion" else 5
    assert seen == [(i, total, (4, EMBED)) for i in range(total)]  # 2 rows of 2 candidates


def test_predictions_are_clamped_to_ten_standard_deviations():
    prior, text = build("diffusion"), make_text(2)
    prior.net.output.bias.data.fill_(1000.0)
    expected = F.normalize(prior.statistics.mean + 10 * prior.statistics.std, dim=-1)
    torch.testing.assert_close(prior.sample(text), expected.expand(2, -1))


def test_draw_inverts_the_distribution_function():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    for u, bucket in [(0.0, 0), (0.099, 0), (0.101, 1), (0.299, 1), (0.301, 2), (0.601, 3), (0.9999, 3)]:
        assert draw(logits, torch.tensor([u], dtype=torch.float64)).item() == bucket
    assert draw(logits, torch.tensor([0.0]), top_k=2).item() == 2  # the smaller two are out
    u = 0.5 + 0.5 * torch.rand(500, generator=torch.Generator().manual_seed(0))
    assert draw(logits.expand(500, -1), u).min().item() == 2  # the top half of the mass: buckets 2 and 3


def test_dot_product_token_is_drawn_from_its_top_half():
    prior, text = build("autoregressive"), make_text(40)
    prior.net.dot_head.weight.data.zero_()
    prior.net.dot_head.bias.data.zero_()  # uniform over 32 buckets
    drawn: list[Tensor] = []
    prior.net.dot.register_forward_pre_hook(lambda module, arguments: drawn.append(arguments[0]))
    prior.sample(text)
    assert drawn[0].shape == (80,) and drawn[0].min() >= 16 and len(drawn[0].unique()) > 8


# -- learning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "guess"])
def test_learns_a_conditional_gaussian(kind):
    """Two prompts, each with a Gaussian cloud of embeddings: samples have the mean and the spread of the
    cloud of their own prompt."""
    torch.manual_seed(0)
    sizes = {**SIZES, "best_of": 1}
    if kind != "autoregressive":
        width = 16 if kind == "guess" else 0
        prior, steps, rate = DiffusionPrior(PriorConfig(**sizes, guess_width=width)), 600, 4e-3
    else:
        config = AutoregressiveConfig(**sizes, codes=EMBED, buckets=16, dot_quantile=0.0)
        prior, steps, rate = AutoregressivePrior(config), 300, 1e-2
    text, centres = make_text(2), unit(2, seed=3)
    which = torch.randint(0, 2, (2048,))
    data = F.normalize(centres[which] + 0.1 * torch.randn(2048, EMBED), dim=-1)
    prior.fit_statistics(data)
    optimizer = torch.optim.Adam(prior.parameters(), rate, betas=(0.9, 0.95))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        rows = torch.randint(0, len(data), (96,))
        keep, t = torch.rand(96) < 0.9, torch.rand(96, dtype=torch.float64)
        mean_loss = prior(data[rows], text[which[rows]], keep, t, torch.randn(96, EMBED)).mean()
        if kind == "guess":
            mean_loss = mean_loss + prior.guess_loss(data[rows], text[which[rows]])
        optimizer.zero_grad()
        mean_loss.backward()
        optimizer.step()

    for i in range(2):
        cloud = data[which == i]
        samples = prior.sample(text[[i]].repeat(256), seed=100)
        assert (samples.mean(0) - cloud.mean(0)).norm() < 0.08  # the clouds are about 1.4 apart
        spread = (samples - samples.mean(0)).square().sum(-1).mean().sqrt()
        truth = (cloud - cloud.mean(0)).square().sum(-1).mean().sqrt()  # about 0.26
        assert math.isclose(spread, truth, rel_tol=0.3)


# -- bad input and storage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(num_candidates=0), "num_candidates"),
        (dict(guidance=math.nan), "guidance"),
        (dict(guidance=math.inf), "guidance"),
        (dict(seed=-1), "seed"),
        (dict(seeds=[1]), "seed"),
        (dict(negative=make_text(3)), "negative"),
    ],
)
def test_impossible_settings_get_one_line(kind, settings, words):
    settings = {"guidance": 2.0, **settings}
    with pytest.raises(InputError, match=words) as error:
        build(kind).sample(make_text(2), **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("diffusion", dict(steps=0), "steps"),
        ("diffusion", dict(sampler="dpmpp_3m"), "did you mean 'dpmpp_2m'"),
        ("autoregressive", dict(temperature=0.0), "temperature"),
        ("autoregressive", dict(top_k=0), "top_k"),
    ],
)
def test_impossible_settings_of_one_prior(kind, settings, words):
    with pytest.raises(InputError, match=words):
        build(kind).sample(make_text(2), **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_does_not_fit_gets_one_line(kind):
    prior, text = build(kind), make_text(2)
    tokens = text.sequences[0]
    wide = replace(text, sequences=(Tokens(torch.randn(2, LENGTH, TEXT_DIM + 1), tokens.mask),))
    long = replace(text, sequences=(Tokens(tokens.states.repeat(1, 2, 1), tokens.mask.repeat(1, 2)),))
    for bad, words in [
        (wide, f"width {TEXT_DIM}, got {TEXT_DIM + 1}"),
        (long, f"at most {LENGTH} text tokens, got {2 * LENGTH}"),
        (replace(text, pooled=None), "no CLIP embedding"),
        (replace(text, pooled=torch.randn(2, EMBED + 1)), f"width {EMBED}, got {EMBED + 1}"),
    ]:
        for use in (lambda bad=bad: prior.sample(bad), lambda bad=bad: loss(prior, bad)):
            with pytest.raises(InputError, match=words):
                use()


@pytest.mark.parametrize("kind", KINDS)
def test_config_and_weights_rebuild_the_prior(kind):
    prior, text = build(kind), make_text(2)
    config = from_dict(prior.config_class, to_dict(prior.config))
    assert config == prior.config
    again = type(prior)(config)
    again.load_state_dict(prior.state_dict())  # statistics included
    assert torch.equal(again.sample(text), prior.sample(text))


def test_configs_refuse_what_cannot_be_built():
    for config, words in [
        (lambda: PriorConfig(width=30, heads=4), "multiple of heads"),
        (lambda: PriorConfig(prediction="edm"), "edm"),
        (lambda: AutoregressiveConfig(embed_dim=8, codes=9), "codes"),
        (lambda: AutoregressiveConfig(dot_quantile=1.0), "dot_quantile"),
    ]:
        with pytest.raises(ValueError, match=words):
            config()


# -- the guess -----------------------------------------------------------------------------------------------


def test_a_guess_depends_on_its_own_text_and_a_dropped_one_is_the_mean():
    prior, text = build("diffusion", guess_width=16), make_text(3)
    whole = prior.net.prepare(text).guess
    for row in range(3):
        torch.testing.assert_close(prior.net.prepare(text[[row]]).guess[0], whole[row])
    torch.testing.assert_close(prior.net.prepare(change(text, 5)).guess, whole)  # padding
    assert not torch.allclose(prior.net.prepare(change(text, 1)).guess, whole)
    keep = torch.tensor([True, False, True])
    dropped = prior.net.prepare(text, keep).guess
    assert torch.equal(dropped[1], torch.zeros(EMBED)) and torch.equal(dropped[keep], whole[keep])


def test_an_untrained_prior_draws_its_guess():
    prior, text = DiffusionPrior(PriorConfig(**SIZES, guess_width=16)), make_text(4)
    prior.fit_statistics(unit(64))
    randomise(prior.net.guess)
    guess = F.normalize(prior.statistics.inverse(prior.net.prepare(text).guess.clamp(-10, 10)), dim=-1)
    torch.testing.assert_close(prior.sample(text, steps=4), guess)


def test_a_guess_learns_from_its_own_error_alone():
    prior, text = build("diffusion", guess_width=16), make_text(LOSS_ROWS)
    loss(prior, text).sum().backward()
    assert all(p.grad is None for p in prior.net.guess.parameters())
    assert prior.net.guess_input.weight.grad.abs().max() > 0
    mean = Tokens(*mean_token(text.sequences[0]))
    target = unit(LOSS_ROWS, 5)
    whole = prior.guess_loss(target, text)
    torch.testing.assert_close(prior.guess_loss(target, TextEmbedding((mean,))), whole)
    expected = (prior.net.prepare(text).guess - prior.statistics(target)).square().mean()
    torch.testing.assert_close(whole, expected)
    whole.backward()
    assert all(p.grad.abs().max() > 0 for p in prior.net.guess.parameters())


def mean_token(tokens: Tokens) -> tuple[Tensor, Tensor]:
    mask = tokens.mask[..., None]
    mean = (tokens.states * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    return mean, torch.ones(len(mean), 1, dtype=torch.bool)


def test_a_guess_is_of_x0_alone():
    with pytest.raises(ValueError, match="guess_width with prediction 'v': expected x0"):
        PriorConfig(**SIZES, guess_width=16, prediction="v")
    with pytest.raises(ValueError, match="guess_width -1: expected an integer of at least 0"):
        PriorConfig(**SIZES, guess_width=-1)
