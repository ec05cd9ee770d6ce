from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from nemo_minitron.cli import app as app_module

TESTS = Path(__file__).resolve().parents[1]


def minitron(*args: str, cwd: Path, fake: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line; with fake stages unless told otherwise."""
    module = "support.fake_minitron" if fake else "nemo_minitron"
    env = {**os.environ, "PYTHONPATH": str(TESTS), "COLUMNS": "150", **environment}
    return subprocess.run(
        [sys.executable, "-m", module, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def score(tmp_path) -> Path:
    path = tmp_path / "score.yaml"
    path.write_text("name: work\nmodel: model\noutput: out\ndata: {sources: [{name: a, path: a.txt}]}\n")
    return path


@pytest.fixture
def pipeline(tmp_path) -> Path:
    (tmp_path / "hf").mkdir()
    path = tmp_path / "pipe.yaml"
    path.write_text(
        """
name: p
output: run
vars: {seed: 1}
stages:
  - {stage: import, name: teacher, source: hf}
  - {stage: prune, name: small, model: "${output}/teacher", method: random, target: {num_layers: 1}}
  - {stage: export, name: last, model: "${output}/small", runtime: {seed: "${vars.seed}"}}
  - {stage: report}
"""
    )
    return path


def made(folder: Path) -> dict[str, str]:
    """Start time of each recorded stage."""
    return {
        p.parent.name: json.loads(p.read_text())["started"] + str(p.stat().st_ino)
        for p in folder.glob("*/record.json")
        if "@" not in p.parent.name
    }


# ------------------------------------------------------------------------------------------------------------- a stage


def test_help_lists_the_stages_and_version_is_the_packages(tmp_path):
    out = minitron("--help", cwd=tmp_path, fake=False).stdout
    for stage in ("import", "score", "prune", "distill", "evaluate", "export", "report", "init", "run", "status"):
        assert f" {stage} " in out
    assert minitron("--version", cwd=tmp_path, fake=False).stdout.startswith("minitron 0.")


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("--help",), 0),
        (("init", "--help"), 0),
        (("score", "score.yaml", "samples=none"), 2),
        (("run", "demo", "x=1"), 2),
    ],
)
def test_help_and_configuration_errors_import_nothing_heavy_and_are_quick(tmp_path, score, args, code):
    command = [sys.executable, "-X", "importtime", "-m", "nemo_minitron", *args]
    # Time on the CPU, which other work on the machine hardly changes.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == code
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "nemo_minitron.cli" in imported
    assert not {"torch", "numpy", "megatron", "nemo", "nemo_run", "transformers", "lightning"} & imported
    assert seconds < 1.0


def test_a_stage_runs_and_says_so(tmp_path, score):
    done = minitron("score", "score.yaml", "runtime.seed=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 1" in done.stdout
    assert "work: done in" in done.stdout
    assert (tmp_path / "out" / "result.txt").read_text() == "5"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("samples=none",), 2, "minitron: score.yaml: override: samples=none: must be a whole number\n"),
        (("name=refuse",), 2, "minitron: hidden_size=7: is odd; choose an even one\n"),
        (("nonsense",), 2, "must have the form key=value"),
        (("name=crash",), 1, "RuntimeError: a fault of ours"),
        (("name=die",), 1, "ended without a result"),
    ],
)
def test_exit_codes_and_messages(tmp_path, score, args, code, message):
    done = minitron("score", "score.yaml", *args, cwd=tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    shown = done.stdout + done.stderr
    assert shown.count(message.removeprefix("minitron: ")) == 1  # and not in the log of the rank that is shown, too
    assert shown.count("Traceback") == ("crash" in args[0])
    if args[0] in ("name=refuse", "name=crash"):
        assert message.removeprefix("minitron: ") in (tmp_path / "logs" / "out" / "rank-0.log").read_text()
    assert not (tmp_path / "out").exists()


def test_usage_errors(tmp_path):
    assert minitron("scor", "x", cwd=tmp_path, fake=False).returncode == 2
    assert minitron("score", cwd=tmp_path, fake=False).returncode == 2
    missing = minitron("score", "there/is/none.yaml", cwd=tmp_path, fake=False)
    assert missing.returncode == 2
    assert "no such file" in missing.stderr


def test_interrupt(tmp_path, score):
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "support.fake_minitron", "score", "score.yaml", "name=hang"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "logs" / "out" / "rank-0.log"
    deadline = time.monotonic() + 30
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == "minitron: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_between_two_jobs_is_a_preemption(number, capsys):
    before = signal.getsignal(number)
    with pytest.raises(typer.Exit) as end, app_module._exit_codes():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert end.value.exit_code == 75
    assert capsys.readouterr().err == f"minitron: {number.name} came. Give the same command again\n"
    assert signal.getsignal(number) == before


def test_a_full_disk_under_the_command_itself_is_one_line(capsys):
    with pytest.raises(typer.Exit) as end, app_module._exit_codes():
        raise OSError(errno.ENOSPC, "No space left on device", "/data/run/logs")
    assert end.value.exit_code == 2
    assert re.match(
        r"minitron: /data/run/logs: No space left on device \(.*free some space.*\n$", capsys.readouterr().err
    )
    with pytest.raises(FileNotFoundError), app_module._exit_codes():
        raise FileNotFoundError(errno.ENOENT, "gone", "x")


@pytest.mark.slow
def test_a_stage_that_can_write_neither_result_nor_log_is_refused_in_words(tmp_path, score):
    """As under a quota."""
    code = (
        "import os, resource, sys\n"
        "from support import fake_worker\n"
        "from nemo_minitron.jobs import worker\n"
        "fake_worker.install()\n"
        "worker.set_up = lambda config: None\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))\n"
        "sys.exit(worker.main(sys.argv[1], launched=True))\n"
    )
    (tmp_path / "small_worker.py").write_text(code)
    start = (
        "from support import fake_minitron\n"
        "from nemo_minitron.jobs import launch, local\n"
        "from nemo_minitron import cli\n"
        "local.launch = lambda module, *a, **k: launch.launch('small_worker', *a, **k)\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", start, "score", "score.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "takes no more files or bytes; look at the quota" in done.stderr


def test_dry_run_shows_and_does_nothing(tmp_path, score):
    done = minitron("score", "score.yaml", "--dry-run", "parallel.tensor=2", cwd=tmp_path)
    assert done.returncode == 2
    assert "model: model (missing)" in done.stdout
    assert "minitron: score.yaml: work: model: model does not exist\n" in done.stderr
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"x" * 2048)
    done = minitron("score", "score.yaml", "--dry-run", "parallel.tensor=2", cwd=tmp_path)
    assert done.returncode == 0
    for text in ("model: model (2.0 KiB)", "output: out", "tensor 2 x pipeline 1 x data 1 = 2 processes", "tokens"):
        assert text in done.stdout
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "logs").exists()


def test_overwrite(tmp_path, score):
    assert minitron("score", "score.yaml", cwd=tmp_path).returncode == 0
    again = minitron("score", "score.yaml", "runtime.seed=2", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr == "minitron: output: out already exists; choose another output or pass --overwrite\n"
    assert minitron("score", "score.yaml", "runtime.seed=2", "--overwrite", cwd=tmp_path).returncode == 0
    assert (tmp_path / "out" / "result.txt").read_text() == "2"


# ---------------------------------------------------------------------------------------------------------- a pipeline


def test_a_pipeline_runs_its_stages_once(tmp_path, pipeline):
    done = minitron("run", "pipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line in ("[1/4] teacher", "[4/4] report", "4 made in", "0 kept"):
        assert line in done.stdout
    before = made(tmp_path / "run")
    assert set(before) == {"teacher", "small", "last", "report"}
    again = minitron("run", "pipe.yaml", cwd=tmp_path)
    assert again.returncode == 0
    assert "0 made in 0:00, 4 kept" in again.stdout
    assert made(tmp_path / "run") == before
    status = minitron("status", "run", cwd=tmp_path)
    assert status.stdout.count("done") == 4


def test_a_changed_setting_makes_again_what_depends_on_it_and_keeps_the_rest(tmp_path, pipeline):
    minitron("run", "pipe.yaml", cwd=tmp_path)
    before = made(tmp_path / "run")
    changed = minitron("run", "pipe.yaml", "stages.small.runtime.seed=7", cwd=tmp_path)
    assert changed.returncode == 0, changed.stderr
    assert "small: made again for other settings (runtime.seed: 1234 then, 7 now)" in changed.stdout
    assert "3 made in" in changed.stdout
    after = made(tmp_path / "run")
    assert after["teacher"] == before["teacher"]
    assert all(after[name] != before[name] for name in ("small", "last", "report"))  # what depends on it, too

    back = minitron("run", "pipe.yaml", cwd=tmp_path)
    assert "small: comes back from other settings (runtime.seed: 7 then, 1234 now)" in back.stdout
    assert re.search(r"1 made in \d+:\d\d, 3 kept", back.stdout), back.stdout  # a report is not kept: it is soon made
    now = made(tmp_path / "run")
    assert all(now[name] == before[name] for name in ("teacher", "small", "last"))
    kept = minitron("status", "run", cwd=tmp_path).stdout
    assert kept.count("run/small@") == kept.count("run/last@") == 1


def test_overwrite_keeps_nothing(tmp_path, pipeline):
    minitron("run", "pipe.yaml", cwd=tmp_path)
    done = minitron("run", "pipe.yaml", "stages.small.runtime.seed=7", "--overwrite", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "run").glob("*@*"))


@pytest.mark.parametrize("content", ["", "other"])
def test_a_lost_file_is_made_again_and_what_read_it_if_it_differs(tmp_path, pipeline, content):
    """A training under a time limit, for one, does not come to the same weights again."""
    assert minitron("run", "pipe.yaml", cwd=tmp_path).returncode == 0
    before = made(tmp_path / "run")
    (tmp_path / "run" / "small" / "result.txt").unlink()
    assert "damaged" in minitron("status", "run", cwd=tmp_path).stdout
    again = minitron("run", "pipe.yaml", cwd=tmp_path, FAKE_CONTENT=content)
    assert again.returncode == 0, again.stderr
    assert "small: made again, as " in again.stdout
    after = made(tmp_path / "run")
    assert after["teacher"] == before["teacher"] and after["small"] != before["small"]
    assert (after["last"] == before["last"]) is (content == "")
    assert (after["report"] == before["report"]) is (content == "")
    assert "0 made" not in again.stdout
    assert "4 kept" in minitron("run", "pipe.yaml", cwd=tmp_path).stdout


def test_limits_and_names_make_nothing_again(tmp_path, pipeline):
    minitron("run", "pipe.yaml", cwd=tmp_path)
    again = minitron(
        "run", "pipe.yaml", "defaults.runtime.timeout_minutes=9", "defaults.runtime.threads=1", cwd=tmp_path
    )
    assert "4 kept" in again.stdout
    (tmp_path / "run").rename(tmp_path / "moved")
    assert "4 kept" in minitron("run", "pipe.yaml", "output=moved", cwd=tmp_path).stdout


@pytest.mark.parametrize(("behaviour", "code"), [("refuse", 2), ("crash", 1), ("die", 1)])
def test_a_failing_stage_stops_the_pipeline(tmp_path, pipeline, behaviour, code):
    pipeline.write_text(pipeline.read_text().replace("name: last", f"name: {behaviour}"))
    done = minitron("run", "pipe.yaml", cwd=tmp_path)
    assert done.returncode == code
    assert f"minitron: stage {behaviour}: " in done.stderr
    assert set(made(tmp_path / "run")) == {"teacher", "small"}


def test_a_killed_pipeline_goes_on_where_it_was(tmp_path, pipeline):
    pipeline.write_text(pipeline.read_text().replace("name: last", "name: slow"))
    env = {**os.environ, "PYTHONPATH": str(TESTS), "FAKE_SECONDS": "600"}
    command = [sys.executable, "-m", "support.fake_minitron", "run", "pipe.yaml"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    second = minitron("run", "pipe.yaml", cwd=tmp_path)
    assert second.returncode == 2
    assert f"run: `minitron run`, process {process.pid} on " in second.stderr
    process.kill()
    process.wait()
    before = made(tmp_path / "run")
    assert set(before) == {"teacher", "small"}
    assert not (tmp_path / "run" / "slow").exists()
    done = minitron("run", "pipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 made" in done.stdout
    assert {name: made(tmp_path / "run")[name] for name in before} == before
    assert not list((tmp_path / "run").glob(".*partial*"))


def test_an_output_without_a_record_is_made_again(tmp_path, pipeline):
    minitron("run", "pipe.yaml", cwd=tmp_path)
    (tmp_path / "run" / "last" / "record.json").write_text("{half")
    done = minitron("run", "pipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 made" in done.stdout or "2 made" in done.stdout


def test_a_pipelines_dry_run_plans_every_stage(tmp_path, pipeline):
    done = minitron("run", "pipe.yaml", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written by earlier stages") == 3  # of small, last and the report
    assert not (tmp_path / "run").exists()


def test_status_needs_a_pipeline(tmp_path):
    done = minitron("status", ".", cwd=tmp_path)
    assert done.returncode == 2
    assert "holds no pipeline" in done.stderr
