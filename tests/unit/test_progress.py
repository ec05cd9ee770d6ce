"""Progress where there is no terminal."""

from __future__ import annotations

import logging

import pytest

from nemo_minitron.runtime import progress


def test_lines_in_a_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with caplog.at_level(logging.INFO), progress.progress_bar("scoring", 8, completed=2) as advance:
        advance(3)
        advance(3, "fast")
    assert [record.message for record in caplog.records] == ["scoring: 5 of 8", "scoring: 8 of 8, fast"]


def test_quiet_ranks_say_nothing(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO), progress.progress_bar("scoring", 8, shown=False) as advance:
        advance(8)
    assert not caplog.records
    assert capsys.readouterr() == ("", "")


def test_a_bar_where_the_output_is_shown_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with progress.progress_bar("scoring", 8) as advance:
        advance(8, "KL 1.0")
    assert "scoring" in capsys.readouterr().err
