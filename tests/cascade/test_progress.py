"""What is said where stderr is no terminal, and that every item passes."""

from __future__ import annotations

import pytest

from cascade.progress import EVERY_S, tracked


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of EVERY_S from one look at the clock to the next: one before the items, one after each."""
    now = iter(EVERY_S / 3 * n for n in range(1000))
    monkeypatch.setattr("cascade.progress.time.monotonic", lambda: next(now))


def test_a_log_gets_a_line_now_and_then(slow: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(tracked(range(1000, 1900, 100), "sizes")) == list(range(1000, 1900, 100))
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "sizes: 3 of 9, 1 min left\nsizes: 6 of 9, 0 min left\nsizes: 9 of 9, 0 min left\n"


def test_items_without_a_length_and_quiet_ones(slow: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(tracked(iter("abcd"), "index", 4)) == list("abcd")
    assert capsys.readouterr().err == "index: 3 of 4, 0 min left\n"
    assert list(tracked("abcd", "index", quiet=True)) == list("abcd")
    assert capsys.readouterr() == ("", "")
