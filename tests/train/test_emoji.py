"""The emoji data set: joining, people, the hold-out rule, drawing, and building from hand-made archives."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from cascade.errors import InputError
from train import emoji, emoji_build
from train.emoji import STYLES, TONES, cell_of, held_out, normal_code, person_of

OPEN = '<svg xmlns="http://www.w3.org/2000/svg" viewBox='
DISC = f'{OPEN}"0 0 36 36"><circle cx="18" cy="18" r="18" fill="#d00"/></svg>'
ICONS = {
    "width": 128,
    "height": 128,
    "icons": {
        "red-apple": {"body": '<circle cx="64" cy="64" r="64" fill="#d00"/>'},
        "tall": {"body": "<g/>", "height": 160},
    },
}
GROUPS = {"1": "people-body", "4": "food-drink"}
ENTRIES = [
    {"label": "red apple", "hexcode": "1F34E", "tags": ["fruit"], "group": 4, "skins": []},
    {"label": "keycap: #", "hexcode": "0023-FE0F-20E3", "tags": [], "group": 4},
    {"label": "regional indicator D", "hexcode": "1F1E9"},
    {
        "label": "police officer",
        "hexcode": "1F46E",
        "tags": ["cop"],
        "group": 1,
        "skins": [{"label": "police officer: dark skin tone", "hexcode": "1F46E-1F3FF", "group": 1}],
    },
    {
        "label": "woman police officer",
        "hexcode": "1F46E-200D-2640-FE0F",
        "tags": ["cop", "woman"],
        "group": 1,
        "skins": [
            {
                "label": "woman police officer: dark skin tone",
                "hexcode": "1F46E-1F3FF-200D-2640-FE0F",
                "group": 1,
            }
        ],
    },
]


# --- codes and people ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("1F34E", "1f34e"),
        ("0023-FE0F-20E3", "23-20e3"),
        ("1F3F3-FE0F-200D-1F308", "1f3f3-200d-1f308"),
        ("00a9", "a9"),
    ],
)
def test_normal_code(text: str, code: str) -> None:
    assert normal_code(text) == code


FIREFIGHTER = "1f9d1-200d-1f692"
HEART = "1f9d1-200d-2764-200d-1f9d1"


@pytest.mark.parametrize(
    ("code", "base", "tone", "gender"),
    [
        ("1f34e", "1f34e", None, None),
        ("1f44d-1f3fd", "1f44d", "medium", None),
        ("1f9d1-1f3fb-200d-1f692", FIREFIGHTER, "light", "person"),
        ("1f469-1f3ff-200d-1f692", FIREFIGHTER, "dark", "woman"),
        ("1f468-200d-1f692", FIREFIGHTER, None, "man"),
        ("1f3c3-1f3fe-200d-2642-200d-27a1", "1f3c3-200d-27a1", "medium-dark", "man"),
        ("1f478-1f3fc", "1fac5", "medium-light", "woman"),
        ("1f491-1f3fb", HEART, "light", "person"),
        ("1f468-1f3fb-200d-2764-200d-1f468-1f3ff", HEART, "light+dark", "man"),
        ("1f469-1f3fb-200d-2764-200d-1f468-1f3fb", HEART, "light", "woman+man"),
        ("1f46b-1f3ff", emoji.HOLD_HANDS, "dark", "woman+man"),
        ("1f469-1f3ff-200d-1f91d-200d-1f468-1f3fb", emoji.HOLD_HANDS, "dark+light", "woman+man"),
        ("1f91d-1f3fb", emoji.TWO_HANDS, "light", None),
        ("1faf1-1f3fb-200d-1faf2-1f3ff", emoji.TWO_HANDS, "light+dark", None),
        ("1f46f-200d-2640", "1f9d1-200d-1f430-200d-1f9d1", None, "woman"),
        ("1f468-200d-1f467", "1f9d1-200d-1f9d2", None, None),
        ("1f3fb", "1f3fb", None, None),  # the swatch of a tone, and the sign of a gender, are objects
        ("2640", "2640", None, None),
    ],
)
def test_person_of(code: str, base: str, tone: str | None, gender: str | None) -> None:
    assert person_of(code) == (base, tone, gender)


def test_captions_recurse_inherit_tags_and_name_the_neutral_person() -> None:
    found = emoji.captions_of(ENTRIES, GROUPS)
    assert set(found) == {
        "1f34e",
        "23-20e3",
        "1f1e9",
        "1f46e",
        "1f46e-1f3ff",
        "1f46e-200d-2640",
        "1f46e-1f3ff-200d-2640",
    }
    assert found["1f46e-1f3ff-200d-2640"] == {
        "label": "woman police officer: dark skin tone",
        "tags": ["cop", "woman"],
        "group": "people-body",
        "base": "1f46e",
        "tone": "dark",
        "gender": "woman",
        "cell": "dark/woman/1f46e",
    }
    assert found["1f46e-1f3ff"]["cell"] == "dark/person/1f46e"
    assert found["1f46e"]["cell"] is None
    assert (found["1f34e"]["gender"], found["1f34e"]["group"]) == (None, "food-drink")
    assert (found["1f1e9"]["group"], found["1f1e9"]["tags"]) == ("component", [])


def test_record() -> None:
    names = emoji.captions_of(ENTRIES, GROUPS)
    (row,) = emoji.records("noto", ["1f34e", "ffff"], names)
    assert row.pop("split") in ("train", "heldout")
    assert row == {
        "file_name": "images/noto/1f34e.webp",
        "text": "red apple, noto style",
        "label": "red apple",
        "tags": ["fruit"],
        "group": "food-drink",
        "style": "noto",
        "code": "1f34e",
        "base": "1f34e",
        "tone": None,
        "gender": None,
        "cell": None,
    }


# --- the hold-out rule -----------------------------------------------------------------------------------

BASES = [f"{0x1F400 + k:x}" for k in range(400)]


def test_held_out_cells_are_a_tenth_and_the_same_in_every_style() -> None:
    cells = [(base, tone, gender) for base in BASES for tone in TONES.values() for gender in ("man", "woman")]
    held = {style: {cell for cell in cells if held_out(style, "any", *cell)} for style in STYLES}
    assert held["twemoji"] == held["noto"] == held["fluent"]
    assert len(held["noto"]) / len(cells) == pytest.approx(0.1, abs=0.015)


def test_held_out_cells_ignore_the_code_so_two_codes_of_one_cell_cannot_leak() -> None:
    for base in BASES:
        codes = (f"{base}-1f3fb", f"{base}-1f3fb-200d-2640", "1f34e")
        assert len({held_out("noto", code, base, "light", "woman") for code in codes}) == 1


def test_held_out_objects_are_a_tenth_of_each_style_and_never_of_two() -> None:
    by_style = {style: {c for c in BASES if held_out(style, c, c, None, None)} for style in STYLES}
    for held in by_style.values():
        assert len(held) / len(BASES) == pytest.approx(0.1, abs=0.04)
    assert len(set.union(*by_style.values())) == sum(map(len, by_style.values()))


def test_held_out_follows_the_documented_hash() -> None:
    def uniform(key: str) -> float:
        return int(hashlib.blake2b(key.encode(), digest_size=8).hexdigest(), 16) / 16**16

    for base in BASES[:50]:
        assert held_out("noto", "x", base, "dark", None) == (uniform(f"cell dark/none/{base}") < 0.1)
        assert held_out("noto", base, base, None, None) == (0.1 <= uniform(f"object {base}") < 0.2)


def test_held_out_is_pinned() -> None:
    """Any change of the rule invalidates every trained model's test split: it must not go unseen."""
    rows = "".join(
        str(int(held_out(style, base, base, tone, None)))
        for style in STYLES
        for base in BASES[:100]
        for tone in (None, "light")
    )
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == "405d3a92ab554ba8"


