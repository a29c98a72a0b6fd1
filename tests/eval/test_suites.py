"""Suites: the own ones, and lists written here in the formats of the published ones."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cascade.errors import InputError
from eval.suites import first, load_suite
from eval.suites.drawbench import COUNTS, TOTAL
from eval.suites.suite import Prompt, list_sha256
from eval.suites.table import quoted

ROWS = [
    (f"Thing {number} of {category}, with a comma", category)
    for category, count in COUNTS.items()
    for number in range(count)
]
EXOTIC = [
    ("A café in Schönhausen\u2028at night", "Reddit") if c == "Reddit" and "Thing 1 " in p else (p, c)
    for p, c in ROWS
]


def write_csv(
    path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("Prompts", "Category")
) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return str(path)


# -- DrawBench -----------------------------------------------------------------------------------------------


def test_copies_that_differ_in_form_are_one_list(tmp_path) -> None:
    """Byte order mark, CRLF, spaces at the ends, column names, decomposed letters, CSV or TSV."""
    plain = load_suite("drawbench", str(write_csv(tmp_path / "plain.csv", EXOTIC)))
    messy = tmp_path / "messy.csv"
    spaced = [(f"{p} ", f" {c} ".replace("Colors", "COLORS")) for p, c in EXOTIC]
    text = write_csv(messy, spaced, ("Prompt", "Category ")).read_text(encoding="utf-8")
    messy.write_bytes(b"\xef\xbb\xbf" + text.replace("ö", "o\u0308").replace("\n", "\r\n").encode())
    tabs = tmp_path / "tabs.tsv"
    tabs.write_text("prompts\tcategory\n" + "".join(f"{' '.join(p.split())}\t{c}\n" for p, c in EXOTIC))
    assert load_suite("drawbench", str(messy)).sha256 == plain.sha256
    assert load_suite("drawbench", str(tabs)).sha256 == plain.sha256
    assert load_suite("drawbench", str(messy)).prompts == plain.prompts
    assert {c: sum(p.category == c for p in plain.prompts) for c in plain.categories} == COUNTS
    assert "not the published list" in plain.warnings[0]


def test_the_hash_is_of_texts_categories_and_order() -> None:
    one, two = Prompt(text="a", category="x"), Prompt(text="b", category="x")
    hashes = {list_sha256(p) for p in ([one, two], [two, one], [one], [Prompt(text="a", category="y"), two])}
    assert len(hashes) == 4
    assert list_sha256([Prompt(text="\ufeffa \u00a0 b")]) == list_sha256([Prompt(text="a b")])


def test_published_lists_are_known_by_their_hash(tmp_path, monkeypatch) -> None:
    """A list without categories is read by the order of the blocks, where its hash is known; the copy with
    altered prompts is called so."""
    texts, module = [text for text, _ in ROWS], "eval.suites.drawbench"
    known = list_sha256([Prompt(text=text, category=category) for text, category in ROWS])
    monkeypatch.setattr(f"{module}.ORIGINAL", known)
    suite = load_suite("drawbench", lines(tmp_path / "list.txt", texts))
    assert suite.warnings == () and suite.prompts[-1].category == "Text" and suite.sha256 == known
    texts[153] = "some sweets"
    with pytest.raises(InputError, match="expected a column 'category'"):
        load_suite("drawbench", lines(tmp_path / "other.txt", texts))
    altered = [Prompt(text=text, category=category) for text, (_, category) in zip(texts, ROWS, strict=True)]
    monkeypatch.setattr(f"{module}.OPENAI", list_sha256(altered))
    assert "153 and 167" in load_suite("drawbench", str(tmp_path / "other.txt")).warnings[0]


def test_what_is_no_drawbench_is_refused_in_one_line(tmp_path) -> None:
    swapped = [("Thing", "Text") if i == 0 else row for i, row in enumerate(ROWS)]
    cases = {
        "wrong column": (
            write_csv(tmp_path / "a.csv", ROWS, ("Sentence", "Category")),
            "expected a column 'prompt'",
        ),
        "too few": (write_csv(tmp_path / "b.csv", ROWS[:-1]), f"expected the {TOTAL} prompts"),
        "wrong counts": (
            write_csv(tmp_path / "c.csv", swapped),
            "expected 25 prompts of category Colors, found 24",
        ),
        "unknown category": (
            write_csv(tmp_path / "d.csv", [("Thing", "Colours"), *ROWS[1:]]),
            "unknown category 'Colours'.*did you mean 'Colors'",
        ),
        "empty prompt": (write_csv(tmp_path / "e.csv", [(" ", "Colors"), *ROWS[1:]]), "row 1 has no"),
        "nothing": (tmp_path / "missing.csv", "cannot read"),
    }
    for path, message in cases.values():
        with pytest.raises(InputError, match=message) as caught:
            load_suite("drawbench", str(path))
        assert "\n" not in str(caught.value)


def test_rendered_words_are_those_in_quotes() -> None:
    assert quoted("A sign that says 'Hello World'.") == "Hello World"
    assert quoted('A cat\'s bowl with "Fish" and “More” on it') == "Fish More"
    assert quoted("The dog's and the cats' house") is None


# -- other published formats ---------------------------------------------------------------------------------


def test_parti(tmp_path) -> None:
    """Tab separated, with quotes that mean themselves."""
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text(
        'Prompt\tCategory\tChallenge\tNote\n"No" said the "old" owl\tAnimals\tBasic\t\n'
        "a mug with 'Tea' on it\tArtifacts\tWriting & Symbols\ta note\n"
    )
    suite = load_suite("parti", str(path))
    assert [p.text for p in suite.prompts] == ['"No" said the "old" owl', "a mug with 'Tea' on it"]
    assert suite.prompts[1].rendered == "Tea" and suite.prompts[0].rendered is None
    assert suite.prompts[1].meta == {"challenge": "Writing & Symbols", "note": "a note"}
    assert suite.warnings == ("2 prompts: the published suite has 1632",)


def test_geneval(tmp_path) -> None:
    row: dict[str, Any] = {
        "tag": "counting",
        "include": [{"class": "owl", "count": 3}],
        "prompt": "three owls",
    }
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(json.dumps(row) + "\n\n")
    prompt = load_suite("geneval", str(path)).prompts[0]
    assert (prompt.text, prompt.category, prompt.meta) == ("three owls", "counting", row)
    path.write_text("{}\n")
    with pytest.raises(InputError, match="expected a column 'prompt'"):
        load_suite("geneval", str(path))
    path.write_text("[1]\n")
    with pytest.raises(InputError, match=":1: expected a JSON object"):
        load_suite("geneval", str(path))


def test_compbench(tmp_path) -> None:
    lines(tmp_path / "color_val.txt", ["a blue owl"])
    lines(tmp_path / "3d_spatial_val.txt", ["an owl behind a jug", "a jug behind an owl"])
    lines(tmp_path / "color_val_seen.txt", ["not of the suite"])
    suite = load_suite("compbench", str(tmp_path))
    assert Counter(p.category for p in suite.prompts) == {"color": 1, "3d_spatial": 2}
    assert "lacks complex_val.txt" in suite.warnings[-1]
    assert len(load_suite("compbench", str(tmp_path / "color_val.txt")).prompts) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="expected T2I-CompBench files"):
        load_suite("compbench", str(tmp_path / "empty"))


def test_dpg_from_its_folder_and_from_its_table(tmp_path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in (("10", "A long\ntext."), ("2", "Another."), ("COCOval", "A third.")):
        (folder / f"{name}.txt").write_text(text)
    prompts = load_suite("dpg", str(folder)).prompts
    assert [p.meta["item_id"] for p in prompts] == ["COCOval", "2", "10"]
    assert prompts[2].text == "A long text."
    table = tmp_path / "dpg_bench.csv"
    table.write_text(
        'item_id,text,keywords,proposition_id\n2,"Another, one.",,1\n2,"Another, one.",,2\n10,Ten.,,1\n'
    )
    assert [p.text for p in load_suite("dpg", str(table)).prompts] == ["Another, one.", "Ten."]
    (folder / "3.txt").write_text(" ")
    with pytest.raises(InputError, match="3.txt empty"):
        load_suite("dpg", str(folder))


def test_coco_draws_one_caption_a_picture(tmp_path) -> None:
    path = tmp_path / "captions.json"
    data = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(20)],
        "annotations": [
            {"id": 100 * k + i, "image_id": i, "caption": f" Caption {k} of {i}\n"}
            for i in range(20)
            for k in range(5)
        ],
    }
    path.write_text(json.dumps(data))
    small, large = (load_suite("coco", str(path), count=count, seed=3) for count in (8, 20))
    assert small.prompts == large.prompts[:8] and len({p.reference for p in large.prompts}) == 20
    assert all(
        p.reference == f"{p.meta['image_id']}.jpg" and p.text.endswith(f"of {p.meta['image_id']}")
        for p in large.prompts
    )
    assert len({p.text.split()[1] for p in large.prompts}) > 1  # not always the first caption
    assert load_suite("coco", str(path), count=8, seed=4).prompts != small.prompts
    with pytest.raises(InputError, match="captions of 20 pictures: expected at least 30000"):
        load_suite("coco", str(path))
    path.write_text('{"images": []}')
    with pytest.raises(InputError, match="expected COCO captions"):
        load_suite("coco", str(path))


def test_a_hub_data_set(monkeypatch) -> None:
    """Class labels by name; a split where there are several; what the hub says when it has none."""
    import datasets

    labels = datasets.ClassLabel(names=["birds", "things"])
    features = datasets.Features({"Prompts": datasets.Value("string"), "Category": labels})
    rows = datasets.Dataset.from_dict(
        {"Prompts": ["an owl ", "a jug"], "Category": [0, 1]}, features=features
    )
    kept = {"owner/one": {"test": rows}, "owner/two": {"train": rows, "test": rows}}

    def load(name: str):
        if name not in kept:
            raise ConnectionError("Couldn't reach the hub\nmore")
        return datasets.DatasetDict(kept[name])

    monkeypatch.setattr("datasets.load_dataset", load)
    prompts = load_suite("prompts", "owner/one").prompts
    assert [(p.text, p.category) for p in prompts] == [("an owl", "birds"), ("a jug", "things")]
    assert load_suite("prompts", "owner/two:test").prompts == prompts
    for source, message in {
        "owner/two": "has splits train, test: expected owner/two:SPLIT",
        "owner/two:tset": "unknown split 'tset'.*did you mean 'test'",
        "owner/none": r"no file 'owner/none', .* from the hub \(Couldn't reach the hub\)$",
    }.items():
        with pytest.raises(InputError, match=message):
            load_suite("prompts", source)


# -- any list, and the own ones ------------------------------------------------------------------------------


def test_any_list_by_its_path(tmp_path) -> None:
    table = write_csv(
        tmp_path / "mine.csv", [("an owl", "birds"), ("a sign 'Stop'", "Text")], ("Caption", "Tag")
    )
    suite = load_suite(str(table))
    assert (suite.name, suite.categories) == ("mine", ("birds", "Text"))
    assert [p.rendered for p in suite.prompts] == [None, "Stop"]
    assert load_suite(lines(tmp_path / "list.txt", ["an owl", "", "a jug"])).categories == ("all",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: expected prompts"),
        ("prompt,category\n", "is empty: expected prompts"),
        ("prompt,category\nan owl\n", "expected 2 fields"),
        ("prompt,category\nan owl,birds,more\n", "expected 2 fields"),
        ("prompt,Prompt\nan owl,a\n", "expected different column names"),
        ("name,category\nan owl,birds\n", "expected a column 'prompt', found name, category"),
    ],
)
def test_a_malformed_table_is_one_line(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_suite("prompts", str(path))


def test_names_of_suites() -> None:
    with pytest.raises(InputError, match="did you mean 'drawbench'"):
        load_suite("drawbnech")
    with pytest.raises(InputError, match="expected its list, as in parti PATH"):
        load_suite("parti")
    with pytest.raises(InputError, match="needs no list"):
        load_suite("skills", "x.csv")
    with pytest.raises(InputError, match="for coco only"):
        load_suite("skills", count=3)


def test_own_suites() -> None:
    skills, emoji = load_suite("skills"), load_suite("emoji")
    assert Counter(Counter(p.category for p in skills.prompts).values()) == {20: 11}
    assert len({p.text.lower() for p in skills.prompts}) == 220
    assert all((p.rendered is not None) == (p.category == "Rendered text") for p in skills.prompts)
    assert Counter(Counter(p.category for p in emoji.prompts).values()) == {60: 4}
    assert len({p.text for p in emoji.prompts}) == 240 and all(p.reference for p in emoji.prompts)
    styles = Counter((p.category, p.text.rsplit(", ", 1)[1]) for p in emoji.prompts)
    assert set(styles.values()) == {20}


def test_a_shorter_look_keeps_every_category() -> None:
    suite = first(load_suite("skills"), 2)
    assert Counter(Counter(p.category for p in suite.prompts).values()) == {2: 11}
    with pytest.raises(InputError, match="limit 0: expected at least 1"):
        first(suite, 0)
    assert suite.sha256 != load_suite("skills").sha256 and "first 2 prompts" in suite.warnings[-1]
