"""Where jobs of a Slurm cluster run, as ``minitron run --slurm`` reads it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from omegaconf import MISSING

from nemo_minitron.config.parts import not_negative, positive

__all__ = ["SlurmConfig"]

_TIME = re.compile(r"(\d+-)?\d{1,2}:\d{2}:\d{2}")
_SIGNAL = re.compile(r"(B:)?[A-Z0-9]+(@\d+)?")


@dataclass
class SlurmConfig:
    """A Slurm cluster and what its jobs ask for. Field names are Slurm's, or nemo_run's where Slurm has none.

    Attributes:
        account, partition, qos, constraint, mem, exclusive: of every job, as in ``sbatch``.
        gpus_per_node: GPUs, and so processes, of a node; 0 for nodes without any.
        tasks_per_node: processes of a node without GPUs.
        cpus_per_task: cores of each process; null leaves it to the cluster.
        time: limit of each job, ``[D-]HH:MM:SS``.
        stage_time: the same of single stages, by name.
        container_image: for Pyxis; null runs on the bare node, where this suite must be installed.
        container_mounts: ``host:container``; the run's output and its inputs must be visible under the same paths.
        python: interpreter that has this suite.
        env: exported in every job.
        setup: shell lines that run first.
        retries: how often a job that failed or was preempted is queued again; stages go on where they were.
        signal: sent before the time limit, so that a training saves and ends: ``NAME@seconds``.
        extra: further sbatch options by name (``mail_user``, ``reservation``, ...).
        host, user, identity: of a login node that jobs are sent to by SSH; without a host, this is one.
        job_dir: where scripts and logs of the jobs go on the cluster; null takes ``jobs`` in the run's output.
    """

    account: str = MISSING
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    mem: str | None = None
    exclusive: bool = False
    gpus_per_node: int = 8
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str = "04:00:00"
    stage_time: dict[str, str] = field(default_factory=dict)
    container_image: str | None = None
    container_mounts: list[str] = field(default_factory=list)
    python: str = "python"
    env: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    retries: int = 3
    signal: str | None = "USR1@180"
    extra: dict[str, str] = field(default_factory=dict)
    host: str | None = None
    user: str | None = None
    identity: str | None = None
    job_dir: str | None = None

    def faults(self) -> list[str]:
        """Malformed times, mounts without a container, SSH without a user."""
        found = [
            *positive(self, "tasks_per_node", "cpus_per_task"),
            *not_negative(self, "gpus_per_node", "retries"),
        ]
        for name, value in (("time", self.time), *((f"stage_time.{k}", v) for k, v in self.stage_time.items())):
            if not _TIME.fullmatch(str(value)):
                found.append(f"{name}={value}: must be [D-]HH:MM:SS, in quotes")
        if self.gpus_per_node == 0 and self.tasks_per_node is None:
            found.append("tasks_per_node: must be given for nodes without GPUs")
        if self.container_mounts and self.container_image is None:
            found.append("container_mounts: there is no container; give container_image, or no mounts")
        found += [f"container_mounts: {m!r} must be host:container" for m in self.container_mounts if ":" not in m]
        if self.host is not None and (self.user is None or self.job_dir is None):
            found.append("host: SSH also needs user and job_dir")
        if self.signal is not None and not _SIGNAL.fullmatch(self.signal):
            found.append(f"signal={self.signal}: must be NAME@seconds, as USR1@180")
        return found

    @property
    def per_node(self) -> int:
        """Processes that a node takes."""
        return self.gpus_per_node or self.tasks_per_node or 1

    def nodes(self, processes: int) -> int:
        """Nodes of a stage with so many processes."""
        return math.ceil(processes / self.per_node)

    def node_faults(self, name: str, world: int) -> list[str]:
        """Why the ``world`` processes of the stage ``name`` cannot be spread over whole nodes."""
        if world > self.per_node and world % self.per_node:
            return [
                f"stage {name}: its {world} processes do not fill nodes of {self.per_node}; "
                "choose parallel.tensor * pipeline * data * context as a multiple of that"
            ]
        return []
