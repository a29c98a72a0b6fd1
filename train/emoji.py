"""The emoji data set: 10,663 captioned vector pictures in three styles, drawn at 1024 px.

Twemoji, Noto Emoji and Fluent Emoji draw the same objects; emojibase names them. All four come as npm
packages whose sha256 is pinned here. They are joined on the code point sequence (lower case hex, no
leading zeros, no fe0f), so that one object has one caption in every style, and combinations of skin
tone, gender and profession can be held out of training by rule (`held_out`).

    folder/sources/*.tgz   folder/images/<style>/<code>.webp   folder/metadata.jsonl   folder/ATTRIBUTION.md
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.errors import InputError
from train.emoji_build import Drawing, write_drawings
from train.files import write_whole

STYLES = ("twemoji", "noto", "fluent")  # the order is part of the hold-out rule
EXPECTED = {"twemoji": 3816, "noto": 3708, "fluent": 3139}
HELD_OUT = 0.1  # share of the toned cells, and of the style x object pairs

TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}
REGIONAL = {f"{point:x}" for point in range(0x1F1E6, 0x1F200)}  # letters: two of them are a flag
SIGNS = {"2640": "woman", "2642": "man"}
CHILDREN = {"1f9d2", "1f466", "1f467"}
HANDSHAKE, TWO_HANDS = "1f91d", "1faf1-200d-1faf2"  # two tones need a right and a left hand
HOLD_HANDS = "1f9d1-200d-1f91d-200d-1f9d1"
# Code points that draw people: the neutral form, and the gender. Several professions have a code point
# a gender, and several couples have both one code point and a sequence; each must land on one base.
PEOPLE: dict[str, tuple[str, str]] = {
    "1f9d1": ("1f9d1", "person"),
    "1f468": ("1f9d1", "man"),
    "1f469": ("1f9d1", "woman"),
    "1f9d2": ("1f9d2", "person"),  # child
    "1f466": ("1f9d2", "man"),
    "1f467": ("1f9d2", "woman"),
    "1f9d3": ("1f9d3", "person"),  # older person
    "1f474": ("1f9d3", "man"),
    "1f475": ("1f9d3", "woman"),
    "1fac5": ("1fac5", "person"),  # person with crown
    "1f934": ("1fac5", "man"),
    "1f478": ("1fac5", "woman"),
    "1fac4": ("1fac4", "person"),  # pregnant
    "1fac3": ("1fac4", "man"),
    "1f930": ("1fac4", "woman"),
    "1f9d5": ("1f9d5", "woman"),  # woman with headscarf: no other form exists
    "1f57a": ("1f483", "man"),  # dancing: no neutral form exists
    "1f483": ("1f483", "woman"),
    "1f385": ("1f9d1-200d-1f384", "man"),  # Santa, Mrs., Mx. Claus
    "1f936": ("1f9d1-200d-1f384", "woman"),
    "1f46b": (HOLD_HANDS, "woman+man"),
    "1f46c": (HOLD_HANDS, "man"),
    "1f46d": (HOLD_HANDS, "woman"),
    "1f491": ("1f9d1-200d-2764-200d-1f9d1", "person"),
    "1f48f": ("1f9d1-200d-2764-200d-1f48b-200d-1f9d1", "person"),
    "1f46f": ("1f9d1-200d-1f430-200d-1f9d1", "person"),  # bunny ears
    "1f93c": ("1f9d1-200d-1faef-200d-1f9d1", "person"),  # wrestling
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One npm package: what it is, and the sha256 of its archive."""

    package: str
    version: str
    sha256: str
    title: str
    author: str
    licence: str

    @property
    def file(self) -> str:
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}.tgz"


