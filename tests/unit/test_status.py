"""``minitron status``: what it says of stages that are done, run, wait, failed, died, or are damaged."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from nemo_minitron.cli.status import show_status, status_json
from nemo_minitron.errors import ConfigError
from nemo_minitron.jobs.lease import leased
from nemo_minitron.jobs.status import status_of

TESTS = Path(__file__).resolve().parents[1]
PIPELINE = """
name: p
output: run
stages:
  - {{stage: import, name: teacher, source: hf}}
  - {{stage: prune, name: {name}, model: "${{output}}/teacher", method: random, target: {{num_layers: 1}}}}
  - {{stage: export, name: last, model: "${{output}}/{name}"}}
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TESTS), "COLUMNS": "150", **more}


def minitron(*args: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """The command line with fake stages."""
    command = [sys.executable, "-m", "support.fake_minitron", *args]
    return subprocess.run(command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=120)


pytestmark = pytest.mark.slow  # each starts commands, and those start processes


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "hf").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pipeline(home: Path, name: str) -> None:
    (home / "pipe.yaml").write_text(PIPELINE.format(name=name))


def states(folder: str | Path) -> dict[str, str]:
    return {stage.name: stage.state for stage in status_of(Path(folder)).stages}


def shown(folder: str | Path) -> str:
    console = Console(width=160, record=True, quiet=False, file=io.StringIO())
    show_status(Path(folder), console)
    return console.export_text()


@pytest.mark.parametrize(
    ("name", "code", "error"),
    [
        ("refuse", 2, "hidden_size=7: is odd; choose an even one"),
        ("crash", 1, "RuntimeError: a fault of ours"),
        ("die", 1, "Rank 0 of 1 ended without a result (killed by signal 9"),
    ],
)
def test_a_failed_stage_says_why(home, name, code, error):
    pipeline(home, name)
    assert minitron("run", "pipe.yaml", cwd=home).returncode == code
    teacher, failed, last = status_of(home / "run").stages
    assert (teacher.state, failed.state, last.state) == ("done", "failed", "-")
    assert teacher.finished is not None
    assert failed.exit_code == code
    assert failed.error is not None and error in failed.error and "\n" not in failed.error
    assert failed.log is not None and Path(failed.log).is_file()
    text = shown(home / "run")
    assert f"(exit code {code}); log: {failed.log}" in text
    # of the output alone, too, and as JSON
    assert states(home / "run" / name) == {name: "failed"}
    assert json.loads(status_json(home / "run"))["stages"][1]["exit_code"] == code
    # a run that goes well leaves nothing of it
    other = (home / "pipe.yaml").read_text().replace(name, "small")
    (home / "pipe.yaml").write_text(other)
    assert minitron("run", "pipe.yaml", cwd=home).returncode == 0
    assert states(home / "run") == {"teacher": "done", "small": "done", "last": "done"}


def test_a_refusal_before_any_process_starts_is_kept(home):
    pipeline(home, "small")
    assert minitron("run", "pipe.yaml", cwd=home).returncode == 0
    (home / "run" / "teacher" / "result.txt").write_text("x")  # of another size: the record does not fit
    (home / "score.yaml").write_text(
        "model: run/teacher\noutput: run/more\ndata: {sources: [{name: a, path: a.txt}]}\n"
    )
    refused = minitron("score", "score.yaml", cwd=home)
    assert refused.returncode == 2
    (stage,) = status_of(home / "run" / "more").stages
    assert (stage.state, stage.exit_code) == ("failed", 2)
    assert stage.error is not None and "result.txt" in stage.error


