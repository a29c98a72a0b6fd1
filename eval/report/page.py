"""report.html: the figures of report.json and the pictures of the run, made ready for the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from eval.pages import environment
from eval.report.charts import (
    OVERALL,
    PLANE,
    Chart,
    category_chart,
    difference_chart,
    estimate,
    number,
    p_value,
    percent,
    planes,
)
from eval.report.gallery import Extremes, Gallery
from eval.run import DEFAULT, Run, Setting

SIDES = {"A better": "A", "B better": "B"}  # verdict -> colour


@dataclass(frozen=True)
class Figure:
    """One estimate as text, under the name by which the page holds it."""

    figure: str
    side: str
    value: str
    interval: str
    warning: str = ""


@dataclass(frozen=True)
class Headline:
    """One measure over all prompts at one setting."""

    title: str
    better: str
    setting: str
    figures: tuple[Figure, ...]
    difference: Figure | None = None
    verdict: str = ""
    p: str = ""
    effect: str = ""


@dataclass(frozen=True)
class MetricView:
    name: str
    title: str
    better: str
    facts: tuple[tuple[str, str], ...]  # what measured it and how
    charts: tuple[tuple[int, Chart, Chart | None], ...]  # by shown setting: values, A - B
    extremes: tuple[Extremes, ...]


@dataclass(frozen=True)
class TableView:
    title: str
    columns: tuple[tuple[str, bool], ...]  # name, and whether it holds measured values
    rows: tuple[tuple[tuple[str, str], ...], ...]  # value and interval
    note: str


def render(
    run: Run, report: dict[str, Any], people: dict[str, Any] | None, *, links: bool, px: int | None
) -> str:
    gallery = Gallery(run, px)
    every = headlines(report, [s["id"] for s in report["settings"]])
    first = gallery.settings[0]
    measures = report["metrics"] | report["sets"]
    titles = {name: f"{entry['title']} ({better(entry)})" for name, entry in measures.items()}
    return environment().get_template("report.html").render(
        run=run,
        report=report,
        links=links,
        sides=SIDES,
        headlines=[h for h in every if h.setting == first.id],
        every=every,
        sentence=sentence([h for h in every if h.setting == first.id]),
        metrics=[metric_view(name, m, gallery, report) for name, m in report["metrics"].items()],
        planes=planes(report["sweeps"], titles),
        plane_size=PLANE,
        tables=[table_view(entry) for entry in report["cascade"].values()],
        gallery=gallery,
        studies=gallery.studies(),
        setting_names=[setting_name(s) for s in gallery.settings],
        people=people,
        overall=OVERALL,
        percent=percent,
        p_value=p_value,
        facts=facts(run, report),
    )  # fmt: skip


def headlines(report: dict[str, Any], settings: Sequence[str]) -> list[Headline]:
    found = []
    for setting in settings:
        for name, metric in report["metrics"].items():
            cells = {m: by[setting]["overall"] for m, by in metric["values"].items() if setting in by}
            headline = _headline(name, metric, setting, cells, "mean")
            if (seen := reach(metric)) < (total := report["suite"]["prompts"]):
                headline = replace(headline, better=f"{headline.better}; {seen} of {total} prompts")
            found.append(headline)
        for name, measure in report["sets"].items():
            cells = {m: by[setting] for m, by in measure["values"].items() if setting in by}
            found.append(_headline(name, measure, setting, cells, "value"))
    return [headline for headline in found if headline.figures]


def _headline(name: str, entry: dict[str, Any], setting: str, cells: dict[str, Any], value: str) -> Headline:
    figures = tuple(
        Figure(
            f"{name}/{setting}/{model}",
            model,
            *estimate(cell[value], cell["low"], cell["high"]),
            cell.get("warning") or "",
        )
        for model, cell in cells.items()
    )
    compared = entry.get("comparison", {}).get(setting)
    if compared is None:
        return Headline(entry["title"], better(entry), setting, figures)
    cell = compared["overall"]
    text = estimate(cell["difference"], cell["low"], cell["high"], sign=True)
    difference = Figure(f"{name}/{setting}/difference", "difference", *text)
    effect = "" if cell["effect"] is None else number(cell["effect"], 2, sign=True)
    return Headline(
        entry["title"],
        better(entry),
        setting,
        figures,
        difference,
        cell["verdict"],
        p_value(cell["p"]),
        effect,
    )


def sentence(found: Sequence[Headline]) -> str:
    """How a comparison ends, in words; empty where nothing is compared."""
    verdicts = [headline.verdict for headline in found if headline.verdict]
    counts = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
    parts = [f"{verdict} on {count}" for verdict, count in counts.items() if verdict in SIDES]
    if counts.get("not significant"):
        parts.append(f"no significant difference on {counts['not significant']}")
    measures = "measure" if len(verdicts) == 1 else "measures"
    return f"Of {len(verdicts)} paired {measures}: {', '.join(parts)}." if verdicts else ""


def metric_view(name: str, metric: dict[str, Any], gallery: Gallery, report: dict[str, Any]) -> MetricView:
    names = list(gallery.run.suite.categories)
    categories = names if len(names) > 1 else []
    charts = []
    for index, setting in enumerate(gallery.settings):
        compared = metric.get("comparison", {}).get(setting.id)
        chart = category_chart(name, metric["values"], setting.id, categories)
        difference = None if compared is None else difference_chart(name, compared, setting.id, categories)
        if chart.rows:
            charts.append((index, chart, difference))
    labels = {"model": "Measured by", "resize": "Resize", "unit": "Unit", "note": "Note"}
    described = tuple((label, metric[key]) for key, label in labels.items() if metric.get(key))
    extremes = tuple(gallery.extremes(metric, report["stage"]))
    return MetricView(name, metric["title"], better(metric), described, tuple(charts), extremes)


def table_view(entry: dict[str, Any]) -> TableView:
    """Rows of plain values, measured ones last. NAME_low and NAME_high are the interval of NAME."""
    rows = entry["rows"]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    ends = {f"{key}_{end}" for key in keys for end in ("low", "high")}
    measured = {key for row in rows for key, value in row.items() if isinstance(value, float)}
    order = {key: place for place, key in enumerate(("model", "stage", "px"))}
    shown = sorted(set(keys) - ends, key=lambda key: (key in measured, order.get(key, len(order)), key))
    cells = tuple(tuple(_cell(row, key) for key in shown) for row in rows)
    columns = tuple((key.replace("_", " "), key in measured) for key in shown)
    return TableView(entry["title"], columns, cells, entry.get("note", ""))


def _cell(row: dict[str, Any], key: str) -> tuple[str, str]:
    """The value and its interval."""
    value = row.get(key)
    if isinstance(value, float):
        return estimate(value, row.get(f"{key}_low"), row.get(f"{key}_high"))
    return "" if value is None else str(value), ""


def reach(metric: dict[str, Any]) -> int:
    """How many prompts a metric has scores of; that of lettering skips all without words to show."""
    counts = [cell["overall"]["count"] for by in metric["values"].values() for cell in by.values()]
    return max(counts, default=0)


def better(entry: dict[str, Any]) -> str:
    return "higher is better" if entry["higher_is_better"] else "lower is better"


def setting_name(setting: Setting) -> str:
    return "defaults" if setting.id == DEFAULT else setting.id


def facts(run: Run, report: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured and with what, down to the hashes."""
    suite, plan = run.suite, run.plan
    size = f"{len(suite.prompts)} prompts in {len(suite.categories)} categories"
    listed = [
        ("Suite", f"{suite.name}: {size}, {suite.source}"),
        ("Prompt list", f"sha256 {suite.sha256}"),
    ]
    for side, model in run.models.items():
        stages = ", ".join(f"{name} {px} px" for name, px in model.stages.items())
        where = ", ".join(filter(None, [model.device, model.dtype]))
        listed.append(
            (f"Model {side}", f"{model.name} ({model.path}); {stages}{where and '; drawn on ' + where}")
        )
        listed.append((f"Files of {side}", f"sha256 {model.sha256}"))
        for name, value in model.config.get("sampling", {}).items():
            listed.append((f"Defaults of {side}, {name}", _assignments(value)))
    for setting in run.settings:
        changes = [_assignments(value, f"{stage}.") for stage, value in setting.overrides.items()]
        changes += [f"image embedding: {setting.embed}"] * (setting.embed != "prior")
        changes += [f"low-res input: {setting.lowres}"] * (setting.lowres != "generated")
        listed.append((f"Setting {setting_name(setting)}", ", ".join(changes) or "nothing changed"))
    listed += [
        ("Pictures", f"{plan.per_prompt} a prompt, seed {plan.seed}, {plan.batch} drawn together"),
        ("Measured stage", report["stage"] or "last"),
        (
            "Code",
            plan.code
            if plan.code == report["code"]
            else f"drawn by {plan.code}, measured by {report['code']}",
        ),
        ("Measured with", _assignments(report["environment"])),
    ]
    if report["references"]:
        listed.append(("References", _assignments(report["references"])))
    return listed


def _assignments(values: dict[str, Any], prefix: str = "") -> str:
    return ", ".join(f"{prefix}{name}={value}" for name, value in values.items())
