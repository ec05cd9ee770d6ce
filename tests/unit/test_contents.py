"""A record names the files of its output: what is gone, cut off or changed since is named, and made again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from nemo_minitron.cli.verify import show_verified
from nemo_minitron.config import DistillConfig, EvaluateConfig, ExportConfig, PruneConfig
from nemo_minitron.errors import CheckpointError, ConfigError
from nemo_minitron.jobs import contents
from nemo_minitron.jobs.output import Output
from nemo_minitron.jobs.records import record_path


def unsealed(record):
    """A record that may be changed, as of an earlier release."""
    return {key: value for key, value in record.items() if key != "seal"}


@pytest.fixture
def config(tmp_path: Path) -> PruneConfig:
    """Of an output that is done."""
    config = PruneConfig(name="p", output=str(tmp_path / "out"), model="teacher")
    (tmp_path / "out" / "weights").mkdir(parents=True)
    (tmp_path / "out" / "weights" / ".metadata").write_text("meta")
    (tmp_path / "out" / "weights" / "__0_0.distcp").write_text("0123456789")
    (tmp_path / "out" / "README.md").write_text("a card")
    (tmp_path / "out" / "skipped.jsonl").write_text("{}\n")
    (tmp_path / "out" / "checkpoints").mkdir()
    (tmp_path / "out" / "checkpoints" / "state").write_text("state")
    (tmp_path / "out" / "round-1" / "previous").mkdir(parents=True)
    (tmp_path / "out" / "round-1" / "previous" / "state").write_text("state")
    Output(config).finish({}, 1.0)
    return config


def test_what_a_record_names(config):
    record = Output(config).record()
    assert record is not None
    assert set(record["files"]) == {"weights/.metadata", "weights/__0_0.distcp"}
    assert record["files"]["weights/__0_0.distcp"] == {
        "size": 10,
        "sha256": "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882",  # sha256sum
    }
    assert Output(config).state() == ("done", [])


def test_what_users_may_change(config):
    out = Path(config.output)
    (out / "README.md").write_text("a better card")
    (out / "skipped.jsonl").unlink()
    (out / "checkpoints" / "state").unlink()
    (out / "notes.txt").write_text("mine")
    assert Output(config).state() == ("done", [])


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_output_is_made_again(config, damage):
    file = Path(config.output, "weights", "__0_0.distcp")
    if damage == "gone":
        file.unlink()
        fault = f"{file} is gone"
    else:
        file.write_text("012")
        fault = f"{file} has 3 bytes, not 10"
    assert Output(config).state() == ("damaged", [fault])
    todo = Output(config).prepare()
    assert todo is not None and todo.config.overwrite
    with pytest.raises(ConfigError, match="is gone" if damage == "gone" else "has 3 bytes, not 10"):
        Output(ExportConfig(name="e", output=f"{config.output}-hf", model=config.output)).check_inputs()


def test_a_damaged_training_is_resumed(tmp_path):
    config = DistillConfig(name="d", output=str(tmp_path / "out"), student="s", teacher="t")
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "weights").write_text("w")
    Output(config).finish({}, 1.0)
    (tmp_path / "out" / "model" / "weights").unlink()
    todo = Output(config).prepare()
    assert todo is not None and not todo.config.overwrite
    assert Output(config).state() == ("unfinished", [])


def test_an_input_is_checked_as_far_as_it_is_named(config, tmp_path):
    out = Path(config.output)
    whole = EvaluateConfig(name="e", output=str(tmp_path / "e"), models={"a": str(out / "weights")})
    Output(whole).check_inputs()
    (out / "weights" / ".metadata").write_text("atem")  # of the same size
    with pytest.raises(ConfigError, match=rf"^models.a: {out}/weights/.metadata is damaged: .*; make {out} again"):
        Output(whole).check_inputs()
    (out / "kept.json").write_text("{}")
    record = json.loads(record_path(out).read_text())
    record["files"] = {"kept.json": {"size": 3, "sha256": ""}}
    record_path(out).write_text(json.dumps(unsealed(record)))
    Output(whole).check_inputs()  # beside what is read


def test_an_archived_output_that_is_damaged_does_not_come_back(config):
    other = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, seed=7))
    place = Output(config).archive()
    assert place is not None and Output(config).is_archived()
    (place / "weights" / ".metadata").unlink()
    assert not Output(config).is_archived()
    assert Output(other).prepare() is not None


def test_what_read_an_output_that_was_made_again_and_differs(config, tmp_path):
    """Also where the run was killed in between: it is seen from the records alone."""
    out = Path(config.output)
    (out / "context").mkdir()
    (out / "metrics.jsonl").write_text("{}")
    Output(config).finish({}, 1.0)
    reads = {
        "all": ExportConfig(name="e", output=str(tmp_path / "e"), model=config.output),
        "a part": ExportConfig(name="w", output=str(tmp_path / "w"), model=str(out / "weights")),
        "another": ExportConfig(name="o", output=str(tmp_path / "o"), model=str(out / "other")),
    }
    for reader in reads.values():
        Path(reader.output).mkdir()
        Output(reader).finish({}, 1.0)

    def states() -> list[str]:
        return [Output(reader).state()[0] for reader in reads.values()]

    (out / "metrics.jsonl").write_text("other times")
    (out / "context" / "io.json").write_text("other names")
    (out / "weights" / ".metadata").write_text("another id")
    Output(config).finish({}, 1.0)
    assert states() == ["done"] * 3
    (out / "weights" / "__0_0.distcp").write_text("9876543210")
    assert Output(config).state() == ("done", [])  # nobody has looked
    Output(config).finish({}, 1.0)
    assert states() == ["changed", "changed", "done"]
    stale = Output(reads["all"])
    assert stale.state()[1] == [f"model: {out} was made again, and differs"]
    todo = stale.prepare()
    assert todo is not None and todo.config.overwrite
    assert Path(stale.path).is_dir()  # the stage replaces it; it is not kept as of other settings
    assert not list(tmp_path.glob("e@*"))
    Output(reads["all"]).finish({}, 1.0)
    assert states() == ["done", "changed", "done"]
    record = json.loads(record_path(tmp_path / "w").read_text())
    del record["contents"]  # of an earlier release
    record_path(tmp_path / "w").write_text(json.dumps(unsealed(record)))
    assert states() == ["done"] * 3


def test_a_training_does_not_go_on_from_another_model(config, tmp_path):
    training = DistillConfig(name="d", output=str(tmp_path / "d"), student=config.output, teacher="t")
    (tmp_path / "d" / "checkpoints").mkdir(parents=True)
    Output(training).begin()
    assert Output(training).state() == ("unfinished", [])
    (Path(config.output) / "weights" / "__0_0.distcp").write_text("9876543210")
    Output(config).finish({}, 1.0)
    fault = f"student: {config.output} was made again, and differs"
    assert Output(training).state() == ("begun", [fault])
    assert Output(training).resume_faults()[0].startswith(f"{training.output} was begun with other settings: {fault}")
    todo = Output(training).prepare()
    assert todo is not None and todo.config.overwrite
    record_path(config.output).unlink()
    assert not Output(training).is_stale()


def test_a_record_whose_figures_changed_is_none(config):
    text = record_path(config.output).read_text()
    assert '"size": 10,' in text
    record_path(config.output).write_text(text.replace('"size": 10,', '"size": 11,'))
    assert Output(config).record() is None
    assert Output(config).state() == ("unfinished", [])
    record_path(config.output).write_text(text.replace("\n", ""))  # the figures count, not how they are set
    assert Output(config).state() == ("done", [])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flip_of_a_record_is_seen_or_changes_nothing(config, data):
    path = record_path(config.output)
    text, before = path.read_bytes(), Output(config).record()
    place = data.draw(st.integers(0, 8 * len(text) - 1))
    changed = bytearray(text)
    changed[place // 8] ^= 1 << place % 8
    path.write_bytes(changed)
    after = Output(config).record()
    path.write_bytes(text)
    assert after is None or {**after, "seal": ""} == {**before, "seal": ""} or "seal" not in after


def test_records_of_earlier_releases(config):
    record = json.loads(record_path(config.output).read_text())
    del record["files"]
    record_path(config.output).write_text(json.dumps(unsealed(record)))
    assert Output(config).state() == ("done", [])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b'{"version": 1}', b'{"version": 1, "hash": "a"}'])
def test_a_damaged_record_is_none(config, content):
    record_path(config.output).write_bytes(content)
    assert Output(config).record() is None
    assert Output(config).state() == ("unfinished", [])


def test_verify_names_each_damaged_file(config, tmp_path, capsys):
    console = Console(width=200)
    show_verified(tmp_path, console)
    assert capsys.readouterr().out == f"prune  {config.output}: 2 files\n"
    file = Path(config.output, "weights", "__0_0.distcp")
    file.write_text("0123456788")
    with pytest.raises(CheckpointError, match=rf"^{file} is damaged: its content is not what was written$"):
        show_verified(tmp_path, console)
    assert capsys.readouterr().out == f"prune  {config.output}: DAMAGED\n"
    record_path(config.output).write_text("{")
    with pytest.raises(CheckpointError, match="record.json cannot be read"):
        show_verified(Path(config.output), console)


def test_verify_needs_something(tmp_path):
    with pytest.raises(ConfigError, match="holds no output of minitron and no distributed checkpoint"):
        show_verified(tmp_path, Console())


def test_a_nemo_file(tmp_path):
    config = ExportConfig(name="e", output=str(tmp_path / "m.nemo"), model="m")
    Path(config.output).write_text("archive")
    Output(config).finish({}, 1.0)
    assert Output(config).state() == ("done", [])
    Path(config.output).write_text("archivE")
    with pytest.raises(CheckpointError, match="is damaged"):
        show_verified(tmp_path, Console())
    Path(config.output).write_text("")
    assert Output(config).state()[0] == "damaged"


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_flip_is_seen(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("out")
    files = data.draw(st.dictionaries(st.sampled_from("abcd"), st.binary(min_size=1, max_size=64), min_size=1))
    for name, content in files.items():
        (out / name).write_bytes(content)
    before = contents.contents_of(out)
    assert contents.damaged(out, before) == []
    name = data.draw(st.sampled_from(sorted(files)))
    place = data.draw(st.integers(0, 8 * len(files[name]) - 1))
    changed = bytearray(files[name])
    changed[place // 8] ^= 1 << place % 8
    (out / name).write_bytes(changed)
    assert contents.damaged(out, before) == [f"{out / name} is damaged: its content is not what was written"]
    assert contents.missing(out, before) == []
