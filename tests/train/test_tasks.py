"""What each stage trains and writes, and the model folder that comes of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cascade import Cascade
from cascade.augment import condition_lowres, residual_base, residual_variance
from cascade.checkpoint import load_component
from cascade.errors import InputError
from cascade.text.pair import PairEncoder
from prior import DiffusionPrior
from tests.conftest import EMBED, ToyEncoder
from train.batches import conditioning_of, guess_part
from train.components import assemble, load_clip, open_images
from train.data import open_pictures
from train.recipe import Recipe
from train.tasks import PriorTask, StageTask, make_task

Tiny = Callable[..., Recipe]


def forward(task) -> torch.Tensor:
    return task(task.make([0, 1, 2, 3], [0, 1, 2, 3]))


def test_the_run_is_read_and_sampled_as_a_model(trained: Path) -> None:
    pipe = Cascade.from_pretrained(trained / "model")
    assert list(pipe.stages) == ["base", "sr256", "sr1024"]
    assert pipe.prior is not None and pipe.clip is not None
    out = pipe("red apple, noto style", seed=1)
    assert out.images[0].size == (64, 64)
    assert out.image_embed is not None and out.image_embed.shape == (1, EMBED)


def test_the_model_holds_the_averages_in_bf16(trained: Path) -> None:
    average = load_file(trained / "base-training" / "state-0000000024" / "ema.safetensors")
    component = load_component(trained / "base", "Stage").tensors
    model = load_component(trained / "model" / "base", "Stage").tensors
    for name, tensor in average.items():
        assert torch.equal(component[name], tensor)
        assert torch.equal(model[name], tensor.bfloat16())


def test_sampling_settings_are_those_of_the_recipe_of_today(
    trained: Path, tiny: Tiny, tmp_path: Path
) -> None:
    for name in ("clip", "base"):
        shutil.copytree(trained / name, tmp_path / name)
    recipe = tiny("base.stage.sampling.steps=1", "prior.model.steps=3", "prior.model.guidance=1.5")
    pipe = Cascade.from_pretrained(assemble(recipe, tmp_path))
    assert list(pipe.stages) == ["base"] and pipe.prior is None
    assert pipe.stages["base"].config.sampling.steps == 1
    shutil.copytree(trained / "prior", tmp_path / "prior")
    prior = Cascade.from_pretrained(assemble(recipe, tmp_path)).prior
    assert isinstance(prior, DiffusionPrior) and (prior.config.steps, prior.config.guidance) == (3, 1.5)


def test_nothing_to_assemble(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no trained stage in .*: train --stage base first"):
        assemble(tiny(), tmp_path)


def test_embeddings_of_every_picture_are_those_of_the_trained_clip(
    trained: Path, tiny: Tiny, pictures
) -> None:
    images, clip = open_images(tiny(), trained, pictures), load_clip(tiny(), trained)
    x = torch.stack([pictures.resized(i, 16) for i in range(14)]).float() / 127.5 - 1
    expected = clip.encode_image(x)
    assert torch.allclose(torch.stack([images(i) for i in range(14)]), expected, atol=1e-5)
    assert torch.allclose(images.sample(), expected[pictures.train], atol=1e-5)


@pytest.mark.parametrize("stage", ["prior", "base"])
def test_later_stages_ask_for_the_clip_first(tiny: Tiny, tmp_path: Path, stage: str) -> None:
    with pytest.raises(InputError, match="train --stage clip first"):
        make_task(tiny(), tmp_path, stage)


def test_each_choice_of_pictures_has_embeddings_of_its_own(tiny: Tiny, trained: Path, pictures) -> None:
    part = tiny("data.styles=[noto]")
    one, all_ = (open_images(r, trained, open_pictures(r.data)) for r in (part, tiny()))
    assert one.folder != all_.folder
    assert one.cache is not None and all_.cache is not None and (len(one.cache), len(all_.cache)) == (7, 14)
    assert one.pictures.name(3) == all_.pictures.name(3) and torch.equal(one(3), all_(3))


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("clip", ["clip.model.text_dim=8"], r"clip.model.text_dim 8, text_sequence 0: expected .*\[24\]"),
        ("clip", ["clip.model.text_sequence=1"], "clip.model.text_dim 24, text_sequence 1: expected"),
        ("prior", ["prior.model.text_dim=8"], "prior.model.text_dim 8, text_sequence 0: expected"),
        (
            "prior",
            ["prior.model.text_length=5"],
            "text_length 5: expected at least the text encoder's 6 tokens",
        ),
        ("sr256", ["sr256.stage.unet.text_dims=[8]"], r"text_dims \[8\]: expected the text encoder's \[24\]"),
    ],
)
def test_a_text_encoder_of_another_width_is_refused(
    tiny: Tiny, trained: Path, stage: str, settings: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make_task(tiny(*settings), trained, stage)
    assert "\n" not in str(caught.value)


def test_the_frozen_clip_stays_frozen(tiny: Tiny, trained: Path) -> None:
    task = make_task(tiny(), trained, "prior")
    assert isinstance(task, PriorTask)
    task.train()
    assert task.network.training and not task.clip.training
    forward(task).mean().backward()
    assert all(p.grad is None for p in task.clip.parameters())
    assert all(p.grad is not None for p in task.network.parameters())


def test_every_level_of_a_residual_stage_counts_alike(tiny: Tiny, trained: Path) -> None:
    """An untrained stage guesses a residual of 0: where x_t is all noise its plain loss is the residual's
    mean square over sigma_data^2, which grows from level to level, and the weight takes that growth out."""
    diffusion = "{prediction: edm, sigma_data: 0.2, weighting: none}"
    settings = ["sr256.stage.augment.residual=true", f"sr256.stage.diffusion={diffusion}"]
    task = make_task(tiny(*settings), trained, "sr256")
    assert isinstance(task, StageTask)
    batch = task.make([0, 0, 0], [0, 0, 0])
    level = torch.tensor([0.0, 0.5, 1.0])
    batch |= {"t": torch.ones(3, dtype=torch.float64), "aug_level": level}
    cfg, size = task.cfg.augment, batch["x"].shape[-2:]
    assert cfg is not None
    lowres = condition_lowres(batch["lowres"], tuple(size), cfg, level, batch["aug_noise"])
    residual = batch["x"] - residual_base(lowres, level, cfg)
    loss = residual.square().flatten(1).mean(1) / (0.2**2 + residual_variance(level, cfg))
    with torch.no_grad():
        assert torch.allclose(task(batch), loss.float(), rtol=1e-3)


@pytest.mark.parametrize(("schedule", "told"), [("cosine", 300.5), ("discrete_linear", 300.0)])
def test_a_network_is_told_its_augmentation_level_as_in_sampling(
    tiny: Tiny, trained: Path, schedule: str, told: float
) -> None:
    """On a discrete grid that is the step that is used."""
    task = make_task(tiny(f"sr256.stage.augment.schedule={schedule}"), trained, "sr256")
    assert isinstance(task, StageTask) and task.stage.unet.condition.aug is not None
    seen = []
    task.stage.unet.condition.aug.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = task.make([0, 1], [0, 1]) | {"aug_level": torch.full((2,), 0.3005)}
    task(batch)
    assert seen[0].tolist() == pytest.approx([told, told])


def test_statistics_are_of_the_training_pictures(tiny: Tiny, trained: Path, pictures) -> None:
    task = make_task(tiny(), trained, "prior")
    images = open_images(tiny(), trained, pictures)
    embeds = torch.stack([images(i) for i in pictures.train])
    assert torch.allclose(task.network.get_buffer("statistics.mean"), embeds.mean(0), atol=1e-6)


def test_a_stage_of_two_encoders_side_by_side(
    tiny: Tiny, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sequence reaches the network, and each has a null of its own."""
    pair = PairEncoder([ToyEncoder(), ToyEncoder(8)])
    monkeypatch.setattr("train.encoded.load_text_encoder", lambda reference: pair)
    unet = ("sr256.stage.unet.text_dims=[24, 8]", "sr256.stage.unet.context_dim=16")
    task = make_task(tiny(*unet, "sr256.train.text_drop=0.5", "text={kind: pair}"), trained, "sr256")
    assert isinstance(task, StageTask)
    for parameter in task.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter)  # zero at first: nothing would show
    batch = task.make([0, 1, 2, 3], [0, 1, 2, 3])
    whole = task(batch)
    for column in range(2):
        changed = batch["keep_text"].clone()
        changed[:, column] = ~changed[:, column]
        assert (task(batch | {"keep_text": changed}) != whole).all()


