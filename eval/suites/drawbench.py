"""DrawBench (Imagen, arXiv:2205.11487, appendix C): 200 prompts in 11 categories.

The prompts are published as a spreadsheet without a licence, so they do not stand here; any public copy can
be read. Two lists are known by their hash: the original, and that of OpenAI's dalle3-eval-samples, which
changed two prompts and has no categories (the blocks are in the same order).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from cascade.errors import InputError, unknown
from eval.suites.suite import Prompt, Suite, list_sha256, make_suite
from eval.suites.table import (
    CATEGORY_COLUMNS,
    TEXT_COLUMNS,
    Row,
    column,
    hub_rows,
    is_hub_id,
    quoted,
    read_rows,
    texts,
)

COUNTS = {  # in the order of the list
    "Colors": 25,
    "Conflicting": 10,
    "Counting": 19,
    "DALL-E": 20,
    "Descriptions": 20,
    "Gary Marcus et al.": 10,
    "Misspellings": 10,
    "Positional": 20,
    "Rare Words": 7,
    "Reddit": 38,
    "Text": 21,
}
TOTAL = sum(COUNTS.values())
ORIGINAL = "a2e054682be8d58a36c97efe760b29de3a274fcd0abeaf21cee015fe8106a605"
OPENAI = "258b2fdefa613c9487b46d55cfadfcf264d4bda522e761938c104ef11b39aa54"
HUB = "sayakpaul/drawbench"  # read where no path is given


def read_drawbench(source: str | None) -> Suite:
    """DrawBench from a CSV, TSV or TXT file or a hub data set. Raises InputError, one line, where a column is
    missing, a category is none of the eleven, or a category has not as many prompts as in the paper."""
    where = source or HUB
    rows = hub_rows(where) if not Path(where).exists() and is_hub_id(where) else read_rows(Path(where))
    if len(rows) != TOTAL:
        raise InputError(f"{where}: expected the {TOTAL} prompts of DrawBench, found {len(rows)}")
    prompt_column = column(rows, TEXT_COLUMNS, where)
    assert prompt_column is not None  # required
    lines, categories = texts(rows, prompt_column, where), _categories(rows, where)
    prompts = [
        Prompt(text=text, category=category, rendered=quoted(text) if category == "Text" else None)
        for text, category in zip(lines, categories, strict=True)
    ]
    digest, warnings = list_sha256(prompts), []
    if digest == OPENAI:
        warnings.append(
            "prompts: the copy of dalle3-eval-samples, in which prompts 153 and 167 (from 0) were changed"
        )
    elif digest != ORIGINAL:
        if column(rows, CATEGORY_COLUMNS, where, required=False) is None:
            raise InputError(
                f"{where}: expected a column 'category', found {', '.join(rows[0])}; only a published list "
                "goes without, as the order tells its categories"
            )
        warnings.append("prompts: not the published list of DrawBench; figures compare with no other run's")
    return make_suite("drawbench", where, prompts, warnings)


def _categories(rows: list[Row], where: str) -> list[str]:
    """One a row; of a list without categories, by the order of the blocks."""
    name = column(rows, CATEGORY_COLUMNS, where, required=False)
    if name is None:
        return [category for category, count in COUNTS.items() for _ in range(count)]
    known = {category.lower(): category for category in COUNTS}
    found = texts(rows, name, where)
    for category in found:
        if category.lower() not in known:
            raise unknown("category", category, COUNTS, where=where)
    result = [known[category.lower()] for category in found]
    counts = Counter(result)
    for category, count in COUNTS.items():
        if counts[category] != count:
            raise InputError(
                f"{where}: expected {count} prompts of category {category}, found {counts[category]}"
            )
    return result
