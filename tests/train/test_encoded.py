"""What frozen encoders say of captions and pictures: cached, hashed, else encoded online."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from cascade import random
from cascade.conditioning import TextEmbedding
from cascade.errors import InputError
from cascade.text.pair import PairEncoder
from tests.conftest import WIDTH, ToyEncoder
from tests.train.conftest import tiny_recipe
from tests.train.picture_files import Item, items, noise, write
from tests.train.test_batches import ToyClip
from train import embed
from train.batches import Batches, StageMaker, packed, unpacked
from train.cache import Cache, finish, made_from, row_hash, write_shard
from train.data import BadPicture, PictureSet, open_pictures
from train.encoded import ImageStore, TextStore, fingerprint, stored_types
from train.recipe import load_recipe

ROOT = Path(__file__).parents[2]
TOY = {"kind": "toy"}


@pytest.fixture
def pictures(tmp_path: Path) -> PictureSet:
    return open_pictures(write(tmp_path / "set", "folder", items(10)))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.encoded.SHARD", 4)


class Counting(ToyEncoder):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding:
        self.asked += prompts
        return super().__call__(prompts)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    encoder = Counting()
    monkeypatch.setattr("train.encoded.load_text_encoder", lambda reference: encoder)
    return encoder


def same(a: TextEmbedding, b: TextEmbedding) -> bool:
    """Equal at real tokens, with equal masks."""
    pairs = list(zip(a.sequences, b.sequences, strict=True))
    masks = all(torch.equal(x.mask, y.mask) for x, y in pairs)
    return masks and all(torch.equal(x.states[x.mask], y.states[y.mask]) for x, y in pairs)


def halved(text: TextEmbedding) -> TextEmbedding:
    return text.to(dtype=torch.float16).to(dtype=torch.float32)


# -- rows ----------------------------------------------------------------------------------------------------


def rows_of(names: list[str]) -> list[dict[str, torch.Tensor]]:
    draw = [random.normal((len(name), 3), [0], name)[0] for name in names]
    return [{"a": x.half(), "b": x[:1, :2].bfloat16()} for x in draw]


def make_cache(folder: Path) -> list[str]:
    names = [f"name {'x' * i}" for i in range(9)]
    for number, part in enumerate((names[:4], names[4:8], names[8:])):
        write_shard(folder / f"{number}.safetensors", f"list {number}", part, rows_of(part))
    finish(folder, [f"{number}.safetensors" for number in range(3)], {"kind": "test"})
    return names


def test_rows_are_found_by_name(tmp_path: Path) -> None:
    names = make_cache(tmp_path)
    cache = Cache(tmp_path)
    for store in (cache, pickle.loads(pickle.dumps(cache))):
        assert len(store) == 9 and store.about == {"kind": "test"}
        for name, expected in zip(names, rows_of(names), strict=True):
            found = store.get(name)
            assert name in store and found is not None and found.keys() == expected.keys()
            assert all(torch.equal(found[f], expected[f]) for f in expected)
        assert store.get("another") is None and "another" not in store
    cache.verify()


def test_a_row_is_hashed_when_it_is_first_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, hashed = make_cache(tmp_path), []
    monkeypatch.setattr("train.cache.row_hash", lambda row: hashed.append(len(row["a"])) or row_hash(row))
    cache = Cache(tmp_path)
    rows = [cache.get(name) for name in (names[0], names[0], names[5], names[0])]
    assert hashed == [len(names[0]), len(names[5])]
    assert rows[0] is not None and rows[1] is not None
    assert rows[0]["a"].data_ptr() == rows[1]["a"].data_ptr()  # both are the file
    cache.verify()
    assert len(hashed) == 2 + len(names)


def test_a_shard_tells_what_it_was_made_from(tmp_path: Path) -> None:
    make_cache(tmp_path)
    assert made_from(tmp_path / "0.safetensors") == "list 0" and made_from(tmp_path / "9.safetensors") is None
    (tmp_path / "0.safetensors").write_bytes(b"x")
    assert made_from(tmp_path / "0.safetensors") is None


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["0.safetensors", "2.safetensors", "index.npy"])
def test_no_flipped_bit_gives_a_wrong_row(tmp_path: Path, file: str) -> None:
    """A row is what was written, or the damage is told, or (in the index) the row is not found."""
    names = make_cache(tmp_path)
    expected, path, told = rows_of(names), tmp_path / file, 0
    good = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, 8 * len(good), 80).tolist():
        flip(path, at)
        for name, row in zip(names[::2], expected[::2], strict=True):
            try:
                found = Cache(tmp_path).get(name)
            except InputError as error:
                assert "damaged" in str(error) and "\n" not in str(error)
                told += 1
                continue
            assert found is None or all(torch.equal(found[f], row[f]) for f in row)
            assert file == "index.npy" or found is not None
        path.write_bytes(good)
    assert told > 5


def test_a_bit_flipped_in_a_row_is_found_before_it_is_used(pictures: PictureSet) -> None:
    store = TextStore(pictures, TOY).prepare()
    path = store.folder / "000000.safetensors"
    tensors = load_file(path)
    start = path.read_bytes().find(tensors["states0"].numpy().tobytes())
    flip(path, 8 * start + 3)
    message = r"000000.safetensors is damaged \(the hash of row 0 differs\): delete it and run"
    again = TextStore(pictures, TOY)
    with pytest.raises(InputError, match=message):
        again(pictures.captions(0))
    with pytest.raises(InputError, match=message):
        Cache(store.folder).verify()
    assert same(again(pictures.captions(1)), halved(ToyEncoder()(pictures.captions(1))))


# -- text ----------------------------------------------------------------------------------------------------


def test_cached_and_online_captions_are_the_same(pictures: PictureSet, small_shards: None) -> None:
    captions = [pictures.captions(i)[0] for i in (3, 0, 9, 3)]
    online = TextStore(pictures, TOY)
    assert online.cache is None
    cached = TextStore(pictures, TOY).prepare()
    assert cached.cache is not None and len(cached.cache) == 10
    for store in (online, cached):
        assert same(store(captions), halved(ToyEncoder()(captions)))
    assert torch.equal(online(captions).sequences[0].states, cached(captions).sequences[0].states)
    assert same(cached(["unheard of", captions[1]]), halved(ToyEncoder()(["unheard of", captions[1]])))


def test_captions_are_encoded_once(pictures: PictureSet, small_shards: None, counting: Counting) -> None:
    TextStore(pictures, TOY).prepare()
    assert sorted(counting.asked) == sorted(pictures.captions(i)[0] for i in range(10))
    counting.asked.clear()
    store = TextStore(pictures, TOY).prepare()
    store([pictures.captions(4)[0]])
    assert counting.asked == []
    metadata = pictures.folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("number 5", "of another thing"))
    changed = TextStore(open_pictures(pictures.cfg), TOY).prepare()
    assert "picture of another thing" in counting.asked and len(counting.asked) == 4  # one shard of three
    assert changed.cache is not None and "picture of another thing" in changed.cache


def test_an_interrupted_encoding_goes_on(
    pictures: PictureSet, small_shards: None, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("train.encoded.finish", fail)
        with pytest.raises(KeyboardInterrupt):
            TextStore(pictures, TOY).prepare()
    store = TextStore(pictures, TOY)
    assert store.cache is None  # nothing is taken for whole
    (store.folder / "000001.safetensors").unlink()
    counting.asked.clear()
    store.prepare()
    assert counting.asked == [pictures.captions(i)[0] for i in range(4, 8)]
    assert store.cache is not None and len(store.cache) == 10
    assert not list(store.folder.glob(".*"))


def test_an_index_older_than_its_shards_is_made_anew(
    pictures: PictureSet, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All shards were written for changed captions, and the process killed before the index was."""
    TextStore(pictures, TOY).prepare()
    metadata = pictures.folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("picture", "drawing"))
    changed = open_pictures(pictures.cfg)
    with monkeypatch.context() as patch:
        patch.setattr("train.encoded.finish", lambda *_: None)
        TextStore(changed, TOY).prepare()
    captions = [changed.captions(i)[0] for i in range(10)]
    store = TextStore(changed, TOY).prepare()
    assert store.cache is not None and all(caption in store.cache for caption in captions)
    assert same(store(captions), halved(ToyEncoder()(captions)))


