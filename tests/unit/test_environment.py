"""What the processes that this suite starts see of launchers above them, and where they meet."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron.config import DistillConfig, ParallelLayout, PruneConfig, ScoreConfig
from nemo_minitron.jobs import results, slurm_environment
from nemo_minitron.runtime import environment

#: Of a task that ``srun`` started in a job of several tasks, and of a script below ``sbatch --ntasks=4``.
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "SLURM_CPUS_PER_TASK": "2", "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NAME": "mine", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_SRUN_COMM_PORT": "1", "SLURM_GTIDS": "2,3", "SLURM_TASK_PID": "9",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SLURM_DISTRIBUTION": "block", "SLURM_CPU_BIND": "none",
}  # fmt: skip
OTHERS = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "NODE_RANK": "1",
    "ROLE_RANK": "3", "MASTER_ADDR": "n1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "a", "PET_NNODES": "2",
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "PMI_RANK": "3", "PMI_SIZE": "4", "PMIX_RANK": "3",
    "MV2_COMM_WORLD_RANK": "3", "MPI_LOCALRANKID": "1", "PALS_RANKID": "3", "JSM_NAMESPACE_RANK": "3",
}  # fmt: skip
KEPT = {
    "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CPUS_PER_TASK", "SLURM_JOB_NODELIST", "SLURM_JOB_NAME",
}  # fmt: skip


def test_no_launcher_shows_in_what_is_started_here() -> None:
    found = environment.local_environment({**SLURM, **OTHERS, "HOME": "/h"})
    assert {name for name in found if name in SLURM} == KEPT
    assert {name for name in found if name in OTHERS} == {"MASTER_ADDR"}
    assert (found["HOME"], found["MASTER_ADDR"], found["PET_LOCAL_ADDR"]) == ("/h", "127.0.0.1", "127.0.0.1")


def test_ranks_of_this_machine_meet_on_loopback_unless_an_interface_is_named() -> None:
    assert environment.local_environment({})["GLOO_SOCKET_IFNAME"] == "lo"
    assert environment.local_environment({"GLOO_SOCKET_IFNAME": "eth0"})["GLOO_SOCKET_IFNAME"] == "eth0"


@pytest.mark.slow  # imports torch
def test_lightning_sees_no_slurm_where_srun_started_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric.plugins.environments import SLURMEnvironment

    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert SLURMEnvironment.detect(), "this is what one-process trainings died of"
    environment.hide_launchers()
    assert not SLURMEnvironment.detect()


@pytest.mark.slow  # imports torch
def test_a_rank_that_srun_started_is_told_as_torchrun_would(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*OTHERS, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as inner:
        inner.setattr(os, "environ", os.environ.copy())
        assert slurm_environment.is_rank()
        assert slurm_environment.translate() == (3, 4)
        found = dict(os.environ)
    assert {name for name in found if name in SLURM} == KEPT
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1"}
    assert {name: found[name] for name in expected} == expected
    assert found["OMP_NUM_THREADS"] == "2", "the cores of a task, which may be bound to them"
    first = dict(found)["MASTER_PORT"]
    with monkeypatch.context() as inner:
        inner.setattr(os, "environ", {**os.environ, "SLURM_RESTART_COUNT": "2"})
        slurm_environment.translate()
        assert os.environ["MASTER_PORT"] != first, "what is left of an earlier attempt waits elsewhere"


def test_megatron_gets_its_order_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    name, value = environment.ORDERED_KERNELS
    wide = ScoreConfig(parallel=ParallelLayout(tensor=2, sequence_parallel=True))
    assert (name, value) == ("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    assert environment.ordered_kernels(wide)
    assert environment.ordered_kernels(DistillConfig(parallel=ParallelLayout(context=2)))
    assert environment.ordered_kernels(DistillConfig(teacher_parallel=ParallelLayout(tensor=2)))
    assert not environment.ordered_kernels(ScoreConfig(parallel=ParallelLayout(pipeline=2, data=2)))
    assert not environment.ordered_kernels(PruneConfig())
    monkeypatch.setenv(name, "8")
    environment.order_kernels(wide)
    assert os.environ[name] == "8", "the user's own stays"
    monkeypatch.delenv(name)
    with monkeypatch.context() as inner:
        inner.setattr(os, "environ", os.environ.copy())
        environment.order_kernels(wide)
        assert os.environ[name] == "1"


def test_a_rank_that_was_given_up_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that hung comes to life when its job runs elsewhere already."""
    monkeypatch.setenv(results.ATTEMPT_VARIABLE, "7-0")
    results.begin_attempt(tmp_path, "7-0")
    results.save_result(tmp_path, results.RankResult(0, "done"))
    results.begin_attempt(tmp_path, "7-1")
    results.save_result(tmp_path, results.RankResult(1, "crashed"))
    assert [result.rank for result in results.read_results(tmp_path)] == [0]
    monkeypatch.delenv(results.ATTEMPT_VARIABLE)
    results.save_result(tmp_path, results.RankResult(1, "done"))
    assert len(results.read_results(tmp_path)) == 2


_MEETS = """
import os, sys
from pathlib import Path
from nemo_minitron.jobs.launch import attach, job_folder, launch
from nemo_minitron.jobs.results import RankResult, save_result
if len(sys.argv) > 2:
    found = launch("meeting", ["x"], world_size=2, folder=Path(sys.argv[2]), timeout_minutes=1.5)
    print(found[0].metrics["sum"])
else:
    folder = job_folder()
    rank = attach(folder)
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.ones(())
    dist.all_reduce(total)
    save_result(folder, RankResult(rank, "done", metrics={"sum": total.item()}))
"""


def _no_host_names() -> str:
    if shutil.which("unshare") is None:
        return "unshare is missing"
    tried = subprocess.run(["unshare", "--uts", "true"], capture_output=True, text=True, check=False)
    return f"a host name of its own is not permitted: {tried.stderr.strip()}" if tried.returncode else ""


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.skipif(bool(_no_host_names()), reason=_no_host_names())
def test_ranks_meet_where_the_host_has_a_name_that_nobody_knows(tmp_path: Path) -> None:
    (tmp_path / "meeting.py").write_text(_MEETS)
    script = 'hostname nobody-knows-me; exec "$@"'
    done = subprocess.run(
        ["unshare", "--uts", "sh", "-c", script, "sh", sys.executable, "meeting.py", "main", str(tmp_path / "job")],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["2.0"], done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_training_gives_up_on_a_rank_that_does_not_answer(tmp_path: Path) -> None:
    """Groups of a library that sets no limit of its own, or half an hour, get this suite's.

    Tried with a receive, as of a pipeline stage: gloo holds it to the limit that its group was made with.
    """
    silent = """
    from datetime import timedelta
    from nemo_minitron.runtime.waits import bounded_groups, limit_waits
    limit_waits(0.05)
    with bounded_groups():
        group = dist.new_group([0, 1], timeout=timedelta(minutes=30))
    if rank == 1:
        os.kill(os.getpid(), 19)
    total ="""
    (tmp_path / "meeting.py").write_text(
        _MEETS.replace("\n    total =", silent).replace(
            "dist.all_reduce(total)", "dist.recv(total, src=1, group=group)"
        )
    )
    done = subprocess.run(
        [sys.executable, "meeting.py", "main", str(tmp_path / "job")],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Rank 0 of 2" in done.stderr, done.stdout + done.stderr
    assert "stopped after" not in done.stderr, "the job's own limit did not end it"
