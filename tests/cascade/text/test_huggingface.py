import json
import logging

import pytest
import torch

from cascade.errors import InputError
from cascade.text import load_text_encoder

transformers = pytest.importorskip("transformers")
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "apple", "cat", "green", "pear", "and"]
PROMPTS = ["a red apple", "cat", ""]


def save_tokenizer(folder, length=10**6, pad="<pad>"):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )
    fast.save_pretrained(folder)


def save_t5(folder, kind):
    torch.manual_seed(0)
    sizes = dict(vocab_size=10, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    sizes |= dict(pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    config, whole = {
        "t5": ("T5Config", "T5ForConditionalGeneration"),
        "mt5": ("MT5Config", "MT5ForConditionalGeneration"),
        "umt5": ("UMT5Config", "UMT5ForConditionalGeneration"),
    }[kind]
    model = getattr(transformers, whole)(getattr(transformers, config)(**sizes)).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model.get_encoder()


def save_bert(folder):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=10, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertModel(transformers.BertConfig(max_position_embeddings=12, **sizes)).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder, length=12)
    return model


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5"])
def test_t5_variants(tmp_path, kind):
    expected_network = save_t5(tmp_path, kind)
    encoder = load_text_encoder({"kind": "hf", "name": str(tmp_path), "max_length": 9}, dtype=torch.float32)
    assert encoder.dims == (16,)
    text = encoder(PROMPTS)
    ids = torch.tensor([[3, 4, 5, 1] + [0] * 5, [6, 1] + [0] * 7, [1] + [0] * 8])
    mask = torch.tensor([[1] * 4 + [0] * 5, [1] * 2 + [0] * 7, [1] + [0] * 8])
    with torch.no_grad():
        expected = expected_network(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(text.sequences[0].mask, mask.bool())
    torch.testing.assert_close(text.sequences[0].states, expected, atol=1e-5, rtol=0)
    assert not any(p.requires_grad for p in encoder._loaded[1].parameters())


def test_t5_dtypes(tmp_path):
    save_t5(tmp_path, "t5")
    reference = {"kind": "hf", "name": str(tmp_path), "max_length": 9}
    encoder = load_text_encoder(reference)
    assert encoder(["cat"]).sequences[0].states.dtype == torch.float32  # of the result, whatever computed it
    assert encoder._loaded[1].dtype == torch.bfloat16
    with pytest.raises(InputError, match="T5 overflows in float16"):
        load_text_encoder(reference, dtype=torch.float16)(["cat"])


def test_any_encoder_and_subfolder_of_a_model_folder(tmp_path):
    network = save_bert(tmp_path / "text_encoder")
    encoder = load_text_encoder({"kind": "hf", "name": "text_encoder", "max_length": 6}, folder=tmp_path)
    states = encoder(["a red apple"]).sequences[0].states
    with torch.no_grad():
        expected = network(torch.tensor([[3, 4, 5, 1]]), torch.ones(1, 4)).last_hidden_state
    torch.testing.assert_close(states[:, :4], expected, atol=1e-5, rtol=0)
    reference = encoder.reference()
    assert reference["name"] == str((tmp_path / "text_encoder").resolve())  # holds in another folder too
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(reference["sha256"])
    again = load_text_encoder(reference, folder=tmp_path / "elsewhere")
    assert torch.equal(again(["a red apple"]).sequences[0].states, states)


@pytest.mark.parametrize("kind", ["clip", "bart", "gpt2"])
def test_other_families(tmp_path, kind):
    """Of two towers the text tower, of an encoder-decoder the encoder, and a decoder that has no padding."""
    torch.manual_seed(0)
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ids = dict(bos_token_id=0, eos_token_id=1, pad_token_id=0)
    if kind == "clip":
        text, vision = small | ids | dict(vocab_size=10), small | dict(image_size=8, patch_size=4)
        network = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
        inner = network.text_model
    elif kind == "bart":
        sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16)
        heads = dict(encoder_attention_heads=2, decoder_attention_heads=2)
        network = transformers.BartModel(transformers.BartConfig(vocab_size=10, **sizes, **heads, **ids))
        inner = network.get_encoder()
    else:
        network = transformers.GPT2Model(
            transformers.GPT2Config(vocab_size=10, n_embd=16, n_layer=1, n_head=2)
        )
        inner = network
    network.eval().save_pretrained(tmp_path)
    save_tokenizer(tmp_path, pad=None if kind == "gpt2" else "<pad>")
    encoder = load_text_encoder({"kind": "hf", "name": str(tmp_path), "max_length": 6})
    states = encoder(["a red apple", "cat"]).sequences[0].states
    batch = {"input_ids": torch.tensor([[3, 4, 5, 1]]), "attention_mask": torch.ones(1, 4).long()}
    with torch.no_grad():
        expected = inner(**batch).last_hidden_state
    assert encoder.dims == (16,)
    torch.testing.assert_close(states[:1, :4], expected, atol=1e-5, rtol=0)


def test_separate_tokenizer_folder(tmp_path):
    save_bert(tmp_path / "text_encoder")
    save_tokenizer(tmp_path / "tokenizer", length=12)
    (tmp_path / "text_encoder" / "tokenizer.json").unlink()
    reference = {"kind": "hf", "name": str(tmp_path), "subfolder": "text_encoder", "max_length": 6}
    encoder = load_text_encoder(reference | {"tokenizer_subfolder": "tokenizer"})
    assert encoder(["cat"]).sequences[0].mask.sum() == 2
    assert "tokenizer/tokenizer.json" in encoder.reference()["sha256"]


def test_clean_is_optional(tmp_path):
    save_bert(tmp_path)
    reference = {"kind": "hf", "name": str(tmp_path), "max_length": 6}
    plain, cleaned = (load_text_encoder(reference | {"clean": c}) for c in (False, True))
    dirty, tidy = ["A <b>red</b> apple"], ["a red apple"]
    assert torch.equal(cleaned(dirty).sequences[0].states, plain(tidy).sequences[0].states)
    assert not torch.equal(plain(dirty).sequences[0].mask, plain(tidy).sequences[0].mask)


def test_truncation_is_noticed(tmp_path, caplog):
    save_bert(tmp_path)
    encoder = load_text_encoder({"kind": "hf", "name": str(tmp_path), "max_length": 4})
    with caplog.at_level(logging.WARNING):
        tokens = encoder(["a red apple and a cat and a green pear and a red cat"]).sequences[0]
    (record,) = caplog.records  # nothing from transformers beside it
    assert "15 tokens" in record.getMessage() and tokens.states.shape == (1, 4, 16)


def test_missing_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_bert(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights are missing.*encoder.layer.1.output.dense.weight"):
        load_text_encoder({"kind": "hf", "name": str(tmp_path), "max_length": 4})(["cat"])


def test_other_shapes_and_truncated_weights_are_refused(tmp_path):
    save_bert(tmp_path)
    encoder = {"kind": "hf", "name": str(tmp_path), "max_length": 4}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(InputError, match="cannot load text encoder"):
        load_text_encoder(encoder)(["cat"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(InputError, match="cannot load text encoder") as error:
        load_text_encoder(encoder)(["cat"])
    assert "\n" not in str(error.value)


def test_pickled_weights_are_not_read(tmp_path):
    network = save_bert(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load text encoder"):
        load_text_encoder({"kind": "hf", "name": str(tmp_path), "max_length": 4})(["cat"])


def test_altered_file_is_refused(tmp_path):
    save_bert(tmp_path)
    reference = load_text_encoder({"kind": "hf", "name": str(tmp_path), "max_length": 4}).reference()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    with pytest.raises(InputError, match=r"config\.json: expected sha256"):
        load_text_encoder(reference)(["cat"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 13}, "expected at most 12, got 13"),
        ({"name": "/no/such/folder"}, "no such folder"),
        ({"subfolder": "nowhere"}, "cannot load text encoder"),
    ],
)
def test_bad_input(tmp_path, changes, message):
    save_bert(tmp_path)
    with pytest.raises(InputError) as error:
        load_text_encoder({"kind": "hf", "name": str(tmp_path), "max_length": 4} | changes)(["cat"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_hub_name_without_network(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no connection\nand a second line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(InputError, match=r"no folder and no hub repository in reach: no connection$"):
        load_text_encoder({"kind": "hf", "name": "google/t5-small"})(["cat"])


def test_clip_with_its_projection_padded_with_zeros_from_a_variant(tmp_path):
    """As Karlo reads it: all states, the projected embedding as it is, padding by the token 0; fp16 files."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ids = dict(vocab_size=10, bos_token_id=3, eos_token_id=1, pad_token_id=2)
    config = transformers.CLIPTextConfig(**sizes, **ids, projection_dim=6)
    network = transformers.CLIPTextModelWithProjection(config).eval()
    network.save_pretrained(tmp_path, variant="fp16")
    save_tokenizer(tmp_path, length=9, pad="<unk>")
    reference = {"kind": "hf", "name": str(tmp_path), "max_length": 9, "projection": True, "pad_id": 0}
    text = load_text_encoder(reference)(["a red apple", ""])
    rows = torch.tensor([[3, 4, 5, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        expected = network(input_ids=rows)
    torch.testing.assert_close(text.sequences[0].states, expected.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(text.pooled, expected.text_embeds, atol=1e-5, rtol=0)
    assert text.sequences[0].mask.sum(1).tolist() == [4, 1]


def test_t5_in_8_bits_says_nearly_the_same_in_less_memory(tmp_path):
    save_t5(tmp_path, "t5")
    reference = {"kind": "hf", "name": str(tmp_path), "max_length": 9}
    full = load_text_encoder(reference, dtype=torch.float32)
    small = load_text_encoder({**reference, "int8": True}, dtype=torch.float32)
    a, b = (encoder(PROMPTS).sequences[0].states[0, :4] for encoder in (full, small))
    assert not torch.equal(a, b) and torch.cosine_similarity(a, b, dim=-1).min() > 0.999

    def linear_bytes(encoder):
        state = encoder._loaded[1].encoder.block.state_dict()
        return sum(t.numel() * t.element_size() for n, t in state.items() if "layer_norm" not in n)

    assert linear_bytes(small) < 0.4 * linear_bytes(full)
