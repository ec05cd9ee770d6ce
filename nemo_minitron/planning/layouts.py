"""The costs of a training under a layout, and the best layout of a cluster.

Time of a step is what its parts take one after the other: arithmetic at ``mfu`` of the peak on the slowest pipeline
stage, the pipeline's bubble, and all traffic at the full rate of the wire, none of it hidden behind arithmetic. So it
is an upper bound of its kind, made to order layouts and not to predict minutes: kernels' own overheads are in ``mfu``.

Traffic of a rank, with ``n = b s H`` numbers of a micro-batch's hidden state (Korthikanti et al., arXiv 2205.05198):

- tensor parallel: a layer all-reduces ``n`` twice forward and twice backward, an all-reduce being ``2 (t-1)/t n`` sent
  (under sequence parallelism as an all-gather and a reduce-scatter of half each, and two more all-gathers backward, of
  the inputs that the weights' gradients need); once more for the embedding and once for the output layer's input.
  Recomputed layers repeat their forward traffic; a teacher has only forward traffic.
- context parallel: keys and values, ``2 b s G d / t`` numbers a layer, go around the ring once forward, and twice
  backward (again, and their gradients); a rank sends ``(c-1)/c`` of them each time. All else is of its ``s/c`` tokens.
- pipeline parallel: ``n`` (``n/t`` under sequence parallelism) to the next stage and back, for each model chunk.
- data parallel: the distributed optimizer reduce-scatters fp32 gradients and all-gathers weights, once a step, over the
  data- and context-parallel ranks together.

The bubble is ``(p - 1) / (m v)`` of the time that ``m`` micro-batches take over ``v`` chunks (Narayanan et al.,
arXiv 2104.04473, section 2.2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from nemo_minitron.config.parts import ClusterConfig, ParallelLayout
from nemo_minitron.planning.cluster import accelerator
from nemo_minitron.planning.counts import layers_of_ranks
from nemo_minitron.planning.memory import MemoryCost, MemoryUse, Workload
from nemo_minitron.planning.model import Model
from nemo_minitron.planning.training import ForwardFlops, Training, layer_flops
from nemo_minitron.shape import ModelShape

__all__ = ["LayoutCost", "best_layout", "layout_cost", "layout_costs", "layout_faults"]


@dataclass(frozen=True)
class LayoutCost:
    """A training under a layout, on a cluster.

    Attributes:
        layout: parallel sizes.
        recompute: what the backward pass computes again.
        ranks: memory of one rank of each pipeline stage.
        fits: the fullest rank stays within the memory that a plan may fill.
        sent: bytes that the busiest rank sends in a step, by group.
        seconds: of a step, by part: "arithmetic", "bubble", "tensor", "context", "pipeline",
            "data".
        gpu_hours: of the whole training.
        mfu: model FLOPs of the training over the peak of all GPUs for that time.
    """

    layout: ParallelLayout
    recompute: str
    ranks: list[MemoryUse]
    fits: bool
    sent: dict[str, float]
    seconds: dict[str, float]
    gpu_hours: float
    mfu: float

    @property
    def fullest(self) -> MemoryUse:
        """Memory of the fullest rank."""
        return max(self.ranks, key=lambda rank: rank.total)

    @property
    def step_seconds(self) -> float:
        """Of a step."""
        return sum(self.seconds.values())

    @property
    def bubble(self) -> float:
        """Idle share of a step's arithmetic time."""
        return self.seconds["bubble"] / (self.seconds["bubble"] + self.seconds["arithmetic"])


def layout_faults(training: Training, layout: ParallelLayout) -> list[str]:
    """Why a training cannot run under a layout; empty if it can."""
    problems = []
    for who, model in (("student", training.student), ("teacher", training.teacher)):
        if model is not None:
            faults = model.shape.layout_faults(
                tensor=layout.tensor, pipeline=layout.pipeline_stages, expert=layout.expert
            )
            problems += [f"{who}: {fault}" for fault in faults]
    one_pass = training.micro_batch_size * layout.data
    if training.global_batch_size % one_pass:
        problems.append(
            f"global_batch_size={training.global_batch_size}: is not a multiple of micro_batch_size * parallel.data = "
            f"{one_pass}"
        )
    elif layout.virtual_pipeline and training.global_batch_size // one_pass % layout.pipeline:
        problems.append(
            f"global_batch_size={training.global_batch_size}: makes {training.global_batch_size // one_pass} "
            f"micro-batches a rank; virtual pipeline stages need a multiple of parallel.pipeline={layout.pipeline}"
        )
    return problems + layout.sequence_faults(training.sequence_length)


