"""A process that Slurm's ``srun`` started as one rank of several: told what torchrun would have told it."""

from __future__ import annotations

import os

__all__ = ["is_rank", "requeued", "translate"]

#: Slurm's variables that would make the libraries below see a cluster of their own.
_HIDDEN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE")


def is_rank() -> bool:
    """Whether ``srun`` alone says which rank this process is: several tasks in its step, and no launcher below it.

    A batch script and an interactive shell have the job's variables too, but are no step of several tasks.
    """
    return "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def requeued() -> bool:
    """Whether this job has run before: Slurm, or somebody, queued it again."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def translate() -> tuple[int, int]:
    """From Slurm's environment to torchrun's, which every stage reads: ``(rank, world)``.

    An address and a port that are set already (by a container's entry point, by nemo_run) stay.
    """
    from lightning.fabric.plugins.environments import SLURMEnvironment

    env = os.environ
    rank, world = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
    nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
    env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = str(rank), str(world), env["SLURM_LOCALID"]
    env["LOCAL_WORLD_SIZE"] = env["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0]
    env.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    # Jobs that share a node, and steps of a job that run at once, must not meet.
    step = int(env["SLURM_JOB_ID"]) + int(env.get("SLURM_STEP_ID", "0"))
    env.setdefault("MASTER_PORT", str(15000 + step % 20000))
    env["TORCHELASTIC_RUN_ID"] = env["SLURM_JOB_ID"]
    for name in _HIDDEN:
        env.pop(name, None)
    return rank, world
