"""Texts and tasks."""

from __future__ import annotations

import glob
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts.checks import ON_BAD_RECORD, choice, not_negative, one_of, positive

__all__ = ["DOCUMENTS", "DataConfig", "ORIGINS", "PACKINGS", "SourceConfig", "TaskConfig", "looks_like_path"]

DOCUMENTS = ("join", "mask")
PACKINGS = ("stream", "best_fit")
ORIGINS = ("path", "package", "dataset", "megatron", "chat")


@dataclass
class SourceConfig:
    """One source of text; exactly one of path, package, dataset, megatron and chat says where it is.

    Attributes:
        name: its name in reports; each source is a domain of the evaluation.
        path: file of plain text, JSONL, a JSON array, Parquet or Arrow, or a glob of them; text and JSON also as
            ``.gz`` and ``.zst``. What is no plain text is told by its content.
        package: a source that an installable package carries, by its name in the table of packages.
        dataset: a dataset of Hugging Face ``datasets``: a directory that ``save_to_disk`` wrote, ``.arrow`` files (a
            glob), or a name on the hub. No code of a dataset runs.
        dataset_split: which split of a dataset with several, such as "train"; always needed for a name on the hub.
        megatron: prefix of a Megatron ``.bin`` and ``.idx`` pair, whose documents are token ids already.
        chat: file of conversations, in any container that ``path`` may be, or a glob; only the answers are learned.
        template: chat template, "own" for the one that the tokenizer carries ("own:rag" for one that it names "rag").
        text_key: key of a JSON object, or column of a table or dataset, that holds the text.
        weight: share of this source in the mixture, relative to the others.
        max_characters: read no more characters than this; null reads all.
    """

    PATHS: ClassVar[tuple[str, ...]] = ("path", "dataset", "megatron", "chat")

    name: str = MISSING
    path: str | None = None
    package: str | None = None
    dataset: str | None = None
    dataset_split: str | None = None
    megatron: str | None = None
    chat: str | None = None
    template: str = "own"
    text_key: str = "text"
    weight: float = 1.0
    max_characters: int | None = None

    def is_path(self, name: str, value: str) -> bool:
        """A dataset may also be named as the hub names it: then nothing of that name is here."""
        if name != "dataset" or self.dataset_split is None or looks_like_path(value):
            return True
        return any(glob.iglob(value, recursive=True))  # noqa: PTH207 - may be absolute

    @property
    def origin(self) -> str | None:
        """Name of its origin, for messages."""
        return self.path or self.package or self.dataset or self.megatron or self.chat

    def faults(self) -> list[str]:
        """Not exactly one origin, options that it does not take, or nothing to read."""
        faults = [*one_of(self, *ORIGINS), *positive(self, "weight", "max_characters")]
        if self.dataset_split is not None and self.dataset is None:
            faults.append(f"dataset_split={self.dataset_split}: only a dataset has splits")
        if self.template != "own" and self.chat is None:
            faults.append(f"template={self.template}: only chat takes a template")
        if self.max_characters is not None and self.megatron is not None:
            faults.append(f"max_characters={self.max_characters}: megatron files hold tokens; lower its weight instead")
        return faults


