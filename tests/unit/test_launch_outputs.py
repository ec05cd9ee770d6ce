from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nemo_minitron.checkpoints.model_record import peek_family, peek_shape
from nemo_minitron.config import (
    CorrectConfig,
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    ReportConfig,
    RuntimeConfig,
    StageConfig,
)
from nemo_minitron.errors import CheckpointError, ConfigError, MinitronError
from nemo_minitron.jobs.atomic import stage_output
from nemo_minitron.jobs.output import Output
from nemo_minitron.jobs.plans import PlannedPath, StagePlan, human_bytes, human_count
from nemo_minitron.jobs.records import hashed_settings, parents, read_record, record_path


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_output_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with stage_output(out) as aside:
        (aside / "a").write_text("1")
        assert not out.exists()
        assert aside.parent == out.parent  # a sibling: the rename never crosses file systems
    assert (out / "a").read_text() == "1"
    assert contents(out.parent) == {"out"}


def test_an_error_leaves_the_earlier_output(tmp_path):
    out = tmp_path / "out"
    with stage_output(out) as aside:
        (aside / "a").write_text("1")
    with pytest.raises(RuntimeError, match="boom"), stage_output(out, overwrite=True) as aside:
        (aside / "a").write_text("2")
        raise RuntimeError("boom")
    assert (out / "a").read_text() == "1"
    assert contents(tmp_path) == {"out"}
    with stage_output(out, overwrite=True) as aside:
        (aside / "b").write_text("3")
    assert not (out / "a").exists()
    assert contents(tmp_path) == {"out"}


def test_a_full_disk_is_one_line_and_leaves_the_earlier_output(tmp_path):
    out = tmp_path / "out"
    with stage_output(out) as aside:
        (aside / "a").write_text("1")
    with pytest.raises(MinitronError, match=r"no space left while writing .*out"), stage_output(out, True) as aside:
        (aside / "a").write_text("2")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (out / "a").read_text() == "1"
    assert contents(tmp_path) == {"out"}
    with pytest.raises(PermissionError), stage_output(out, True):  # other errors of the system are not dressed up
        raise PermissionError(errno.EACCES, "no")


