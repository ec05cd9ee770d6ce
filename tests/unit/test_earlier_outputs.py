"""Outputs of other settings are kept under their identity, and come back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from nemo_minitron.config import CorrectConfig, DistillConfig, ExportConfig, ParallelLayout, PruneConfig, StageConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.jobs import local
from nemo_minitron.jobs.output import Output, archived_outputs
from nemo_minitron.jobs.records import read_record, record_path


def make(config: StageConfig, content: str) -> None:
    output = Path(config.output)
    if output.suffix == ".nemo":
        output.write_text(content)
    else:
        output.mkdir()
        (output / "content").write_text(content)
    Output(config).finish({}, 1.0)


def content(path: Path) -> str:
    return (path if path.is_file() else path / "content").read_text()


@pytest.mark.parametrize("name", ["out", "out.nemo", "o[u]t*"])
def test_settings_there_and_back(tmp_path: Path, name: str) -> None:
    one = PruneConfig(name="p", output=str(tmp_path / name), model="teacher")
    two = dataclasses.replace(one, runtime=dataclasses.replace(one.runtime, seed=7))
    make(one, "one")
    assert Output(one).prepare() is None
    assert Output(two).state() == ("changed", ["runtime.seed: 1234 then, 7 now"])
    todo = Output(two).prepare()
    assert todo is not None and todo.config is two
    assert not Path(one.output).exists()
    make(two, "two")
    (kept,) = archived_outputs(one.output)
    assert content(kept) == "one"
    assert kept.name.endswith(".nemo") == name.endswith(".nemo")

    assert Output(one).prepare() is None
    assert content(Path(one.output)) == "one"
    record = read_record(one.output)
    assert record is not None and record["settings"]["runtime"]["seed"] == 1234
    (kept,) = archived_outputs(one.output)
    assert content(kept) == "two"
    assert len(list(tmp_path.iterdir())) == (4 if name.endswith(".nemo") else 2)


def test_the_same_made_twice_is_kept_once(tmp_path: Path) -> None:
    one = PruneConfig(name="p", output=str(tmp_path / "out"), model="teacher")
    two = dataclasses.replace(one, runtime=dataclasses.replace(one.runtime, seed=7))
    make(one, "first")
    Output(two).prepare()
    make(one, "second")
    Output(two).prepare()
    assert [content(path) for path in archived_outputs(one.output)] == ["second"]


def test_what_is_not_whole_or_not_ours_is_left(tmp_path: Path) -> None:
    one = PruneConfig(name="p", output=str(tmp_path / "out"), model="teacher")
    make(one, "one")
    other = dataclasses.replace(one, output=str(tmp_path / "other"))
    Output(dataclasses.replace(one, runtime=dataclasses.replace(one.runtime, seed=7))).prepare()
    (kept,) = archived_outputs(one.output)
    (kept / "record.json").unlink()
    assert not Output(one).restore()
    assert not Output(other).restore()
    (tmp_path / "out@mine").mkdir()
    assert archived_outputs(one.output) == [kept]


def test_what_is_half_made_gives_way_to_what_was_whole(tmp_path: Path) -> None:
    one = PruneConfig(name="p", output=str(tmp_path / "out"), model="teacher")
    two = dataclasses.replace(one, runtime=dataclasses.replace(one.runtime, seed=7))
    make(one, "one")
    Output(two).prepare()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "half").touch()  # a run of the second that was killed
    assert Output(one).prepare() is None
    assert content(tmp_path / "out") == "one"
    assert (tmp_path / ".out.replaced" / "half").exists()


def test_what_was_begun_with_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    """A killed training is gone on with under its own settings alone, and waits for them."""
    one = DistillConfig(name="d", output=str(tmp_path / "out"), student="s", teacher="t")
    two = dataclasses.replace(one, lr=3e-4)

    def start(config: DistillConfig) -> None:
        todo = Output(config).prepare()
        assert todo is not None and todo.config is config
        todo.begin()

    start(one)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "content").write_text("half of one")
    start(one)
    assert content(tmp_path / "out") == "half of one"
    assert Output(two).state() == ("begun", ["lr: 0.0001 then, 0.0003 now"])
    start(two)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "content").write_text("half of two")
    start(one)
    assert content(tmp_path / "out") == "half of one"
    assert [content(path) for path in archived_outputs(one.output)] == ["half of two"]


def test_something_else_in_the_way_is_named(tmp_path: Path) -> None:
    one = PruneConfig(name="p", output=str(tmp_path / "out"), model="teacher")
    two = dataclasses.replace(one, runtime=dataclasses.replace(one.runtime, seed=7))
    make(one, "one")
    Output(two).prepare()
    (kept,) = archived_outputs(one.output)
    (kept / "record.json").unlink()
    make(one, "again")
    with pytest.raises(ConfigError, match="is in the way of an output that is to be kept there"):
        Output(two).prepare()
    assert content(tmp_path / "out") == "again"


def test_overwrite_replaces(tmp_path: Path) -> None:
    one = ExportConfig(name="e", output=str(tmp_path / "out"), model="teacher")
    make(one, "one")
    todo = Output(dataclasses.replace(one, formats=["nemo"])).prepare(overwrite=True)
    assert todo is not None and todo.config.overwrite
    assert archived_outputs(one.output) == []


def training(tmp_path: Path) -> DistillConfig:
    (tmp_path / "student").mkdir()
    return DistillConfig(output=str(tmp_path / "out"), student=str(tmp_path / "student"), teacher="t")


def test_a_stage_by_itself_does_not_pass_off_what_others_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every difference is named before a process starts; with --overwrite it is made anew."""
    one = training(tmp_path)
    make(one, "one")
    started = []
    monkeypatch.setattr(local, "launch", lambda *args, **kwargs: started.append(args) or pytest.fail("it starts"))
    two = dataclasses.replace(one, lr=3e-4, loss=dataclasses.replace(one.loss, kind="reverse_kl"))
    (tmp_path / "student" / "weights").touch()
    with pytest.raises(ConfigError) as refused:
        local.run_stage(two)
    made = f"{one.output} was made with other settings"
    assert refused.value.faults == [
        f"{made}: loss.kind: forward_kl then, reverse_kl now",
        f"{made}: lr: 0.0001 then, 0.0003 now",
        f"{made}: student: {one.student} has changed; choose another output, or make this one anew with --overwrite "
        "(overwrite=true)",
    ]
    assert not started
    assert content(Path(one.output)) == "one"
    Output(dataclasses.replace(two, overwrite=True)).check_resumable()
    with pytest.raises(ConfigError, match="stage: distill then, correct now"):
        Output(CorrectConfig(output=one.output, model="t")).check_resumable()


