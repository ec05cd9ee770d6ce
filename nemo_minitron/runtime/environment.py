"""Environment variables of the processes that this suite starts: no other launcher's, loopback, Megatron's demands."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from nemo_minitron.config import ParallelLayout, StageConfig

__all__ = [
    "ORDERED_KERNELS",
    "hide_launchers",
    "local_environment",
    "order_kernels",
    "ordered_kernels",
    "threads_each",
]

ORDERED_KERNELS = ("CUDA_DEVICE_MAX_CONNECTIONS", "1")
"""Kernels start in the order in which they were queued: Megatron overlaps its traffic with arithmetic by that."""

LOOPBACK = "127.0.0.1"

#: What launchers tell their processes about ranks: torchrun, Slurm's srun, MPI's, LSF's. What says which job this is,
#: and what it may use (SLURM_JOB_ID, SLURM_RESTART_COUNT, SLURM_CPUS_PER_TASK, ...), stays.
_RANKS = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|NODE_RANK|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_RANK|ROLE_WORLD_SIZE|ROLE_NAME"
    r"|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_.*|PET_.*"
    r"|SLURM_(PROCID|LOCALID|NODEID|GTIDS|TASK_PID|NTASKS|NPROCS|NTASKS_PER_.*|TASKS_PER_NODE|STEP_.*|STEPID|STEPMGR)"
    r"|SLURM_(SRUN_.*|LAUNCH_.*|DISTRIBUTION|CPU_BIND.*|MPI_TYPE|PMI.*|UMASK)"
    r"|PMI_.*|PMI2?_(RANK|SIZE|FD|PORT)|PMIX_.*|OMPI_COMM_WORLD_.*|OMPI_UNIVERSE_SIZE|MV2_COMM_WORLD_.*|MPI_LOCAL.*"
    r"|HYDRA_.*|PALS_.*|JSM_.*|FLUX_TASK_.*"
)


def threads_each(processes: int) -> int:
    """Threads of each of some processes that share the cores that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def _without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without the variables by which a launcher told this process its own rank."""
    return {name: value for name, value in environment.items() if not _RANKS.fullmatch(name)}


def hide_launchers(environment: MutableMapping[str, str] | None = None) -> None:
    """Remove from an environment, by default this process's, the variables by which a launcher states a rank."""
    environment = os.environ if environment is None else environment
    for name in set(environment) - set(_without_ranks(environment)):
        del environment[name]


def local_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment of processes that all run on this machine: without a launcher's ranks, and connected over loopback.

    So the host's name need not resolve. An interface that the user named for gloo or NCCL stays.
    """
    variables = {**_without_ranks(environment), "MASTER_ADDR": LOOPBACK, "PET_LOCAL_ADDR": LOOPBACK}
    if Path("/sys/class/net/lo").exists():
        variables.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return variables


def ordered_kernels(config: StageConfig) -> bool:
    """Whether Megatron demands :data:`ORDERED_KERNELS` of a stage: for tensor, sequence or context parallelism."""
    entries = [entry for value in vars(config).values() if isinstance(value, list) for entry in value]
    groups = [config, *(entry for entry in entries if dataclasses.is_dataclass(entry))]
    layouts = [value for group in groups for value in vars(group).values() if isinstance(value, ParallelLayout)]
    return any(layout.tensor > 1 or layout.context > 1 for layout in layouts)


def order_kernels(config: StageConfig) -> None:
    """Set :data:`ORDERED_KERNELS` for this process, before CUDA is started; a value that the user set stays."""
    if ordered_kernels(config):
        os.environ.setdefault(*ORDERED_KERNELS)
