"""Forked processes: they are as fresh ones to whoever asks for them, and what ends badly ends alone."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nemo_minitron.jobs import warm
from nemo_minitron.jobs.ranks import ForkedRanks, forked
from nemo_minitron.jobs.warm import Level, WarmPool
from nemo_minitron.jobs.warm_client import WarmProcess

#: A level that imports nothing heavy, and one whose import starts a thread.
LEVELS = {
    "light": Level(("json",), stack=False),
    "above": Level(("decimal", "marked"), below="light", stack=False),
    "threaded": Level(("threaded",), stack=False),
    "missing": Level(("no_such_module",), stack=False),
}

ACT = """
import json, logging, os, signal, sys, threading, time
what, *args = sys.argv[1:]
if what == "exit": sys.exit(int(args[0]))
if what == "say": sys.exit(args[0])
if what == "os_exit": os._exit(int(args[0]))
if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
if what == "raise": raise ValueError("a fault of ours")
if what == "sleep": print("asleep", flush=True); time.sleep(float(args[0]))
if what == "deaf": signal.signal(signal.SIGTERM, signal.SIG_IGN); print("deaf", flush=True); time.sleep(60)
if what == "late": threading.Thread(target=lambda: (time.sleep(0.3), print("late"))).start()
if what == "tell":
    import random
    print(json.dumps({
        "argv": sys.argv[1:], "cwd": os.getcwd(), "path": sys.path[:2], "environ": dict(os.environ),
        "stdin": sys.stdin.read(), "leads": os.getsid(0) == os.getpid() == os.getpgrp(), "name": __name__,
        "draw": random.random(), "modules": [m for m in ("decimal", "marked") if m in sys.modules],
        "chld": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL, "handlers": len(logging.root.handlers),
        "open": len([f for f in os.listdir("/proc/self/fd") if int(f) > 2]),
    }))
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "act.py").write_text(ACT)
    (tmp_path / "marked.py").write_text("")
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    return tmp_path


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[WarmPool]:
    monkeypatch.delenv(warm.COLD_VARIABLE, raising=False)
    opened = WarmPool(levels=LEVELS)
    yield opened
    opened.close()


Act = Callable[..., WarmProcess | None]


@pytest.fixture
def act(pool: WarmPool, home: Path) -> Act:
    """Start ``python -m act *args``; its output goes to a file of its name."""

    def start(*args: str, level: str = "light", **environment: str) -> WarmProcess | None:
        own = {**os.environ, "PYTHONPATH": str(home), **environment}
        log = home / f"{'-'.join(args)[:40]}.log"
        return pool.start(level, "act", args, environment=own, cwd=home, output=log)

    return start


def ended(process: WarmProcess | None) -> int:
    assert process is not None
    return process.wait(20)


def told(home: Path, *args: str) -> dict[str, Any]:
    return json.loads((home / f"{'-'.join(['tell', *args])}.log").read_text())


def gone(*pids: int) -> bool:
    """Whether processes end within a few seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        alive = [process for process in psutil.process_iter(["pid", "status"]) if process.info["pid"] in pids]
        if all(process.info["status"] == psutil.STATUS_ZOMBIE for process in alive):
            return True
        time.sleep(0.05)
    return False


def test_exit_codes_are_those_of_a_fresh_interpreter(act, home):
    assert [ended(act("exit", code)) for code in ("0", "7", "256")] == [0, 7, 0]
    assert ended(act("os_exit", "3")) == 3
    assert ended(act("kill")) == -signal.SIGKILL
    assert ended(act("raise")) == 1
    assert "ValueError: a fault of ours" in (home / "raise.log").read_text()
    assert ended(act("say", "no")) == 1
    assert (home / "say-no.log").read_text() == "no\n"
    assert ended(act("late")) == 0
    assert (home / "late.log").read_text() == "late\n"  # a thread that is no daemon is waited for


def test_a_child_that_dies_harms_no_other(act):
    sleeper = act("sleep", "60")
    for _ in range(3):
        assert [ended(act("kill")), ended(act("os_exit", "9")), ended(act("raise"))] == [-9, 9, 1]
    assert sleeper.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        sleeper.wait(0.1)
    os.killpg(sleeper.pid, signal.SIGTERM)  # a group of its own, from the start
    assert ended(sleeper) == -signal.SIGTERM


def test_a_child_is_as_it_was_asked_for(act, home, pool):
    assert ended(act("tell", "one", ONLY_ONE="1")) == 0
    assert ended(act("tell", "two", level="above")) == 0
    one, two = told(home, "one"), told(home, "two")
    assert one["argv"] == ["tell", "one"]
    assert one["cwd"] == str(home)
    assert one["path"] == [str(home), str(home)]
    assert one["name"] == "__main__"
    assert one["stdin"] == ""
    assert one["leads"]
    assert one["chld"]
    assert one["handlers"] == 0
    assert one["open"] <= 1  # of the server's sockets and pipes none; /proc is being read
    assert one["environ"]["ONLY_ONE"] == "1"
    assert "ONLY_ONE" not in two["environ"]
    assert one["draw"] != two["draw"]
    for name in ("OPENBLAS_NUM_THREADS", "JE_ARROW_MALLOC_CONF"):  # the server's own
        assert one["environ"].get(name) == os.environ.get(name)
    assert one["modules"] == []
    assert two["modules"] == ["decimal", "marked"]


def test_a_variable_that_is_read_at_import_needs_a_server_of_its_own(act, pool):
    for value in ("0", "1", "0", "1"):
        assert ended(act("exit", "0", HF_HUB_OFFLINE=value)) == 0
    assert ended(act("exit", "0", HF_HUB_OFFLINE="0", RANK="3", FREE="1", NEMORUN_HOME="/x")) == 0
    assert len(pool._servers) == 2


def said(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the pool logged: threads of other tests may log at the same time."""
    return [record for record in caplog.records if record.name == warm.__name__]


