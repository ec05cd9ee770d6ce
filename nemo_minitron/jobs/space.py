"""Disk space that stages need, against what is free where they write."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_minitron.errors import DiskError
from nemo_minitron.jobs.plans import DiskNeed, StagePlan, human_bytes
from nemo_minitron.runtime.disk import Room, room

__all__ = ["FileSystem", "check_space", "file_systems", "present_bytes", "space_faults"]

#: Share of the certain bytes below which too little is free: file systems that compress, or count in other units, may
#: take a little less than the tensors have.
_MARGIN = 0.95


@dataclass
class FileSystem:
    """What stages that run one after the other write to a file system.

    Attributes:
        room: its space.
        needed: most bytes that are there at one time, beyond what is there now.
        staying: bytes that are left at the end.
        certain: most bytes of those that are written in any case.
        stage: name of the stage during which ``certain`` is reached.
        parts: what the needs of that stage are.
    """

    room: Room
    needed: float = 0.0
    staying: float = 0.0
    certain: float = 0.0
    stage: str = ""
    parts: list[DiskNeed] = field(default_factory=list)
    _left: float = 0.0  # certain bytes of the stages before

    @property
    def is_short(self) -> bool:
        """Whether what is written in any case does not fit."""
        return _MARGIN * self.certain > self.room.free

    def add(self, stage: str, needs: Sequence[DiskNeed], present: float) -> None:
        """Add a stage, of whose output so many bytes are there already."""
        certain = self._left + max(0.0, sum(need.certain for need in needs) - present)
        if certain > self.certain:
            self.certain, self.stage, self.parts = certain, stage, list(needs)
        self.needed = max(self.needed, self.staying + max(0.0, sum(need.bytes for need in needs) - present))
        self.staying += max(0.0, sum(need.staying for need in needs) - present)
        self._left += max(0.0, sum(min(need.certain, need.staying) for need in needs) - present)


def file_systems(stages: Iterable[tuple[str, StagePlan, float]]) -> list[FileSystem]:
    """The file systems that stages write to, with the space that they need there one after the other.

    Args:
        stages: name and plan of each, and the bytes of its output that are there and are not written again.
    """
    systems: dict[int, FileSystem] = {}
    for name, plan, present in stages:
        by_device: dict[int, list[DiskNeed]] = {}
        for need in plan.disk:
            if (place := room(Path(need.path))) is not None:
                systems.setdefault(place.device, FileSystem(place))
                by_device.setdefault(place.device, []).append(need)
        for device, needs in by_device.items():
            systems[device].add(name, needs, present)
    return list(systems.values())


def space_faults(systems: Iterable[FileSystem]) -> list[str]:
    """One line for each file system that what is certain does not fit on."""
    return [_fault(system) for system in systems if system.is_short]


def check_space(stages: Iterable[tuple[str, StagePlan, float]]) -> None:
    """Refuse stages that cannot fit on the disk, before they write anything. Arguments as :func:`file_systems`.

    Raises:
        DiskError: naming the file system, what is needed and what is free.
    """
    if faults := space_faults(file_systems(stages)):
        raise DiskError("; ".join(faults))


def present_bytes(output: Path) -> float:
    """Bytes of the files of an output that is there."""
    if output.is_file():
        return float(output.stat().st_size)
    sizes = 0.0
    for folder, _, names in os.walk(output):  # which passes over what is removed meanwhile
        for name in names:
            with contextlib.suppress(OSError):
                sizes += (Path(folder) / name).stat().st_size
    return sizes


def _fault(system: FileSystem) -> str:
    parts = ", ".join(f"{need.what} {human_bytes(need.certain)}" for need in system.parts if need.certain)
    return (
        f"{system.stage}: at least {human_bytes(system.certain)} are needed on {system.room.mount} by then ({parts}), "
        f"and {human_bytes(system.room.free)} are free; free some space, or choose an output on another disk"
    )
