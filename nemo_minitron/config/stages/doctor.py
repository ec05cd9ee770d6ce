"""The stage that checks the suite on a machine: the settings of ``minitron doctor --run``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from nemo_minitron.config.parts import DTYPES, ParallelLayout, positive
from nemo_minitron.config.stages.base import NEEDS_MODEL, StageConfig

__all__ = ["DOCTOR_CHECKS", "DoctorConfig"]

__all__ = ["DOCTOR_CHECKS", "DoctorConfig"]

DOCTOR_CHECKS = ("allreduce", "forward", "kl", "score", "prune", "convert", "distill", "sft")
"""The checks, in the order in which they run."""


@dataclass
class DoctorConfig(StageConfig):
    """Run every part of the suite on a tiny random model and compare it with one process on the CPU.

    Attributes:
        output: directory of ``doctor.json``.
        overwrite: on by default: the machine is checked anew each time.
        precision: precisions of the model in each check, "float32" and "bfloat16"; of trainings, "32" and "bf16-mixed".
        checks: names of the checks to run; empty for all.
        minutes: a check that takes longer fails.
        parallel: layout to check.
    """

    STAGE: ClassVar[str] = "doctor"
    HELP: ClassVar[str] = "Say what this machine has and what works on it; with --run, prove it."
    NEEDS: ClassVar[tuple[str, ...]] = NEEDS_MODEL  # what single checks need besides, they lack
    LEVEL: ClassVar[str] = "torch"
    REPEATS: ClassVar[bool] = True

    output: str = "doctor"
    overwrite: bool = True
    precision: list[str] = field(default_factory=lambda: list(DTYPES))
    checks: list[str] = field(default_factory=list)
    minutes: float = 10.0
    parallel: ParallelLayout = field(default_factory=ParallelLayout)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The checks to run, in order."""
        return tuple(name for name in DOCTOR_CHECKS if not self.checks or name in self.checks)

    def faults(self) -> list[str]:
        """Unknown precisions and checks, no time."""
        faults = [
            f"precision: {precision!r} must be one of {', '.join(DTYPES)}"
            for precision in self.precision
            if precision not in DTYPES
        ]
        if not self.precision:
            faults.append(f"precision: none is given; choose of {', '.join(DTYPES)}")
        faults += [
            f"checks: {precision!r} must be one of {', '.join(DOCTOR_CHECKS)}"
            for precision in self.checks
            if precision not in DOCTOR_CHECKS
        ]
        return [*faults, *positive(self, "minutes")]
