"""The pipeline of stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

__all__ = ["PipelineConfig"]


@dataclass
class PipelineConfig:
    """Stages one after the other, each in its own processes.

    ``${...}`` interpolation reaches the whole file: ``model: ${output}/teacher``.

    Attributes:
        name: name of the run.
        output: directory of the run; a stage without ``output`` writes to ``output/<its name>``.
        vars: variables for interpolation.
        defaults: settings of every stage that has them in that form (``runtime``, ``data``, ...); a stage's own win.
        stages: each ``{stage: distill, name: ..., <the stage's keys>}``; the name is the stage's own unless given.
    """

    PATHS: ClassVar[tuple[str, ...]] = ("output",)

    name: str = "pipeline"
    output: str = MISSING
    vars: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)

    def faults(self) -> list[str]:
        """No stages."""
        return [] if self.stages else ["stages: none is given"]
