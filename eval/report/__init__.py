"""The report of a run: report.html, one file that needs no other and no script, report.csv and report.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cascade.config import read_mapping
from cascade.errors import InputError
from eval.pages import write_text
from eval.report.page import reach, render
from eval.report.tables import to_csv, to_markdown
from eval.run import Run

HTML = "report.html"
TALLY = "tally.json"  # of `python -m eval tally`


def write_report(run: Run, report: dict[str, Any], *, out: Path | None = None, px: int | None = None) -> Path:
    """Write report.html, report.csv and report.md of the figures in `report` into the run folder and return
    the page. The people's votes go in where they have been tallied.

    out: another place for the page, where its pictures link to nothing; the tables go beside it.
    px: longest side of the embedded pictures; None is what a budget of about 10 MB allows.
    """
    if out is not None and out.suffix != ".html":
        raise InputError(
            f"report {out}: expected a name that ends in .html, as in {out.with_suffix('.html')}"
        )
    report = json.loads(json.dumps(report, sort_keys=True))  # in the order of report.json, read or not
    report["metrics"] = dict(sorted(report["metrics"].items(), key=lambda item: -reach(item[1])))
    path = run.folder / HTML if out is None else out
    tally = run.folder / TALLY
    people = read_mapping(tally) if tally.is_file() else None
    html = render(run, report, people, links=out is None, px=px)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path.with_suffix(".csv"), to_csv(report))
    write_text(path.with_suffix(".md"), to_markdown(report))
    return write_text(path, html)
