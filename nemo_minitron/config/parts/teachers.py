"""Several teachers of one distillation, and the share of each in the loss of a block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts.checks import choice
from nemo_minitron.config.parts.process import ParallelLayout

__all__ = ["SEVERAL_PLACEMENTS", "TeacherConfig", "teacher_shares"]

#: Where each of several teachers may run.
SEVERAL_PLACEMENTS = ("shared", "own_layout")


@dataclass
class TeacherConfig:
    """One of several teachers.

    Attributes:
        name: its name in messages, and in the metrics as ``kl_<name>``.
        model: checkpoint to learn from.
        weight: its share in the loss of a block, relative to the other teachers of the block's source; 0 measures it
            alone.
        sources: names of the sources of ``data`` that it teaches; empty for all.
        default: it teaches the sources that no other teacher teaches.
        placement: "shared" (the student's ranks and layout) or "own_layout" (the same ranks, laid out by ``parallel``).
        parallel: its layout with "own_layout".
    """

    PATHS: ClassVar[tuple[str, ...]] = ("model",)

    name: str = MISSING
    model: str = MISSING
    weight: float = 1.0
    sources: list[str] = field(default_factory=list)
    default: bool = False
    placement: str = "shared"
    parallel: ParallelLayout = field(default_factory=ParallelLayout)

    def faults(self) -> list[str]:
        """A weight that is none, a placement that a teacher among several cannot have."""
        faults = choice(self, "placement", SEVERAL_PLACEMENTS)
        if self.placement == "own_ranks":
            faults = [
                "placement=own_ranks: is offered for a single teacher alone (teacher, teacher_placement); use shared "
                "or own_layout"
            ]
        if not self.name:
            faults.append("name: is empty; the metrics need one")
        if not _is_weight(self.weight):
            faults.append(f"weight={self.weight}: must be 0 or more, and finite")
        if self.default and self.sources:
            faults.append(
                f"default=true: teaches what no other teacher does, and sources={self.sources} are given; leave out "
                "one of the two"
            )
        if self.placement == "shared" and self.parallel != ParallelLayout():
            faults.append("parallel: placement=shared has the student's layout; use placement=own_layout, or leave it")
        for setting in ("context", "expert"):
            if (value := getattr(self.parallel, setting)) > 1:
                faults.append(f"parallel.{setting}={value}: a teacher in its own layout shares none out; set it to 1")
        if self.parallel.virtual_pipeline is not None:
            faults.append(
                f"parallel.virtual_pipeline={self.parallel.virtual_pipeline}: a teacher only runs forward, where "
                "virtual stages gain nothing; set it to null"
            )
        return faults


def teacher_shares(
    teachers: Sequence[TeacherConfig], sources: Sequence[str]
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """The share of each teacher in the loss of the blocks of each source; those of a source add up to 1.

    Args:
        teachers: each with its faults reported already.
        sources: names of all sources of the data.

    Returns:
        ``{teacher: {source: share}}``, without the sources that a teacher does not teach; and what is wrong.
    """
    faults: list[str] = []
    names = [teacher.name for teacher in teachers]
    doubled = sorted({name for name in names if names.count(name) > 1 and name != MISSING})
    faults += [f"teachers: the name {name!r} is given twice" for name in doubled]
    for teacher in teachers:
        twice = sorted({source for source in teacher.sources if teacher.sources.count(source) > 1})
        faults += [f"teachers: {teacher.name} names the source {source!r} twice" for source in twice]
        faults += [
            f"teachers: {teacher.name} teaches {source!r}, which no source of data is called; they are "
            f"{', '.join(sources)}"
            for source in dict.fromkeys(teacher.sources)
            if source not in sources
        ]
    shares: dict[str, dict[str, float]] = {name: {} for name in names}
    by_default = [teacher for teacher in teachers if teacher.default]
    defaults_used = False
    for source in sources:
        own = [t for t in teachers if not t.default and (not t.sources or source in t.sources)]
        defaults_used |= not own
        taught_by = own or by_default
        if not taught_by:
            faults.append(
                f"teachers: none teaches the source {source!r}; name it in a teacher's sources, or give a teacher "
                "default=true"
            )
            continue
        if any(not _is_weight(teacher.weight) for teacher in taught_by):
            continue  # a fault of the teacher's own
        total = math.fsum(teacher.weight for teacher in taught_by)
        if total == 0:
            faults.append(f"teachers: all teachers of the source {source!r} have weight 0; give one a weight above 0")
            continue
        for teacher in taught_by:
            shares[teacher.name][source] = teacher.weight / total
    if sources and not defaults_used:
        faults += [
            f"teachers: {teacher.name} has default=true, and other teachers teach every source; leave it out"
            for teacher in by_default
        ]
    return shares, faults


def _is_weight(weight: float) -> bool:
    return math.isfinite(weight) and weight >= 0