def test_losses_are_one_a_sample_and_one_a_batch_for_the_clip(tiny: Tiny, trained: Path) -> None:
    assert forward(make_task(tiny(), trained, "clip")).shape == (1,)
    for stage in ("prior", "base", "sr256", "sr1024"):
        losses = forward(make_task(tiny(), trained, stage))
        assert losses.shape == (4,) and losses.dtype == torch.float32


def test_the_clip_and_the_prior_have_no_grid(tiny: Tiny, trained: Path) -> None:
    for stage in ("clip", "prior"):
        task = make_task(tiny(), trained, stage)
        assert task.grid(task.network.state_dict()) is None


def test_identity_is_what_a_state_depends_on(tiny: Tiny, trained: Path) -> None:
    def identity(stage: str, *settings: str) -> dict:
        return make_task(tiny(*settings), trained, stage).identity()

    assert identity("base") == identity(
        "base", "base.stage.sampling.steps=9", "base.stage.diffusion.weighting=none"
    )
    assert identity("base") != identity("base", "base.stage.diffusion.prediction=eps")
    assert identity("prior") == identity("prior", "prior.model.steps=9", "prior.model.best_of=1")
    assert identity("prior") != identity("prior", "prior.model.heads=1")


GUESS = ["base.stage.unet.position_grid=16", "base.stage.unet.guess_width=8", "base.train.guess_batch=16"]


