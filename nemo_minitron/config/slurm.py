"""The settings of a Slurm cluster and of its jobs, which ``minitron run --slurm`` reads."""

from __future__ import annotations

import difflib
import math
import os.path
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts import choice, not_negative, positive
from nemo_minitron.config.parts.cluster import GPUS
from nemo_minitron.config.stages import STAGES, StageConfig, StageJob

__all__ = ["CpuConfig", "Request", "SlurmConfig", "seconds_of"]

_TIME = re.compile(r"(\d+-)?\d{1,2}:\d{2}:\d{2}")
_SIGNAL = re.compile(r"(B:)?[A-Z0-9]+(@\d+)?")


@dataclass(frozen=True)
class Request:
    """The resources that the job of a stage requests from Slurm; None leaves a value to the cluster.

    Attributes:
        account, partition, qos, constraint, mem, exclusive, time, extra: as in :class:`SlurmConfig`.
        nodes, tasks: number of nodes, and of processes on each.
        gpus: number of GPUs of each node.
        cpus_per_task: cores of each process.
    """

    account: str
    partition: str | None
    qos: str | None
    constraint: str | None
    mem: str | None
    exclusive: bool
    nodes: int
    tasks: int
    gpus: int | None
    cpus_per_task: int | None
    time: str
    extra: dict[str, str]