SOURCES = {
    "twemoji": Source(
        package="@discordapp/twemoji",
        version="16.0.1",
        sha256="2278fd609501e20dc646a546c1d7bbcab86a4c38010ded12b45e61f9687b9d0a",
        title="Twemoji graphics",
        author="Twitter, Inc and other contributors",
        licence="CC-BY-4.0",
    ),
    "noto": Source(
        package="@iconify-json/noto",
        version="1.2.9",
        sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        title="Noto Emoji",
        author="Google Inc",
        licence="Apache-2.0",
    ),
    "fluent": Source(
        package="@iconify-json/fluent-emoji-flat",
        version="1.2.6",
        sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        title="Fluent Emoji, flat style",
        author="Microsoft Corporation",
        licence="MIT",
    ),
    "captions": Source(
        package="emojibase-data",
        version="17.0.0",
        sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        title="emojibase data (labels, tags, groups)",
        author="Miles Johnson",
        licence="MIT",
    ),
}


# --- sources ---------------------------------------------------------------------------------------------


def fetch(folder: Path, styles: Sequence[str] = STYLES) -> dict[str, Path]:
    """The archives of `styles` and the captions under `folder`/sources, downloaded where they are missing.

    Raises InputError if the npm client fails, or if an archive does not have its pinned sha256.
    """
    target = folder / "sources"
    target.mkdir(parents=True, exist_ok=True)
    paths = {name: target / SOURCES[name].file for name in (*styles, "captions")}
    for name, path in paths.items():
        if not path.exists():
            _npm_pack(SOURCES[name], path)
        elif (problem := _wrong_hash(SOURCES[name], path)) is not None:
            raise InputError(f"{path}: {problem}; delete the file to fetch it again")
    return paths


def _npm_pack(source: Source, path: Path) -> None:
    """Download into a temporary folder; the archive gets its name only once its hash is right."""
    name = f"{source.package}@{source.version}"
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        command = ["npm", "pack", name, "--pack-destination", temporary]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise InputError(f"{name}: the npm client is needed to fetch it and was not found") from None
        got = Path(temporary) / source.file
        if done.returncode or not got.exists():
            reason = (done.stderr.strip() or "no archive").splitlines()[-1]
            raise InputError(f"npm pack {name} failed: {reason}")
        if (problem := _wrong_hash(source, got)) is not None:
            raise InputError(f"npm pack {name}: {problem}; refused")
        got.replace(path)


def _wrong_hash(source: Source, path: Path) -> str | None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    return None if found == source.sha256 else f"expected sha256 {source.sha256}, found {found}"


def _members(path: Path, wanted: Iterable[str] | str) -> dict[str, bytes]:
    """Files of an npm archive by name: those in `wanted`, or all with the prefix `wanted`."""
    with tarfile.open(path) as archive:
        found = {}
        for member in archive:
            name = member.name.removeprefix("package/")
            if name.startswith(wanted) if isinstance(wanted, str) else name in wanted:
                handle = archive.extractfile(member)
                if handle is not None:
                    found[name] = handle.read()
    return found


def drawings(style: str, path: Path) -> dict[str, str]:
    """{code: SVG document} of one style's archive."""
    if style == "twemoji":
        files = _members(path, "dist/svg/")
        return {normal_code(Path(name).stem): data.decode() for name, data in files.items()}
    files = _members(path, ("chars.json", "icons.json"))
    names, icons = json.loads(files["chars.json"]), json.loads(files["icons.json"])
    return {normal_code(code): icon_svg(icons, name) for code, name in names.items()}


def icon_svg(icons: dict[str, Any], name: str) -> str:
    """The SVG document of one icon of an iconify set (sizes default to the set's own)."""
    icon = icons["icons"][name]
    width, height = (icon.get(key, icons[key]) for key in ("width", "height"))
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'{head} viewBox="0 0 {width} {height}">{icon["body"]}</svg>'


# --- codes, people, captions -----------------------------------------------------------------------------


def normal_code(text: str) -> str:
    """A code point sequence as every source is joined on: lower case, no leading zeros, no fe0f."""
    points = (point.lstrip("0") for point in text.lower().split("-"))
    return "-".join(point for point in points if point != "fe0f")


