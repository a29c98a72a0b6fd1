"""report.json: its form, its figures against what the pictures were made to say, and its bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cascade import random
from cascade.errors import InputError
from cascade.images import save_png
from eval import measure as module
from eval.extractors import base
from eval.extractors.base import JointExtractor
from eval.gauges import GAUGES, parse
from eval.measure import check, measure
from eval.metrics.frechet import frechet_distance, moments
from eval.run import Run
from tests.eval.small_models import save_aesthetic_head, save_open_clip, save_transformers_clip
from tests.eval.synthetic import make_run

TEXTS = {"Colors": [f"colour {i}" for i in range(12)], "Rare Words": [f"rare {i}" for i in range(3)]}


class MeanColour(JointExtractor):
    """A joint space of two: a picture is its red and green, and every text is red."""

    network, resize = "toy of mean colours", "none"

    def __init__(self, source: str = "") -> None:
        self.module = nn.Linear(1, 1)
        nn.init.ones_(self.module.weight)
        nn.init.zeros_(self.module.bias)

    def prepare(self, picture: Tensor) -> Tensor:
        return picture.mean(dim=(1, 2))[:2] + 1

    def encode(self, pictures: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        return torch.stack(list(pictures))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[1.0, 0.0]]).expand(len(texts), -1)


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """clip and dinov2 look at mean colours."""
    monkeypatch.setattr(base, "MeanColour", MeanColour, raising=False)
    for name in ("clip", "dinov2"):
        monkeypatch.setitem(GAUGES, name, replace(GAUGES[name], loader="base:MeanColour", pickles=False))


def draw(model: str, prompt: int, k: int, px: int) -> Image.Image:
    """A is redder than B, and only a little so in the second category."""
    noise = int(30 * random.uniform([prompt], model, k)[0, 0])
    ahead = (40 if prompt < 12 else 4) if model == "A" else 0
    return Image.new("RGB", (px, px), (100 + ahead + noise, 120 - noise, 0))


def pictures_run(folder: Path, **settings: Any) -> Run:
    """A run of pictures made elsewhere: nothing has to be loaded for them."""
    run = make_run(folder, texts=TEXTS, draw=draw, stages={"picture": 16}, **settings)
    models = {name: replace(model, kind="pictures") for name, model in run.models.items()}
    return replace(run, plan=replace(run.plan, models=models))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return pictures_run(tmp_path / "run")


@pytest.fixture
def real(tmp_path: Path) -> Path:
    folder = tmp_path / "real"
    for i in range(40):
        save_png(
            Image.new("RGB", (20, 20), (150 + 3 * i % 50, 60 + 7 * i % 90, 0)),
            folder / f"sub{i % 2}" / f"{i}.png",
        )
    return folder


def cosines(run: Run, model: str) -> np.ndarray:
    """P K, from the files."""
    found = []
    for item in run.select(model):
        r, g, _ = np.asarray(Image.open(run.path(item))).mean(axis=(0, 1)) / 127.5
        found.append(r / math.hypot(r, g))
    return np.array(found).reshape(15, 2)


def test_scores_are_means_over_prompts(run: Run) -> None:
    report = measure(run, metrics=["clip=toy"])
    metric = report["metrics"]["clip_cosine"]
    expected = cosines(run, "A").mean(axis=1)
    found = metric["values"]["A"]["default"]
    assert found["overall"]["mean"] == pytest.approx(expected.mean(), rel=1e-6)
    assert found["categories"]["Rare Words"]["mean"] == pytest.approx(expected[12:].mean(), rel=1e-6)
    assert list(found["prompts"].values()) == pytest.approx(expected.tolist(), rel=1e-6)
    assert (found["overall"]["count"], found["categories"]["Colors"]["count"]) == (15, 12)
    for cell in (found["overall"], *found["categories"].values()):
        assert cell["low"] < cell["mean"] < cell["high"]
    score = report["metrics"]["clip_score"]["values"]["A"]["default"]["overall"]["mean"]
    assert score == pytest.approx(2.5 * expected.mean(), rel=1e-6)
    assert (metric["model"], metric["resize"]) == ("toy of mean colours", "none")


def test_a_hit_rate_of_0_has_an_interval(run: Run) -> None:
    """All texts are alike to the toy, so that no picture finds its own: 0 of 15, whose Wilson interval is."""
    found = measure(run, metrics=["clip=toy"])["metrics"]["clip_r1"]["values"]["A"]["default"]["overall"]
    assert found == {"mean": 0.0, "low": 0.0, "high": pytest.approx(0.2039, abs=1e-3), "count": 15}


def test_a_against_b(run: Run) -> None:
    found = measure(run, metrics=["clip=toy"])["metrics"]["clip_cosine"]["comparison"]["default"]
    apart = (cosines(run, "A") - cosines(run, "B")).mean(axis=1)
    assert found["overall"]["difference"] == pytest.approx(apart.mean(), rel=1e-6)
    assert found["overall"]["effect"] == pytest.approx(apart.mean() / apart.std(ddof=1), rel=1e-6)
    assert found["overall"]["verdict"] == "A better"
    colours, rare = found["categories"]["Colors"], found["categories"]["Rare Words"]
    assert (colours["verdict"], colours["p"], colours["p_holm"]) == ("A better", 2**-11, 2**-10)
    assert "note" not in colours
    assert rare["verdict"] == "not significant"
    assert rare["p"] >= 0.25  # of three prompts, no less is possible
    assert "alone they cannot be significant" in rare["note"]


def test_sets_against_real_pictures(run: Run, real: Path) -> None:
    report = measure(run, metrics=["dinov2=toy"], references=real)
    assert report["references"]["what"] == "all pictures of the folder"
    assert report["references"]["count"] == 40
    found = report["sets"]["fd_dinov2"]["values"]["A"]["default"]

    def levels(paths: Any) -> Tensor:
        return torch.tensor(
            np.array([np.asarray(Image.open(p)).mean(axis=(0, 1))[:2] / 127.5 for p in paths])
        )

    expected = frechet_distance(
        moments(levels(real.rglob("*.png"))), moments(levels(run.path(i) for i in run.select("A")))
    )
    assert found["value"] == pytest.approx(expected, rel=1e-4)
    assert found["low"] < found["value"] < found["high"]
    assert found["count"] == 30 and "fewer than 2,048" in found["warning"]
    names = {"fd", "kid", "precision", "recall", "density", "coverage"}
    assert set(report["sets"]) == {f"{name}_dinov2" for name in names}
    assert (
        report["sets"]["recall_dinov2"]["higher_is_better"]
        and not report["sets"]["fd_dinov2"]["higher_is_better"]
    )
    assert any("30 pictures" in warning for warning in report["warnings"])


def test_published_statistics_stand_for_pictures(run: Run, tmp_path: Path) -> None:
    mu, sigma = np.array([1.0, 0.8]), np.array([[0.04, 0.01], [0.01, 0.02]])
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma)
    report = measure(run, metrics=["dinov2=toy"], references=tmp_path / "stats.npz")
    assert set(report["sets"]) == {"fd_dinov2"}  # the others need the pictures
    np.savez(tmp_path / "wide.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(InputError, match="statistics of 3 features: dinov2 has 2"):
        measure(run, metrics=["dinov2=toy"], references=tmp_path / "wide.npz")


def test_the_prompts_own_pictures_are_the_reference(run: Run, real: Path) -> None:
    """Where the suite names one for every prompt; a protocol that wants the whole folder gets it."""

    def naming(suite_name: str) -> Run:
        prompts = tuple(
            replace(p, reference=f"sub0/{2 * (i % 5)}.png") for i, p in enumerate(run.suite.prompts)
        )
        suite = replace(run.suite, prompts=prompts, name=suite_name)
        return replace(run, plan=replace(run.plan, suite=suite))

    assert measure(naming("toy"), metrics=["dinov2=x"], references=real)["references"]["count"] == 5
    assert measure(naming("coco"), metrics=["dinov2=x"], references=real)["references"]["count"] == 40


def test_sweeps_pair_alignment_and_distance(tmp_path: Path, real: Path) -> None:
    run = pictures_run(tmp_path / "run", guidance=(1, 4), sides="A")
    settings = tuple(replace(s, study=f"base.{s.study}" if s.study else "") for s in run.settings)
    run = replace(run, plan=replace(run.plan, settings=settings))
    report = measure(run, metrics=["clip=toy", "dinov2=toy"], references=real)
    (sweep,) = report["sweeps"]
    assert (sweep["over"], sweep["x"], sweep["y"]) == ("base.guidance", "clip_cosine", "fd_dinov2")
    assert [(p["setting"], p["label"]) for p in sweep["points"]] == [
        ("base.guidance=1", "1"),
        ("base.guidance=4", "4"),
    ]
    point, values = sweep["points"][0], report["metrics"]["clip_cosine"]["values"]["A"]["base.guidance=1"]
    assert (point["x"], point["x_low"]) == (values["overall"]["mean"], values["overall"]["low"])
    assert point["y_low"] < point["y"] < point["y_high"]
    assert "comparison" not in report["metrics"]["clip_cosine"]


def test_imported_scores_stand_beside_the_others(run: Run, tmp_path: Path) -> None:
    """GenEval's overall figure is the mean of its tasks, here of 12 and of 3 prompts."""
    folder = tmp_path / "geneval"
    for model, good in (("A", 12), ("B", 6)):
        place = folder / model / "default"
        place.mkdir(parents=True)
        rows = [
            {"filename": f"x/{p:05d}/samples/{k:04d}.png", "correct": p < good}
            for p in range(15)
            for k in range(2)
        ]
        (place / "results.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = measure(run, metrics=[f"geneval={folder}"])["metrics"]["geneval"]
    assert found["values"]["A"]["default"]["overall"]["mean"] == pytest.approx((1 + 0) / 2)
    assert found["values"]["B"]["default"]["overall"]["mean"] == pytest.approx((0.5 + 0) / 2)
    assert found["comparison"]["default"]["overall"]["difference"] == pytest.approx(0.25)
    assert found["model"] == "scored elsewhere, read from geneval"


def test_only_prompts_that_ask_for_words_are_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GAUGES, "ocr", replace(GAUGES["ocr"], loader="base:MeanColour"))
    prompts = tuple(replace(p, rendered="X" if i < 4 else None) for i, p in enumerate(run.suite.prompts))
    run = replace(run, plan=replace(run.plan, suite=replace(run.suite, prompts=prompts)))
    found = measure(run, metrics=["ocr"])["metrics"]["ocr_similarity"]["values"]["A"]["default"]
    assert found["overall"]["count"] == 4
    assert list(found["prompts"]) == ["0", "1", "2", "3"] and list(found["categories"]) == ["Colors"]


