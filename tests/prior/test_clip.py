"""The CLIP: its loss against hand-worked cases, its vision tower against open_clip's own, and its storage."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.checkpoint import load_tensors
from cascade.conditioning import TextEmbedding, Tokens
from cascade.config import from_dict, to_dict
from cascade.errors import InputError
from prior import CLIP, ClipConfig, OpenCLIP, OpenClipConfig
from prior.clip import contrastive_loss

TEXT_DIM, LENGTH, EMBED = 12, 6, 8
CONFIG = ClipConfig(
    embed_dim=EMBED,
    image_px=16,
    patch=8,
    width=16,
    layers=2,
    heads=2,
    text_dim=TEXT_DIM,
    text_width=16,
    text_layers=1,
    text_heads=2,
)


@pytest.fixture
def clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(CONFIG)


def make_text(rows: int, seed: int = 0) -> TextEmbedding:
    states = torch.randn(rows, LENGTH, TEXT_DIM, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(LENGTH) < torch.tensor([1 + i % LENGTH for i in range(rows)])[:, None]
    return TextEmbedding((Tokens(states, mask),))


def pictures(rows: int, px: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(rows, 3, px, px, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# -- loss ----------------------------------------------------------------------------------------------------


def test_loss_without_groups_is_clips_cross_entropy():
    image = F.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    text = F.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(2)), dim=-1)
    logits = 7.0 * image @ text.T
    labels = torch.arange(5)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(contrastive_loss(image, text, torch.tensor(7.0)), expected)
    apart = contrastive_loss(image, text, torch.tensor(7.0), torch.tensor([4, 9, 1, 0, 2]))
    torch.testing.assert_close(apart, expected)


def test_equal_groups_are_positives_of_each_other():
    """Rows 0 and 2 are of one group, so each of them has two right answers, of half the weight."""
    image = F.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    text = F.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(2)), dim=-1)
    logits = 5.0 * image @ text.T
    expected = torch.zeros(())
    for side in (logits, logits.T):
        log_p = side.log_softmax(dim=1)
        rows = (log_p[0, 0] + log_p[0, 2]) / 2, log_p[1, 1], (log_p[2, 0] + log_p[2, 2]) / 2
        expected = expected - sum(rows) / 3 / 2
    loss = contrastive_loss(image, text, torch.tensor(5.0), torch.tensor([7, 3, 7]))
    torch.testing.assert_close(loss, expected)


def test_loss_is_the_same_in_any_order(clip):
    text, images, group = make_text(6), pictures(6), torch.tensor([0, 1, 1, 2, 3, 0])
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    expected = clip.loss(images, text, group)
    torch.testing.assert_close(clip.loss(images[order], text[order], group[order]), expected)


def test_logit_scale_is_capped_at_one_hundred(clip):
    clip.logit_scale.data.fill_(9.0)
    high = clip(pictures(4), make_text(4))
    clip.logit_scale.data.fill_(torch.tensor(100.0).log())
    torch.testing.assert_close(clip(pictures(4), make_text(4)), high)


@pytest.mark.parametrize("autocast", [False, True])
def test_learns_to_tell_eight_pairs_apart(clip, autocast):
    text, images = make_text(8), pictures(8)
    optimizer = torch.optim.Adam(clip.parameters(), 1e-2)
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = clip(images, text)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in clip.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        optimizer.step()
    similarity = clip.encode_image(images) @ clip.encode_text(text).T
    assert (similarity.argmax(1) == torch.arange(8)).all() and (similarity.argmax(0) == torch.arange(8)).all()


# -- text ----------------------------------------------------------------------------------------------------


def test_text_embeddings_are_unit_vectors_that_ignore_padding(clip):
    text = make_text(4)  # 1, 2, 3 and 4 real tokens
    tokens = text.sequences[0]
    embeds = clip.encode_text(text)
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(4))
    filled = torch.where(tokens.mask[..., None], tokens.states, torch.tensor(50.0))
    torch.testing.assert_close(clip.encode_text(TextEmbedding((Tokens(filled, tokens.mask),))), embeds)
    turned = tokens.states.clone()
    turned[:, 0] = -turned[:, 0]
    changed = clip.encode_text(TextEmbedding((Tokens(turned, tokens.mask),)))
    assert ((changed - embeds).norm(dim=-1) > 1e-3).all()


def test_text_of_another_encoder_gets_one_line(clip):
    wide = TextEmbedding((Tokens(torch.randn(1, LENGTH, 20), torch.ones(1, LENGTH, dtype=torch.bool)),))
    with pytest.raises(InputError, match="clip: expected text tokens of width 12, got 20"):
        clip.encode_text(wide)
    second = CLIP(replace(CONFIG, text_sequence=1))
    with pytest.raises(InputError, match="at least 2 token sequences, got 1"):
        second.encode_text(make_text(1))
    pair = TextEmbedding((*wide.sequences, *make_text(1).sequences))
    assert second.encode_text(pair).shape == (1, EMBED)


def test_sampling_imports_no_open_clip():
    """In a process of its own: `import prior` is light, and text is encoded without the vision tower."""
    code = (
        "import sys, prior\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\n"
        "from cascade.conditioning import TextEmbedding, Tokens\n"
        "clip = prior.CLIP(prior.ClipConfig(width=64, layers=1, text_width=64, text_layers=1))\n"
        "clip.encode_text(TextEmbedding((Tokens(torch.randn(1, 4, 384), torch.ones(1, 4).bool()),)))\n"
        "assert clip.state_dict() and 'open_clip' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# -- pictures ------------------------------------------------------------------------------------------------


def test_vision_tower_is_open_clips(clip):
    """The same numbers as open_clip's VisionTransformer built by itself and given the same weights."""
    from open_clip.transformer import VisionTransformer

    reference = VisionTransformer(16, 8, 16, 2, 2, 4.0, output_dim=EMBED, pool_type="avg").eval()
    weights = {n.removeprefix("vision."): t for n, t in clip.state_dict().items() if n.startswith("vision.")}
    reference.load_state_dict(weights, strict=True)
    images = pictures(3)
    expected = F.normalize(reference(images), dim=-1)
    torch.testing.assert_close(clip.eval().encode_image(images), expected)