def test_a_running_stage_and_what_is_left_of_it_when_it_is_killed(home):
    pipeline(home, "slow")
    command = [sys.executable, "-m", "support.fake_minitron", "run", "pipe.yaml"]
    process = subprocess.Popen(command, cwd=home, env=environment(FAKE_SECONDS="600"), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (home / "run" / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        teacher, slow, last = status_of(home / "run").stages
        assert (teacher.state, slow.state, last.state) == ("done", "running", "-")
        assert (slow.pid, slow.job) == (process.pid, None)
        assert slow.seconds is not None and 0 <= slow.seconds < 120
        assert f"process {process.pid} on " in shown(home / "run")
        assert states(home / "run" / "slow") == {"slow": "running"}
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    slow = status_of(home / "run").stages[1]
    assert slow.state == "dead"
    assert slow.error is not None and f"process {process.pid} on " in slow.error and slow.error.endswith("is gone")
    assert "the command that started it goes on" in shown(home / "run")


def test_an_interrupted_stage_is_stopped(home):
    pipeline(home, "slow")
    command = [sys.executable, "-m", "support.fake_minitron", "run", "pipe.yaml"]
    process = subprocess.Popen(command, cwd=home, env=environment(FAKE_SECONDS="600"), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (home / "run" / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    slow = status_of(home / "run").stages[1]
    assert (slow.state, slow.exit_code) == ("stopped", 130)


def test_what_changed_since_a_stage_was_made(home):
    pipeline(home, "small")
    assert minitron("run", "pipe.yaml", cwd=home).returncode == 0
    manifest = json.loads((home / "run" / "pipeline.json").read_text())
    manifest["configs"]["small"]["runtime"]["seed"] = 7
    (home / "run" / "pipeline.json").write_text(json.dumps(manifest))
    small = status_of(home / "run").stages[1]
    assert (small.state, small.error) == ("out of date", "runtime.seed: 1234 then, 7 now")
    # settings of another release, which cannot be read: what is not known is not said
    manifest["configs"]["small"]["new_setting"] = 1
    (home / "run" / "pipeline.json").write_text(json.dumps(manifest))
    assert states(home / "run")["small"] == "done"


def test_a_moved_run_and_one_seen_from_elsewhere(home, monkeypatch):
    pipeline(home, "small")
    assert minitron("run", "pipe.yaml", cwd=home).returncode == 0
    (home / "run").rename(home / "moved")
    (home / "below").mkdir()
    monkeypatch.chdir(home / "below")
    assert states("../moved") == {"teacher": "done", "small": "done", "last": "done"}


@pytest.mark.parametrize("content", ["", "{", '{"name": "p", "stages": [{"name"', "\x00\x01"])
def test_a_pipeline_json_that_is_cut_off(home, content):
    pipeline(home, "small")
    assert minitron("run", "pipe.yaml", cwd=home).returncode == 0
    (home / "run" / "pipeline.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        status_of(home / "run")
    assert "\n" not in str(caught.value)
    assert "run/pipeline.json: is damaged or cut off" in str(caught.value)
    assert "writes it anew and keeps what is done" in str(caught.value)
    told = minitron("status", "run", cwd=home)
    assert (told.returncode, told.stderr.count("\n")) == (2, 1)
    again = minitron("run", "pipe.yaml", cwd=home)
    assert again.returncode == 0, again.stderr
    assert "it is written anew" in again.stdout and "3 kept" in again.stdout
    assert states(home / "run") == {"teacher": "done", "small": "done", "last": "done"}


@pytest.mark.parametrize(
    "content", ["[]", "3", '{"name": "p"}', '{"name": "p", "stages": [{"task": 1}]}', '{"name": 1, "stages": []}']
)
def test_another_programs_pipeline_json_is_left_alone(home, content):
    pipeline(home, "small")
    (home / "run").mkdir()
    (home / "run" / "pipeline.json").write_text(content)
    for command in (("status", "run"), ("run", "pipe.yaml")):
        told = minitron(*command, cwd=home)
        assert (told.returncode, told.stderr.count("\n")) == (2, 1), told.stderr
        assert "run/pipeline.json: is not the pipeline.json of a run of this suite" in told.stderr
    assert (home / "run" / "pipeline.json").read_text() == content


def test_damage_is_a_line_each(home):
    pipeline(home, "small")
    assert minitron("run", "pipe.yaml", cwd=home).returncode == 0
    (home / "run" / "teacher" / "result.txt").unlink()
    (home / "run" / "small" / "record.json").write_text('{"version": 1, "stage"')
    (home / "run" / "logs" / "small" / "rank-0.json").write_bytes(b"\xff{")
    (home / "run" / "logs" / "last.lease").write_text("{")
    (home / "run" / "slurm.json").write_text("[1")
    run = status_of(home / "run")
    assert {stage.name: stage.state for stage in run.stages} == {
        "teacher": "damaged", "small": "damaged", "last": "out of date"  # its input is not what it was
    }  # fmt: skip
    errors = [stage.error for stage in run.stages]
    assert errors[0] is not None and errors[0].endswith("result.txt is gone")
    assert errors[1] is not None and errors[1].endswith("record.json cannot be read")
    assert "made until" in shown(home / "run")
    record = json.loads((home / "run" / "last" / "record.json").read_text())
    (home / "run" / "last" / "record.json").write_text(
        json.dumps({**record, "files": [1], "seconds": "x", "started": 3})
    )
    assert states(home / "run")["last"] in ("done", "damaged", "out of date")


def test_how_far_a_training_is(home):
    """By its metrics: the step, and the time of those that are left as the last ones took."""
    output = home / "distilled"
    output.mkdir()
    logs = home / "logs" / "distilled"
    logs.mkdir(parents=True)
    (logs / "begun.json").write_text(json.dumps({"stage": "distill", "hash": "", "settings": {}, "parents": {}}))
    (logs / "config.yaml").write_text("{steps: 100, name: distilled}")
    lines = [{"step": step, "seconds": 2.0 * step, "kl": 1.0} for step in range(1, 41)]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"split": "validation", "step": 40, "kl": 1.0}])
    (output / "metrics.jsonl").write_text(text + '{"step": 41, "sec')  # a line that is being written
    with leased(home / "logs" / "distilled.lease", "distilled", "minitron distill"):
        (stage,) = status_of(output).stages
    assert (stage.state, stage.step, stage.steps, stage.pid) == ("running", 40, 100, os.getpid())
    assert stage.left == pytest.approx(2.0 * 60)
    (stage,) = status_of(output).stages
    assert (stage.state, stage.step) == ("unfinished", 40)


def test_how_far_a_stage_is_by_its_log(home):
    logs = home / "logs" / "scores"
    logs.mkdir(parents=True)
    (logs / "begun.json").write_text(json.dumps({"stage": "score", "hash": "", "settings": {}, "parents": {}}))
    with leased(home / "logs" / "scores.lease", "scores", "minitron score"):
        for text in ("scoring: 8 of 32\nscoring: 12 of 32, 3.1/s\n", "scoring \x1b[35m━━━╸\x1b[0m 12/32 0:00:03\r"):
            (logs / "rank-0.log").write_text(text)
            (stage,) = status_of(home / "scores").stages
            assert (stage.state, stage.step, stage.steps) == ("running", 12, 32)


def test_there_is_nothing_to_tell_of(home):
    with pytest.raises(ConfigError, match="holds no pipeline"):
        status_of(home)
    with pytest.raises(ConfigError, match="holds no pipeline"):
        status_of(home / "nowhere")
