"""Keeping a teacher's logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts import DataConfig, ParallelLayout, choice, positive
from nemo_minitron.config.stages.base import NEEDS_MODEL, StageConfig

__all__ = ["CACHE_VALUES", "LEAST_ERROR_BOUND", "MOST_ERROR_BOUND", "CacheConfig"]

CACHE_VALUES = ("float16", "bfloat16", "int8", "float32", "compact")
LEAST_ERROR_BOUND, MOST_ERROR_BOUND = 2.0**-10, 1.0


@dataclass
class CacheConfig(StageConfig):
    """Write a teacher's logits for the blocks that a training reads.

    ``data``, ``steps``, ``global_batch_size`` and ``validation_batches`` define the blocks; give the values that
    ``minitron distill`` will have.

    Attributes:
        teacher: checkpoint whose logits are kept.
        student: model that is going to read the cache, where its tokenizer ends texts otherwise or has other added
            tokens than the teacher's: it then cuts the text, as in the training. null: the teacher's does.
        data: training text; its held-out split validates.
        steps, global_batch_size, validation_batches: as in the training that the cache is for.
        k: tokens kept of each position; null keeps all.
        values: type of the kept log-probabilities: "float16", "bfloat16" (as large and eight times coarser), "int8"
            (one byte, in 255 steps between a position's largest and smallest) or "float32"; "compact" codes tokens and
            log-probabilities together, in less than half the bytes of "int8".
        top_p: with values=compact, keep of each position as few of the k likeliest tokens as reach this probability
            together; null keeps k.
        error_bound: with values=compact, largest error of a kept log-probability, in nats; a quarter of it where the
            probability is above exp(-5).
        micro_batch_size: blocks of one forward pass on one data-parallel rank.
        samples_per_shard: blocks of one file; a killed stage loses the blocks of the file that it was filling.
        resume: keep the logits in ``output`` and write those that are missing.
        parallel: layout of the teacher.
    """

    STAGE: ClassVar[str] = "cache"
    HELP: ClassVar[str] = "Keep a teacher's logits on disk, for trainings without it."
    NEEDS: ClassVar[tuple[str, ...]] = NEEDS_MODEL
    INPUTS: ClassVar[tuple[str, ...]] = ("teacher", "student")
    ADDED: ClassVar[tuple[str, ...]] = ("student", "top_p", "error_bound")

    teacher: str = MISSING
    student: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    steps: int = 300
    global_batch_size: int = 8
    validation_batches: int = 8
    k: int | None = 64
    values: str = "float16"
    top_p: float | None = None
    error_bound: float = 0.125
    micro_batch_size: int = 1
    samples_per_shard: int = 64
    resume: bool = True
    parallel: ParallelLayout = field(default_factory=ParallelLayout)

    @property
    def tokens(self) -> int:
        """Number of cached positions."""
        return (self.steps + self.validation_batches) * self.global_batch_size * self.data.sequence_length

    def faults(self) -> list[str]:
        """Ranges and unknown choices."""
        return [
            *positive(
                self, "steps", "global_batch_size", "validation_batches", "k", "micro_batch_size", "samples_per_shard"
            ),
            *choice(self, "values", CACHE_VALUES),
            *self._compact_faults(),
        ]

    def _compact_faults(self) -> list[str]:
        if self.values != "compact":
            given = {"top_p": self.top_p is not None, "error_bound": self.error_bound != CacheConfig.error_bound}
            return [
                f"{name}={getattr(self, name)}: belongs to values=compact; values={self.values} keeps k tokens of each "
                "position in their own type. Leave it out, or set values=compact"
                for name, is_given in given.items()
                if is_given
            ]
        faults = []
        if self.k is None:
            faults.append("values=compact: codes the likeliest tokens alone; give k, or another type with k=null")
        if self.top_p is not None and not 0 < self.top_p < 1:
            faults.append(f"top_p={self.top_p}: must be between 0 and 1; null keeps k tokens")
        if not LEAST_ERROR_BOUND <= self.error_bound <= MOST_ERROR_BOUND:
            faults.append(
                f"error_bound={self.error_bound}: must be from {LEAST_ERROR_BOUND} to {MOST_ERROR_BOUND} nats"
            )
        return faults