@dataclass
class DataConfig:
    """Token blocks of fixed length from a mixture of sources, split by document into train, calibration and held-out.

    Attributes:
        sources: where the text comes from.
        blend: sources in Megatron's form, weights and ``.bin``/``.idx`` prefixes in turn: ``[30, a, 70, b]``; or a
            single prefix without a weight.
        sequence_length: tokens of one block (its last label needs one more).
        documents: "join": attention reaches across the documents of a block; "mask": it stays within each, and so do
            the labels.
        packing: "stream": documents one after the other, cut where a block ends; "best_fit": documents stay whole as
            far as they fit into a block, and blocks are filled up (for documents=mask).
        begin_pieces: the parts of a document that is cut begin with the tokenizer's first token, for models that are
            lost without it (Gemma).
        calibration_fraction: share of the documents set aside for scoring.
        held_out_fraction: share of the documents set aside for evaluation and validation.
        seed: seed of the split and of the order of the documents.
        cache_dir: where fetched sources, tokens and token blocks are kept.
        workers: processes that tokenise; null for as many as there are cores, where there is enough text for them.
        on_bad_record: what becomes of records that cannot be used (no JSON, no text under ``text_key``, an unknown form
            of a conversation): "refuse" stops, "skip" leaves them out, counts them in the results and keeps them in
            ``skipped.jsonl``.
    """

    PATHS: ClassVar[tuple[str, ...]] = ("blend", "cache_dir")
    ADDED: ClassVar[tuple[str, ...]] = ("on_bad_record", "begin_pieces")

    sources: list[SourceConfig] = field(default_factory=list)
    blend: list[str] = field(default_factory=list)
    sequence_length: int = 512
    documents: str = "join"
    packing: str = "stream"
    begin_pieces: bool = False
    calibration_fraction: float = 0.05
    held_out_fraction: float = 0.05
    seed: int = 1234
    cache_dir: str = ".cache/minitron"
    workers: int | None = None
    on_bad_record: str = "refuse"

    @property
    def skip(self) -> bool:
        """Bad records are left out."""
        return self.on_bad_record == "skip"

    def is_path(self, name: str, value: str) -> bool:
        """``blend`` has weights between its prefixes."""
        return name != "blend" or len(self.blend) == 1 or not _above_0(value)

    def all_sources(self) -> list[SourceConfig]:
        """``sources``, and those of ``blend``, which are called by the last part of their prefix."""
        prefixes = self.blend[1::2] if len(self.blend) > 1 else self.blend
        weights = [float(weight) for weight in self.blend[::2]] if len(self.blend) > 1 else [1.0] * len(prefixes)
        ends = [PurePath(prefix).name for prefix in prefixes]
        taken = [*ends, *(source.name for source in self.sources)]
        return self.sources + [
            SourceConfig(name=end if taken.count(end) == 1 else prefix, megatron=prefix, weight=weight)
            for end, prefix, weight in zip(ends, prefixes, weights, strict=True)
        ]

    def faults(self) -> list[str]:
        """No or doubled sources, splits that leave nothing to train on."""
        faults = [*positive(self, "sequence_length", "workers"), *not_negative(self, "seed")]
        faults += [*choice(self, "documents", DOCUMENTS), *choice(self, "packing", PACKINGS)]
        faults += choice(self, "on_bad_record", ON_BAD_RECORD)
        if self.packing == "best_fit" and self.documents == "join":
            faults.append("packing=best_fit: keeps documents whole, so it needs documents=mask")
        if not self.sources and not self.blend:
            faults.append("sources: none is given; list at least one {name, path} or {name, package}")
        blend_faults = self._blend_faults()
        sources = self.sources if blend_faults else self.all_sources()
        names = [source.name for source in sources]
        faults += blend_faults
        faults += [
            f"sources: the name {name!r} is given twice" for name in sorted({n for n in names if names.count(n) > 1})
        ]
        fractions = ("calibration_fraction", "held_out_fraction")
        outside = [name for name in fractions if not 0 < getattr(self, name) < 1]
        faults += [f"{name}={getattr(self, name)}: must lie between 0 and 1" for name in outside]
        if not outside and self.calibration_fraction + self.held_out_fraction >= 1:
            faults.append("calibration_fraction + held_out_fraction must stay below 1: nothing is left to train on")
        return faults

    def _blend_faults(self) -> list[str]:
        if len(self.blend) == 1:
            return []
        if len(self.blend) % 2:
            return [f"blend={self.blend}: give weight and prefix in turn, as in [30, a, 70, b]"]
        return [
            f"blend={self.blend}: {weight!r} is no weight above 0" for weight in self.blend[::2] if not _above_0(weight)
        ]


def looks_like_path(dataset: str) -> bool:
    """Whether a dataset is certainly no name on the hub (``name`` or ``owner/name``)."""
    return dataset.startswith((".", "/", "~", "$")) or dataset.count("/") > 1 or "*" in dataset


def _above_0(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


@dataclass
class TaskConfig:
    """A multiple-choice task, for the layers whose absence costs the least accuracy; none unless one is named.

    Attributes:
        path: records ``{"prompt": "...", "choices": ["...", "..."], "answer": 0}``: a file of JSONL, of a JSON array,
            Parquet or Arrow, or a directory with a dataset.
        builtin: instead, a task that is built from a package's text, by its name in the table of packages.
        questions: use no more questions than this; null uses all.
        on_bad_record: what becomes of records that cannot be used: "refuse" names them all, "skip" leaves them out,
            counts them in the results and keeps them in ``skipped.jsonl``.
    """

    PATHS: ClassVar[tuple[str, ...]] = ("path",)
    ADDED: ClassVar[tuple[str, ...]] = ("on_bad_record",)

    path: str | None = None
    builtin: str | None = None
    questions: int | None = None
    on_bad_record: str = "refuse"

    @property
    def skip(self) -> bool:
        """Bad records are left out."""
        return self.on_bad_record == "skip"

    @property
    def given(self) -> str | None:
        """Name of the task; None without a task."""
        return self.path or self.builtin

    def faults(self) -> list[str]:
        """Two tasks, no questions."""
        faults = [*positive(self, "questions"), *choice(self, "on_bad_record", ON_BAD_RECORD)]
        if self.path is not None and self.builtin is not None:
            faults.append("path: give one of path and builtin, not both")
        return faults
