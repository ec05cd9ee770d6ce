"""The process, and the parallel layout of a model over several processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from nemo_minitron.config.parts.checks import AUTO, DTYPES, choice, not_negative, positive
from nemo_minitron.config.parts.sizes import parse_bytes

__all__ = ["MEMORY", "ParallelLayout", "RuntimeConfig", "memory_faults", "states_faults"]


@dataclass(frozen=True)
class ParallelLayout:
    """Parallel layout of a model. ``tensor * pipeline * data * context`` processes are started.

    Algorithms take this class, too.

    Attributes:
        tensor: ranks that share each layer (Megatron's tensor_model_parallel_size).
        pipeline: pipeline stages, each with a part of the layers (Megatron's pipeline_model_parallel_size).
        data: data-parallel replicas.
        virtual_pipeline: virtual stages on each pipeline rank (Megatron's virtual_pipeline_model_parallel_size); null
            for none.
        sequence_parallel: shard the activations between tensor-parallel regions along the sequence.
        context: ranks that each have a part of every sequence, attention included (Megatron's context_parallel_size).
        expert: data-parallel replicas that share the experts of a mixture, each with some of them (Megatron's
            expert_model_parallel_size); it divides ``data``, and starts no further processes.
    """

    #: Settings that a later release added; see ``StageConfig.ADDED``.
    ADDED: ClassVar[tuple[str, ...]] = ("expert",)

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    virtual_pipeline: int | None = None
    sequence_parallel: bool = False
    context: int = 1
    expert: int = 1

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def pipeline_stages(self) -> int:
        """Number of pipeline stages, virtual stages included."""
        return self.pipeline * (self.virtual_pipeline or 1)

    def rank(self, *, tensor: int, data: int, pipeline: int, context: int = 0) -> int:
        """Global rank from the ranks in each group, in Megatron's order (``tp-cp-ep-dp-pp``)."""
        return tensor + self.tensor * (context + self.context * (data + self.data * pipeline))

    def sequence_faults(self, length: int) -> list[str]:
        """Why sequences of ``data.sequence_length`` cannot be sharded over tensor- and context-parallel ranks."""
        if positive(self, "tensor", "context"):
            return []  # a fault of its own
        if self.context > 1:
            # a context-parallel rank has two runs of tokens (runtime.context)
            step = 2 * self.context * (self.tensor if self.sequence_parallel else 1)
            tensor = f" and parallel.tensor={self.tensor}" if self.sequence_parallel else ""
            if length % step == 0:
                return []
            return [
                f"data.sequence_length={length}: cannot be split over parallel.context={self.context}{tensor}; set a "
                f"multiple of {step}, or parallel.context=1"
            ]
        if not self.sequence_parallel or length % self.tensor == 0:
            return []
        return [
            f"data.sequence_length={length}: cannot be split over parallel.tensor={self.tensor}; set a multiple of it, "
            "or parallel.sequence_parallel=false"
        ]

    def faults(self) -> list[str]:
        """Sizes below 1 and options that need a size above 1."""
        faults = positive(self, "tensor", "pipeline", "data", "virtual_pipeline", "context", "expert")
        if not faults and self.data % self.expert:
            faults.append(
                f"expert={self.expert}: the experts are shared out over data-parallel replicas; set parallel.data="
                f"{self.data} to a multiple of it"
            )
        if not faults and self.expert > 1 and self.context > 1:
            faults.append(f"expert={self.expert}: is not offered with parallel.context={self.context}; set one to 1")
        if not faults and self.expert > 1 and self.tensor > 1 and not self.sequence_parallel:
            faults.append(
                f"expert={self.expert}: beside tensor parallelism Megatron shares experts out only with sequence "
                "parallelism; set parallel.sequence_parallel=true, or parallel.tensor=1"
            )
        if not faults and self.virtual_pipeline is not None and self.pipeline == 1:
            faults.append(f"virtual_pipeline={self.virtual_pipeline}: needs parallel.pipeline above 1; set it to null")
        if not faults and self.sequence_parallel and self.tensor == 1:
            faults.append("sequence_parallel=true: needs parallel.tensor above 1; set it to false")
        return faults


@dataclass
class RuntimeConfig:
    """The process itself.

    Attributes:
        device: "auto" takes CUDA where there is any and otherwise the CPU; "cpu" and "cuda" allow no other device.
        seed: seed of every random generator.
        threads: torch threads of one process; null shares the machine's cores among the processes.
        timeout_minutes: a stage that runs longer is stopped; null for no limit.
        collective_timeout_minutes: a rank that waits longer for the others stops with an error.
        dtype: type of weights and activations in scoring and evaluation, "float32", "bfloat16", or "auto": bfloat16
            where the machine computes faster in it, as measured at the start, else float32.
    """

    device: str = "auto"
    seed: int = 1234
    threads: int | None = None
    timeout_minutes: float | None = None
    collective_timeout_minutes: float = 10.0
    dtype: str = "float32"

    def faults(self) -> list[str]:
        """Unknown choices and limits that leave nothing."""
        return [
            *choice(self, "device", ("auto", "cpu", "cuda")),
            *choice(self, "dtype", DTYPES, also=(AUTO,)),
            *not_negative(self, "seed"),
            *positive(self, "threads", "timeout_minutes", "collective_timeout_minutes"),
        ]


MEMORY = ("auto", "live", "streamed")
"""Values of a stage's ``memory``: "live" loads the whole model; "streamed" runs all samples through one layer after the
other, with one layer's weights in memory; "auto" streams a model that does not fit into free memory."""


def memory_faults(config: Any) -> list[str]:
    """What is wrong with the settings ``memory`` and ``states_memory`` of a stage."""
    return [*choice(config, "memory", MEMORY), *states_faults(config)]


def states_faults(config: Any) -> list[str]:
    """What is wrong with the setting ``states_memory`` of a stage."""
    try:
        parse_bytes(config.states_memory)
    except ValueError as error:
        return [f"states_memory={config.states_memory}: {error}"]
    return []