def person_of(code: str) -> tuple[str, str | None, str | None]:
    """(base, tone, gender) of a code. Tones and genders of a couple are joined by "+" where they differ.

    The base is the code without skin tones and with neutral people, so that all forms of one profession
    share it. A lone skin tone or gender sign is an object of its own, not a marker.
    """
    points = code.split("-")
    if code in TONES or code in SIGNS:
        return code, None, None
    tones = [TONES[point] for point in points if point in TONES]
    signs = [SIGNS[point] for point in points if point in SIGNS]
    genders = [PEOPLE[point][1] for point in points if point in PEOPLE]
    neutral = [PEOPLE[point][0] if point in PEOPLE else point for point in points if point not in TONES]
    base = TWO_HANDS if neutral == [HANDSHAKE] else "-".join(neutral)
    for sign in SIGNS:
        base = base.replace(f"-200d-{sign}", "")
    if len(genders) > 1 and CHILDREN.intersection(points):  # a family is a group, not a gender
        return base, _joined(tones), None
    return base, _joined(tones), _joined(signs or genders)


def _joined(values: Sequence[str]) -> str | None:
    return (values[0] if len(set(values)) == 1 else "+".join(values)) if values else None


def captions(path: Path) -> dict[str, dict[str, Any]]:
    """{code: label, tags, group, base, tone, gender, cell} from the emojibase archive."""
    files = _members(path, ("en/data.json", "meta/groups.json"))
    groups = json.loads(files["meta/groups.json"])["groups"]
    return captions_of(json.loads(files["en/data.json"]), groups)


def captions_of(entries: Iterable[dict[str, Any]], groups: dict[str, str]) -> dict[str, dict[str, Any]]:
    """`captions` of parsed emojibase entries; `groups` names the group numbers."""
    found = {}
    for entry, tags in _flat(entries, []):
        code = normal_code(entry["hexcode"])
        base, tone, gender = person_of(code)
        # Regional indicators have no group of their own.
        group = groups[str(entry["group"])] if "group" in entry else "component"
        found[code] = {"label": entry["label"], "tags": tags, "group": group}
        found[code] |= {"base": base, "tone": tone, "gender": gender}
    gendered = {item["base"] for item in found.values() if item["gender"] in ("man", "woman")}
    for item in found.values():
        if (
            item["gender"] is None and item["base"] in gendered
        ):  # "police officer" beside "man police officer"
            item["gender"] = "person"
        item["cell"] = cell_of(item["base"], item["tone"], item["gender"])
    return found


