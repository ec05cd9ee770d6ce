"""Disk space before a stage starts: what is needed against what is free, and the plans that say it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nemo_minitron.cli.dry_run import show_plans
from nemo_minitron.cli.expected_time import clock, expected_time
from nemo_minitron.config import load_pipeline
from nemo_minitron.errors import ConfigError, DiskError
from nemo_minitron.jobs.dry_run import planned
from nemo_minitron.jobs.plans import DiskNeed, StagePlan
from nemo_minitron.jobs.space import check_space, file_systems, present_bytes
from nemo_minitron.planning.disk import states_at_once
from nemo_minitron.runtime.disk import room

GIB = 2**30
#: A model of petabytes, of which only the configuration is there.
HUGE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 131072,
    "intermediate_size": 524288, "num_hidden_layers": 4000, "num_attention_heads": 1024, "num_key_value_heads": 1024,
    "head_dim": 128, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PIPELINE = """
name: p
output: {home}/run
defaults:
  data: {{sources: [{{name: text, path: {home}/text.jsonl}}], sequence_length: 16, cache_dir: {home}/cache}}
stages:
  - {{stage: import, name: teacher, source: {home}/hf, verify: false}}
  - {{stage: prune, name: pruned, model: "${{output}}/teacher", method: random, target: {{num_layers: 2}}}}
  - {{stage: distill, name: distilled, student: "${{output}}/pruned", teacher: "${{output}}/teacher", steps: 400,
     save_every: 100, keep_best: kl}}
  - {{stage: export, name: export, model: "${{output}}/distilled/model", formats: [hf, nemo2, nemo]}}
"""


def plan(*needs: DiskNeed) -> StagePlan:
    return StagePlan("x", disk=list(needs))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A file system with 10 GiB free."""
    stated = os.statvfs(tmp_path)

    def statvfs(_: object) -> os.statvfs_result:
        values = list(stated)
        values[1], values[4] = 4096, 10 * GIB // 4096  # f_frsize, f_bavail
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", statvfs)
    return tmp_path


def test_the_most_that_stages_need_at_one_time(small):
    first = plan(DiskNeed("states", str(small / "a"), 6 * GIB, stay=2 * GIB), DiskNeed("model", str(small / "a"), GIB))
    second = plan(DiskNeed("model", str(small / "b"), 5 * GIB, least=4 * GIB))
    (system,) = file_systems([("first", first, 0.0), ("second", second, 0.0)])
    assert (system.needed, system.staying) == (8 * GIB, 8 * GIB)
    assert (system.certain, system.stage) == (7 * GIB, "first")
    check_space([("first", first, 0.0), ("second", second, 0.0)])


def test_too_little_space_is_one_line(small):
    needs = plan(
        DiskNeed("states", str(small / "a"), 9 * GIB), DiskNeed("model", str(small / "a"), 3 * GIB, least=2 * GIB)
    )
    with pytest.raises(DiskError) as caught:
        check_space([("distilled", needs, 0.0)])
    message = str(caught.value)
    mount = room(small)
    assert mount is not None
    assert (
        f"distilled: at least 11.0 GiB are needed on {mount.mount} by then (states 9.0 GiB, model 2.0 GiB)" in message
    )
    assert "10.0 GiB are free; free some space, or choose an output on another disk" in message
    assert "\n" not in message and caught.value.exit_code == 2
    check_space([("distilled", needs, 1.0 * GIB)])  # what is there of an unfinished output is not written again
    check_space([("close", plan(DiskNeed("model", str(small), 10.4 * GIB)), 0.0)])  # within the margin


@pytest.mark.parametrize("fault", ["error", "sizeless"])
def test_a_file_system_that_does_not_say_is_not_checked(tmp_path, monkeypatch, fault):
    stated = os.statvfs(tmp_path)

    def statvfs(_: object) -> os.statvfs_result:
        if fault == "error":
            raise OSError("no such call")
        return os.statvfs_result([stated[0], stated[1], 0, 0, 0, *stated[5:10]])

    monkeypatch.setattr(os, "statvfs", statvfs)
    assert room(tmp_path) is None
    check_space([("x", plan(DiskNeed("model", str(tmp_path), 1e30)), 0.0)])


