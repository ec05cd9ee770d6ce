"""Where the teacher runs, and how its results get to the student's ranks.

The results of a teacher in a layout of its own are on the last-stage ranks of its data-parallel replicas; the
last-stage ranks of the student's replicas need them. :class:`Transfer` lists which rank sends which part to which rank;
it is the same on every rank. :func:`deliver` sends them.

For each token, either the hidden state before the output layer or the logits are sent, whichever is smaller. Each of
the student's tensor-parallel ranks needs the whole hidden state (under sequence parallelism only that of its own
tokens; it gathers the others itself), but only its own columns of the logits. So hidden states cost ``H tp`` (or ``H``)
numbers per token, logits ``V``, and hidden states are sent if ``H tp <= V``. The student's last-stage ranks then hold
the teacher's output layer, split in the student's layout. Either way a rank gets the teacher's logits of the
columns that it holds of the student's, whatever the sizes of both vocabularies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from nemo_minitron.distillation.teachers.documents import starts_of_positions
from nemo_minitron.runtime.groups import ParallelLayout
from nemo_minitron.shape import ModelShape, padded_vocab

__all__ = ["Link", "Piece", "TeacherPlacement", "Transfer", "deliver", "packed_requests"]


@dataclass(frozen=True)
class TeacherPlacement:
    """Where the teacher's logits come from.

    Attributes:
        kind: "shared" (the student's ranks and layout), "own_layout" (the same ranks, another layout) or "own_ranks"
            (further ranks, in a layout of their own).
        layout: of the teacher, where it has its own; without virtual pipeline stages.
        cache: directory of a logit cache, which replaces the teacher.
        timeout_minutes: longest wait of the student's and the teacher's ranks for each other.
    """

    kind: str = "shared"
    layout: ParallelLayout | None = None
    cache: Path | None = None
    timeout_minutes: float = 60.0


class Piece(NamedTuple):
    """A range of tokens (of hidden states) or of columns (of logits) that one rank sends to another."""

    sender: int
    receiver: int
    start: int
    stop: int


@dataclass(frozen=True)
class Transfer:
    """Everything that the teacher's ranks send to the student's.

    Attributes:
        shape: of the teacher.
        student, teacher: layouts.
        student_rows: the student's vocabulary; None where it is as large as the teacher's.
    """

    shape: ModelShape
    student: ParallelLayout
    teacher: ParallelLayout
    student_rows: int | None = None

    @property
    def hidden(self) -> bool:
        """Whether hidden states are sent instead of logits."""
        copies = 1 if self.student.sequence_parallel else self.student.tensor
        return self.shape.hidden_size * copies <= self.shape.vocab_size

    @property
    def axis(self) -> int:
        """The dimension of ``[s, b, H]`` or ``[s, b, V/tp]`` along which it is split."""
        return 0 if self.hidden else 2

    @property
    def columns(self) -> int:
        """Columns of the student's logits on a rank, padding included."""
        rows = self.shape.vocab_size if self.student_rows is None else self.student_rows
        return padded_vocab(rows, tensor=self.student.tensor) // self.student.tensor

    def held(self, tensor_rank: int, sequence: int) -> tuple[int, int]:
        """Range ``(first, end)`` of the tokens, or columns without padding, that a rank of the teacher has."""
        columns = padded_vocab(self.shape.vocab_size, tensor=self.teacher.tensor) // self.teacher.tensor
        return self._range(self.teacher, tensor_rank, sequence, columns, self.shape.vocab_size)

    def needed(self, tensor_rank: int, sequence: int) -> tuple[int, int]:
        """Range ``(first, end)`` of the tokens, or columns that both models have, that a rank of the student needs."""
        rows = self.shape.vocab_size
        size = rows if self.student_rows is None else min(rows, self.student_rows)
        return self._range(self.student, tensor_rank, sequence, self.columns, size)

    def _range(
        self, layout: ParallelLayout, tensor_rank: int, sequence: int, columns: int, size: int
    ) -> tuple[int, int]:
        if not self.hidden:
            return min(tensor_rank * columns, size), min((tensor_rank + 1) * columns, size)
        if not layout.sequence_parallel:
            return 0, sequence
        run = sequence // layout.tensor
        return tensor_rank * run, (tensor_rank + 1) * run

    def pieces(self, sequence: int) -> list[Piece]:
        """The parts of one micro-batch; each receiver gets everything that it needs exactly once."""
        pieces = []
        for receiver in range(self.student.tensor):
            first, last = self.needed(receiver, sequence)
            whole = self.hidden and not self.teacher.sequence_parallel
            # Every sender has all of it: they take turns.
            senders = [receiver % self.teacher.tensor] if whole else range(self.teacher.tensor)
            for sender in senders:
                begin, end = self.held(sender, sequence)
                start, stop = max(first, begin), min(last, end)
                if start < stop:
                    pieces.append(Piece(sender, receiver, start, stop))
        return pieces

    def replica(self, number: int, count: int) -> range:
        """The micro-batches that a replica of the teacher runs.

        The micro-batches of a step are numbered, one student replica after the other; ``count`` is their number.
        """
        data = self.teacher.data
        return range(number * count // data, (number + 1) * count // data)

    def messages(self, micro_batches: int, sequence: int) -> Iterator[tuple[int, Piece, int, int]]:
        """``(micro-batch number, part, teacher rank, student rank)`` of a step, in the same order on every rank.

        Args:
            micro_batches: of one replica of the student.
            sequence: s.
        """
        pieces, count = self.pieces(sequence), micro_batches * self.student.data
        for replica in range(self.teacher.data):
            for number in self.replica(replica, count):
                for piece in pieces:
                    source = self.teacher.rank(tensor=piece.sender, data=replica, pipeline=self.teacher.pipeline - 1)
                    target = self.student.rank(
                        tensor=piece.receiver, data=number // micro_batches, pipeline=self.student.pipeline - 1
                    )
                    yield number, piece, source, target


class Link(Protocol):
    """Sends between the ranks of the teacher and those of the student."""

    def exchange(self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]) -> None:
        """Send tensors to ranks of the student and fill tensors from ranks of the teacher; messages of a pair keep
        their order.
        """
        ...


def deliver(
    transfer: Transfer,
    link: Link,
    results: Mapping[int, torch.Tensor],
    *,
    teacher_rank: int | None,
    student_rank: int | None,
    micro_batches: int,
    micro_batch_size: int,
    sequence: int,
    like: torch.Tensor,
) -> list[torch.Tensor]:
    """Bring a step's results to the student's last-stage ranks. Called on every rank of both.

    Args:
        transfer: which rank sends what to which.
        link: sends the messages.
        results: on the teacher's last-stage ranks by the micro-batch's number: ``[s (/tp), b, H]``, or
            ``[s, b, V/tp]``.
        teacher_rank, student_rank: this process's rank in each layout; None if it is not in that layout.
        micro_batches: of one replica of the student; micro_batch_size, sequence: b and s.
        like: a tensor of the results' dtype and device.

    Returns:
        Of the micro-batches of this rank's replica of the student in order, ``[s (/tp), b, H]`` or
        ``[s, b, V/tp]`` in its layout; empty elsewhere than on its last stage.
    """
    received = _buffers(transfer, student_rank, micro_batches, micro_batch_size, sequence, like)
    sends, receives, landed = [], [], []
    for number, piece, source, target in transfer.messages(micro_batches, sequence):
        length = piece.stop - piece.start
        part = None
        if source == teacher_rank:
            own, _ = transfer.held(piece.sender, sequence)
            part = results[number].narrow(transfer.axis, piece.start - own, length)
        if target == student_rank:
            first, _ = transfer.needed(piece.receiver, sequence)
            place = received[number].narrow(transfer.axis, piece.start - first, length)
            if part is not None:
                place.copy_(part)
                continue
            buffer = place if place.is_contiguous() else torch.empty_like(place, memory_format=torch.contiguous_format)
            receives.append((buffer, source))
            landed.append((place, buffer))
        elif part is not None:
            sends.append((part.contiguous(), target))
    link.exchange(sends, receives)
    for place, buffer in landed:
        if place is not buffer:
            place.copy_(buffer)
    return list(received.values())


def _buffers(
    transfer: Transfer, student_rank: int | None, micro_batches: int, rows: int, sequence: int, like: torch.Tensor
) -> dict[int, torch.Tensor]:
    """By number, the buffers that a student rank receives into; padding columns are zero and are not sent."""
    layout = transfer.student
    if student_rank is None or student_rank < layout.rank(tensor=0, data=0, pipeline=layout.pipeline - 1):
        return {}
    if transfer.hidden:
        first, last = transfer.needed(student_rank % layout.tensor, sequence)
        sizes = last - first, rows, transfer.shape.hidden_size
    else:
        sizes = sequence, rows, transfer.columns
    replica = student_rank // layout.tensor % layout.data
    return {replica * micro_batches + index: like.new_zeros(sizes) for index in range(micro_batches)}


def packed_requests(batches: Sequence[dict[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
    """``[m, 2, b, s]`` int32: tokens of each micro-batch, and the position where each token's document starts."""
    return torch.stack(
        [
            torch.stack([batch["tokens"].to(torch.int32), starts_of_positions(batch["position_ids"])])
            for batch in batches
        ]
    ).to(device)