def _flat(entries: Iterable[dict[str, Any]], tags: list[str]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Every entry and, below it, its skins, which have no tags and inherit those of their parent."""
    for entry in entries:
        own = entry.get("tags", tags)
        yield entry, own
        yield from _flat(entry.get("skins", []), own)


def cell_of(base: str, tone: str | None, gender: str | None) -> str | None:
    """The cell of the tone x gender x base grid, or None for what has no skin tone."""
    return None if tone is None else f"{tone}/{gender or 'none'}/{base}"


def held_out(style: str, code: str, base: str, tone: str | None, gender: str | None) -> bool:
    """Whether this picture is kept from training. A pure function of its arguments.

    Toned people and hands: `HELD_OUT` of the cells (tone, gender, base), each in every style at once, so
    that no other style shows the combination. All else: `HELD_OUT` of the (style, object) pairs, at most
    one style an object, so that the object is seen but never in that style. National flags are never held
    out: Twemoji alone draws them, so no other style would show them.
    """
    if style not in STYLES:
        raise InputError(f"style {style!r}: expected one of {', '.join(STYLES)}")
    cell = cell_of(base, tone, gender)
    if cell is not None:
        return _uniform(f"cell {cell}") < HELD_OUT
    points = code.split("-")
    if len(points) == 2 and REGIONAL.issuperset(points):
        return False
    slot = int(_uniform(f"object {code}") / HELD_OUT)  # one slot a style, and the rest hold nothing out
    return slot == STYLES.index(style)


def _uniform(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


# --- records ---------------------------------------------------------------------------------------------


def records(style: str, codes: Iterable[str], names: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for each of `codes` that has a caption in `names`, sorted by code."""
    return [_record(style, code, names[code]) for code in sorted(codes) if code in names]


def _record(style: str, code: str, name: dict[str, Any]) -> dict[str, Any]:
    held = held_out(style, code, name["base"], name["tone"], name["gender"])
    return {
        "file_name": f"images/{style}/{code}.webp",
        "text": f"{name['label']}, {style} style",
        "label": name["label"],
        "tags": name["tags"],
        "group": name["group"],
        "style": style,
        "code": code,
        "base": name["base"],
        "tone": name["tone"],
        "gender": name["gender"],
        "cell": name["cell"],
        "split": "heldout" if held else "train",
    }


def build(
    folder: Path, *, processes: int | None = None, progress: bool = True, styles: Sequence[str] = STYLES
) -> list[dict[str, Any]]:
    """Build the data set in `folder` and return its records; what is there already is not made again.

    processes: how many draw, None for one a core. Raises InputError, one line, on a wrong archive, a wrong
    count or a picture that cannot be drawn.
    """
    if unknown := [style for style in styles if style not in STYLES]:
        raise InputError(f"style {unknown[0]!r}: expected one of {', '.join(STYLES)}")
    paths = fetch(folder, styles)
    names = captions(paths["captions"])
    rows, todo = [], []
    for style in styles:
        svgs = drawings(style, paths[style])
        mine = records(style, svgs, names)
        renderer = "resvg" if style == "noto" else "vips"
        rows += mine
        todo += [
            Drawing(svg=svgs[row["code"]], renderer=renderer, path=folder / row["file_name"]) for row in mine
        ]
    _check_counts(rows, styles)
    write_drawings(todo, processes=processes, progress=progress)
    rows.sort(key=lambda row: row["file_name"])
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(folder / "metadata.jsonl", "".join(lines).encode())
    write_whole(folder / "ATTRIBUTION.md", attribution(paths).encode())
    return rows


def check(folder: Path, styles: Sequence[str] = STYLES) -> dict[str, int]:
    """{style: pictures} of a built folder; raises InputError on a wrong count or a missing picture."""
    path = folder / "metadata.jsonl"
    if not path.exists():
        raise InputError(f"{path}: not found; build the data set first")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    _check_counts(rows, styles)
    if missing := [row["file_name"] for row in rows if not (folder / row["file_name"]).exists()]:
        raise InputError(f"{folder}: {len(missing)} pictures are missing, the first is {missing[0]}")
    return dict(Counter(row["style"] for row in rows))


def _check_counts(rows: Iterable[dict[str, Any]], styles: Sequence[str]) -> None:
    found = Counter(row["style"] for row in rows)
    expected = {style: EXPECTED[style] for style in styles}
    if found != expected:
        off = [style for style in {**expected, **found} if found[style] != expected.get(style, 0)]
        text = ", ".join(f"{style} {expected.get(style, 0)} (found {found[style]})" for style in off)
        raise InputError(f"emoji pictures: expected {text}")


def attribution(paths: dict[str, Path]) -> str:
    """ATTRIBUTION.md: each source with its author, version, licence, and the package's own notices."""
    parts = ["# Sources of the emoji data set\n"]
    for name, path in paths.items():
        source = SOURCES[name]
        files = {name: data.decode() for name, data in _members(path, ("LICENSE", "package.json")).items()}
        stated = json.loads(files["package.json"])["license"]
        lines = (line.strip() for line in files.get("LICENSE", "").splitlines())
        notices = "".join(f"> {line}  \n" for line in lines if line.startswith("Copyright"))
        use = "Captions, unchanged" if name == "captions" else "Changed: drawn at 1024 pixels on white"
        parts.append(
            f"## {source.title}\nBy {source.author}. Licence: {source.licence}. {use}.  \n"
            f"From the npm package {source.package} {source.version}, which states: {stated}.\n\n{notices}"
        )
    return "\n".join(parts)