def test_held_out_never_takes_a_national_flag() -> None:
    letters = sorted(emoji.REGIONAL)
    flags = [f"{first}-{second}" for first in letters for second in letters]
    assert not any(held_out(style, flag, flag, None, None) for style in STYLES for flag in flags)


@pytest.mark.parametrize(
    ("style", "codes"),
    [
        ("noto", "1faea 1faef 1fac8 1f9d1-200d-1fa70 1facd 1f6d8 1fa8a 1fa8e"),
        ("twemoji", "1f3fb 1f3fc 1f3fd 1f3fe 1f3ff 1f9b0 1f9b1 1f9b2 1f9b3"),
        ("twemoji", "1f3f4-e0067-e0062-e0065-e006e-e0067-e007f"),  # England, Scotland, Wales
        ("twemoji", "1f3f4-e0067-e0062-e0073-e0063-e0074-e007f"),
        ("twemoji", "1f3f4-e0067-e0062-e0077-e006c-e0073-e007f"),
    ],
)
def test_held_out_spares_the_other_objects_that_one_style_alone_draws(style: str, codes: str) -> None:
    """No other style would show them, so they could not be composed from what was seen."""
    assert not any(held_out(style, code, code, None, None) for code in codes.split())


def test_held_out_refuses_an_unknown_style() -> None:
    with pytest.raises(InputError, match="expected one of"):
        held_out("apple", "1f34e", "1f34e", None, None)


