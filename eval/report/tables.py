"""The report's figures as CSV, one a line, and as Markdown tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from eval.report.charts import OVERALL, cells_of, estimate, p_value

COLUMNS = ("kind", "name", "model", "setting", "category", "value", "low", "high", "count", "p", "verdict")
Line = dict[str, Any]


def lines(report: dict[str, Any]) -> Iterator[Line]:
    """Every figure of report.json: metrics, differences of two models, and distances of sets."""
    settings = [setting["id"] for setting in report["settings"]]
    for name, metric in report["metrics"].items():
        for model, by_setting in metric["values"].items():
            for setting in filter(by_setting.__contains__, settings):
                for category, cell in cells_of(by_setting[setting]):
                    yield _line("metric", name, setting, category, cell, cell["mean"], model)
        compared = metric.get("comparison", {})
        for setting in filter(compared.__contains__, settings):
            for category, cell in cells_of(compared[setting]):
                line = _line("A - B", name, setting, category, cell, cell["difference"])
                yield line | {"p": cell.get("p_holm", cell["p"]), "verdict": cell["verdict"]}
    for name, measure in report["sets"].items():
        for model, by_setting in measure["values"].items():
            for setting in filter(by_setting.__contains__, settings):
                cell = by_setting[setting]
                yield _line("set", name, setting, OVERALL, cell, cell["value"], model)


def to_csv(report: dict[str, Any]) -> str:
    """One figure a line at full precision; p is corrected by Holm within the categories."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([line.get(column) for column in COLUMNS] for line in lines(report))
    return buffer.getvalue()


def to_markdown(report: dict[str, Any]) -> str:
    """A title, the figures of all prompts, and those of each category at the first setting."""
    figures = list(lines(report))
    models = ", ".join(f"{side}: {model['name']}" for side, model in report["models"].items())
    overall = [line for line in figures if line["category"] == OVERALL]
    parts = [f"# {report['suite']['name']}", _escape(models), _table(report, overall, ["setting"])]
    first = report["settings"][0]["id"]
    by_category = [x for x in figures if x["category"] != OVERALL and x["setting"] == first]
    if by_category:
        parts += [f"## By category, {_escape(first)}", _table(report, by_category, ["category"])]
    if report["warnings"]:
        parts += ["## Warnings", "\n".join(f"- {_escape(text)}" for text in report["warnings"])]
    return "\n\n".join(parts) + "\n"


def _line(
    kind: str, name: str, setting: str, category: str, cell: Line, value: float, model: str = ""
) -> Line:
    ends = {end: cell.get(end) for end in ("low", "high", "count")}
    return dict(kind=kind, name=name, model=model, setting=setting, category=category, value=value) | ends


def _table(report: dict[str, Any], figures: Sequence[Line], keys: Sequence[str]) -> str:
    """Rows of measure and `keys`; a column a model and, where two are compared, one for A - B."""
    measures = report["metrics"] | report["sets"]
    sides, compared = list(report["models"]), any(line["kind"] == "A - B" for line in figures)
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for line in figures:
        arrow = "higher" if measures[line["name"]]["higher_is_better"] else "lower"
        title = f"{measures[line['name']]['title']} ({arrow} is better)"
        row = rows.setdefault((title, *(line[key] for key in keys)), {})
        row[line["model"] or "A - B"] = _cell(line)
    columns = [*sides, *(["A - B"] if compared else [])]
    head = ["measure", *keys, *columns]
    body = [[*key, *(row.get(column, "") for column in columns)] for key, row in rows.items()]
    align = ["---"] * (1 + len(keys)) + ["---:"] * len(columns)
    return "\n".join("| " + " | ".join(map(_escape, row)) + " |" for row in [head, align, *body])


def _cell(line: Line) -> str:
    value, interval = estimate(line["value"], line["low"], line["high"], sign=line["kind"] == "A - B")
    text = f"{value} ({interval})" if interval else value
    return text if line["kind"] != "A - B" else f"{text}, p {p_value(line['p'])}: {line['verdict']}"


def _escape(text: str) -> str:
    """One line of plain text in Markdown."""
    for mark in "\\|*_`<>[]":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())