def test_a_second_thread_means_a_cold_start(act, caplog):
    with caplog.at_level(logging.WARNING):
        assert act("exit", "0", level="threaded") is None
        assert act("exit", "0", level="threaded") is None
    (record,) = said(caplog)  # it is said, and tried, once
    assert record.getMessage().startswith("act starts cold: the imports left more than one thread (python")


def test_what_cannot_be_imported_means_a_cold_start(act, caplog):
    with caplog.at_level(logging.WARNING):
        assert act("exit", "0", level="missing") is None
    assert "act starts cold: ModuleNotFoundError: No module named 'no_such_module'" in caplog.text


def test_a_dead_server_ends_its_children_and_is_replaced(act, pool):
    sleeper = act("sleep", "60")
    (server,) = pool._servers.values()
    os.kill(server.process.pid, signal.SIGKILL)
    assert ended(sleeper) == -signal.SIGKILL
    assert gone(sleeper.pid)
    assert ended(act("exit", "5")) == 5


def test_signals_for_a_whole_job_do_not_reach_its_server(act, pool):
    sleeper = act("sleep", "60", level="above")
    for server in pool._servers.values():
        for order in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(server.process.pid, order)
    assert ended(act("exit", "5", level="above")) == 5
    assert sleeper.poll() is None
    os.kill(sleeper.pid, signal.SIGUSR1)  # the default of a fresh process
    assert ended(sleeper) == -signal.SIGUSR1


def test_a_machine_with_a_gpu_starts_cold(act, home, monkeypatch, caplog):
    monkeypatch.setattr(warm, "_DRIVER", home)
    assert act("exit", "0") is None
    assert not said(caplog)


def test_a_server_that_stays_dead_means_a_cold_start(act, pool, monkeypatch, caplog):
    assert ended(act("exit", "0")) == 0
    (server,) = pool._servers.values()
    os.kill(server.process.pid, signal.SIGKILL)
    assert gone(server.process.pid)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with caplog.at_level(logging.WARNING):
        assert act("exit", "0") is None
    assert "starts cold" in caplog.text


def test_cold_starts_can_be_asked_for(act, monkeypatch, caplog):
    monkeypatch.setenv(warm.COLD_VARIABLE, "1")
    assert act("exit", "0") is None
    assert not said(caplog)


