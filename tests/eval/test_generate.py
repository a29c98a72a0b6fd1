"""Drawing a run: the same bytes for any number of processes, any batch company and any interruption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cascade import Cascade, random
from cascade.errors import InputError
from cascade.images import downsample, from_pil, save_png, to_pil
from eval.generate import draw_share, finish, run_folder
from eval.pictures import load_picture
from eval.run import Model, Plan, Run, Setting, picture_seeds, read_items, read_run
from eval.settings import make_settings
from eval.suites.suite import Prompt, make_suite
from tests.conftest import tiny_stage

TEXTS = ("a red owl", "a blue jug", "a red owl", "two small owls")
PROMPTS = [Prompt(text=text, category=text[:1], reference="real.png") for text in TEXTS]
SETTINGS = make_settings(sweeps=["sr256.aug_level=0.4"])


class Killed(BaseException):
    """As SIGKILL: nothing may catch it and tidy up."""


def make_plan(settings: Sequence[Setting] = SETTINGS, batch: int = 2, **change) -> Plan:
    stages = {"base": 16, "sr256": 32}
    model = Model(name="tiny", path="tiny", sha256="0" * 64, kind="cascade", stages=stages)
    plan = Plan(
        suite=make_suite("tiny", "own", PROMPTS),
        models={"A": model},
        settings=tuple(settings),
        per_prompt=2,
        seed=5,
        batch=batch,
        stop_at="sr256",
        code="one",
    )
    return replace(plan, **change)


def draw(pipe: Cascade, folder: Path, plan: Plan, world: int = 1, order: Sequence[int] | None = None) -> Run:
    with run_folder(folder, plan) as plan:
        for rank in order or range(world):
            draw_share(folder, plan, dict.fromkeys(plan.models, pipe), "one", rank, world)
        return finish(folder, plan)


def interrupted(pipe: Cascade, folder: Path, plan: Plan, after: int, rank: int = 0, world: int = 1) -> None:
    """Draw until `after` batches are done, then die."""
    done = 0

    def report() -> None:
        nonlocal done
        done += 1
        if done == after:
            raise Killed

    with pytest.raises(Killed), run_folder(folder, plan) as plan:
        draw_share(folder, plan, {"A": pipe}, "one", rank, world, report)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(tiny_cascade, tmp_path_factory) -> Path:
    """A run drawn by one process without an interruption."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    draw(tiny_cascade, folder, make_plan())
    return folder


# -- the same bytes ------------------------------------------------------------------------------------------


def test_a_run_is_complete_and_in_order(whole) -> None:
    run = read_run(whole)
    assert [item.key for item in run.items] == list(run.plan.keys()) and len(run.items) == 4 * 2 * 2
    item = run.items[-1]
    assert set(item.files) == {"base", "sr256"} and item.overrides == {"sr256": {"aug_level": 0.4}}
    with Image.open(run.path(run.items[0])) as image:
        assert image.size == (32, 32) and image.text["prompt"] == "a red owl"  # type: ignore[attr-defined]
    assert len({item.sha256["sr256"] for item in run.items}) == len(run.items)  # prompt 2 repeats prompt 0
    assert len({item.sha256["base"] for item in run.items}) == 8  # both settings have the same


@pytest.mark.parametrize(("world", "order"), [(2, (1, 0)), (3, (2, 0, 1))])
def test_any_number_of_processes_gives_the_same_files(tiny_cascade, whole, tmp_path, world, order) -> None:
    draw(tiny_cascade, tmp_path / "run", make_plan(), world, order)
    assert contents(tmp_path / "run") == contents(whole)


def test_pictures_are_those_of_one_call_of_the_pipeline(tiny_cascade, whole) -> None:
    """Stage by stage, with shared stages drawn once, or in one call: the same."""
    run = read_run(whole)
    item = next(i for i in run.items if (i.prompt, i.k, i.setting) == (3, 1, "sr256.aug_level=0.4"))
    assert item.seed == random.key(5, TEXTS[3], 1)
    output = tiny_cascade([TEXTS[3]], seed=item.seed, stop_at="sr256", sr256=dict(aug_level=0.4))
    for stage, expected in output.stages.items():
        assert to_pil(load_picture(run.path(item, stage))[None])[0] == to_pil(expected)[0]


def test_the_batch_does_not_change_a_picture(tiny_cascade, whole, tmp_path) -> None:
    run = draw(tiny_cascade, tmp_path / "run", make_plan(batch=5))
    assert [item.sha256 for item in run.items] == [item.sha256 for item in read_run(whole).items]


def test_seeds_are_of_text_and_k_alone() -> None:
    """Not of the place in the suite; a repeated text draws new pictures."""
    plan = make_plan()
    seeds = picture_seeds(plan)
    moved = picture_seeds(replace(plan, suite=make_suite("x", "own", plan.suite.prompts[::-1])))
    assert moved[0, 1] == seeds[3, 1] and moved[2, 0] == seeds[1, 0]
    assert len(set(seeds.values())) == len(seeds) == 8
    assert picture_seeds(replace(plan, seed=6))[0, 0] != seeds[0, 0]