def test_a_guess_learns_from_pictures_of_its_own_and_the_reported_loss_stays(
    tiny: Tiny, trained: Path
) -> None:
    plain, task = (make_task(tiny(*s), trained, "base") for s in (GUESS, GUESS))
    assert isinstance(task, StageTask) and task.stage.unet.guess is not None
    plain.load_state_dict(task.state_dict())
    batch = task.make([0, 1, 2, 3], [0, 1, 2, 3])
    assert len(batch["x"]) == 4 and len(batch["guess_x"]) == len(batch["guess_image_embed"]) == 8
    own = {name: x for name, x in batch.items() if not name.startswith("guess_")}
    losses = task(batch)
    assert torch.equal(losses, plain(own))
    losses.mean().backward()
    guess = task.stage.unet.guess
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in guess.hidden.parameters())
    assert all(p.grad is None for p in plain.stage.unet.guess.parameters())


def test_a_guess_nears_its_pictures(tiny: Tiny, trained: Path) -> None:
    task = make_task(tiny(*GUESS), trained, "base")
    assert isinstance(task, StageTask) and task.stage.unet.guess is not None
    guess, part = task.stage.unet.guess, guess_part(task.make([0, 1, 2, 3], [0, 1, 2, 3]))
    optimizer = torch.optim.Adam(guess.parameters(), lr=1e-2)
    errors = []
    for _ in range(60):
        errors.append(task._guess_loss(part))
        optimizer.zero_grad()
        errors[-1].backward()
        optimizer.step()
    assert errors[-1] < 0.3 * errors[0]


def test_a_prior_learns_its_guess_from_embeddings_of_its_own(tiny: Tiny, trained: Path) -> None:
    settings = ["prior.model.guess_width=8", "prior.train.guess_batch=16"]
    task = make_task(tiny(*settings), trained, "prior")
    assert isinstance(task.network, DiffusionPrior) and task.network.net.guess is not None
    batch = task.make([0, 1, 2, 3], [0, 1, 2, 3])
    assert len(batch["noise"]) == 4 and len(batch["guess_image_embed"]) == len(batch["guess_states0"]) == 8
    own = {name: x for name, x in batch.items() if not name.startswith("guess_")}
    losses = task(batch)
    assert torch.equal(losses, task(own))
    losses.mean().backward()
    assert task.network.net.guess.output.weight.grad.abs().max() > 0


