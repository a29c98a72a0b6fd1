"""Every source of pictures: what is in it, its captions, its filters, its order."""

from __future__ import annotations

import http.server
import itertools
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from cascade import random
from cascade.errors import InputError
from cascade.images import downsample, from_uint8, to_uint8
from tests.train.picture_files import KINDS, Item, items, noise, write
from train.data import BadPicture, PictureSet, open_pictures
from train.data.config import DataConfig
from train.data.order import Shuffle, Shuffled, Streamed
from train.data.shards import TarPictures
from train.data.table import expand


def read_all(pictures: PictureSet) -> dict[str, tuple[str, str]]:
    """Principal caption -> file hash: what a set holds, whatever it calls its pictures."""
    return {
        pictures.captions(i)[0]: (
            str(random.key(0, pictures.encoded(i).hex())),
            str(pictures.picture(i).shape),
        )
        for i in range(len(pictures))
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_holds_the_same(tmp_path: Path, kind: str) -> None:
    rows = items(7, width=33)
    pictures = open_pictures(write(tmp_path, kind, rows))
    expected = {r.text: (str(random.key(0, r.data.hex())), "torch.Size([3, 40, 33])") for r in rows}
    assert read_all(pictures) == expected
    assert list(pictures.train) == list(range(7)) and len(pictures.heldout) == 0
    again = open_pictures(write(tmp_path, kind, rows))  # caches lie beside it now
    assert read_all(again) == expected


def test_the_tar_reader_agrees_with_datasets(tmp_path: Path) -> None:
    import datasets

    rows = items(5)
    pictures = open_pictures(write(tmp_path, "webdataset", rows))
    files = {"train": sorted(str(p) for p in tmp_path.glob("*.tar"))}
    other = datasets.load_dataset(
        "webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "other")
    ).cast_column("png", datasets.Image(decode=False))
    for i in range(5):
        assert pictures.name(i).split("/")[1] == other[i]["__key__"]
        assert pictures.encoded(i) == other[i]["png"]["bytes"]
        assert pictures.captions(i) == [other[i]["txt"]]


# -- captions ------------------------------------------------------------------------------------------------


def captioned(tmp_path: Path, kind: str, **settings) -> PictureSet:
    more = {"short": ["one", "two"], "tags": ["a", "b", "c", "d"]}
    rows = [
        Item("p.png", noise(0), "long text", more),
        Item("q.png", noise(1), "", {"short": [], "tags": []}),
    ]
    cfg = write(tmp_path, kind, rows, shards=1)
    settings = {"captions": {"text": 3.0, "short": 2.0, "tags": 1.0}, "tags": ("tags",), **settings}
    return open_pictures(replace(cfg, **settings))


@pytest.mark.parametrize("kind", ["folder", "parquet", "webdataset"])
def test_caption_columns_by_weight(tmp_path: Path, kind: str) -> None:
    pictures = captioned(tmp_path, kind)
    assert pictures.captions(0) == ["long text", "one", "two", "a, b, c, d"]
    count = 1800
    drawn = Counter(pictures.caption(0, random.key(0, i)) for i in range(count))
    for caption, share in (("long text", 3 / 6), ("one", 1 / 6), ("two", 1 / 6), ("a, b, c, d", 1 / 6)):
        assert abs(drawn[caption] / count - share) < 4 * (share * (1 - share) / count) ** 0.5
    assert drawn.total() == sum(drawn[c] for c in pictures.captions(0))
    assert pictures.captions(1) == [""] and pictures.caption(1, 5) == ""


def test_a_draw_depends_on_its_key_alone_and_lands_where_its_number_says(tmp_path: Path) -> None:
    pictures = captioned(tmp_path, "folder", captions={"text": 1.0, "short": 3.0, "tags": 0.0})
    for seed in range(60):
        u = random.uniform([seed], "caption").item()
        expected = "long text" if u < 0.25 else ["one", "two"][random.key(seed, "text") % 2]
        assert pictures.caption(0, seed) == expected


def test_tags_are_dropped_one_by_one(tmp_path: Path) -> None:
    pictures = captioned(tmp_path, "folder", captions={"tags": 1.0}, tag_drop=0.4)
    count = 1500
    drawn = [pictures.caption(0, random.key(1, i)).split(", ") for i in range(count)]
    for tag in "abcd":
        # each stays with 0.6; where all four would go (0.4^4) one of them stays
        share, kept = 0.6 + 0.4**4 / 4, sum(tag in tags for tags in drawn) / count
        assert abs(kept - share) < 4 * (share * (1 - share) / count) ** 0.5
    assert all(tags == sorted(tags) and tags != [""] for tags in drawn)


def test_tags_may_be_a_text_with_commas(tmp_path: Path) -> None:
    cfg = write(tmp_path, "csv", [Item("p.png", noise(0), "a,  b ,c,")])
    assert open_pictures(replace(cfg, tags=("text",))).captions(0) == ["a, b, c"]


def test_columns_of_a_parquet_file_beside_a_shard(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    cfg = write(tmp_path, "webdataset", items(3), shards=1)
    table = {"key": ["p000", "p001", "p002"], "aesthetic": [4.0, 6.0, None], "caption": ["x", "y", "z"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "00000.parquet")
    pictures = open_pictures(replace(cfg, captions={"caption": 1.0}, ranges={"aesthetic": (5.0, None)}))
    assert [pictures.captions(i) for i in range(3)] == [["x"], ["y"], ["z"]]
    assert list(pictures.train) == [1]


# -- filters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_filters_by_size_aspect_and_columns(tmp_path: Path, kind: str) -> None:
    sizes = [(40, 40), (20, 60), (60, 20), (100, 40), (64, 64), (30, 30)]
    scores = [5.0, 5.0, 6.0, 7.0, 3.0, 9.0]
    rows = [
        Item(f"p{i}.png", noise(i, *size), f"t{i}", {"score": s, "other": i})
        for i, (size, s) in enumerate(zip(sizes, scores, strict=True))
    ]
    cfg = write(tmp_path, kind, rows)

    def train(**settings) -> list[int]:
        return list(open_pictures(replace(cfg, **settings)).train)

    assert train() == [0, 1, 2, 3, 4, 5]
    assert train(min_px=40) == [0, 3, 4]
    assert train(max_aspect=2.0) == [0, 4, 5]
    assert train(max_aspect=2.5) == [0, 3, 4, 5]
    assert train(ranges={"score": (5.0, 7.0)}) == [0, 1, 2, 3]
    assert train(ranges={"score": (5.0, None), "other": (None, 2.0)}) == [0, 1, 2]
    assert train(min_px=40, ranges={"score": (5.0, None)}) == [0, 3]
    pictures = open_pictures(cfg)
    order = pictures.order(0, min_px=40)  # what a stage of 40 px asks for
    assert {order[p] for p in range(9)} == {0, 3, 4}
    with pytest.raises(InputError, match="no training picture has 65 px on its shorter side"):
        pictures.order(0, min_px=65)
    with pytest.raises(InputError, match="none of 6 pictures passes the filters"):
        train(min_px=1000)


def test_sizes_of_columns_are_taken_for_what_they_say(tmp_path: Path) -> None:
    rows = [Item("a.png", noise(0), "a", {"width": 500, "height": 400}), Item("b.png", noise(1), "b")]
    rows[1].more = {"width": None, "height": None}
    pictures = open_pictures(replace(write(tmp_path, "parquet", rows, 1), min_px=300))
    assert list(pictures.train) == [0, 1]  # nothing is known of the second
    with pytest.raises(BadPicture, match=r"a.png: too small \(40x40 px, at least 64 are needed\)"):
        pictures.resized(0, 64)


def test_a_share_is_held_out_and_never_drawn(tmp_path: Path) -> None:
    cfg = replace(write(tmp_path, "folder", items(60, width=2, height=2)), heldout=0.3)
    pictures = open_pictures(cfg)
    held = set(pictures.heldout.tolist())  # type: ignore[union-attr]
    assert 8 <= len(held) <= 28 and held.isdisjoint(pictures.train)
    order = pictures.order(0)
    assert held.isdisjoint(order[p] for p in range(200))
    filtered = open_pictures(replace(cfg, ranges={}, min_px=2))
    assert set(filtered.heldout) == held


# -- pixels --------------------------------------------------------------------------------------------------


def test_a_square_is_cut_out_and_antialiased(tmp_path: Path) -> None:
    cfg = write(tmp_path, "folder", [Item("p.png", noise(0, 96, 64), "t")])
    pictures = open_pictures(cfg)
    full = pictures.picture(0)
    assert torch.equal(pictures.resized(0, 64), full[:, :, 16:80])
    expected = to_uint8(downsample(from_uint8(full[:, :, 16:80]), 16))
    assert torch.equal(pictures.resized(0, 16), expected)
    anywhere = open_pictures(replace(cfg, crop="random"))
    lefts = set()
    for seed in range(40):
        cut = anywhere.resized(0, 64, seed)
        assert torch.equal(cut, anywhere.resized(0, 64, seed))
        (left,) = (x for x in range(33) if torch.equal(cut, full[:, :, x : x + 64]))
        lefts.add(left)
    assert len(lefts) > 15 and max(lefts) > 24 and min(lefts) < 8


def test_pictures_stand_upright(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    cfg = write(tmp_path, "folder", [Item("p.jpg", noise(0, 60, 30, "JPEG", exif=exif), "t")])
    assert open_pictures(cfg).picture(0).shape == (3, 60, 30)


# -- order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000])
def test_a_shuffle_is_a_permutation_of_its_own(size: int) -> None:
    first, second = Shuffle(size, 1), Shuffle(size, 2)
    assert sorted(first[i] for i in range(size)) == list(range(size))
    assert size < 5 or [first[i] for i in range(size)] != [second[i] for i in range(size)]


def test_shuffles_are_fair() -> None:
    """Each of 6 places takes each of 6 values equally often, and so do pairs of neighbours."""
    count = 6000
    drawn = [tuple(s[i] for i in range(6)) for s in (Shuffle(6, random.key(0, k)) for k in range(count))]
    for place, value in itertools.product(range(6), range(6)):
        found = sum(d[place] == value for d in drawn)
        assert abs(found - count / 6) < 5 * (count * 5 / 36) ** 0.5
    assert len(set(drawn)) > 700  # of 720


def streamed(count: int, ends: list[int], window: int, lanes: int, chosen: np.ndarray | None = None):
    pictures = np.arange(count) if chosen is None else chosen
    return Streamed(pictures, np.array(ends), 7, window, lanes)


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("window", [1, 4, 1000])
def test_every_picture_once_an_epoch_in_streams(lanes: int, window: int) -> None:
    order = streamed(23, [5, 6, 14, 23], window, lanes)
    for epoch in range(3):
        seen = [order[p] for p in range(23 * epoch, 23 * (epoch + 1))]
        assert sorted(seen) == list(range(23))
    chosen = np.array([0, 5, 6, 7, 13, 20, 22])
    some = streamed(23, [5, 6, 14, 23], window, lanes, chosen)
    assert sorted(some[p] for p in range(7, 14)) == chosen.tolist()


def test_a_stream_reads_shards_one_after_another_in_an_order_of_each_epoch() -> None:
    ends = list(range(10, 101, 10))
    order = streamed(100, ends, 10, 1)
    orders = []
    for epoch in range(4):
        shards = [order[p] // 10 for p in range(100 * epoch, 100 * (epoch + 1))]
        runs = [shard for shard, _ in itertools.groupby(shards)]
        assert sorted(runs) == list(range(10))  # each is read once, whole
        orders.append(tuple(runs))
    assert len(set(orders)) == 4
    inside = [order[p] % 10 for p in range(10)]
    assert sorted(inside) == list(range(10)) and inside != list(range(10))


def test_a_lane_reads_its_own_shards() -> None:
    order = streamed(96, list(range(12, 97, 12)), 12, 4)
    for lane in range(4):
        assert len({order[p] // 12 for p in range(lane, 96, 4)}) == 2


@pytest.mark.parametrize("make", [lambda: Shuffled(np.arange(37), 3), lambda: streamed(37, [20, 37], 8, 2)])
def test_an_order_is_a_function_of_the_position(make) -> None:
    expected = [make()[p] for p in range(90)]  # a new one each: as in any process, after any resume
    order = make()
    assert [order[p] for p in reversed(range(90))] == expected[::-1]
    for world in (1, 2, 4):
        parts = [[order[p] for p in range(rank, 88, world)] for rank in range(world)]
        assert sorted(sum(parts, [])) == sorted(expected[:88])
    assert order.replacement(5, 1) == make().replacement(5, 1)
    assert len({order.replacement(5, attempt) for attempt in range(1, 20)}) > 4


def test_the_world_may_change_within_an_epoch() -> None:
    """2, then 1, then 4 processes with a batch of 8: every picture once an epoch."""
    order, batch = Shuffled(np.arange(64), 5), 8
    worlds = [2, 2, 1, 1, 1, 4, 4, 4]
    seen = [
        order[p]
        for step, world in enumerate(worlds)
        for rank in range(world)
        for p in range(step * batch + rank, (step + 1) * batch, world)
    ]
    assert sorted(seen) == list(range(64))


# -- shards --------------------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """tmp_path/remote, served on this machine."""
    (tmp_path / "remote").mkdir()
    Quiet.asked = []
    handler = partial(Quiet, directory=str(tmp_path / "remote"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_shards_at_urls_stream_through_a_bounded_cache(tmp_path: Path, server: str) -> None:
    rows = items(12, width=32, height=32)
    write(tmp_path / "remote", "webdataset", rows, shards=4)
    size = (tmp_path / "remote" / "00000.tar").stat().st_size
    cfg = DataConfig(
        name="webdataset",
        folder=str(tmp_path / "local"),
        files=(f"{server}/{{00000..00003}}.tar",),
        streaming=True,
        window=3,
        heldout=0.0,
        cache_gb=2.5 * size / 1e9,
    )
    pictures = open_pictures(cfg)
    assert isinstance(pictures, TarPictures)
    by_text = {r.text: r.data for r in rows}
    order = pictures.order(0)
    seen = [order[p] for p in range(24)]
    Quiet.asked = []
    for index in seen:
        assert pictures.encoded(index) == by_text[pictures.captions(index)[0]]
        assert len(list((tmp_path / "local" / "cache" / "shards").glob("*.tar"))) <= 2
        pictures.shards.close()  # as if it were long ago
    tars = [path for path in Quiet.asked if path.endswith(".tar")]
    assert len(tars) <= 8  # each once an epoch at most
    assert sorted(seen[:12]) == list(range(12))


def test_a_shard_that_cannot_be_fetched(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.shards.PAUSE", 0.0)
    cfg = DataConfig(name="webdataset", folder=str(tmp_path / "local"), files=(f"{server}/no.tar",))
    refuses(cfg, r"cannot fetch http.*no.tar: 404 File not found")
    monkeypatch.setattr("train.data.shards._remote", lambda url: (_ for _ in ()).throw(TimeoutError("late")))
    refuses(replace(cfg, files=("http://x/y.tar",)), "cannot read http://x/y.parquet: late")
    monkeypatch.setattr("train.data.shards._beside", lambda source: {})
    refuses(cfg, r"cannot fetch http.*no.tar in 4 tries: late")
    monkeypatch.undo()
    refuses(replace(cfg, files=("nowhere://x/y.tar",)), "Protocol not known: nowhere")


def test_an_index_is_made_once_and_anew_for_a_changed_shard(tmp_path: Path) -> None:
    cfg = write(tmp_path, "webdataset", items(4))
    open_pictures(cfg)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "index").iterdir()}
    assert len(files) == 2
    open_pictures(cfg)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "index").iterdir()} == files
    write(tmp_path, "webdataset", items(6))
    assert len(open_pictures(cfg)) == 6


# -- refusals ------------------------------------------------------------------------------------------------


def refuses(cfg: DataConfig, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_pictures(cfg)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = str(tmp_path)
    refuses(DataConfig(name="folder", folder=folder), "no pictures in .*metadata.jsonl or metadata.csv")
    refuses(DataConfig(name="parquet", folder=folder, files=(f"{folder}/x.parquet",)), "no such file")
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    refuses(
        DataConfig(name="webdataset", folder=folder, files=(f"{folder}/bad.tar",)), "not a whole tar file"
    )
    cfg = write(tmp_path / "set", "folder", items(2))
    refuses(replace(cfg, captions={"txt": 1.0}), "unknown column 'txt' .*did you mean 'text'")
    refuses(replace(cfg, ranges={"text": (1.0, None)}), "column text of .*: expected numbers")
    (tmp_path / "set" / "metadata.jsonl").write_text("{")
    refuses(cfg, "cannot read data set ")


def test_a_set_of_the_hub_that_is_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("datasets.config", "huggingface_hub.constants"):  # whoever imported them first
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    cfg = DataConfig(name="hub", folder=str(tmp_path), hub="nobody/nothing")
    refuses(cfg, "cannot read data set nobody/nothing: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "folder"}, "folder 'data/emoji': expected a folder of its own for data.name folder"),
        ({"hub": "a/b"}, "hub 'a/b': expected data.name hub with it"),
        ({"name": "hub", "folder": "x"}, "hub None: expected a value for data.name hub"),
        ({"files": ("a.tar",)}, "files .*: expected data.name parquet or webdataset with it"),
        (
            {"name": "webdataset", "folder": "x", "files": ("pipe:cat a",)},
            "expected a path or a URL, no command",
        ),
        ({"streaming": True}, "streaming True: expected data.name webdataset with it"),
        ({"captions": {}}, "captions {}: expected weights above 0"),
        ({"captions": {"a": 0.0}}, "expected weights above 0"),
        ({"tags": ("b",)}, "unknown column 'b' in data.tags: expected one of text"),
        ({"tag_drop": 1.0}, "tag_drop 1.0: expected a number from 0 to below 1"),
        ({"ranges": {"a": (2.0, 1.0)}}, r"ranges.a \[2.0, 1.0\]: expected \[least, most\]"),
        ({"max_aspect": 0.5}, "max_aspect 0.5: expected a number of at least 1"),
        ({"max_bad": 1.0}, "max_bad 1.0: expected a number from 0 to below 1"),
        ({"window": 0}, "window 0: expected an integer of at least 1"),
    ],
)
def test_settings_that_do_not_fit(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_numbers_are_counted_out_and_stars_matched(tmp_path: Path) -> None:
    assert expand(("s3://a/{08..11}.tar",)) == [f"s3://a/{n}.tar" for n in ("08", "09", "10", "11")]
    for name in ("b.tar", "a.tar", "c.txt"):
        (tmp_path / name).touch()
    assert expand((f"{tmp_path}/*.tar",)) == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]


def test_a_metadata_line_without_a_picture_file(tmp_path: Path) -> None:
    cfg = write(tmp_path, "folder", items(2))
    (tmp_path / "p001.png").unlink()
    pictures = open_pictures(cfg)
    with pytest.raises(BadPicture, match="cannot read p001.png: no such file"):
        pictures.picture(1)
    assert json.loads((tmp_path / "metadata.jsonl").read_text().splitlines()[1])["file_name"] == "p001.png"