def test_cell_of() -> None:
    assert cell_of("1f44d", "dark", None) == "dark/none/1f44d"
    assert cell_of("1f34e", None, "man") is None


# --- drawing ---------------------------------------------------------------------------------------------


def pixels(webp: bytes) -> np.ndarray:
    """H W 3, uint8."""
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(webp))
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("renderer", ["vips", "resvg"])
def test_rasterise_fills_the_square_on_white(renderer: str) -> None:
    pytest.importorskip("pyvips")
    pytest.importorskip("resvg_py")
    image = pixels(emoji_build.rasterise(DISC, renderer, size=64))
    assert image.shape == (64, 64, 3)
    for corner in (image[0, 0], image[0, -1], image[-1, 0], image[-1, -1]):
        assert corner.min() > 250
    red = (image[..., 0] > 150) & (image[..., 1] < 90)
    assert red[32, 32] and red[32, 2] and red[32, 61] and red[2, 32] and red[61, 32]
    assert red.mean() == pytest.approx(np.pi / 4, abs=0.03)


@pytest.mark.parametrize("renderer", ["vips", "resvg"])
def test_rasterise_centres_what_is_not_square(renderer: str) -> None:
    pytest.importorskip("pyvips")
    pytest.importorskip("resvg_py")
    svg = f'{OPEN}"0 0 36 18"><path fill="#00f" d="M0 0h36v18H0z"/></svg>'
    image = pixels(emoji_build.rasterise(svg, renderer, size=64))
    blue = (image[..., 0] < 100)[:, 32]
    assert blue[20:44].all() and not blue[:12].any() and not blue[52:].any()


def test_icon_svg_takes_the_sizes_of_the_set_unless_it_has_its_own() -> None:
    assert 'viewBox="0 0 128 128"' in emoji.icon_svg(ICONS, "red-apple")
    assert 'viewBox="0 0 128 160"' in emoji.icon_svg(ICONS, "tall")


@pytest.mark.parametrize("svg", ["<g/>", '<svg width="3" viewBox="0 0 1 1"/>', "<svg/>"])
def test_sized_svg_refuses_other_roots(svg: str) -> None:
    with pytest.raises(InputError, match="viewBox"):
        emoji_build.sized_svg(svg)


@pytest.mark.parametrize("renderer", ["vips", "resvg", "crayon"])
def test_a_picture_that_cannot_be_drawn_is_one_line_with_its_file(tmp_path: Path, renderer: str) -> None:
    pytest.importorskip("pyvips")
    pytest.importorskip("resvg_py")
    path = tmp_path / "broken.webp"
    drawing = emoji_build.Drawing(svg='<svg viewBox="0 0 1 1"><oops', renderer=renderer, path=path)
    with pytest.raises(InputError) as caught:
        emoji_build.write_drawings([drawing], processes=1, progress=False)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# --- fetching and building -------------------------------------------------------------------------------