def test_the_report_is_the_same_bytes(run: Run, real: Path) -> None:
    """Measured anew, from stored features, and by the functions of the seed alone."""
    settings: Any = dict(metrics=["clip=toy", "dinov2=toy"], references=real)
    report, path = measure(run, **settings), run.folder / "report.json"
    first = path.read_bytes()
    assert json.loads(first) == report
    assert measure(run, **settings) and path.read_bytes() == first
    for stored in (run.folder / "features").rglob("*.safetensors"):
        stored.unlink()
    assert measure(run, **settings) and path.read_bytes() == first
    assert measure(run, **settings, seed=1) and path.read_bytes() != first


def test_own_clip_scores_every_model_and_is_flagged(tmp_path: Path, model_folder: Path) -> None:
    """A cascade against pictures: the cascade's CLIP scores both, and says that it flatters."""
    run = make_run(tmp_path / "run")
    config = {"sampling": {}}
    models = {name: replace(m, path=str(model_folder), config=config) for name, m in run.models.items()}
    run = replace(run, plan=replace(run.plan, models=models))
    report = measure(run)
    found = report["metrics"]["own_clip_cosine"]
    assert set(found["values"]) == {"A", "B"}
    assert "flatter" in found["note"] and found["note"] in report["warnings"]
    assert found["model"] == "own CLIP of model"
    assert report["stage"] == "sr1024"
    rows = report["cascade"]["stages"]["rows"]
    assert {row["stage"] for row in rows} == {"base", "sr256", "sr1024"}
    assert all("Own CLIP: cosine to the prompt" in row for row in rows)
    base_only = measure(run, stage="base")["metrics"]["own_clip_cosine"]["values"]
    assert base_only != found["values"]


