"""A training that is made anew begins anew, and what it replaces is lost only when it is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_minitron.config import DistillConfig
from nemo_minitron.errors import ConfigError, DataError, PreemptedError
from nemo_minitron.stages.base import set_aside


@pytest.fixture
def output(tmp_path: Path) -> Path:
    path = tmp_path / "distilled"
    (path / "checkpoints" / "step=8-last").mkdir(parents=True)
    (path / "metrics.jsonl").write_text("old\n")
    return path


def config(output: Path, **settings: bool) -> DistillConfig:
    return DistillConfig(output=str(output), student="s", teacher="t", **settings)


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir())


def test_overwrite_begins_with_nothing_and_ends_with_the_new(output: Path) -> None:
    with set_aside(config(output, overwrite=True)):
        assert not output.exists()
        output.mkdir()
        (output / "metrics.jsonl").write_text("new\n")
    assert (output / "metrics.jsonl").read_text() == "new\n"
    assert names(output) == ["distilled"]


def test_a_resume_finds_what_was_there(output: Path) -> None:
    with set_aside(config(output)):
        assert (output / "checkpoints" / "step=8-last").is_dir()
    assert names(output) == ["distilled"]


def test_a_refusal_costs_nothing(output: Path) -> None:
    with pytest.raises(DataError), set_aside(config(output, overwrite=True)):
        output.mkdir()
        (output / "metrics.jsonl").write_text("new\n")
        raise DataError("no text")
    assert (output / "metrics.jsonl").read_text() == "old\n"
    assert names(output) == ["distilled"]


@pytest.mark.parametrize("error", [PreemptedError("stopped"), RuntimeError("crashed")])
def test_what_can_be_gone_on_with_stays_and_so_does_the_old(output: Path, error: Exception) -> None:
    with pytest.raises(type(error)), set_aside(config(output, overwrite=True)):
        (output / "checkpoints").mkdir(parents=True)
        raise error
    assert names(output) == [".distilled.replaced", "distilled"]
    with set_aside(config(output)):  # the same stage again, to its end
        assert (output / "checkpoints").is_dir()
    assert names(output) == ["distilled"]


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.mkdir()
    (path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="was not written by minitron"), set_aside(config(path, overwrite=True)):
        pass
    assert (path / "thesis.tex").read_text() == "x"
