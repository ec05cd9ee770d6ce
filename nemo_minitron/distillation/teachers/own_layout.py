"""A teacher whose layout is not the student's, on the student's own ranks.

Every process is a rank of both models. The teacher's groups are a second set of Megatron's
(:class:`~nemo_minitron.runtime.groups.SecondLayout`), so its tensor, pipeline and data parallelism are free. All
micro-batches of a step, of all the student's replicas, are divided among the teacher's data-parallel replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from nemo_minitron.checkpoints.live import output_weight
from nemo_minitron.distillation.losses.fused_head import OutputHead
from nemo_minitron.distillation.teachers.documents import model_inputs
from nemo_minitron.distillation.teachers.frozen import Teacher
from nemo_minitron.distillation.teachers.placement import Transfer, deliver, packed_requests
from nemo_minitron.runtime.groups import Groups, ParallelLayout, SecondLayout

if TYPE_CHECKING:
    from nemo_minitron.checkpoints.base import Checkpoint
    from nemo_minitron.distillation.losses.state_hooks import TeacherStates

__all__ = ["OutputLayer", "OwnLayoutTeacher", "run_replica"]


class OutputLayer:
    """On the student's last stage, turns the delivered tensors into logits of the student's columns.

    Memory: if hidden states are delivered, the teacher's output layer ``[V/tp, H]``; under sequence parallelism, while
    it is applied, one ``[s, b, H]``.
    """

    def __init__(self, checkpoint: Checkpoint, transfer: Transfer, groups: Groups, dtype: torch.dtype) -> None:
        self.groups = groups
        self._weight: torch.Tensor | None = None
        if transfer.hidden and groups.is_last_stage:
            weight = output_weight(checkpoint, groups, vocab_size=transfer.student_rows)
            self._weight = weight.to(groups.device.torch, dtype)

    @torch.no_grad()
    def logits(self, kept: torch.Tensor) -> torch.Tensor:
        """``[s (/tp), b, H]`` hidden states, or logits as they are -> ``[s, b, V/tp]``."""
        if self._weight is None:
            return kept
        if self.groups.layout.sequence_parallel:
            whole = [torch.empty_like(kept) for _ in range(self.groups.layout.tensor)]
            dist.all_gather(whole, kept.contiguous(), group=self.groups.tp)
            kept = torch.cat(whole)
        return kept @ self._weight.T

    def head(self, kept: torch.Tensor) -> OutputHead | None:
        """Hidden states with the output layer; None where logits are delivered."""
        if self._weight is None:
            return None
        return OutputHead(kept, self._weight, self.groups.layout.sequence_parallel)


def run_replica(teacher: Teacher, transfer: Transfer, requests: torch.Tensor, first: int) -> dict[int, torch.Tensor]:
    """Run the micro-batches of a replica of the teacher.

    Args:
        teacher: this rank's part.
        transfer: says whether logits are wanted.
        requests: ``[m, 2, b, s]``.
        first: number of the first micro-batch.

    Returns:
        On the teacher's last stage, by number, the ``results`` of
        :func:`~nemo_minitron.distillation.teachers.placement.deliver`.
    """
    if not len(requests):
        return {}
    kept = teacher.run([model_inputs(tokens, starts) for tokens, starts in requests])
    if not transfer.hidden:
        kept = [teacher.logits(hidden) for hidden in kept]
    return {first + index: logits for index, logits in enumerate(kept)}


class _World:
    """Messages between the processes of one world."""

    def exchange(self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]) -> None:
        """See :class:`~nemo_minitron.distillation.teachers.placement.Link`."""
        messages = [dist.P2POp(dist.isend, tensor, rank) for tensor, rank in sends]
        messages += [dist.P2POp(dist.irecv, tensor, rank) for tensor, rank in receives]
        for work in dist.batch_isend_irecv(messages) if messages else []:
            work.wait()


class OwnLayoutTeacher:
    """The teacher in its own layout on the student's ranks.

    Memory: this rank's part of the teacher in its layout; on the student's last stage see :class:`OutputLayer`, and for
    each micro-batch of a step what is delivered. Communication a step: the requests (8 bytes a token) gathered over the
    student's data-parallel group, the teacher's own, and the delivery.

    Args:
        checkpoint: the teacher.
        groups: the student's.
        layout: the teacher's.
        dtype: of its weights and activations.
        student_rows: the student's vocabulary, where it is not as large as the teacher's.

    Raises:
        ShapeError: if the layout cannot split it.
        CheckpointError: if the checkpoint cannot be read.
        ConfigError: if the layout does not fill the world.
    """

    states: TeacherStates | None = None

    def __init__(
        self,
        checkpoint: Checkpoint,
        groups: Groups,
        layout: ParallelLayout,
        dtype: torch.dtype,
        *,
        student_rows: int | None = None,
    ) -> None:
        self.groups = groups
        self.transfer = Transfer(checkpoint.shape, groups.layout, layout, student_rows)
        self._second = SecondLayout(layout)
        with self._second.active() as own:
            self._teacher = Teacher.load(checkpoint, own, dtype=dtype)
        if self.transfer.hidden:
            self._teacher.drop_output_layer()
        self._output = OutputLayer(checkpoint, self.transfer, groups, dtype)
        self._like = torch.empty(0, dtype=dtype, device=next(self._teacher.chunks[0].parameters()).device)

    def run(self, batches: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        """See :class:`~nemo_minitron.distillation.teachers.frozen.TeacherSource`; called on every rank."""
        micro_batch_size, sequence = batches[0]["tokens"].shape
        own_requests = packed_requests(batches, self._like.device)
        everyone = [torch.empty_like(own_requests) for _ in range(self.groups.layout.data)]
        dist.all_gather(everyone, own_requests, group=self.groups.dp)
        requests = torch.cat(everyone)
        with self._second.active() as own:
            numbers = self.transfer.replica(own.dp_rank, len(requests))
            results = run_replica(self._teacher, self.transfer, requests[numbers.start : numbers.stop], numbers.start)
        return deliver(
            self.transfer,
            _World(),
            results,
            teacher_rank=dist.get_rank(),
            student_rank=dist.get_rank(),
            micro_batches=len(batches),
            micro_batch_size=micro_batch_size,
            sequence=sequence,
            like=self._like,
        )

    def logits(self, kept: torch.Tensor) -> torch.Tensor:
        """``[s, b, V/tp]`` in the student's layout."""
        return self._output.logits(kept)

    def head(self, kept: torch.Tensor) -> OutputHead | None:
        """See :class:`~nemo_minitron.distillation.teachers.frozen.TeacherSource`."""
        return self._output.head(kept)

    def close(self) -> None:
        """Nothing to close."""