def test_building_the_tower_keeps_every_parameter_and_name(clip):
    parameters, names = {id(p) for p in clip.parameters()}, list(clip.state_dict())
    clip.build_vision()
    assert {id(p) for p in clip.parameters()} == parameters
    assert set(clip.state_dict()) == set(names)
    tower = clip.vision
    clip.build_vision()
    assert clip.vision is tower


def test_pictures_of_any_size_are_antialiased(clip):
    embeds = clip.encode_image(pictures(2, 40))
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(2))
    stripes = torch.tensor([-1.0, 1.0, 1.0, -1.0]).repeat(16).expand(1, 3, 64, 64)
    # one period a pixel of 16: an interpolation without a filter reads the bright half only
    grey = clip.encode_image(torch.zeros(1, 3, 16, 16))
    torch.testing.assert_close(clip.encode_image(stripes), grey, atol=0.05, rtol=0)


# -- storage -------------------------------------------------------------------------------------------------


def test_weights_rebuild_the_clip_whether_or_not_the_tower_was_built(clip):
    images, text = pictures(2), make_text(2)
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    expected = clip.eval().encode_image(images)
    for state in (before, clip.state_dict()):
        again = CLIP(from_dict(ClipConfig, to_dict(CONFIG))).eval()
        load_tensors(again, state, "clip")
        torch.testing.assert_close(again.encode_image(images), expected)
        torch.testing.assert_close(again.encode_text(text), clip.encode_text(text))


def test_a_missing_vision_weight_is_never_ignored(clip):
    state = clip.state_dict()
    del state["vision.conv1.weight"]
    with pytest.raises(InputError, match="missing tensor vision.conv1.weight"):
        load_tensors(CLIP(CONFIG), state, "clip")


def test_configs_refuse_what_cannot_be_built():
    with pytest.raises(ValueError, match="multiple of patch"):
        ClipConfig(image_px=60)
    with pytest.raises(ValueError, match="multiple of heads"):
        ClipConfig(text_width=30)


# -- any open_clip model -------------------------------------------------------------------------------------

MODEL: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": EMBED,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]},
}


def test_open_clip_model_from_a_folder(tmp_path):
    import open_clip
    from safetensors.torch import save_file

    (tmp_path / "open_clip_config.json").write_text(json.dumps(MODEL))
    name = f"local-dir:{tmp_path}"
    torch.manual_seed(0)
    model: Any = open_clip.create_model(name).eval()
    config = OpenClipConfig(model=name, embed_dim=EMBED)
    with pytest.raises(InputError, match="cannot load clip"):  # open_clip alone would go on at random
        OpenCLIP(config).encode_image(pictures(1))

    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    clip = OpenCLIP(config)
    images = pictures(2)
    mean, std = (torch.tensor(MODEL["preprocess_cfg"][key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        expected = model.encode_image(((images + 1) / 2 - mean) / std, normalize=True)
    torch.testing.assert_close(clip.encode_image(images), expected)
    assert clip.encode_image(pictures(1, 40)).shape == (1, EMBED)
    assert list(clip.state_dict()) == ["logit_scale"] and not any(p.requires_grad for p in clip.parameters())

    pooled = torch.randn(2, EMBED) * 3
    text = replace(make_text(2), pooled=pooled)
    torch.testing.assert_close(clip.encode_text(text), F.normalize(pooled, dim=-1))
    assert torch.isfinite(clip.loss(images, text))


def test_open_clip_errors_are_one_line():
    clip = OpenCLIP(OpenClipConfig(model="ViT-B-33", pretrained="laion2b", embed_dim=EMBED))
    with pytest.raises(InputError, match="ViT-B-33") as error:
        clip.encode_image(pictures(1))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="got none"):
        clip.encode_text(make_text(1))
    with pytest.raises(InputError, match="got width 5"):
        clip.encode_text(replace(make_text(1), pooled=torch.randn(1, 5)))
