from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from nemo_minitron.config import ExportConfig, ParallelLayout, RuntimeConfig, ScoreConfig, StageConfig
from nemo_minitron.errors import ConfigError, MinitronError, PreemptedError, ShapeError
from nemo_minitron.jobs import launch as launching
from nemo_minitron.jobs import local, stalls, warm
from nemo_minitron.jobs.launch import launch
from nemo_minitron.jobs.output import Output
from nemo_minitron.jobs.records import read_record
from nemo_minitron.jobs.results import StageCrashError, read_results

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pool():
    """Parents that have imported nothing heavy: the fakes need nothing."""
    opened = warm.WarmPool(levels={"megatron": warm.Level(("nemo_minitron.jobs.worker",), stack=False)})
    yield opened
    opened.close()


@pytest.fixture(autouse=True, params=["cold", "forked"])
def fakes(request, monkeypatch, pool):
    """Stages are the fakes of support.fake_worker, in processes of their own: fresh ones, or forked."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setattr(warm, "_current", pool)
    if request.param == "cold":
        monkeypatch.setenv(warm.COLD_VARIABLE, "1")
    else:
        monkeypatch.delenv(warm.COLD_VARIABLE, raising=False)
    monkeypatch.setattr(local, "launch", lambda module, *args, **kwargs: launch("support.fake_worker", *args, **kwargs))
    yield request.param
    forks_nothing = ("killing_the_launcher", "device_that_is_not_there")
    if request.param == "forked" and not any(case in request.node.name for case in forks_nothing):
        assert set(pool._servers) and None not in pool._servers.values()  # it was forked indeed


def job(tmp_path: Path, name: str = "work", tensor: int = 1, **runtime: object) -> StageConfig:
    data = {"sources": [{"name": "a", "path": "a.txt"}]}
    from omegaconf import OmegaConf

    from nemo_minitron.config import DataConfig

    typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), data))
    return ScoreConfig(
        name=name,
        model="m",
        output=str(tmp_path / "run dir" / "out"),  # with a blank: it must survive every launcher in between
        data=typed,  # type: ignore[arg-type]
        parallel=ParallelLayout(tensor=tensor),
        runtime=RuntimeConfig(**runtime),  # type: ignore[arg-type]
    )


def left_over(folder: Path, variable: str = launching.FOLDER_VARIABLE) -> list[psutil.Process]:
    """Processes that still belong to a job. One that was forked shows the environment of the first parent."""
    found = []
    assert warm._current is not None
    for server in warm._current._servers.values():
        found += psutil.Process(server.process.pid).children()
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == str(folder) and process.pid != os.getpid():
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def test_one_process(tmp_path):
    config, shown = job(tmp_path, seed=5), io.BytesIO()
    record = local.run_stage(config, shown.write)
    assert record["metrics"] == {"loss": 1.5, "world": 1, "rank": 0}
    assert record == read_record(config.output)
    assert record["peak_rss_bytes"] > 1e6
    assert record["seconds"] > 0
    assert record["config"]["runtime"]["seed"] == 5
    assert (Path(config.output) / "result.txt").read_text() == "5"
    assert b"rank 0 of 1" in shown.getvalue()
    assert (Output(config).folder / "rank-0.log").read_bytes() == shown.getvalue()


def test_threads_are_given_or_shared(tmp_path):
    shown = io.BytesIO()
    local.run_stage(job(tmp_path, threads=3), shown.write)
    assert b"threads 3" in shown.getvalue()


@pytest.mark.slow
def test_several_processes(tmp_path, fakes):
    config, shown = job(tmp_path, tensor=2), io.BytesIO()
    record = local.run_stage(config, shown.write)
    assert record["metrics"]["world"] == 2
    assert b"rank 0 of 2" in shown.getvalue()
    assert b"rank 1" not in shown.getvalue()
    folder = Output(config).folder
    assert "rank 1 of 2" in (folder / "rank-1.log").read_text()
    assert (folder / "nemo_run" / "experiments").is_dir() == (fakes == "cold")
    assert not left_over(folder)


@pytest.mark.slow
def test_a_process_is_set_up(tmp_path, monkeypatch):
    import torch

    monkeypatch.setenv("REAL_SET_UP", "1")
    metrics = local.run_stage(job(tmp_path, threads=2, seed=77, device="cpu"))["metrics"]
    expected = torch.rand((), generator=torch.Generator().manual_seed(77)).item()
    assert metrics == {"loss": 1.5, "world": 1, "rank": 0, "threads": 2, "draw": expected, "cpu": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threads", "variable", "local", "expected"),
    [(3, "1", "1", 3), (None, "2", "1", 2), (None, None, "1", 5), (None, None, "2", 2), (None, None, "8", 1)],
)
def test_threads_where_another_launcher_started_the_process(tmp_path, monkeypatch, threads, variable, local, expected):
    """What is configured, else the launcher's variable, else the cores shared: one thread each was slow."""
    from nemo_minitron.jobs.worker import set_up

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)))
    counts = []
    monkeypatch.setattr("torch.set_num_threads", counts.append)
    set_up(ExportConfig(output=str(tmp_path), model="m", runtime=RuntimeConfig(threads=threads)))
    assert counts == [expected]