def test_small_models_in_published_layouts(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every score of a network that reads files, from the command line's words to the report."""
    clips = tmp_path / "open_clip", tmp_path / "transformers"
    for folder, save in zip(clips, (save_open_clip, save_transformers_clip), strict=True):
        folder.mkdir()
        save(folder)
    save_aesthetic_head(tmp_path / "head.pth")
    monkeypatch.undo()  # the toys
    specs = [f"clip=local-dir:{clips[0]}", f"pickscore={clips[1]}"]
    specs.append(f"aesthetic={tmp_path / 'head.pth'},local-dir:{clips[0]}")
    found = measure(run, metrics=specs, allow_legacy=True)["metrics"]
    assert set(found) == {"clip_cosine", "clip_score", "clip_r1", "clip_r5", "pickscore", "aesthetic"}
    assert (
        found["clip_cosine"]["resize"]
        == "bicubic with antialiasing (Pillow), shorter side to 32 px, centre crop"
    )
    for metric in found.values():
        assert set(metric["values"]) == {"A", "B"}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["klip=x"], "unknown metric 'klip'.*did you mean 'clip'"),
        (["clip"], "metric clip: expected clip=FOLDER"),
        (["ocr=x"], "metric ocr=x: expected ocr alone"),
        (["clip=a", "clip=b"], "metric clip is given twice"),
        (["geneval=/no/such/folder"], "metric geneval: no file or folder /no/such/folder"),
    ],
)
def test_bad_metrics_are_one_line(metrics: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(metrics)


def test_what_cannot_be_measured_changes_nothing(run: Run, real: Path, tmp_path: Path) -> None:
    measure(run, metrics=["clip=toy"])
    before = (run.folder / "report.json").read_bytes()
    (tmp_path / "empty").mkdir()
    cascade = replace(run, plan=replace(run.plan, models={"A": replace(run.models["A"], kind="cascade")}))
    for call, message in (
        (lambda: measure(run, metrics=["dinov2=toy"]), "compares with real pictures: expected --references"),
        (
            lambda: measure(run, metrics=["dinov2=toy"], references=tmp_path / "empty"),
            "at least 2 pictures, found 0",
        ),
        (
            lambda: measure(run, metrics=["dinov2=toy"], references=tmp_path / "none"),
            "expected a folder of pictures",
        ),
        (lambda: measure(cascade, metrics=["clip=toy"], stage="sr9"), "unknown stage 'sr9'"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert (run.folder / "report.json").read_bytes() == before


def test_names_parse() -> None:
    assert parse(["own-clip", "clip=local-dir:/x=y"]) == [("own-clip", ""), ("clip", "local-dir:/x=y")]


def test_figures_have_nine_digits() -> None:
    assert module._rounded({"a": [1 / 3, (2, None)], 3: "x"}) == {"a": [0.333333333, [2, None]], "3": "x"}