def test_a_killed_training_goes_on_with_its_settings_in_any_layout(tmp_path: Path) -> None:
    one = training(tmp_path)
    Output(one).begin()
    Path(one.output).mkdir()
    Output(one).check_resumable()
    Output(
        dataclasses.replace(one, parallel=ParallelLayout(tensor=2), micro_batch_size=2, max_minutes=5.0)
    ).check_resumable()
    with pytest.raises(ConfigError, match="was begun with other settings: steps: 300 then, 600 now; choose another"):
        Output(dataclasses.replace(one, steps=600)).check_resumable()
    (tmp_path / "logs" / "out" / "begun.json").write_text("{")  # nothing is known
    Output(dataclasses.replace(one, steps=600)).check_resumable()


@pytest.mark.parametrize("known", ["parallel.context", "intermediate"])
def test_a_setting_that_is_new_had_its_default(tmp_path: Path, known: str) -> None:
    """A record that was written before there was this setting."""
    one = training(tmp_path)
    make(one, "one")
    path = record_path(one.output)
    record = json.loads(path.read_text())
    section, *rest = known.split(".")
    del (record["settings"][section] if rest else record["settings"])[(rest or [section])[0]]
    del record["seal"]
    path.write_text(json.dumps(record | {"hash": "of fewer settings"}))
    assert Output(one).state() == ("done", [])
    Output(one).check_resumable()
    wide = dataclasses.replace(one, parallel=ParallelLayout(context=2), intermediate=dataclasses.replace(
        one.intermediate, hidden="mse"))  # fmt: skip
    state, reasons = Output(wide).state()
    assert state == "changed"
    assert f"{'parallel.context: 1' if rest else 'intermediate.hidden: None'} then" in " ".join(reasons)