@pytest.mark.slow
def test_a_device_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("REAL_SET_UP", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="no CUDA device is visible"):
        local.run_stage(job(tmp_path, device="cuda"))


def test_a_refusal_comes_through_in_its_class(tmp_path):
    config = job(tmp_path, "refuse")
    with pytest.raises(ShapeError, match=r"^hidden_size=7: is odd; choose an even one$"):
        local.run_stage(config)
    assert not Path(config.output).exists()


def test_a_crash_carries_the_traceback_and_the_log(tmp_path):
    config = job(tmp_path, "crash")
    with pytest.raises(StageCrashError) as error:
        local.run_stage(config)
    assert "Traceback" in str(error.value)
    assert "RuntimeError: a fault of ours" in str(error.value)
    assert f"{Output(config).folder}/rank-0.log" in str(error.value)


def test_a_killed_process_is_named(tmp_path):
    with pytest.raises(
        StageCrashError, match=r"Rank 0 of 1 ended without a result \(killed by signal 9; a process that"
    ):
        local.run_stage(job(tmp_path, "die"))


def test_a_time_limit_ends_the_job(tmp_path):
    config = job(tmp_path, "hang", timeout_minutes=2 / 60)
    started = time.monotonic()
    with pytest.raises(MinitronError, match=r"stopped after 0\.0333.* minutes \(runtime\.timeout_minutes\)"):
        local.run_stage(config)
    assert time.monotonic() - started < 10
    assert not left_over(Output(config).folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("refuse", ShapeError, r"^hidden_size=7: is odd; choose an even one$"),
        ("crash", StageCrashError, r"(?s)RuntimeError: a fault of ours.*Rank 1 of 2 crashed"),
        ("die", StageCrashError, r"Rank 1 of 2 ended without a result \(killed by signal 9"),
    ],
)
def test_one_failing_rank_ends_all_and_shows_once(tmp_path, name, kind, message):
    config = job(tmp_path, name, tensor=2)
    started = time.monotonic()
    with pytest.raises(kind, match=message) as error:
        local.run_stage(config)
    assert str(error.value).count("Traceback") == (name == "crash")
    assert time.monotonic() - started < 60  # the peer sleeps for ten minutes
    assert not left_over(Output(config).folder)


