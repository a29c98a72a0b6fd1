import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade.errors import InputError
from cascade.text import load_text_encoder

open_clip = pytest.importorskip("open_clip")
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
PROMPTS = ["a red apple", "Cat!", ""]


@pytest.fixture(scope="module", params=["CLIP", "CustomTextCLIP"])
def saved(request, tmp_path_factory):
    """A folder in open_clip's hub format and the network in it, in both layouts of tensor names."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    cls = getattr(open_clip.model, request.param)
    model = cls(embed_dim=8, vision_cfg=VISION, text_cfg=TEXT, quick_gelu=True).eval()
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    config = {"model_cfg": {"embed_dim": 8, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder, model


def test_matches_open_clip(saved):
    folder, model = saved
    encoder = load_text_encoder({"kind": "open_clip", "name": str(folder)})
    assert encoder.dims == (16,) and encoder.max_length == 12
    text = encoder(PROMPTS)
    ids = open_clip.tokenizer.SimpleTokenizer(context_length=12)(PROMPTS)
    with torch.no_grad():
        projected = model.encode_text(ids)
        unit = model.encode_text(ids, normalize=True)
    torch.testing.assert_close(encoder.project(PROMPTS), projected, atol=1e-5, rtol=0)
    torch.testing.assert_close(text.pooled, unit, atol=1e-5, rtol=0)
    assert text.sequences[0].mask.sum(1).tolist() == [5, 4, 2]  # start, words, end
    # the sequence is after the final norm, and its end-of-text state is what the projection reads
    ends = text.sequences[0].states[torch.arange(3), text.sequences[0].mask.sum(1) - 1]
    tower = model.text if hasattr(model, "text") else model
    torch.testing.assert_close(ends @ tower.text_projection.detach(), projected, atol=1e-5, rtol=0)


def test_truncation_keeps_the_end_token(saved, caplog):
    encoder = load_text_encoder({"kind": "open_clip", "name": str(saved[0])})
    with caplog.at_level(logging.WARNING, "cascade"):
        tokens = encoder(["red apple " * 20]).sequences[0]
    assert "42 tokens" in caplog.text and bool(tokens.mask.all())


def test_reference_round_trip(saved, tmp_path):
    folder, _ = saved
    encoder = load_text_encoder({"kind": "open_clip", "name": folder.name}, folder=folder.parent)
    reference = encoder.reference()
    assert set(reference["sha256"]) == {"open_clip_config.json", "open_clip_model.safetensors"}
    again = load_text_encoder(reference, folder=tmp_path)
    assert torch.equal(again(PROMPTS).pooled, encoder(PROMPTS).pooled)


def test_in_a_pair(saved):
    one = {"kind": "open_clip", "name": str(saved[0])}
    text = load_text_encoder({"kind": "pair", "encoders": [one, one]})(PROMPTS)
    assert len(text.sequences) == 2 and text.pooled.shape == (3, 8)


def test_missing_tensor_is_refused(saved, tmp_path):
    folder, _ = saved
    tensors = load_file(folder / "open_clip_model.safetensors")
    name = next(n for n in tensors if n.endswith("ln_final.weight"))
    del tensors[name]
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    with pytest.raises(InputError, match=r"Missing key.*ln_final.weight") as error:
        load_text_encoder({"kind": "open_clip", "name": str(tmp_path)})(["cat"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 77}, "expected 12, got 77"),
        ({"sha256": {"open_clip_config.json": "0" * 64}}, "expected sha256 00000000"),
        ({"name": "ViT-L-14x", "pretrained": "openai"}, "did you mean 'ViT-L-14'"),
        ({"name": "ViT-L-14", "pretrained": "openia"}, "did you mean 'openai'"),
    ],
)
def test_bad_input(saved, change, message):
    with pytest.raises(InputError) as error:
        load_text_encoder({"kind": "open_clip", "name": str(saved[0])} | change)(["cat"])
    assert message in str(error.value)


def test_folder_without_weights_and_other_tokens(saved, tmp_path):
    config = json.loads((saved[0] / "open_clip_config.json").read_text())
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"expected open_clip_model\.safetensors or model\.safetensors"):
        load_text_encoder({"kind": "open_clip", "name": str(tmp_path)})(["cat"])
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "some/tokenizer"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="expected CLIP's own tokens"):
        load_text_encoder({"kind": "open_clip", "name": str(tmp_path)})(["cat"])


def test_tags_name_the_hub_repository(monkeypatch):
    asked = []

    def download(name, **kwargs):
        asked.append(name)
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(InputError, match="offline"):
        load_text_encoder({"kind": "open_clip", "name": "ViT-L-14", "pretrained": "openai"})(["cat"])
    assert asked == ["timm/vit_large_patch14_clip_224.openai"]
