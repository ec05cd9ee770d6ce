"""Texts and tasks."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from nemo_minitron.config.parts.checks import not_negative, one_of, positive


@dataclass
class SourceConfig:
    """One source of text.

    Attributes:
        name: how reports call it; each source is a domain of the evaluation.
        path: text, JSONL or Parquet file, or a glob of them.
        package: a source that an installable package carries, by its name in the data room's table.
        text_key: JSONL key or Parquet column that holds the text.
        weight: share of this source in the mixture, relative to the others.
        max_characters: read no more than this.
    """

    name: str = MISSING
    path: str | None = None
    package: str | None = None
    text_key: str = "text"
    weight: float = 1.0
    max_characters: int | None = None

    def faults(self) -> list[str]:
        """Not exactly one origin, or nothing to read."""
        return [*one_of(self, "path", "package"), *positive(self, "weight", "max_characters")]


@dataclass
class DataConfig:
    """Token blocks of fixed length from a mixture of sources, split by document into train, calibration and held-out.

    Attributes:
        sources: where the text comes from.
        sequence_length: tokens of one block (its last label needs one more).
        calibration_fraction: share of the documents set aside for scoring.
        held_out_fraction: share of the documents set aside for evaluation and validation.
        seed: of the split and of the order.
        cache_dir: where fetched sources and token blocks are kept.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    sequence_length: int = 512
    calibration_fraction: float = 0.05
    held_out_fraction: float = 0.05
    seed: int = 1234
    cache_dir: str = ".cache/minitron"

    def faults(self) -> list[str]:
        """No or doubled sources, splits that leave nothing to train on."""
        found = [*positive(self, "sequence_length"), *not_negative(self, "seed")]
        if not self.sources:
            found.append("sources: none is given; list at least one {name, path} or {name, package}")
        names = [source.name for source in self.sources]
        found += [
            f"sources: the name {name!r} is given twice" for name in sorted({n for n in names if names.count(n) > 1})
        ]
        fractions = ("calibration_fraction", "held_out_fraction")
        outside = [name for name in fractions if not 0 < getattr(self, name) < 1]
        found += [f"{name}={getattr(self, name)}: must lie between 0 and 1" for name in outside]
        if not outside and self.calibration_fraction + self.held_out_fraction >= 1:
            found.append("calibration_fraction + held_out_fraction must stay below 1: nothing is left to train on")
        return found


@dataclass
class TaskConfig:
    """A multiple-choice task, for the layers whose absence costs the least accuracy; none unless one is named.

    Attributes:
        path: JSONL file; a line is ``{"prompt": "...", "choices": ["...", "..."], "answer": 0}``.
        builtin: instead, a task that is built from a package's text, by its name in the data room's table.
        questions: use no more than this.
    """

    path: str | None = None
    builtin: str | None = None
    questions: int | None = None

    @property
    def given(self) -> str | None:
        """What the task is called, or None without one."""
        return self.path or self.builtin

    def faults(self) -> list[str]:
        """Two tasks, no questions."""
        found = positive(self, "questions")
        if self.path is not None and self.builtin is not None:
            found.append("path: give one of path and builtin, not both")
        return found