def layout_cost(training: Training, layout: ParallelLayout, recompute: str, cluster: ClusterConfig) -> LayoutCost:
    """The costs of a training under a layout in which :func:`layout_faults` finds no faults."""
    gpu, per_node = accelerator(cluster), cluster.gpus_per_node
    micro_batches = training.global_batch_size // (training.micro_batch_size * layout.data)
    ranks = _memory(training, layout, recompute, micro_batches)

    # TF32 has half of bf16's rate.
    rate = gpu.flops * cluster.mfu * (1.0 if training.bytes == 2 else 0.5)
    busy = micro_batches * _stage_flops(training, layout, recompute) / rate
    weights = max(rank.weights for rank in ranks) / training.bytes
    replicas = layout.data * layout.context
    sent = {
        "tensor": micro_batches * _tensor_bytes(training, layout, recompute),
        "context": micro_batches * _context_bytes(training, layout, recompute),
        "pipeline": micro_batches * _pipeline_bytes(training, layout),
        "data": weights * (4 + training.bytes) * (replicas - 1) / replicas,
    }
    seconds = {
        "arithmetic": busy,
        "bubble": busy * (layout.pipeline - 1) / (micro_batches * (layout.virtual_pipeline or 1)),
        "tensor": sent["tensor"] / gpu.tensor_bandwidth(layout, per_node),
        "context": sent["context"] / gpu.context_bandwidth(layout, per_node),
        "pipeline": sent["pipeline"] / gpu.pipeline_bandwidth(layout, per_node),
        "data": sent["data"] / gpu.data_bandwidth(layout, per_node),
    }
    step = sum(seconds.values())
    return LayoutCost(
        layout=layout,
        recompute=recompute,
        ranks=ranks,
        fits=max(rank.total for rank in ranks) <= cluster.usable * gpu.memory,
        sent=sent,
        seconds=seconds,
        gpu_hours=step * training.steps * layout.world_size / 3600,
        mfu=training.flops_per_step / (step * layout.world_size * gpu.flops),
    )


def layout_costs(training: Training, cluster: ClusterConfig) -> list[LayoutCost]:
    """Every layout of a cluster's GPUs that can run a training, by time of a step.

    Tensor parallelism stays within a node; sequence parallelism comes with it. Each layout is there once, with the
    least recomputation that makes it fit, or with all if none does. The layout that the training asks for, if it has
    as many processes, is there as it asks for it, too.
    """
    own = training.layout
    gpus = cluster.gpus or own.world_size
    layouts: list[LayoutCost] = []
    if own.world_size == gpus and not layout_faults(training, own):
        layouts.append(layout_cost(training, own, training.recompute, cluster))
    for layout in _candidates(gpus, cluster.gpus_per_node):
        if layout_faults(training, layout) or (layout == own and layouts and layouts[0].fits):
            continue
        # Selective recomputation saves nothing where the kernels of the attention are fused.
        costs = [layout_cost(training, layout, recompute, cluster) for recompute in ("none", "full")]
        chosen = next((cost for cost in costs if cost.fits), costs[-1])
        if chosen not in layouts:
            layouts.append(chosen)
    return sorted(layouts, key=_order)


def best_layout(costs: list[LayoutCost]) -> LayoutCost | None:
    """The layout that fits and takes the least time; None if no layout fits.

    Of equally fast layouts it is the one with the fewest tensor-parallel, and then pipeline ranks.
    """
    return min((cost for cost in costs if cost.fits), key=_order, default=None)


def _order(cost: LayoutCost) -> tuple[float, int, int]:
    return cost.step_seconds, cost.layout.tensor, cost.layout.pipeline


