"""Checks before jobs are submitted, for faults that would show only hours later, in the queue or on a node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.config import SlurmConfig, StageConfig
from nemo_minitron.config.paths import paths_of
from nemo_minitron.jobs.dry_run import plan_faults

__all__ = ["input_faults", "mount_faults"]


def mount_faults(configs: Sequence[StageConfig], slurm: SlurmConfig) -> list[str]:
    """Paths of the stages, all absolute, that are not visible in the jobs' container under the same name.

    The directory of the jobs' scripts and logs does not count: nemo_run mounts it by itself.
    """
    needed: dict[str, str] = {}
    for config in configs:
        for setting, path in paths_of(config).items():
            # An output is written beside its place, where its logs lie too.
            folder = str(Path(path).parent) if setting == "output" else path
            needed.setdefault(folder, f"stage {config.name}: {setting}={path}")
    faults = {path: fault for path in needed if (fault := slurm.mount_fault(path)) is not None}
    # Of those that lie in one another the outermost says it all.
    outer = [path for path in faults if not any(Path(path) != Path(o) and Path(path).is_relative_to(o) for o in faults)]
    mounts = ", ".join(slurm.container_mounts) or "none"
    return [
        f"{needed[path]}: {path} {faults[path]} in the container (container_mounts: {mounts}); add {path}:{path}, or a "
        "mount that holds it under the same path"
        for path in outer
    ]


def input_faults(configs: Sequence[StageConfig], submitted: Sequence[StageConfig]) -> list[str]:
    """Missing inputs and other faults of the stages' plans, as ``--dry-run`` without a cluster finds them.

    Args:
        configs: of all stages, in order; outputs of earlier stages count as existing.
        submitted: the stages to check.
    """
    names = {config.name for config in submitted}
    return [fault for name, fault in plan_faults(configs) if name in names]
