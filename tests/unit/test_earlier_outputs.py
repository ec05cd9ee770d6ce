"""Outputs of other settings are kept under their identity, and come back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nemo_minitron.config import DistillConfig, ExportConfig, PruneConfig, StageConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.stages.base import read_record, write_record
from nemo_minitron.stages.earlier import earlier_outputs, recall, stage_state
from nemo_minitron.stages.execute import begin
from nemo_minitron.stages.pipeline import prepare


def make(config: StageConfig, content: str) -> None:
    output = Path(config.output)
    if output.suffix == ".nemo":
        output.write_text(content)
    else:
        output.mkdir()
        (output / "content").write_text(content)
    write_record(output, config.STAGE, config, {}, 1.0)


def content(path: Path) -> str:
    return (path if path.is_file() else path / "content").read_text()


@pytest.mark.parametrize("name", ["out", "out.nemo", "o[u]t*"])
def test_settings_there_and_back(tmp_path: Path, name: str) -> None:
    one = PruneConfig(name="p", output=str(tmp_path / name), model="teacher")
    two = dataclasses.replace(one, runtime=dataclasses.replace(one.runtime, seed=7))
    make(one, "one")
    assert prepare(one) is None
    assert stage_state(two) == ("changed", ["runtime.seed: 1234 then, 7 now"])
    assert prepare(two) is two
    assert not Path(one.output).exists()
    make(two, "two")
    (kept,) = earlier_outputs(one.output)
    assert content(kept) == "one"
    assert kept.name.endswith(".nemo") == name.endswith(".nemo")

    assert prepare(one) is None
    assert content(Path(one.output)) == "one"
    record = read_record(one.output)
    assert record is not None and record["settings"]["runtime"]["seed"] == 1234
    (kept,) = earlier_outputs(one.output)
    assert content(kept) == "two"
    assert len(list(tmp_path.iterdir())) == (4 if name.endswith(".nemo") else 2)


def test_the_same_made_twice_is_kept_once(tmp_path: Path) -> None:
    one = PruneConfig(name="p", output=str(tmp_path / "out"), model="teacher")
    two = dataclasses.replace(one, runtime=dataclasses.replace(one.runtime, seed=7))
    make(one, "first")
    prepare(two)
    make(one, "second")
    prepare(two)
    assert [content(path) for path in earlier_outputs(one.output)] == ["second"]


def test_what_is_not_whole_or_not_ours_is_left(tmp_path: Path) -> None:
    one = PruneConfig(name="p", output=str(tmp_path / "out"), model="teacher")
    make(one, "one")
    other = dataclasses.replace(one, output=str(tmp_path / "other"))
    prepare(dataclasses.replace(one, runtime=dataclasses.replace(one.runtime, seed=7)))
    (kept,) = earlier_outputs(one.output)
    (kept / "record.json").unlink()
    assert not recall(one)
    assert not recall(other)
    (tmp_path / "out@mine").mkdir()
    assert earlier_outputs(one.output) == [kept]


def test_what_is_half_made_gives_way_to_what_was_whole(tmp_path: Path) -> None:
    one = PruneConfig(name="p", output=str(tmp_path / "out"), model="teacher")
    two = dataclasses.replace(one, runtime=dataclasses.replace(one.runtime, seed=7))
    make(one, "one")
    prepare(two)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "half").touch()  # a run of the second that was killed
    assert prepare(one) is None
    assert content(tmp_path / "out") == "one"
    assert (tmp_path / ".out.replaced" / "half").exists()


def test_what_was_begun_with_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    """A killed training is gone on with under its own settings alone, and waits for them."""
    one = DistillConfig(name="d", output=str(tmp_path / "out"), student="s", teacher="t")
    two = dataclasses.replace(one, lr=3e-4)

    def start(config: DistillConfig) -> None:
        todo = prepare(config)
        assert todo is config
        begin(todo)

    start(one)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "content").write_text("half of one")
    start(one)
    assert content(tmp_path / "out") == "half of one"
    assert stage_state(two) == ("begun", ["those that it was begun with"])
    start(two)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "content").write_text("half of two")
    start(one)
    assert content(tmp_path / "out") == "half of one"
    assert [content(path) for path in earlier_outputs(one.output)] == ["half of two"]


def test_something_else_in_the_way_is_named(tmp_path: Path) -> None:
    one = PruneConfig(name="p", output=str(tmp_path / "out"), model="teacher")
    two = dataclasses.replace(one, runtime=dataclasses.replace(one.runtime, seed=7))
    make(one, "one")
    prepare(two)
    (kept,) = earlier_outputs(one.output)
    (kept / "record.json").unlink()
    make(one, "again")
    with pytest.raises(ConfigError, match="is in the way of an output that is to be kept there"):
        prepare(two)
    assert content(tmp_path / "out") == "again"


def test_overwrite_replaces(tmp_path: Path) -> None:
    one = ExportConfig(name="e", output=str(tmp_path / "out"), model="teacher")
    make(one, "one")
    todo = prepare(dataclasses.replace(one, formats=["nemo"]), overwrite=True)
    assert todo is not None and todo.overwrite
    assert earlier_outputs(one.output) == []