def _candidates(gpus: int, per_node: int) -> Iterator[ParallelLayout]:
    for tensor in (size for size in range(1, min(gpus, per_node) + 1) if gpus % size == 0 and per_node % size == 0):
        rest = gpus // tensor
        for pipeline in (size for size in range(1, rest + 1) if rest % size == 0):
            yield ParallelLayout(tensor, pipeline, rest // pipeline, sequence_parallel=tensor > 1)


def _memory(training: Training, layout: ParallelLayout, recompute: str, micro_batches: int) -> list[MemoryUse]:
    work = Workload.on(
        layout,
        training=True,
        batch_size=training.micro_batch_size,
        sequence_length=training.sequence_length,
        bytes=training.bytes,
        recompute=recompute,
        micro_batches=micro_batches,
        chunked=training.chunked,
    )
    return MemoryCost.of(training.student, work, training.teacher).ranks(training.student.shape)


def _layers(model: Model, layout: ParallelLayout) -> list[Counter[ModelShape]]:
    return layers_of_ranks(model.shape, pipeline=layout.pipeline, virtual_pipeline=layout.virtual_pipeline)


def _stage_flops(training: Training, layout: ParallelLayout, recompute: str) -> float:
    """Operations of the busiest rank for a micro-batch, recomputed ones included."""
    tokens = training.micro_batch_size * training.sequence_length / layout.context
    stages = [0.0] * layout.pipeline
    for model, passes in ((training.student, 3), (training.teacher, 1)):
        if model is None:
            continue
        for stage, layers in enumerate(_layers(model, layout)):
            for sizes, count in layers.items():
                matrices, core = layer_flops(model, sizes, training.sequence_length)
                layer = passes * (matrices + core)
                if model is training.student:
                    layer += {"none": 0.0, "selective": core, "full": matrices + core}[recompute]
                stages[stage] += count * layer
        stages[-1] += passes * ForwardFlops.of(model, training.sequence_length).output
    return max(stages) * tokens / layout.tensor


def _tensor_bytes(training: Training, layout: ParallelLayout, recompute: str) -> float:
    """Sent by the busiest rank to its tensor-parallel group for a micro-batch."""
    if layout.tensor == 1:
        return 0.0
    tokens = training.micro_batch_size * training.sequence_length / layout.context
    reduce = 2 * (layout.tensor - 1) / layout.tensor * tokens * training.bytes
    stages = [0.0] * layout.pipeline
    for model in (training.student, training.teacher):
        if model is None:
            continue
        trained = model is training.student
        layer = 2.0
        if trained:
            # 2 further all-gathers, each worth half an all-reduce, under sequence parallelism
            layer += 2.0 + (1.0 if layout.sequence_parallel else 0.0) + (2.0 if recompute == "full" else 0.0)
        hidden = model.shape.hidden_size * reduce
        for stage, layers in enumerate(_layers(model, layout)):
            for sizes, count in layers.items():
                parts = (sizes.num_query_groups > 0) + (sizes.ffn_hidden_size > 0)
                stages[stage] += count * layer * parts / 2 * hidden
        stages[0] += hidden
        stages[-1] += hidden if trained else 0.0
    return max(stages)


def _context_bytes(training: Training, layout: ParallelLayout, recompute: str) -> float:
    """Sent by the busiest rank to its context-parallel group for a micro-batch."""
    tokens = training.micro_batch_size * training.sequence_length
    around = (layout.context - 1) / layout.context * tokens * training.bytes / layout.tensor
    stages = [0.0] * layout.pipeline
    for model, passes in ((training.student, 3 + (recompute != "none")), (training.teacher, 1)):
        if model is None:
            continue
        for stage, layers in enumerate(_layers(model, layout)):
            for sizes, count in layers.items():
                stages[stage] += count * (2 * sizes.num_query_groups * sizes.head_dim * passes * around)
    return max(stages)


def _pipeline_bytes(training: Training, layout: ParallelLayout) -> float:
    """Sent by a rank to other stages for a micro-batch."""
    if layout.pipeline == 1:
        return 0.0
    split = layout.tensor if layout.sequence_parallel else 1
    tokens = training.micro_batch_size * training.sequence_length / layout.context / split
    there = training.student.shape.hidden_size * 2
    if training.teacher is not None:
        there += training.teacher.shape.hidden_size
    return (layout.virtual_pipeline or 1) * tokens * there * training.bytes
