"""Several teachers of one student: who scores which sequence, and which micro-batches each of them runs.

A sequence knows its source (``batch["source"]``, an index into the blocks' domains). Each teacher has a share in the
loss of the sequences of each source, 0 where it does not teach. A teacher runs the micro-batches in which it teaches a
sequence; sequences of others in them are scored and left out of the loss. Ranks that must run a model together decide
alike: all ranks of a data-parallel replica have the same sequences, and where a teacher's ranks are those of several
replicas, they agree first (:meth:`SeveralTeachers.run`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_minitron.config import LossConfig
from nemo_minitron.data.blocks import Blocks
from nemo_minitron.distillation.losses.common import CommonTokens
from nemo_minitron.distillation.losses.weighted import Scored
from nemo_minitron.distillation.teachers.frozen import TeacherSource
from nemo_minitron.distillation.teachers.open import open_teacher
from nemo_minitron.distillation.teachers.placement import TeacherPlacement
from nemo_minitron.errors import DataError
from nemo_minitron.runtime.groups import Groups

if TYPE_CHECKING:
    from nemo_minitron.checkpoints.base import Checkpoint
    from nemo_minitron.distillation.losses.state_hooks import TeacherStates

__all__ = ["SOURCE", "KeptOfSeveral", "OneOfSeveral", "SeveralTeachers", "numbered_by_source"]

SOURCE = "source"
"""Of a batch: ``[b]``, the number of each sequence's source."""


@dataclass(frozen=True)
class OneOfSeveral:
    """A teacher, before it is opened.

    Attributes:
        name: in messages and metrics.
        checkpoint: the model.
        shares: by the source's name, the teacher's share in the loss of its sequences; without those that it does not
            teach. The shares of a source's teachers add up to 1.
        placement: where it runs: "shared" or "own_layout".
        common: the tokens that it shares with the student; None where they are all.
    """

    name: str
    checkpoint: Checkpoint
    shares: Mapping[str, float]
    placement: TeacherPlacement = dataclasses.field(default_factory=TeacherPlacement)
    common: CommonTokens | None = None


@dataclass(frozen=True)
class KeptOfSeveral:
    """What is kept of a micro-batch for its loss.

    Attributes:
        kept: of each teacher; None where it did not run.
        shares: ``[t, b]`` float64, of each teacher in the loss of each sequence.
        taught: ``[t, b]`` bool, whether it teaches the sequence, be it with weight 0.
    """

    kept: list[Any]
    shares: torch.Tensor
    taught: torch.Tensor


def numbered_by_source(blocks: Blocks, sources: Sequence[str], what: str) -> Blocks:
    """The blocks with their domains numbered as the sources are.

    Raises:
        DataError: for blocks of a source that is none of these.
    """
    present = {int(number) for number in blocks.domain.unique()}
    strange = [name for number, name in enumerate(blocks.domains) if number in present and name not in sources]
    if strange:
        raise DataError(
            f"{what}: has blocks of the source {strange[0]!r}, which no teacher teaches; the teachers' sources are "
            f"{', '.join(map(repr, sources))}"
        )
    numbers = [sources.index(name) if name in sources else 0 for name in blocks.domains]
    return dataclasses.replace(blocks, domain=torch.tensor(numbers)[blocks.domain], domains=tuple(sources))


