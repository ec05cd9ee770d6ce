"""One process writes an output; a second is refused with the holder's name, and a dead holder's lease is taken over."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_minitron.config import DistillConfig, PruneConfig, load
from nemo_minitron.errors import ConfigError, MinitronError
from nemo_minitron.jobs import lease as module
from nemo_minitron.jobs.lease import Holder, Lease, leased
from nemo_minitron.jobs.nested import run_child
from nemo_minitron.jobs.output import Output

_made: list[Lease] = []


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    """Gives back every lease of a test: a thread that goes on renewing would warn in the logs of later tests."""
    yield
    while _made:
        _made.pop().release()


def lease(path: Path, what: str = "minitron distill") -> Lease:
    made = Lease(path, "output: out", what)
    _made.append(made)
    return made


def write(path: Path, **changes: object) -> Holder:
    """A lease's file of another holder."""
    holder = dataclasses.replace(Holder.of_this_process("minitron distill"), token="other", **changes)
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


HOLD = """
import sys, time
from pathlib import Path
from nemo_minitron.jobs.lease import leased
with leased(Path(sys.argv[1]), "output: out", "minitron distill"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    path = tmp_path / "logs" / "out.lease"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"^output: out: `minitron distill`, process {first.pid} on .* since 20"):
            lease(path).take()
    finally:
        first.kill()
        first.wait()
    assert path.exists()
    with leased(path, "output: out", "minitron distill") as held:
        assert json.loads(path.read_text())["token"] == held.me.token
    assert list(path.parent.iterdir()) == []


def test_a_reused_process_id_is_not_the_holder(tmp_path):
    path = tmp_path / "out.lease"
    write(path, born=1.0)
    age(path, 30)
    lease(path).take()


def test_another_host_holds_while_it_renews(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_POLL", 0.05)
    path = tmp_path / "out.lease"
    write(path, place="elsewhere", host="node7", pid=1)
    timer = threading.Timer(0.3, os.utime, [path])
    timer.start()
    with pytest.raises(ConfigError, match="process 1 on node7"):
        lease(path).take()
    timer.join()


def test_another_host_that_does_not_renew_is_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_POLL", 0.05)
    monkeypatch.setattr(module, "EXPIRES", 0.5)
    path = tmp_path / "out.lease"
    write(path, place="elsewhere", host="node7")
    taken = lease(path)
    started = time.monotonic()
    taken.take()
    assert time.monotonic() - started > 0.4
    taken.check()
    taken.release()
    assert not path.exists()


def test_the_job_that_slurm_queued_again_does_not_wait(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    path = tmp_path / "out.lease"
    write(path, place="elsewhere", job="12", restart=0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = lease(path)
    again.take()
    again.check()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '"\\ud800"'])
def test_a_file_that_says_nothing_counts_by_its_age(tmp_path, content):
    path = tmp_path / "out.lease"
    path.write_text(content)
    age(path, 2 * module.EXPIRES)
    lease(path).take()
    assert json.loads(path.read_text())["pid"] == os.getpid()


def test_who_lost_the_lease_does_not_finish(tmp_path):
    config = PruneConfig(name="p", output=str(tmp_path / "out"), model="teacher")
    output = Output(config)
    with output.leased():
        Path(config.output).mkdir()
        write(tmp_path / "logs" / "out.lease", host="node7")
        with pytest.raises(MinitronError, match="on node7 .* took it over"):
            output.finish({}, 1.0)
    assert output.record() is None
    assert json.loads((tmp_path / "logs" / "out.lease").read_text())["host"] == "node7"


def test_a_deleted_lease_is_made_again(tmp_path):
    config = PruneConfig(name="p", output=str(tmp_path / "out"), model="teacher")
    output = Output(config)
    with output.leased():
        Path(config.output).mkdir()
        (tmp_path / "logs" / "out.lease").unlink()
        output.finish({}, 1.0)
    assert output.record() is not None


def test_a_process_may_lease_again_what_it_holds(tmp_path):
    output = Output(DistillConfig(name="d", output=str(tmp_path / "out"), student="s", teacher="t"))
    with output.leased(), Output(output.config).leased():
        pass
    with output.leased():
        pass
    assert list((tmp_path / "logs").iterdir()) == []


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output: out: cannot be written \(Not a directory|File exists"):
        lease(tmp_path / "file" / "logs" / "out.lease").take()


def _race(path: str, number: int, log: str) -> None:
    times = 0
    while times < 10:
        try:
            with leased(Path(path), "output: out", "minitron distill"):
                with open(log, "a") as file:
                    file.write(f"{number} in\n")
                time.sleep(0.002)
                with open(log, "a") as file:
                    file.write(f"{number} out\n")
            times += 1
        except ConfigError:
            time.sleep(0.001)


def test_never_two_at_once(tmp_path):
    path = tmp_path / "out.lease"
    write(path, born=1.0)  # all begin with a dead holder
    age(path, 30)
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    racers = [context.Process(target=_race, args=(str(path), number, str(log))) for number in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    lines = log.read_text().splitlines()
    assert len(lines) == 2 * 4 * 10
    for entered, left in zip(lines[::2], lines[1::2], strict=True):
        number = entered.removesuffix(" in")
        assert (entered, left) == (f"{number} in", f"{number} out")


def test_a_done_stage_is_kept_where_nothing_can_be_written(tmp_path, monkeypatch):
    config = PruneConfig(name="p", output=str(tmp_path / "shared" / "out"), model="teacher")
    Path(config.output).mkdir(parents=True)
    Output(config).finish({}, 1.0)

    def refuse(self: Lease) -> None:
        raise AssertionError("a lease was taken")

    monkeypatch.setattr(Lease, "take", refuse)
    record = run_child(config)
    assert record["stage"] == "prune"
    with pytest.raises(AssertionError, match="a lease was taken"):
        run_child(dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, seed=7)))


def test_the_lease_of_who_was_killed_after_the_end_does_not_stay(tmp_path):
    config = PruneConfig(name="p", output=str(tmp_path / "out"), model="teacher")
    Path(config.output).mkdir()
    Output(config).finish({}, 1.0)
    (tmp_path / "logs").mkdir(exist_ok=True)
    path = tmp_path / "logs" / "out.lease"
    write(path)  # of this process, which lives
    assert run_child(config)["stage"] == "prune"
    assert path.exists()
    write(path, born=1.0)
    assert run_child(config)["stage"] == "prune"
    assert not path.exists()


def test_an_old_output_that_a_kill_left_aside_comes_back(tmp_path):
    config = PruneConfig(name="p", output=str(tmp_path / "out"), model="teacher")
    aside = tmp_path / ".out.replaced.otherhost.77"
    aside.mkdir()
    (aside / "content").write_text("old")
    half = tmp_path / ".out.partial.otherhost.77"
    half.mkdir()
    with Output(config).leased():
        assert (tmp_path / "out" / "content").read_text() == "old"
        assert not half.exists()


def test_an_output_that_is_a_link_is_written_where_it_leads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to("disk")
    (tmp_path / "score.yaml").write_text("model: m\noutput: out\ndata: {sources: [{name: a, path: a.txt}]}\n")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "scores")  # of a directory that is still to be made
    assert load("score", tmp_path / "score.yaml").output == str(tmp_path / "disk" / "scores")
    assert load("score", tmp_path / "score.yaml", ["output=runs/x"]).output == "runs/x"