def test_present_bytes(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(bytes(5))
    (tmp_path / "a" / "gone").symlink_to(tmp_path / "nowhere")
    assert (present_bytes(tmp_path / "a"), present_bytes(tmp_path / "a" / "b" / "c")) == (5, 5)
    assert present_bytes(tmp_path / "nowhere") == 0


@pytest.mark.parametrize(
    ("steps", "intervals", "count"), [(1, (100, 50), 1), (60, (100, 50), 2), (300, (100, 50), 3), (2, (1, 1), 2)]
)
def test_states_at_once(steps, intervals, count):
    assert states_at_once(steps, *intervals) == count


@pytest.fixture
def huge(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(HUGE))
    (tmp_path / "text.jsonl").write_text('{"text": "a b c"}\n')
    (tmp_path / "pipe.yaml").write_text(PIPELINE.format(home=tmp_path))
    return tmp_path


def minitron(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nemo_minitron", *args]
    return subprocess.run(command, cwd=cwd, env={**os.environ, "COLUMNS": "150"}, capture_output=True, text=True)


@pytest.mark.parametrize("command", ["single", "pipeline", "dry run"])
def test_a_model_that_fits_on_no_disk_is_refused_before_any_work(huge, command):
    (huge / "import.yaml").write_text(f"source: {huge}/hf\noutput: {huge}/out\n")
    args = {
        "single": ("import", "import.yaml"),
        "pipeline": ("run", "pipe.yaml"),
        "dry run": ("run", "pipe.yaml", "--dry-run"),
    }
    told = minitron(*args[command], cwd=huge)
    assert told.returncode == 2, told.stderr
    assert "are needed on /" in told.stderr and "PiB" not in told.stderr
    if command != "dry run":
        assert told.stderr.count("\n") == 1
    assert not (huge / "out").exists() and not (huge / "run" / "teacher").exists()
    assert not (huge / "run" / "pipeline.json").exists()


def small_model(huge: Path) -> None:
    sizes = {"vocab_size": 256, "hidden_size": 48, "intermediate_size": 76, "num_hidden_layers": 3, "head_dim": 8,
             "num_attention_heads": 6, "num_key_value_heads": 2}  # fmt: skip
    (huge / "hf" / "config.json").write_text(json.dumps({**HUGE, **sizes}))


def test_sizes_go_through_the_pipeline(huge):
    small_model(huge)
    _, stages = load_pipeline(huge / "pipe.yaml")
    plans = {stage.name: stage for stage in planned(stages)}
    assert all(not stage.faults for stage in plans.values()), [stage.faults for stage in plans.values()]
    made = plans["pruned"].plan.makes[f"{huge}/run/pruned"]
    assert (made.shape.num_layers, made.architecture.dtype) == (2, "bfloat16")
    assert plans["distilled"].plan.costs["parameters"].startswith("student ")
    assert "% of the teacher" in plans["distilled"].plan.costs["parameters"]
    states, best, blocks = plans["distilled"].plan.disk
    assert "3 of" in states.what and states.bytes == pytest.approx(3 * 16 * made_parameters(made))
    assert best.bytes == pytest.approx(4 * made_parameters(made))
    assert blocks.certain == 0
    hf, nemo2, nemo = plans["export"].plan.disk
    assert hf.bytes == nemo2.bytes == nemo.bytes / 2 == nemo.staying == 2 * made_parameters(made)


def made_parameters(made) -> int:
    from nemo_minitron.planning import Model

    return Model(made.shape, made.architecture).parameters


def test_a_layout_that_the_pruned_model_does_not_have_is_a_fault_of_the_dry_run(huge):
    small_model(huge)
    _, stages = load_pipeline(huge / "pipe.yaml", ["stages.distilled.parallel={pipeline: 3}"])
    (fault,) = [fault for stage in planned(stages) for fault in stage.faults if "student" in fault]
    assert "2" in fault and "3" in fault


def test_the_dry_run_shows_it(huge):
    small_model(huge)
    _, stages = load_pipeline(huge / "pipe.yaml")
    console = Console(width=200, record=True, file=io.StringIO())
    show_plans(stages, console, "pipe.yaml")
    text = console.export_text()
    assert "2 layers, hidden 48, MLP 76, heads 6/2, vocabulary 256" in text
    assert "at least 1 s (by its FLOPs at " in text  # of the training
    assert "unknown" in text  # the time of import and prune, which nothing supports
    assert "for all stages that are not done" in text and "are free" in text


def test_the_dry_run_imports_no_torch_and_is_quick(huge):
    small_model(huge)
    code = (
        "import sys, time; started = time.process_time()\n"
        "from nemo_minitron.cli import app\n"
        "try: app.app(['run', 'pipe.yaml', '--dry-run'])\n"
        "except SystemExit as error: assert not error.code, error.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "assert time.process_time() - started < 3, time.process_time() - started"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=huge, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def record(folder: Path, **changes: object) -> None:
    folder.mkdir(parents=True)
    content = {
        "version": 1, "stage": "score", "name": folder.name, "hash": "x", "settings": {}, "parents": {},
        "config": {"runtime": {"device": "cpu", "threads": None}, "parallel": {"tensor": 1}}, "metrics": {},
        "seconds": 30.0, "host": os.uname().nodename, "work": {"flops": 1e12},
    }  # fmt: skip
    (folder / "record.json").write_text(json.dumps({**content, **changes}))


def test_time_by_an_earlier_run(tmp_path):
    from nemo_minitron.config import ScoreConfig

    config = ScoreConfig(output=str(tmp_path / "run" / "scores"))
    config.runtime.device = "cpu"
    work = StagePlan("score", flops=2e12)
    record(tmp_path / "run" / "far", work={"flops": 1e8})  # too unlike to say anything
    record(tmp_path / "run" / "wide", config={"runtime": {"device": "cpu", "threads": None}, "parallel": {"tensor": 2}})
    record(tmp_path / "run" / "damaged", work=None)
    assert expected_time(config, work).startswith("at least ")
    record(tmp_path / "other" / "before")
    assert expected_time(config, work) == f"about 1.0 min (as {tmp_path}/other/before took on this machine)"
    record(tmp_path / "run" / "elsewhere", host="node7", seconds=10.0)
    assert "other/before" in expected_time(config, work)  # this machine's says more
    assert expected_time(config, StagePlan("score")) == "unknown"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.01, "1 s"), (59, "59 s"), (75, "1.2 min"), (1200, "20 min"), (7200, "2.0 h"), (9e5, "10 d")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_faults_are_those_of_the_pipeline(huge):
    _, stages = load_pipeline(huge / "pipe.yaml")
    with pytest.raises(ConfigError, match="are needed on"):
        show_plans(stages, Console(file=io.StringIO()), "pipe.yaml")
