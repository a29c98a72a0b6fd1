"""Every command line answers bad arguments alike."""

from __future__ import annotations

import importlib

import pytest

COMMANDS = {
    "cascade": "cascade.cli",
    "python -m train": "train.__main__",
    "python -m train.data": "train.data.__main__",
    "python -m train.ema": "train.ema",
    "python -m train.embed": "train.embed",
    "python -m train.report": "train.report",
    "python -m eval": "eval.__main__",
    "python -m eval.bench_pretrained": "eval.bench_pretrained",
    "python -m eval.judge": "eval.judge.__main__",
    "python -m eval.launch": "eval.launch",
    "python -m eval.quality": "eval.quality",
    "python -m eval.sheet": "eval.sheet",
}


WITHOUT_ARGUMENTS = {"python -m eval.bench_pretrained"}  # they have something to do


@pytest.mark.parametrize(
    ("typed", "words"),
    [(typed, []) for typed in COMMANDS if typed not in WITHOUT_ARGUMENTS]
    + [(typed, ["--no-such-option"]) for typed in COMMANDS],
)
def test_bad_arguments_are_one_line_and_status_2(
    typed: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert importlib.import_module(COMMANDS[typed]).main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("\n")
    assert "usage:" not in err and f"see {typed}" in err and "--help" in err


@pytest.mark.parametrize("typed", COMMANDS)
def test_help_shows_what_is_typed(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(COMMANDS[typed]).main(["--help"])
    assert ended.value.code == 0 and f"usage: {typed} " in capsys.readouterr().out