def test_a_kill_leaves_the_earlier_output_and_the_next_run_clears_up(tmp_path):
    out = tmp_path / "out"
    with stage_output(out) as aside:
        (aside / "a").write_text("1")
    code = (
        "import time\nfrom nemo_minitron.jobs.atomic import stage_output\n"
        f"with stage_output({str(out)!r}, True) as aside:\n"
        "    (aside / 'a').write_text('2')\n    print('written', flush=True)\n    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (out / "a").read_text() == "1"
    assert len(contents(tmp_path)) == 2
    with stage_output(out, True) as aside:
        (aside / "a").write_text("3")
    assert contents(tmp_path) == {"out"}


def test_only_ours_is_overwritten(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with stage_output(out):  # an empty directory is nobody's
        pass
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "x").touch()
    with pytest.raises(ConfigError, match="already exists"), stage_output(foreign):
        pass
    with pytest.raises(ConfigError, match="was not written by minitron"), stage_output(foreign, overwrite=True):
        pass
    link = tmp_path / "link"
    link.symlink_to(foreign)
    with pytest.raises(ConfigError, match="was not written by minitron"), stage_output(link, overwrite=True):
        pass
    assert contents(foreign) == {"x"}


def export(tmp_path: Path, **changes: object) -> ExportConfig:
    return dataclasses.replace(ExportConfig(model=str(tmp_path / "m"), output=str(tmp_path / "o")), **changes)


def record(path: Path, config: StageConfig) -> None:
    Output(dataclasses.replace(config, output=str(path))).finish({}, 1.0)


def test_record_round_trip(tmp_path):
    (tmp_path / "o").mkdir()
    written = Output(export(tmp_path)).finish({"size": 3}, 1.5, peak_rss_bytes=7)
    assert read_record(tmp_path / "o") == json.loads(json.dumps(written))
    assert written["name"] == "export"
    assert written["versions"]["nemo-minitron"]
    assert written["hash"] == Output(export(tmp_path)).hash
    assert record_path("x/model.nemo") == Path("x/model.nemo.record.json")
    for broken in ("", "{", "[]", '{"version": 0}'):
        (tmp_path / "o" / "record.json").write_text(broken)
        assert read_record(tmp_path / "o") is None


def test_the_hash_follows_settings_and_inputs_only(tmp_path):
    model = tmp_path / "m"
    model.mkdir()
    (model / "w").write_text("1")
    base = Output(export(tmp_path)).hash
    for same in (
        {"output": "elsewhere"},
        {"overwrite": True},
        {"name": "n"},
        {"runtime": RuntimeConfig(threads=4, timeout_minutes=3.0)},
    ):
        assert Output(export(tmp_path, **same)).hash == base
    for other in ({"formats": ["nemo"]}, {"runtime": RuntimeConfig(seed=2)}, {"max_shard_size": "1GB"}):
        assert Output(export(tmp_path, **other)).hash != base
    (model / "w").write_text("23")
    assert Output(export(tmp_path)).hash != base


def test_a_setting_that_was_added_leaves_earlier_identities(tmp_path):
    settings = hashed_settings(export(tmp_path))
    assert not set(ExportConfig.ADDED) & set(settings)
    assert hashed_settings(export(tmp_path, max_shard_size="1GB")) == settings | {"max_shard_size": "1GB"}
    for cls in (CorrectConfig, DistillConfig):
        before = hashed_settings(cls(output="o"))
        assert not {"logits", "quantize", "group_size"} & set(before)
        assert hashed_settings(cls(output="o", logits="chunks")) == before | {"logits": "chunks"}


def test_a_recorded_input_counts_by_its_record(tmp_path):
    first = tmp_path / "first"
    (first / "model").mkdir(parents=True)
    record(first, export(tmp_path))
    inside = export(tmp_path, model=str(first / "model"))
    before = Output(inside).hash
    (first / "model" / "w").write_text("x")  # the record vouches for what lies under it
    assert Output(inside).hash == before
    record(first, export(tmp_path, formats=["nemo2"]))
    assert Output(inside).hash != before


def test_a_report_depends_on_all_records_but_its_own(tmp_path):
    config = ReportConfig(run=str(tmp_path), output=str(tmp_path / "report"))
    (tmp_path / "a").mkdir()
    record(tmp_path / "a", export(tmp_path))
    before = Output(config).hash
    (tmp_path / "report").mkdir()
    record(tmp_path / "report", config)
    assert Output(config).hash == before
    record(tmp_path / "a", export(tmp_path, formats=["nemo"]))
    assert Output(config).hash != before


def test_inputs_of_a_mapping(tmp_path):
    config = EvaluateConfig(models={"a": "x", "b": "y"}, output="o")
    assert config.inputs() == {"models.a": "x", "models.b": "y"}
    assert set(parents(config)) == {"models.a", "models.b"}


def test_plans_know_what_earlier_stages_write(tmp_path):
    plan = StagePlan("x", reads=[PlannedPath(str(tmp_path / "run" / "a" / "model"), "student")])
    assert plan.missing_reads(set()) == [f"student: {tmp_path}/run/a/model does not exist"]
    assert plan.missing_reads({str(tmp_path / "run" / "a")}) == []
    assert plan.missing_reads({str(tmp_path / "run" / "ab")}) != []
    whole = StagePlan("report", reads=[PlannedPath(str(tmp_path / "run"), "run")])
    assert whole.missing_reads({str(tmp_path / "run" / "a")}) == []


def test_peeking_at_a_shape(tmp_path):
    assert peek_shape(tmp_path) is None
    shape = {
        "num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2, "num_query_groups": 1,
        "head_dim": 4, "vocab_size": 11, "tied_embeddings": True, "num_moe_experts": None,
    }  # fmt: skip
    (tmp_path / "minitron.json").write_text(json.dumps({"shape": shape, "architecture": {"family": "qwen2"}}))
    assert peek_family(tmp_path).qkv_bias
    found = peek_shape(tmp_path)
    assert found is not None
    assert found.to_dict() == shape
    for broken in ("{", "{}", json.dumps({"shape": {**shape, "num_layers": 0}})):
        (tmp_path / "minitron.json").write_text(broken)
        with pytest.raises(CheckpointError, match="not a readable model record"):
            peek_shape(tmp_path)


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**40, "3.0 TiB")])
def test_human_bytes(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(("count", "text"), [(12, "12"), (1500, "1.5 k"), (134515008, "134.5 M"), (2e12, "2.0 T")])
def test_human_count(count, text):
    assert human_count(count) == text


@pytest.mark.slow
def test_the_wheel_takes_one_top_level_name_and_carries_the_configurations(repository, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached"], cwd=repository, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        if (repository / name).is_file() and not name.startswith(("tests/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((repository / name).read_bytes())
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(build, cwd=source, check=True, capture_output=True, timeout=200)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"nemo_minitron"}
    for config in (repository / "configs").glob("*.yaml"):
        assert f"nemo_minitron/configs/{config.name}" in names
    modules = {name for name in filter(None, tracked) if name.startswith("nemo_minitron/") and name.endswith(".py")}
    assert modules <= set(names)