# -- interruptions -------------------------------------------------------------------------------------------


def test_killed_and_resumed_by_other_numbers_of_processes(tiny_cascade, whole, tmp_path) -> None:
    folder = tmp_path / "run"
    interrupted(tiny_cascade, folder, make_plan(), after=3)
    with (folder / "manifest-0.jsonl").open("ab") as manifest:
        manifest.write(b'{"model": "A", "setti')  # the line it was writing
    (folder / "pictures/A/default/base/.5f.tmp").write_bytes(b"half a picture")
    interrupted(tiny_cascade, folder, make_plan(), after=1, rank=2, world=3)
    interrupted(tiny_cascade, folder, make_plan(), after=1, rank=1, world=2)
    draw(tiny_cascade, folder, make_plan())
    assert contents(folder) == contents(whole)


def test_only_what_is_missing_or_damaged_is_drawn(tiny_cascade, whole, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    items = {item.key: item for item in read_run(folder).items}
    (folder / items["A", "sr256.aug_level=0.4", 1, 0].files["sr256"]).unlink()
    damaged = folder / items["A", "sr256.aug_level=0.4", 3, 1].files["base"]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    drawn = []

    def save(image, path, chunks):
        drawn.append(path)
        return save_png(image, path, chunks)

    monkeypatch.setattr("eval.generate.save_png", save)
    draw(tiny_cascade, folder, make_plan())
    assert contents(folder) == contents(whole)
    assert {path.parent.parent.name for path in drawn} == {"sr256.aug_level=0.4"}
    assert {path.name for path in drawn} == {f"000{p}-{k}.png" for p in (1, 3) for k in (0, 1)}  # two batches


def test_an_unfinished_run_is_no_run(tiny_cascade, tmp_path) -> None:
    interrupted(tiny_cascade, tmp_path / "run", make_plan(), after=1)
    with pytest.raises(InputError, match="lacks 14 of 16 pictures: draw the rest"):
        read_run(tmp_path / "run")


# -- refusals ------------------------------------------------------------------------------------------------


def test_a_run_of_something_else_is_refused_and_left_as_it_is(whole, tmp_path) -> None:
    folder, plan = tmp_path / "run", make_plan()
    shutil.copytree(whole, folder)
    before = contents(folder)
    other = replace(plan.models["A"], sha256="1" * 64)
    changes = {
        "suite tiny [0-9a-f]{12}, not other [0-9a-f]{12}": dict(
            suite=make_suite("other", "own", plan.suite.prompts[:2])
        ),
        "model A tiny 000000000000 base sr256.*, not tiny 111111111111 base sr256": dict(models={"A": other}),
        "model B absent, not tiny": dict(models={"A": plan.models["A"], "B": other}),
        "setting sr256.aug_level=0.4 .*, not absent": dict(settings=(Setting(),)),
        "per-prompt 2, not 3": dict(per_prompt=3),
        "seed 5, not 6": dict(seed=6),
    }
    for message, change in changes.items():
        with pytest.raises(InputError, match=message), run_folder(folder, replace(plan, **change)):
            pass
    assert contents(folder) == before


def test_what_does_not_change_a_picture_may_differ(whole, tmp_path) -> None:
    """Where the model and the list lie, what is measured, infinity as JSON has it."""
    folder, plan = tmp_path / "run", make_plan()
    shutil.copytree(whole, folder)
    moved = replace(plan.models["A"], path="elsewhere/tiny")
    suite = replace(plan.suite, source="elsewhere.csv")
    with run_folder(folder, replace(plan, models={"A": moved}, suite=suite, references="real")) as found:
        assert found.references == "real"
    endless = make_plan(make_settings(common=["base.threshold_cap=.inf"]))
    for _ in range(2):
        with run_folder(tmp_path / "endless", endless):
            pass


def test_a_folder_with_something_else_in_it_is_refused(tmp_path) -> None:
    (tmp_path / "letters.txt").write_text("keep")
    with pytest.raises(InputError, match="no run and not empty"), run_folder(tmp_path, make_plan()):
        pass
    assert contents(tmp_path) == {"letters.txt": b"keep"}


def test_two_commands_do_not_draw_in_one_folder(tmp_path) -> None:
    with run_folder(tmp_path / "run", make_plan()):
        with (
            pytest.raises(InputError, match="in use by another command"),
            run_folder(tmp_path / "run", make_plan()),
        ):
            pass


def test_the_code_of_a_run_is_that_which_began_it(tiny_cascade, tmp_path) -> None:
    interrupted(tiny_cascade, tmp_path / "run", make_plan(), after=2)
    with run_folder(tmp_path / "run", make_plan(code="two", command="again")) as plan:
        assert (plan.code, plan.command) == ("one", "again")
        draw_share(tmp_path / "run", plan, {"A": tiny_cascade}, "two")
        run = finish(tmp_path / "run", plan)
    assert [item.code for item in run.items].count("one") == 4


# -- ablations -----------------------------------------------------------------------------------------------


def test_where_the_image_embedding_comes_from(tiny_cascade, tmp_path) -> None:
    suite = make_suite("x", "own", PROMPTS[:2])
    plan = make_plan(make_settings(ablations=["prior"]), per_prompt=1, suite=suite)
    run = draw(tiny_cascade, tmp_path / "run", plan)
    bare = Cascade(tiny_cascade.stages.values(), tiny_cascade.text_encoder)
    pooled = tiny_cascade.encode([TEXTS[1]]).pooled
    for setting, pipe, embed in (
        ("default", tiny_cascade, None),
        ("embed=text", tiny_cascade, pooled),
        ("embed=none", bare, None),
    ):
        item = next(i for i in run.items if (i.prompt, i.k, i.setting) == (1, 0, setting))
        expected = pipe([TEXTS[1]], seed=[item.seed], image_embed=embed, stop_at="sr256")
        assert to_pil(load_picture(run.path(item))[None])[0] == expected.images[0], setting
    assert len({i.sha256["base"] for i in run.items}) == len(run.items)  # the three differ


def test_super_resolution_of_real_pictures(tiny_cascade, tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    real = to_pil(torch.rand(1, 3, 80, 96, generator=generator) * 2 - 1)[0]
    real.save(tmp_path / "real.png")
    plan = make_plan(make_settings(ablations=["lowres"]), per_prompt=1, references=str(tmp_path))
    run = draw(tiny_cascade, tmp_path / "run", plan)
    item = next(i for i in run.items if (i.prompt, i.k, i.setting) == (3, 0, "lowres=real"))
    small = downsample(from_pil(real)[:, :, 8:88], 16)
    assert to_pil(load_picture(run.path(item, "base"))[None])[0] == to_pil(small[None])[0]
    expected = tiny_cascade(
        [TEXTS[3]], seed=[item.seed], start_at="sr256", stop_at="sr256", images=small[None]
    )
    assert to_pil(load_picture(run.path(item))[None])[0] == expected.images[0]


def test_stages_that_settings_share_are_drawn_once(tiny_cascade, tmp_path, monkeypatch) -> None:
    """A sweep of the last stage draws the first stage as often as no sweep would."""
    calls = []
    stage = type(tiny_cascade.stages["base"])
    sample = stage.sample
    monkeypatch.setattr(
        stage, "sample", lambda self, *a, **k: calls.append(self.config.name) or sample(self, *a, **k)
    )
    plan = make_plan(make_settings(sweeps=["sr256.aug_level=0,0.2"]), batch=4, per_prompt=1)
    draw(tiny_cascade, tmp_path / "run", plan)
    assert calls == ["base", "sr256", "sr256", "sr256"]
    items = read_items(tmp_path / "run")
    assert len({i.sha256["base"] for i in items}) == 4 and len({i.sha256["sr256"] for i in items}) == 12


def test_two_models_draw_the_same_seeds(tiny_cascade, tmp_path) -> None:
    torch.manual_seed(1)
    other = Cascade([tiny_stage("base", 16)], tiny_cascade.text_encoder)
    plan = make_plan((Setting(),), per_prompt=1)
    model = plan.models["A"]
    plan = replace(plan, models={"A": model, "B": replace(model, sha256="1" * 64, stages={"base": 16})})
    with run_folder(tmp_path / "run", plan):
        draw_share(tmp_path / "run", plan, {"A": tiny_cascade, "B": other}, "one")
        run = finish(tmp_path / "run", plan)
    assert [i.seed for i in run.select("A")] == [i.seed for i in run.select("B")]
    assert run.stage("B") == "base" and run.stage("A") == "sr256"
    with pytest.raises(InputError, match="unknown stage 'sr256' in model B"):
        run.stage("B", "sr256")


# -- the manifest --------------------------------------------------------------------------------------------


def test_a_damaged_run_is_one_line(whole, tmp_path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    with pytest.raises(InputError, match="is no run folder"):
        read_run(tmp_path)
    (folder / read_run(folder).items[3].files["base"]).unlink()
    with pytest.raises(InputError, match="missing picture"):
        read_run(folder)
    row = json.loads((folder / "manifest.jsonl").read_text().splitlines()[0])
    (folder / "manifest.jsonl").write_text(json.dumps({**row, "prompt": "one"}) + "\n")
    with pytest.raises(InputError, match=r"manifest.jsonl:1.prompt: expected int"):
        read_run(folder)