@pytest.mark.parametrize("stage", ["clip", "sr256"])
def test_siblings_are_for_stages_that_take_stored_embeddings(tiny: Tiny, trained: Path, stage: str) -> None:
    message = f"{stage}.train.image_siblings 0.5: expected 0, or texts, image embeddings that are stored"
    with pytest.raises(InputError, match=message):
        make_task(tiny(f"{stage}.train.image_siblings=0.5"), trained, stage)


FINE = ["base.stage.unet.patch=4", "base.stage.unet.fine_channels=[8, 8]"]


def test_a_fine_network_learns_beside_the_base_from_a_loss_of_its_own(tiny: Tiny, trained: Path) -> None:
    """The reported loss and the other parameters' gradients are those of a batch that does not teach it."""
    task, plain = (make_task(tiny(*FINE), trained, "base") for _ in range(2))
    assert isinstance(task, StageTask) and task.stage.unet.fine is not None
    plain.load_state_dict(task.state_dict())
    batch = task.make([0, 1, 2, 3], [0, 1, 2, 3])
    assert batch["fine_noise"].shape == batch["x"].shape and batch["fine_draws"].shape == (4, 3)
    losses = task(batch)
    others = plain({name: x for name, x in batch.items() if not name.startswith("fine_")})
    assert torch.equal(losses, others)
    losses.mean().backward()
    others.mean().backward()
    expected = {name: p.grad for name, p in plain.network.named_parameters()}
    for name, parameter in task.network.named_parameters():
        assert (expected[name] is None) == name.startswith("fine."), name
        assert parameter.grad is not None, name
        if not name.startswith("fine."):
            assert torch.equal(parameter.grad, expected[name]), name
    out = dict(task.stage.unet.fine.named_parameters())["net.conv_out.weight"]
    assert out.grad is not None and out.grad.abs().max() > 0


def test_a_fine_network_sees_own_estimates_without_noise_and_pictures_with_it(
    tiny: Tiny, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tiny(*FINE), trained, "base")
    assert isinstance(task, StageTask) and task.stage.unet.fine is not None
    batch = task.make(list(range(8)), list(range(8)))
    batch["t"] = torch.tensor([0.2, 0.9] * 4)  # estimates of the noisiest levels are no pictures
    shown: list[torch.Tensor] = []
    loss = task.stage.unet.fine.loss

    def kept(x: torch.Tensor, noise: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        shown.extend((x, noise))
        return loss(x, noise, *others)

    monkeypatch.setattr(task.stage.unet.fine, "loss", kept)
    estimate = 2 * batch["x"].flip(0)
    task._fine_loss(batch, conditioning_of(batch, None), estimate)
    x, noise = shown
    assert torch.allclose(x[::2], estimate[::2].clamp(-1, 1), atol=1e-6)
    unit = (x - batch["x"])[1::2] / noise[1::2]
    assert torch.allclose(unit, batch["fine_noise"][1::2], atol=1e-4)


def test_a_fine_network_betters_the_estimates_of_its_base(tiny: Tiny, trained: Path) -> None:
    task = make_task(tiny(*FINE), trained, "base")
    assert isinstance(task, StageTask) and task.stage.unet.fine is not None
    optimizer = torch.optim.Adam(task.stage.unet.fine.parameters(), lr=1e-2)
    batch = task.make(list(range(8)), list(range(8)))
    cond = conditioning_of(batch, None)
    errors = []
    for _ in range(40):
        errors.append(task._fine_loss(batch, cond, batch["x"]).mean())
        optimizer.zero_grad()
        errors[-1].backward()
        optimizer.step()
    assert errors[-1] < 0.6 * errors[0]
