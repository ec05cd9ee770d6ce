"""What is looked at before jobs are submitted: faults that would show only hours later, in the queue or on a node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.config import ClusterConfig, SlurmConfig, StageConfig
from nemo_minitron.config.paths import paths_of, read_paths
from nemo_minitron.config.slurm import seconds_of
from nemo_minitron.errors import MinitronError
from nemo_minitron.stages.base import PlannedPath
from nemo_minitron.stages.plan import plan_faults

__all__ = ["depends_on", "input_faults", "mount_faults", "time_warnings"]


def depends_on(config: StageConfig, other: StageConfig) -> bool:
    """Whether a stage reads what another writes."""
    return any(PlannedPath(path, "").comes_from({other.output}) for path in read_paths(config).values())


def mount_faults(configs: Sequence[StageConfig], slurm: SlurmConfig) -> list[str]:
    """Paths of the stages, all absolute, that the jobs' container does not show under the same name.

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
        configs: of all stages, in order; what an earlier one writes counts as there.
        submitted: those that are looked at.
    """
    names = {config.name for config in submitted}
    return [fault for name, fault in plan_faults(configs) if name in names]


def time_warnings(configs: Sequence[StageConfig], submitted: Sequence[StageConfig], slurm: SlurmConfig) -> list[str]:
    """Trainings whose time limit, times the runs that ``retries`` allow, is below the estimate of ``minitron plan``.

    Args:
        configs: of all stages, in order.
        submitted: those that are looked at.
        slurm: where they run.
    """
    from nemo_minitron.planning import layout_cost, layout_faults
    from nemo_minitron.stages.costs import Subject, trainings_of

    if not slurm.gpus_per_node:
        return []
    cluster = ClusterConfig(gpu=slurm.gpu, gpus_per_node=slurm.gpus_per_node)
    found = []
    for number, config in enumerate(configs):
        if config not in submitted or not config.needs_gpu:
            continue
        try:
            # The stages before say how large its models will be; where that is not known, nothing is.
            trainings, _ = trainings_of(Subject("", list(configs[: number + 1])))
        except MinitronError:
            continue
        training = next((one for one in trainings if one.name == config.name), None)
        if training is None or layout_faults(training, training.layout):
            continue
        estimate = layout_cost(training, training.layout, training.recompute, cluster).step_seconds * training.steps
        request = slurm.request(config)
        runs = slurm.retries + 1
        if (limit := seconds_of(request.time) * runs) < estimate:
            found.append(
                f"stage {config.name}: is estimated to take {estimate / 3600:,.1f} hours on {slurm.gpu}, and {runs} "
                f"runs of {request.time} (time, retries) are {limit / 3600:,.1f}; raise time, stage_time or retries"
            )
    return found
