"""Where a distillation runs: layout, micro-batch, recomputation and time of a step.

On GPUs these are what the planner finds fastest (:mod:`nemo_minitron.planning.layouts`), over all micro-batches that
divide the batch; with whole logits if any layout holds them, else in chunks. Processors run one process, whose
micro-batch is what its memory holds, up to the few sequences beyond which a processor gains nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from nemo_minitron.config import LOGITS, ClusterConfig, ParallelLayout
from nemo_minitron.errors import ConfigError
from nemo_minitron.planning import MemoryCost, Model, Training, Workload, best_layout, layout_costs
from nemo_minitron.proposal.machine import CORE_FLOPS, Machine

__all__ = ["Placed", "fitting_micro_batch", "place", "step_seconds"]

#: Share of a host's free memory that a training on processors may take; the rest is for Python, NeMo and buffers.
HOST_SHARE = 0.6
#: Tokens of a micro-batch beyond which a processor gains nothing.
HOST_TOKENS = 1024
#: Seconds that a layer's kernels take to start on a processor, however small they are, forward and backward.
_LAYER_SECONDS = 0.002


@dataclass(frozen=True)
class Placed:
    """A training on its machine.

    Attributes:
        layout: parallel sizes.
        micro_batch_size: sequences of a pass.
        recompute: of the backward pass.
        logits: "whole", or "chunks" where whole logits fit in no layout.
        seconds: of a step.
        memory: bytes of the fullest rank.
        considered: number of layouts that were compared.
    """

    layout: ParallelLayout
    micro_batch_size: int
    recompute: str
    seconds: float
    memory: float
    considered: int = 1
    logits: str = "whole"


def place(training: Training, machine: Machine) -> Placed:
    """The fastest way to run a training on a machine.

    Args:
        training: its micro-batch and layout are not used.
        machine: with GPUs or without.

    Raises:
        ConfigError: if its memory holds it in no way.
    """
    if machine.cluster is None:
        size = fitting_micro_batch(training, machine)
        return Placed(ParallelLayout(), size, "none", step_seconds(training, machine, size), _host(training, size))
    least = float("inf")
    for logits in LOGITS:
        chosen, leanest = _fastest(dataclasses.replace(training, chunked=logits == "chunks"), machine.cluster)
        if chosen is not None:
            return dataclasses.replace(chosen, logits=logits)
        least = min(least, leanest)
    need = f"the leanest layout needs {least / 2**30:.0f} GiB a GPU" if least < float("inf") else "no layout divides it"
    raise ConfigError(f"{machine.title}: holds no distillation of this model ({need}); give more GPUs or a larger kind")


def _fastest(training: Training, cluster: ClusterConfig) -> tuple[Placed | None, float]:
    """The fastest layout that fits, over all micro-batches; and the bytes of a GPU of the leanest."""
    chosen: Placed | None = None
    least = float("inf")
    free = dataclasses.replace(training, layout=ParallelLayout())
    for size in (n for n in _powers(free.global_batch_size) if free.global_batch_size % n == 0):
        costs = layout_costs(dataclasses.replace(free, micro_batch_size=size), cluster)
        least = min([least, *(cost.fullest.total for cost in costs)])
        best = best_layout(costs)
        if best is not None and (chosen is None or best.step_seconds < chosen.seconds):
            chosen = Placed(best.layout, size, best.recompute, best.step_seconds, best.fullest.total, len(costs))
    return chosen, least


def fitting_micro_batch(training: Training, machine: Machine) -> int:
    """The largest micro-batch that the memory of a host holds and a processor gains from.

    Raises:
        ConfigError: if it does not hold one sequence.
    """
    sizes = [
        size
        for size in _powers(training.global_batch_size)
        if training.global_batch_size % size == 0
        and (size == 1 or size * training.sequence_length <= HOST_TOKENS)
        and _host(training, size) <= HOST_SHARE * machine.memory
    ]
    if not sizes:
        raise ConfigError(
            f"{machine.title}: a training of {training.student.parameters / 1e9:.2f} B parameters needs "
            f"{_host(training, 1) / 2**30:.0f} GiB, and {HOST_SHARE * machine.memory / 2**30:.0f} GiB may be used "
            "here; plan for a cluster, with --cluster h100:8"
        )
    return max(sizes)


def step_seconds(training: Training, machine: Machine, micro_batch_size: int = 1) -> float:
    """Seconds of an optimizer step on the processors of a machine."""
    passes = training.global_batch_size / micro_batch_size
    layers = 3 * training.student.shape.num_layers
    layers += 0 if training.teacher is None else training.teacher.shape.num_layers
    # Adam reads and writes each weight and its state some ten times.
    update = 40 * training.student.parameters / 10e9
    return training.flops_per_step / (CORE_FLOPS * machine.cores) + passes * layers * _LAYER_SECONDS + update


def _host(training: Training, size: int) -> float:
    return _memory(training.student, training.teacher, size, training)


def _memory(student: Model, teacher: Model | None, size: int, training: Training) -> float:
    work = Workload(
        training=True,
        batch_size=size,
        sequence_length=training.sequence_length,
        bytes=4,
        fused=False,
        micro_batches=max(1, training.global_batch_size // size),
    )
    return MemoryCost.of(student, work, teacher)(student.shape)


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]
