"""Set torchrun's environment variables in a process that Slurm's ``srun`` started as one rank of several."""

from __future__ import annotations

import os

from nemo_minitron.runtime.environment import hide_launchers

__all__ = ["is_rank", "requeued", "translate"]


_RESTARTS = "SLURM_RESTART_COUNT"


def is_rank() -> bool:
    """Whether only ``srun`` states this process's rank: several tasks in its step, and no launcher below it.

    A batch script and an interactive shell have the job's variables too, but are no step of several tasks.
    """
    return "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def requeued() -> bool:
    """Whether this job has run before, and Slurm or a user queued it again."""
    return os.environ.get(_RESTARTS, "0") != "0"


def translate() -> tuple[int, int]:
    """From Slurm's environment to torchrun's, which every stage reads: ``(rank, world)``.

    An address and a port that are set already (by a container's entry point, by nemo_run) stay.
    """
    from lightning.fabric.plugins.environments import SLURMEnvironment

    env = os.environ
    rank, world = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
    nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
    # Jobs that share a node, steps of a job that run at once, and what is left of an earlier attempt must not meet.
    step = int(env["SLURM_JOB_ID"]) + int(env.get("SLURM_STEP_ID", "0")) + 997 * int(env.get(_RESTARTS, "0"))
    ranks = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": env["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0],
        "MASTER_ADDR": env.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes),
        "MASTER_PORT": env.get("MASTER_PORT") or str(15000 + step % 20000),
        "TORCHELASTIC_RUN_ID": env["SLURM_JOB_ID"],
    }
    if cpus := env.get("SLURM_CPUS_PER_TASK"):
        env.setdefault("OMP_NUM_THREADS", cpus)
    hide_launchers()  # the libraries below would see a cluster of their own
    env.update(ranks)
    return rank, world
