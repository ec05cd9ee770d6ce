"""Settings of the reconstruction of a pruned model."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.config.parts.checks import positive

__all__ = ["METHODS", "BlockConfig"]

#: How a pruned model is refitted.
METHODS = ("least_squares", "block")


@dataclass(frozen=True)
class BlockConfig:
    """Gradient steps on each layer alone, after least squares.

    Attributes:
        steps: for each layer, at most; those up to the smallest held-out error are kept.
        learning_rate: of Adam, relative to the root mean square of each tensor; it falls linearly to zero.
        samples: blocks of calibration text of a step.
    """

    steps: int = 48
    learning_rate: float = 1e-3
    samples: int = 4

    def faults(self) -> list[str]:
        """Numbers that are not above zero."""
        return positive(self, "steps", "learning_rate", "samples")