def test_the_cache_of_another_encoder_is_refused(
    pictures: PictureSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = TextStore(pictures, TOY).prepare().folder
    named = open_pictures(replace(pictures.cfg, text_cache=str(folder)))
    assert TextStore(named, TOY).cache is not None
    empty = open_pictures(replace(pictures.cfg, text_cache=str(folder / "empty")))
    assert TextStore(empty, TOY).prepare().cache is None  # a folder that is named is left to train.embed
    monkeypatch.setattr("train.encoded.load_text_encoder", lambda reference: ToyEncoder(8))
    assert TextStore(pictures, TOY).cache is None  # it has a folder of its own
    with pytest.raises(
        InputError, match='is the cache of another encoder, .*"width": 24.* expected .*8'
    ) as caught:
        TextStore(named, TOY)
    assert "\n" not in str(caught.value)


def test_a_large_set_is_not_encoded_before_training(
    pictures: PictureSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.encoded.SMALL", 9)
    assert TextStore(pictures, TOY).prepare().cache is None


def test_encoders_are_told_apart_by_what_they_say() -> None:
    one = {
        "kind": "hf",
        "name": "/a/t5",
        "revision": None,
        "sha256": {"w": "12"},
        "max_length": 77,
        "clean": True,
    }
    assert fingerprint(one) == fingerprint(one | {"name": "/b/t5"})
    for change in ({"sha256": {"w": "13"}}, {"max_length": 128}, {"clean": False}):
        assert fingerprint(one) != fingerprint(one | change)
    pair = {"kind": "pair", "encoders": [one, TOY]}
    assert fingerprint(pair) == fingerprint({"kind": "pair", "encoders": [one | {"name": "x"}, TOY]})
    assert fingerprint({"kind": "hf", "name": "a", "sha256": {}})["name"] == "a"


def test_bfloat16_states_are_kept_exactly(pictures: PictureSet, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wide(ToyEncoder):
        dtype = torch.bfloat16

        def __call__(self, prompts: Sequence[str]) -> TextEmbedding:
            text = super().__call__(prompts)
            text.sequences[0].states.mul_(1e6)  # beyond float16
            return text.to(dtype=torch.bfloat16).to(dtype=torch.float32)

    pair = PairEncoder([Wide(), ToyEncoder(8)])
    assert stored_types(pair) == [torch.bfloat16, torch.float16]
    monkeypatch.setattr("train.encoded.load_text_encoder", lambda reference: pair)
    store, captions = TextStore(pictures, {"kind": "pair"}).prepare(), pictures.captions(2)
    assert store.dims == (WIDTH, 8)
    found, expected = store(captions).sequences, pair(captions).sequences
    for i, kind in enumerate((torch.float32, torch.float16)):
        mask = expected[i].mask
        assert torch.equal(found[i].states[mask], expected[i].states[mask].to(kind).float())

    class Bad(Wide):
        dtype = torch.float32

    monkeypatch.setattr("train.encoded.load_text_encoder", lambda reference: Bad())
    with pytest.raises(InputError, match="caption 'picture number 0' has states beyond torch.float16"):
        TextStore(pictures, TOY).prepare()


def test_texts_cross_processes_as_bytes() -> None:
    texts = ["", "a\x00b", "épée 🗡", "x" * 1000]
    assert unpacked(packed(texts)) == texts


# -- batches without a cache ---------------------------------------------------------------------------------


def test_what_no_cache_holds_is_encoded_in_the_training_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are the same with and without caches, with and without loader processes."""
    data = write(tmp_path / "set", "folder", items(6, width=20, height=18))
    plain = tiny_recipe(tmp_path, tmp_path)
    plain["data"] = {"name": "folder", "folder": data.folder, "heldout": 0.0}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(plain))
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    pictures = open_pictures(recipe.data)

    def maker(cached: bool) -> StageMaker:
        text, images = TextStore(pictures, TOY), ImageStore(pictures, ToyClip(), {})  # type: ignore[arg-type]
        if cached:
            text.prepare(), images.prepare()
        return StageMaker(recipe, "base", pictures, text, images)

    online = maker(False)
    draw = online.draw([0, 1, 2], [0, 1, 2])
    assert "tokens0" not in draw and "image_embed" not in draw
    expected = [maker(True)(list(range(8 * s, 8 * s + 8)), seeds(s)) for s in range(3)]
    loader: Any = DataLoader(
        Batches(online, 8, 0, 1, 0, "base", 3),
        batch_size=None,
        num_workers=1,
        multiprocessing_context="fork",
    )
    for bundle, cached in zip(loader, expected, strict=True):
        whole = online.complete(bundle.open(), "cpu")
        assert whole.keys() == cached.keys()
        for name, value in cached.items():
            assert torch.equal(whole[name], value) or torch.allclose(whole[name], value, atol=1e-6), name


def seeds(step: int) -> list[int]:
    return [random.key(0, "train", "base", p) for p in range(8 * step, 8 * step + 8)]


# -- pictures ------------------------------------------------------------------------------------------------


def test_image_embeddings_and_what_cannot_be_read(tmp_path: Path, small_shards: None) -> None:
    rows = [*items(6), Item("bad.png", b"x", "bad"), Item("tiny.png", noise(9, 5, 7), "tiny")]
    pictures = open_pictures(replace(write(tmp_path, "folder", rows), max_bad=0.2))
    store = ImageStore(pictures, ToyClip(), {"a": 1}).prepare()  # type: ignore[arg-type]
    for i in (0, 5, 7):  # the small one is enlarged
        expected = store.encode(store.view(i)[None])[0]
        assert torch.allclose(store(i), expected, atol=1e-6)
    with pytest.raises(BadPicture, match="cannot read bad.png: it has no CLIP embedding"):
        store(6)
    assert (tmp_path / "quarantine.jsonl").read_text().count("\n") == 1
    assert store.sample().shape == (7, 16)
    online = ImageStore(pictures, ToyClip(), {"b": 1})  # type: ignore[arg-type]
    assert online.cache is None and torch.allclose(online.sample(), store.sample(), atol=1e-6)


# -- command -------------------------------------------------------------------------------------------------

LAUNCHED = """
import sys
import train.encoded
from tests.conftest import ToyEncoder
train.encoded.load_text_encoder = lambda reference: ToyEncoder()
train.encoded.SHARD = 4
from train.embed import main
sys.exit(main(sys.argv[1:]))
"""


def launch(recipe: Path, processes: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(ROOT),
    }
    script = recipe.parent / "launched.py"
    script.write_text(LAUNCHED)
    done = subprocess.run(
        [*command, str(script), str(recipe)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        cfg = write(folder / "set", "folder", items(10))
        plain = tiny_recipe(folder, folder) | {"data": {"name": "folder", "folder": cfg.folder}}
        (folder / "r.yaml").write_text(yaml.safe_dump(plain))
        if processes == 2:
            launch(folder / "r.yaml", 2)
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("train.encoded.SHARD", 4)
                assert embed.main([str(folder / "r.yaml")]) == 0
        (cache,) = (folder / "set" / "cache").glob("text-*")
        found.append({p.name: p.read_bytes() for p in cache.iterdir()})
    assert found[0].keys() == {f"{n:06d}.safetensors" for n in range(3)} | {"index.npy", "cache.json"}
    assert found[0] == found[1]


def test_the_command_refuses_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert embed.main(["emojy"]) == 2
    assert embed.main(["emoji", "--only", "txt"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "did you mean 'emoji'" in lines[0] and "did you mean 'text'" in lines[1]