@dataclass
class CpuConfig:
    """The partition for stages that need no GPU: import, export, prune, tokens, report, and those with ``device=cpu``.

    Only ``account`` and ``time`` are taken from the cluster's description where they are null here.

    Attributes:
        partition: partition of nodes without GPUs; null for none, and such a stage takes the place of one GPU on an
            ordinary node.
        account, qos, constraint, mem, time, extra: as for the other jobs, for the jobs of this partition.
        tasks_per_node: processes of a node; null puts all of a stage on one.
        cpus_per_task: cores of each process.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    mem: str | None = None
    time: str | None = None
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    extra: dict[str, str] = field(default_factory=dict)

    def faults(self) -> list[str]:
        """Malformed times, settings of a partition that is not named."""
        faults = positive(self, "tasks_per_node", "cpus_per_task")
        if self.time is not None and not _TIME.fullmatch(str(self.time)):
            faults.append(f"time={self.time}: must be [D-]HH:MM:SS, in quotes")
        if self.partition is None and self != CpuConfig():
            faults.append("partition: must be given where anything of a CPU partition is")
        return faults


@dataclass
class SlurmConfig:
    """A Slurm cluster and the resources of its jobs. Field names are Slurm's, or nemo_run's where Slurm has none.

    Attributes:
        account, partition, qos, constraint, mem, exclusive: ``sbatch``'s option of that name, for every job.
        gpus_per_node: GPUs, and so processes, of a node; 0 for nodes without any.
        gpu: kind of the GPUs ("a100", "h100", "h200", "b200"), for the estimate that ``time`` is held against.
        tasks_per_node: processes of a node without GPUs.
        cpus_per_task: cores of each process; null leaves it to the cluster.
        time: limit of each job, ``[D-]HH:MM:SS``.
        stage_time: time limit of single stages, by name, or of a kind of stage ("distill"); a name goes before a kind.
            Of the jobs of a search or an iteration: by the job's name ("search.1.distilled"), the stage's name, the
            job's kind ("distill"), the stage's kind.
        cpu: partition for stages that have no work for a GPU.
        container_image: image for Pyxis; null runs on the bare node, where this suite must be installed.
        container_mounts: ``host:container``; outputs, inputs and caches must be visible under the same paths.
        python: interpreter that has this suite.
        env: exported in every job.
        setup: shell lines that run first.
        retries: how often a job that failed or was preempted is queued again; stages go on where they were.
        signal: sent before the time limit, so that a training saves and ends: ``NAME@seconds``.
        extra: further sbatch options by name (``mail_user``, ``reservation``, ...).
        host: login node that jobs are sent to by SSH; null where this machine is one.
        user: user name on ``host``.
        identity: file of the SSH key for ``host``; null leaves it to SSH.
        job_dir: where scripts and logs of the jobs go on the cluster; null takes ``jobs`` in the run's output.
    """

    PATHS: ClassVar[tuple[str, ...]] = ("container_image", "python", "job_dir", "identity")

    account: str = MISSING
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    mem: str | None = None
    exclusive: bool = False
    gpus_per_node: int = 8
    gpu: str = "h100"
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str = "04:00:00"
    stage_time: dict[str, str] = field(default_factory=dict)
    cpu: CpuConfig = field(default_factory=CpuConfig)
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
        faults = [
            *choice(self, "gpu", GPUS),
            *positive(self, "tasks_per_node", "cpus_per_task"),
            *not_negative(self, "gpus_per_node", "retries"),
        ]
        for name, value in (("time", self.time), *((f"stage_time.{k}", v) for k, v in self.stage_time.items())):
            if not _TIME.fullmatch(str(value)):
                faults.append(f"{name}={value}: must be [D-]HH:MM:SS, in quotes")
        if self.gpus_per_node == 0 and self.tasks_per_node is None:
            faults.append("tasks_per_node: must be given for nodes without GPUs")
        if self.container_mounts and self.container_image is None:
            faults.append("container_mounts: there is no container; give container_image, or no mounts")
        faults += [
            f"container_mounts: {mount!r} must be host:container, both absolute"
            for mount in self.container_mounts
            if ":" not in mount or not all(part.startswith("/") for part in mount.split(":")[:2])
        ]
        if self.container_image is not None and "/" in self.python and not self.python.startswith("/"):
            faults.append(f"python={self.python}: is a path inside the container; give it absolute, or a bare name")
        if self.host is not None and self.job_dir is not None and not self.job_dir.startswith("/"):
            faults.append(f"job_dir={self.job_dir}: lies on another machine; give it absolute")
        if self.host is not None and (self.user is None or self.job_dir is None):
            faults.append("host: SSH also needs user and job_dir")
        if self.signal is not None and not _SIGNAL.fullmatch(self.signal):
            faults.append(f"signal={self.signal}: must be NAME@seconds, as USR1@180")
        return faults

    def is_path(self, name: str, value: str) -> bool:
        """An image may also be in a registry, an interpreter in the container or on ``PATH``.

        What ``~`` and ``$NAME`` stand for on ``host`` is not known here: there the shell replaces them.
        """
        if name == "container_image":
            return value.startswith((".", "/", "~", "$")) or value.endswith(".sqsh")
        if name != "identity" and self.host is not None and (value.startswith("~") or "$" in value):
            return False
        return name in ("job_dir", "identity") or (self.container_image is None and "/" in value)

    @property
    def per_node(self) -> int:
        """Number of processes on a node."""
        return self.gpus_per_node or self.tasks_per_node or 1

    def nodes(self, processes: int) -> int:
        """Number of nodes of a stage with so many processes."""
        return math.ceil(processes / self.per_node)

    def request(self, config: StageConfig, job: StageJob | None = None) -> Request:
        """The resources of a stage's job: as many whole nodes as its processes fill, or a place without a GPU.

        Args:
            config: of the stage.
            job: one of its jobs; None for the last, which writes its record.
        """
        job = job or config.jobs()[-1]
        world = job.processes
        if not job.needs_gpu and self.cpu.partition is not None:
            cpu = self.cpu
            tasks = min(world, cpu.tasks_per_node or world)
            return Request(
                account=cpu.account or self.account, partition=cpu.partition, qos=cpu.qos, constraint=cpu.constraint,
                mem=cpu.mem, exclusive=False, nodes=math.ceil(world / tasks), tasks=tasks, gpus=None,
                cpus_per_task=cpu.cpus_per_task, time=self._time(config, job, cpu.time), extra=dict(cpu.extra),
            )  # fmt: skip
        tasks, gpus, exclusive = min(world, self.per_node), None, self.exclusive
        if self.gpus_per_node:
            # A GPU that is not used: the partition may refuse jobs without one, but the others stay free.
            exclusive = exclusive and job.needs_gpu
            gpus = self.gpus_per_node if exclusive else min(job.started, self.per_node) if job.needs_gpu else tasks
        return Request(
            account=self.account, partition=self.partition, qos=self.qos, constraint=self.constraint, mem=self.mem,
            exclusive=exclusive, nodes=self.nodes(world), tasks=tasks, gpus=gpus,
            cpus_per_task=self.cpus_per_task and self.cpus_per_task * max(1, job.started // world),
            time=self._time(config, job, None), extra=dict(self.extra),
        )  # fmt: skip

    def _time(self, config: StageConfig, job: StageJob, cpu: str | None) -> str:
        names = (f"{config.name}.{job.name}", config.name, job.kind, config.STAGE)
        named = next((self.stage_time[name] for name in names if name in self.stage_time), None)
        return named or cpu or self.time

    def stage_faults(self, configs: Iterable[StageConfig]) -> list[str]:
        """Layouts that do not fill nodes, and time limits of names that are neither a stage nor a kind of stage."""
        configs = list(configs)
        jobs = [(config, job) for config in configs for job in config.jobs()]
        faults = list(dict.fromkeys(fault for config, job in jobs for fault in self._node_faults(config, job)))
        names = [config.name for config in configs]
        parts = {f"{config.name}.{job.name}" for config, job in jobs}
        for name in self.stage_time:
            if name not in names and name not in parts and name not in STAGES:
                near = difflib.get_close_matches(name, [*names, *STAGES], n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                faults.append(
                    f"stage_time.{name}: no stage is called so, nor a kind of stage{hint}; the stages are "
                    f"{', '.join(names)}"
                )
        return faults

    def _node_faults(self, config: StageConfig, job: StageJob) -> list[str]:
        """Why the processes of a stage's job cannot be spread over whole nodes."""
        request, world = self.request(config, job), job.processes
        if world > request.tasks and world % request.tasks:
            return [
                f"stage {config.name}: its {world} processes do not fill nodes of {request.tasks}; "
                "choose parallel.tensor * pipeline * data * context as a multiple of that"
            ]
        if job.started > world and job.started > self.per_node:
            return [
                f"stage {config.name}: it starts {job.started} processes by itself, all on the one node that it "
                f"has, which takes {self.per_node}; choose parallel.tensor * pipeline * data * context within that"
            ]
        return []

    def mount_fault(self, path: str) -> str | None:
        """Why an absolute path is not visible under its own name in the container; None if it is, or there is none."""
        if self.container_image is None:
            return None
        inside = None
        for mount in self.container_mounts:
            host, container, *_ = (*mount.split(":"), "")
            host, container = os.path.normpath(host), os.path.normpath(container)
            if _below(path, host):
                if host == container:
                    return None
                inside = f"is seen as {container}{os.path.normpath(path)[len(host.rstrip('/')) :]}"
        return inside or "is not seen"


def seconds_of(time: str) -> int:
    """``"1-02:00:00"`` -> 93600."""
    days, _, clock = time.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def _below(path: str, folder: str) -> bool:
    return os.path.commonpath([os.path.normpath(path), folder]) == folder