class SeveralTeachers:
    """The teachers as this rank of the student sees them; a :class:`TeacherSource`.

    Memory: that of each teacher; for each micro-batch of a step, what each teacher that runs it keeps. Communication
    above each teacher's own: where a teacher is not run by each replica for itself, one all-reduce of a number for each
    micro-batch and teacher in a step.

    Args:
        teachers: what they are.
        sources: of each teacher, opened.
        names: of the sources of text, in the order of their numbers.
        groups: the student's.
    """

    states: TeacherStates | None = None

    def __init__(
        self, teachers: Sequence[OneOfSeveral], sources: Sequence[TeacherSource], names: Sequence[str], groups: Groups
    ) -> None:
        self.teachers, self.groups = list(teachers), groups
        self._sources = list(sources)
        # [t, number of sources]
        table = [[teacher.shares.get(name) for name in names] for teacher in teachers]
        self._taught = torch.tensor([[share is not None for share in row] for row in table])
        self._shares = torch.tensor([[share or 0.0 for share in row] for row in table], dtype=torch.float64)
        layout = groups.layout
        self._whole = layout.virtual_pipeline is not None  # Megatron's interleaved schedule runs multiples of PP
        self._together = layout.data > 1 and (
            layout.expert > 1 or any(teacher.placement.kind != "shared" for teacher in teachers)
        )

    @classmethod
    def load(
        cls,
        teachers: Sequence[OneOfSeveral],
        names: Sequence[str],
        groups: Groups,
        *,
        dtype: torch.dtype,
        loss: LossConfig,
        student_rows: int,
    ) -> SeveralTeachers:
        """Open every teacher, one after the other; arguments as of :func:`open_teacher`.

        Raises:
            ShapeError: if its layout cannot split one.
            CheckpointError: if one cannot be read.
        """
        sources = [
            open_teacher(
                teacher.placement,
                teacher.checkpoint,
                groups,
                dtype=dtype,
                loss=loss,
                student_rows=student_rows,
                common=teacher.common,
            )
            for teacher in teachers
        ]
        return cls(teachers, sources, names, groups)

    def run(self, batches: Sequence[dict[str, torch.Tensor]]) -> list[KeptOfSeveral]:
        """Run each teacher over the micro-batches that it is needed for. Every rank of the student calls it.

        Args:
            batches: see :meth:`Teacher.run`; also with ``source`` ``[b]``.

        Returns:
            On the last pipeline stage what is kept of each micro-batch, elsewhere an empty list.
        """
        numbers = [batch[SOURCE].cpu() for batch in batches]
        taught = [self._taught[:, of] for of in numbers]
        needed = self.needed(torch.stack([part.any(1) for part in taught]))
        kept: list[list[Any]] = [[None] * len(self.teachers) for _ in batches]
        for column, source in enumerate(self._sources):
            chosen = needed[:, column].nonzero()[:, 0].tolist()
            if not chosen:
                continue
            for index, result in zip(chosen, source.run([batches[index] for index in chosen]), strict=False):
                kept[index][column] = result
        if not self.groups.is_last_stage:
            return []
        return [
            KeptOfSeveral(parts, self._shares[:, of], mine)
            for parts, of, mine in zip(kept, numbers, taught, strict=True)
        ]

    def needed(self, taught: torch.Tensor) -> torch.Tensor:
        """Which micro-batches each teacher runs, ``[m, t]`` bool, alike on all ranks that run it together.

        Args:
            taught: ``[m, t]`` bool, whether this replica needs it; the same on all of its ranks.
        """
        if self._whole:
            taught = taught.any(0, keepdim=True).expand_as(taught)
        if not self._together or bool(self._taught.all()):
            return taught
        everywhere = taught.to(self.groups.device.torch, torch.int32)
        dist.all_reduce(everywhere, op=dist.ReduceOp.MAX, group=self.groups.dp)
        apart = [teacher.placement.kind == "shared" for teacher in self.teachers]
        alone = torch.tensor(apart) & (self.groups.layout.expert == 1)
        return torch.where(alone, taught, everywhere.cpu().bool())

    def scored(self, kept: KeptOfSeveral) -> dict[str, Scored]:
        """On the last stage: what the loss of a micro-batch needs of each teacher that teaches a sequence in it."""
        return {
            teacher.name: Scored(_later(source, kept.kept[number]), kept.shares[number], teacher.common)
            for number, (teacher, source) in enumerate(zip(self.teachers, self._sources, strict=True))
            if kept.taught[number].any()
        }

    def logits(self, kept: Any) -> torch.Tensor:
        """There are no logits of all: :meth:`scored` gives those of each."""
        raise NotImplementedError

    def head(self, kept: Any) -> None:
        """There is no output layer of all."""

    def close(self) -> None:
        """The training is over."""
        for source in self._sources:
            source.close()


def _later(source: TeacherSource, kept: Any) -> Any:
    return lambda: source.logits(kept)