def archive(path: Path, files: dict[str, str]) -> str:
    """An npm archive at `path`; its sha256."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose sources are small archives, pinned as theirs."""
    sources = tmp_path / "sources"
    sources.mkdir()
    licence = {
        "LICENSE": "MIT License\n\nCopyright (c) 2020 Somebody\n",
        "package.json": '{"license": "MIT"}',
    }
    icons = {
        "icons.json": json.dumps(ICONS),
        "chars.json": json.dumps({"1f34e": "red-apple", "fffff": "tall"}),
    }
    captions = {"en/data.json": json.dumps(ENTRIES), "meta/groups.json": json.dumps({"groups": GROUPS})}
    contents = {
        "twemoji": {
            "dist/svg/1f34e.svg": DISC,
            "dist/svg/23-20e3.svg": DISC,
            "dist/twemoji.js": "",
            **licence,
        },
        "noto": {**icons, "package.json": '{"license": "Apache-2.0"}'},
        "fluent": {**icons, **licence},
        "captions": {**captions, **licence},
    }
    for name, files in contents.items():
        source = emoji.SOURCES[name]
        digest = archive(sources / source.file, files)
        monkeypatch.setitem(emoji.SOURCES, name, dataclasses.replace(source, sha256=digest))
    monkeypatch.setattr(emoji, "EXPECTED", {"twemoji": 2, "noto": 1, "fluent": 1})
    return tmp_path


def test_build_check_and_resume(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyvips")
    pytest.importorskip("resvg_py")
    rows = emoji.build(folder, processes=1, progress=False)
    files = ["fluent/1f34e", "noto/1f34e", "twemoji/1f34e", "twemoji/23-20e3"]
    assert [row["file_name"] for row in rows] == [f"images/{name}.webp" for name in files]
    assert emoji.check(folder) == {"twemoji": 2, "noto": 1, "fluent": 1}
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    text = (folder / "ATTRIBUTION.md").read_text()
    assert "Copyright (c) 2020 Somebody" in text and "CC-BY-4.0" in text and "http" not in text
    assert not list(folder.rglob("*.part"))

    gone = folder / rows[0]["file_name"]
    gone.unlink()
    with pytest.raises(InputError, match="1 pictures are missing"):
        emoji.check(folder)
    drawn = []
    real = emoji_build.rasterise
    monkeypatch.setattr(emoji_build, "rasterise", lambda *args: drawn.append(args) or real(*args))
    emoji.build(folder, processes=1, progress=False)
    assert len(drawn) == 1 and gone.exists()


def test_build_names_expected_and_found_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "EXPECTED", {"twemoji": 3, "noto": 1, "fluent": 1})
    with pytest.raises(InputError) as caught:
        emoji.build(folder, processes=1, progress=False)
    assert str(caught.value) == "emoji pictures: expected twemoji 3 (found 2)"


def test_build_refuses_an_unknown_style(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'apple'"):
        emoji.build(tmp_path, styles=("apple",))


def test_check_wants_a_built_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="build the data set first"):
        emoji.check(tmp_path)


def test_fetch_refuses_an_archive_with_another_hash(folder: Path) -> None:
    path = folder / "sources" / emoji.SOURCES["noto"].file
    path.write_bytes(b"other")
    with pytest.raises(InputError, match="expected sha256"):
        emoji.fetch(folder)


def test_fetch_downloads_what_is_missing_and_keeps_no_wrong_archive(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = emoji.SOURCES["noto"]
    path = folder / "sources" / source.file
    right = path.read_bytes()
    served = {"bytes": right}

    def npm(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:3] == ["npm", "pack", "@iconify-json/noto@1.2.9"]
        (Path(command[-1]) / source.file).write_bytes(served["bytes"])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", npm)
    path.unlink()
    served["bytes"] = b"wrong"
    with pytest.raises(InputError, match="refused"):
        emoji.fetch(folder)
    assert not path.exists()
    served["bytes"] = right
    assert emoji.fetch(folder)["noto"].read_bytes() == right
    assert len(list(path.parent.iterdir())) == 4


def test_fetch_without_npm_or_with_its_failure_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "sources" / emoji.SOURCES["noto"].file).unlink()
    failed = subprocess.CompletedProcess([], 1, "", "npm error code E404\nnpm error not found")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match=r"npm error not found$"):
        emoji.fetch(folder)

    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", absent)
    with pytest.raises(InputError, match="npm client"):
        emoji.fetch(folder)


def test_expected_counts_and_pins() -> None:
    assert sum(emoji.EXPECTED.values()) == 10663
    assert {source.file for source in emoji.SOURCES.values()} == {
        "discordapp-twemoji-16.0.1.tgz",
        "iconify-json-noto-1.2.9.tgz",
        "iconify-json-fluent-emoji-flat-1.2.6.tgz",
        "emojibase-data-17.0.0.tgz",
    }
