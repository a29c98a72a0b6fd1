"""Settings of a run from the texts of the command line."""

from __future__ import annotations

import pytest

from cascade.errors import InputError
from eval.run import Setting
from eval.settings import check_settings, make_settings
from eval.suites.suite import Prompt, make_suite

SUITE = make_suite("tiny", "own", [Prompt(text="an owl")])


def test_nothing_said_is_the_default() -> None:
    assert make_settings() == (Setting(),)


def test_guidance_replaces_the_default_and_several_stages_multiply() -> None:
    one = make_settings(guidance=["base=1,2.5"])
    assert [(s.id, s.overrides, s.study, s.label) for s in one] == [
        ("base.guidance=1", {"base": {"guidance": 1}}, "base.guidance", "1"),
        ("base.guidance=2.5", {"base": {"guidance": 2.5}}, "base.guidance", "2.5"),
    ]
    grid = make_settings(guidance=["base=1,2", "sr256=3,4"])
    assert [s.label for s in grid] == ["1, 3", "1, 4", "2, 3", "2, 4"]
    assert grid[1].overrides == {"base": {"guidance": 1}, "sr256": {"guidance": 4}}
    assert {s.study for s in grid} == {"base.guidance,sr256.guidance"}


def test_sweeps_and_ablations_stand_beside_the_default() -> None:
    settings = make_settings(
        common=["base.steps=4"], sweeps=["base.threshold=none,dynamic"], ablations=["prior", "lowres"]
    )
    assert [s.id for s in settings] == [
        "default",
        "base.threshold=none",
        "base.threshold=dynamic",
        "embed=text",
        "embed=none",
        "lowres=real",
    ]
    assert settings[1].overrides == {"base": {"steps": 4, "threshold": "none"}}
    assert all(s.overrides["base"]["steps"] == 4 for s in settings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(guidance=["base"]), "'base': expected NAME=V1,V2"),
        (dict(guidance=["base=1,1"]), "setting base.guidance=1 is given twice"),
        (dict(guidance=["base=1,"]), "expected numbers or names, got ''"),
        (dict(sweeps=["aug_level=1"]), "expected STAGE.NAME=V1,V2"),
        (dict(sweeps=["base.threshold=../up"]), "value '../up': expected a number or a name"),
        (dict(common=["steps=4"]), "--set steps=4: expected STAGE.NAME=VALUE"),
        (dict(ablations=["pior"]), "unknown ablation 'pior'.*did you mean 'prior'"),
    ],
)
def test_malformed_texts_are_one_line(given, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_settings(**given)


def test_what_a_model_cannot_draw_is_refused(tiny_cascade, tmp_path) -> None:
    def check(stop_at: str | None = None, **given) -> None:
        check_settings(tiny_cascade, make_settings(**given), stop_at, SUITE, str(tmp_path))

    check(guidance=["base=1,2"], ablations=["prior"])
    for message, given in {
        "unknown stage 'sr512'": dict(sweeps=["sr512.steps=2"]),
        "unknown setting 'guidence'.*did you mean 'guidance'": dict(common=["base.guidence=2"]),
        "steps: expected int, got 1.5": dict(sweeps=["base.steps=1.5"]),
        "unknown stage 'sr512'.*": dict(stop_at="sr512"),
        "stop-at 'prior' draws no picture": dict(stop_at="prior"),
        "expected --references and a suite that names one a prompt": dict(ablations=["lowres"]),
        "draws no super-resolution": dict(stop_at="base", ablations=["lowres"]),
    }.items():
        with pytest.raises(InputError, match=message):
            check(**given)
    bare = type(tiny_cascade)(tiny_cascade.stages.values(), tiny_cascade.text_encoder)
    with pytest.raises(InputError, match="has no prior"):
        check_settings(bare, make_settings(ablations=["prior"]), None, SUITE, None)
