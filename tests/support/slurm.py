"""A real Slurm of one node on this host, from the distribution's packages: munged, slurmctld, slurmd."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
#: What every cluster of the tests has in its ``slurm.conf``.
COMMON_CONF = """
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={home}/munge.socket
StateSaveLocation={home}/state
SlurmctldPidFile={home}/slurmctld.pid
SlurmctldLogFile={home}/slurmctld.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
MinJobAge=3600
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller}
SlurmdPort={node}
SlurmdSpoolDir={home}/spool
SlurmdPidFile={home}/slurmd.pid
SlurmdLogFile={home}/slurmd.log
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
"""


def missing() -> list[str]:
    """Daemons of Slurm that this machine does not have."""
    return [name for name in (*DAEMONS, "sbatch", "srun") if shutil.which(name, path=search_path()) is None]


def search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def munge(home: Path) -> list[str]:
    """The command that starts munge's daemon in ``home``, with a key of its own."""
    key = home / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    return [
        "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={home}/munge.socket",
        f"--pid-file={home}/munge.pid", f"--log-file={home}/munge.log", f"--seed-file={home}/munge.seed",
    ]  # fmt: skip


@contextmanager
def slurm(home: Path, patience: float = 30.0) -> Iterator[dict[str, str]]:
    """Start it, and stop it in the end.

    Args:
        home: empty directory with a short path (munge's socket lies in it).
        patience: seconds until the node must be idle.

    Yields:
        The environment in which ``sbatch``, ``squeue`` and ``scontrol`` find it.

    Raises:
        AssertionError: if the node does not come up; the message holds the daemons' logs.
    """
    import pwd

    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o755)
    for name in ("state", "spool"):
        (home / name).mkdir()
    host = socket.gethostname().split(".")[0]
    conf = home / "slurm.conf"
    conf.write_text(
        (_CONF + COMMON_CONF).format(
            host=host, home=home, user=pwd.getpwuid(os.getuid()).pw_name, controller=_free_port(), node=_free_port()
        )
    )
    env = dict(os.environ, SLURM_CONF=str(conf), PATH=search_path())
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command, wait in ((munge(home), 0.5), (["slurmctld", "-D"], 1.5), (["slurmd", "-D"], 0.0)):
            log = (home / f"{command[0]}.out").open("wb")
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
            time.sleep(wait)
        deadline = time.monotonic() + patience
        state = ""
        while "idle" not in state:
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {p.name}\n{p.read_text()[-2000:]}" for p in home.glob("*.[lo]*") if p.is_file())
                raise AssertionError(f"Slurm's node is not idle but {state!r}\n{logs}")
            time.sleep(0.5)
            found = subprocess.run(["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True, check=False)
            state = found.stdout.strip()
        try:
            yield env
        finally:  # jobs outlive the daemons
            kill = ["scancel", "--full", "--signal=KILL", "--user", str(os.getuid())]
            subprocess.run(kill, env=env, capture_output=True, check=False)
            time.sleep(1)
    finally:
        for process in reversed(started):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def job_states(env: dict[str, str]) -> dict[str, str]:
    """State of each job that Slurm still knows, by number."""
    found = subprocess.run(["scontrol", "show", "jobs", "-o"], env=env, capture_output=True, text=True, check=True)
    fields = [dict(p.split("=", 1) for p in line.split() if "=" in p) for line in found.stdout.splitlines()]
    return {job["JobId"]: job["JobState"] for job in fields if "JobId" in job}
