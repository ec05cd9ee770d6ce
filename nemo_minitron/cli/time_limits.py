"""Compare time limits of Slurm jobs with the estimates of ``minitron plan``."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_minitron.cli.plan import Subject, trainings_of
from nemo_minitron.config import ClusterConfig, SlurmConfig, StageConfig
from nemo_minitron.config.slurm import seconds_of
from nemo_minitron.errors import MinitronError
from nemo_minitron.planning import layout_cost, layout_faults

__all__ = ["time_warnings"]


def time_warnings(configs: Sequence[StageConfig], submitted: Sequence[StageConfig], slurm: SlurmConfig) -> list[str]:
    """Trainings whose time limit, times the runs that ``retries`` allow, is below the estimate of ``minitron plan``.

    Args:
        configs: of all stages, in order.
        submitted: the stages to check.
        slurm: the cluster.
    """
    if not slurm.gpus_per_node:
        return []
    cluster = ClusterConfig(gpu=slurm.gpu, gpus_per_node=slurm.gpus_per_node)
    warnings = []
    for number, config in enumerate(configs):
        if config not in submitted or not config.needs_gpu:
            continue
        try:
            # The stages before say how large its models will be; where that is not known, nothing is.
            trainings, _ = trainings_of(Subject("", list(configs[: number + 1])))
        except MinitronError:
            continue
        training = next((candidate for candidate in trainings if candidate.name == config.name), None)
        if training is None or layout_faults(training, training.layout):
            continue
        estimate = layout_cost(training, training.layout, training.recompute, cluster).step_seconds * training.steps
        request = slurm.request(config)
        runs = slurm.retries + 1
        if (limit := seconds_of(request.time) * runs) < estimate:
            warnings.append(
                f"stage {config.name}: is estimated to take {estimate / 3600:,.1f} hours on {slurm.gpu}, and {runs} "
                f"runs of {request.time} (time, retries) are {limit / 3600:,.1f}; raise time, stage_time or retries"
            )
    return warnings