@pytest.mark.slow
def test_a_hang_of_several_is_said_and_bounded(tmp_path, monkeypatch):
    """One rank waits, the other is stopped."""
    monkeypatch.setattr(stalls, "QUIET", 2.0)
    monkeypatch.setattr(stalls, "BUSY", 0.3)
    monkeypatch.setattr(stalls, "_LOOK", 0.2)
    config = job(tmp_path, "hang", tensor=2, timeout_minutes=14 / 60)
    folder, shown = Output(config).folder, []

    def stop() -> None:
        path = folder / "rank-1.pid"
        while not (path.exists() and path.read_text()):
            time.sleep(0.05)
        os.kill(int(path.read_text()), signal.SIGSTOP)

    stopper = threading.Thread(target=stop, daemon=True)
    stopper.start()
    with pytest.raises(MinitronError, match="stopped after"):
        local.run_stage(config, shown.append)
    stopper.join()
    reports = [data.decode() for data in shown if b"no rank has made progress" in data]
    assert len(reports) == 1, reports
    report = reports[0]
    assert re.search(r"rank 0 \(process \d+\) is in \w+ \(.*fake_worker\.py:\d+\)", report), report
    assert re.search(r"rank 1 is stopped \(process \d+\): continue it with kill -CONT", report), report
    assert "fake_worker.py" in (folder / "rank-0.log").read_text()
    assert not left_over(folder)


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
def test_killing_the_launcher_leaves_no_process(tmp_path, tensor, fakes):
    folder = tmp_path / "job"
    code = (
        "from pathlib import Path\n"
        "from nemo_minitron.jobs import ranks, warm\n"
        "from nemo_minitron.jobs.launch import launch\n"
        "warm._current = warm.WarmPool(levels={'light': warm.Level(('nemo_minitron.jobs.worker',), stack=False)})\n"
        f"launch('support.fake_worker', ['score'], world_size={tensor}, folder=Path({str(folder)!r}),\n"
        "       starter=ranks.forked('light'))\n"
    )
    import dataclasses

    import yaml

    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(job(tmp_path, "hang", tensor))))
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OF_THE_TEST": str(folder)})
    deadline = time.monotonic() + 60
    while len(list(folder.glob("rank-*.log"))) < tensor and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(left_over(folder, "OF_THE_TEST")) >= tensor + 1
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while left_over(folder, "OF_THE_TEST") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left_over(folder, "OF_THE_TEST")


def signalled(tmp_path: Path, config: StageConfig, order: signal.Signals, ready: int) -> MinitronError:
    """What the launcher says when a signal reaches it once ``ready`` ranks work."""

    def send() -> None:
        deadline = time.monotonic() + 60
        names = "started-*" if config.name.startswith("stoppable") else "logs/out/rank-*.log"
        while len(list((tmp_path / "run dir").glob(names))) < ready and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), order)

    before = signal.getsignal(order)
    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(PreemptedError) as error:
        local.run_stage(config)
    sender.join()
    assert signal.getsignal(order) == before
    assert not left_over(Output(config).folder)
    return error.value


def test_a_signal_reaches_a_rank_that_can_stop(tmp_path):
    error = signalled(tmp_path, job(tmp_path, "stoppable"), signal.SIGTERM, 1)
    assert str(error) == "stopped by SIGUSR1"
    assert error.exit_code == 75


@pytest.mark.slow
def test_a_signal_reaches_every_rank_that_can_stop(tmp_path):
    config = job(tmp_path, "stoppable", tensor=2)
    assert str(signalled(tmp_path, config, signal.SIGUSR1, 2)) == "stopped by SIGUSR1"
    results = read_results(Output(config).folder)
    assert [result.error for result in results] == ["PreemptedError"] * 2


def test_a_signal_ends_what_cannot_stop_in_order(tmp_path):
    error = signalled(tmp_path, job(tmp_path, "hang"), signal.SIGTERM, 1)
    assert str(error).startswith("SIGTERM came; what was running does not save in the middle of its work")


def test_an_earlier_jobs_results_do_not_count(tmp_path):
    config = job(tmp_path, "crash")
    folder = Output(config).folder
    with pytest.raises(StageCrashError):
        local.run_stage(config)
    local.run_stage(job(tmp_path))
    assert [result.status for result in read_results(folder)] == ["done"]


def test_an_output_that_is_there_is_kept(tmp_path):
    config = job(tmp_path)
    local.run_stage(config)
    with pytest.raises(ConfigError, match="already exists; choose another output or pass --overwrite"):
        local.run_stage(config)
    config.overwrite, config.runtime.seed = True, 9
    local.run_stage(config)
    assert (Path(config.output) / "result.txt").read_text() == "9"


def test_overwriting_spares_what_is_not_ours(tmp_path):
    config = ExportConfig(model="m", output=str(tmp_path / "precious"), overwrite=True)
    Path(config.output).mkdir()
    (Path(config.output) / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="was not written by minitron"):
        local.run_stage(config)
    assert (Path(config.output) / "thesis.tex").exists()