def test_a_fork_of_the_owner_does_not_use_its_servers(act, pool):
    assert ended(act("exit", "0")) == 0
    pid = os.fork()
    if pid == 0:
        os._exit(0 if act("exit", "0") is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert ended(act("exit", "4")) == 4


def test_killing_the_owner_ends_servers_and_children(home, monkeypatch):
    monkeypatch.delenv(warm.COLD_VARIABLE, raising=False)
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom nemo_minitron.jobs.warm import Level, WarmPool\n"
        "levels = {'light': Level(('json',), stack=False), 'above': Level(('decimal',), below='light', stack=False)}\n"
        "pool = WarmPool(levels=levels)\nhome = Path(sys.argv[1])\n"
        "env = {**os.environ, 'PYTHONPATH': sys.argv[1]}\n"
        "def start(level):\n"
        "    return pool.start(level, 'act', ['sleep', '60'], environment=env, cwd=home, output=home / 'log')\n"
        "pids = [start('light').pid, start('above').pid, *(s.process.pid for s in pool._servers.values())]\n"
        "print(*pids, pool._folder, flush=True)\ntime.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(home)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    *pids, folder = owner.stdout.readline().split()
    assert len(pids) == 4
    assert all(psutil.pid_exists(int(pid)) for pid in pids)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert gone(*map(int, pids))
    assert not Path(folder).exists()


def test_closing_a_pool_leaves_nothing(act, pool):
    sleepers = [act("sleep", "60"), act("deaf", level="above")]
    servers = [server.process.pid for server in pool._servers.values()]
    folder = pool._folder
    pool.close()
    assert gone(*servers, *(sleeper.pid for sleeper in sleepers))
    assert [ended(sleeper) for sleeper in sleepers] == [-9, -9]
    assert not folder.exists()


def test_a_child_uses_the_servers_of_its_owner(act, home, pool, monkeypatch):
    assert ended(act("exit", "0")) == 0
    monkeypatch.setenv("MINITRON_WARM", str(pool._folder))
    nested = WarmPool(levels=LEVELS)
    environment = {**os.environ, "PYTHONPATH": str(home)}
    process = nested.start("light", "act", ["sleep", "60"], environment=environment, cwd=home, output=home / "n.log")
    assert [server.process for server in nested._servers.values()] == [None]
    nested.close()  # ends what it asked for, not the server
    assert gone(process.pid)
    assert ended(act("exit", "6")) == 6


@pytest.fixture
def starter(pool, monkeypatch):
    monkeypatch.setattr(warm, "_current", pool)
    return forked("light")


def ranks(starter: Any, home: Path, *what: str) -> ForkedRanks:
    """One rank for each word of ``what``; the module of a rank runs the word of its number."""
    (home / "each.py").write_text(
        "import os, sys, runpy\nwords = sys.argv[1:]\n"
        "sys.argv = ['act', *words[int(os.environ['RANK'])].split(':')]\nrunpy.run_module('act', run_name='__main__')\n"
    )
    return starter(
        "each", what, world_size=len(what), environment={**os.environ, "PYTHONPATH": str(home)}, log=home / "all.log"
    )


def test_ranks_are_told_what_torchrun_tells(starter, home, monkeypatch):
    monkeypatch.chdir(home)
    assert ranks(starter, home, "tell:0", "tell:1").wait() == 0
    first, second = (json.loads(line)["environ"] for line in sorted((home / "all.log").read_text().splitlines()))
    assert {first["RANK"], second["RANK"]} == {"0", "1"}
    for each in (first, second):
        assert each["LOCAL_RANK"] == each["RANK"]
        assert (each["WORLD_SIZE"], each["LOCAL_WORLD_SIZE"], each["MASTER_ADDR"]) == ("2", "2", "127.0.0.1")
        assert each["MASTER_PORT"] == first["MASTER_PORT"]
        assert "TORCHELASTIC_RUN_ID" in each


def test_a_rank_that_fails_ends_the_others(starter, home, monkeypatch):
    monkeypatch.chdir(home)
    job = ranks(starter, home, "sleep:60", "kill")
    started = time.monotonic()
    assert job.wait() == -signal.SIGKILL
    assert job.first_failure == (1, -signal.SIGKILL)
    assert time.monotonic() - started < 10
    assert job.pids == []


def test_one_rank_alone_is_none(starter, home, monkeypatch):
    monkeypatch.chdir(home)
    environment = {k: v for k, v in os.environ.items() if k != "RANK"} | {"PYTHONPATH": str(home)}
    job = starter("act", ["tell", "alone"], world_size=1, environment=environment, log=home / "tell-alone.log")
    assert job.wait() == 0
    assert "RANK" not in told(home, "alone")["environ"]


def reduce(value: float) -> dict[str, Any]:
    """A collective of forked ranks; also whether Lightning knows which rank this is."""
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from nemo_minitron.runtime import cpu
    from nemo_minitron.runtime.groups import ParallelLayout, initialize

    rank = int(os.environ["RANK"])
    initialize(ParallelLayout(tensor=2))
    tensor = torch.full((3,), value * (rank + 1), requires_grad=True)
    (tensor * 2).sum().backward()
    torch.distributed.all_reduce(tensor.grad)
    return {
        "sum": tensor.grad.tolist(),
        "rank_zero": rank_zero_only.rank,
        "writes": rank_zero_only(lambda: True)(),
        "cpu": cpu.is_active(),
        "forked": "MINITRON_WARM" in os.environ,
        "threads": torch.get_num_threads(),
    }


@pytest.mark.slow
def test_forked_ranks_meet_and_know_their_rank(tmp_path: Path) -> None:
    from support.distributed import run_distributed

    if warm.is_cold():
        pytest.skip(f"{warm.COLD_VARIABLE} is set: no process is forked")
    results = run_distributed(reduce, 2, tmp_path, value=1.5)
    assert [result["sum"] for result in results] == [[4.0] * 3] * 2
    assert [result["rank_zero"] for result in results] == [0, 1]
    assert [result["writes"] for result in results] == [True, None]
    assert all(result["cpu"] and result["forked"] and result["threads"] == 1 for result in results)
