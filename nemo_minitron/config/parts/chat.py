"""Conversations to train on, and how they become tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from nemo_minitron.config.parts.checks import ON_BAD_RECORD, choice, not_negative, one_of, positive

__all__ = ["CHAT_TEMPLATES", "ChatDataConfig", "template_faults"]

CHAT_TEMPLATES = ("own", "chatml", "llama3", "nemotron")


def template_faults(config: Any, *others: str) -> list[str]:
    """What is wrong with a setting ``template``: ``own:NAME`` too is one of the tokenizer's.

    Args:
        config: with the setting.
        others: what it may be besides.
    """
    name = str(config.template)
    return [] if name.startswith("own:") and name != "own:" else choice(config, "template", (*CHAT_TEMPLATES, *others))


@dataclass
class ChatDataConfig:
    """Conversations or preference pairs, split into training and held-out ones.

    Attributes:
        path: conversations or preference pairs: a file of JSONL, of a JSON array (both also as ``.gz`` and ``.zst``),
            Parquet or Arrow, told by its content; or a directory that ``save_to_disk`` of Hugging Face ``datasets``
            wrote.
        package: instead, a source that an installable package carries, by its name in the table of packages.
        validation: such a file of held-out conversations; null sets ``held_out_fraction`` of the others aside.
        held_out_fraction: share that is set aside.
        template: "chatml", "llama3", "nemotron", or "own" for the tokenizer's; of a tokenizer with several,
            "own:rag" for the one that it names "rag".
        labelled: put the attribute values of the last answer before it (SteerLM); they are not trained on.
        max_length: tokens of one conversation.
        long: what becomes of a conversation with more tokens: "refuse" names them all, "drop" leaves them out.
        seed: seed of the split.
        cache_dir: where fetched sources are kept.
        on_bad_record: what becomes of records that cannot be used (no JSON, wrong types, an unknown form or field, or
            refused by the template): "refuse" names them all, "skip" leaves them out, counts them in the results and
            keeps them in ``skipped.jsonl``.
    """

    PATHS: ClassVar[tuple[str, ...]] = ("path", "validation", "cache_dir")
    ADDED: ClassVar[tuple[str, ...]] = ("on_bad_record",)

    path: str | None = None
    package: str | None = None
    validation: str | None = None
    held_out_fraction: float = 0.1
    template: str = "own"
    labelled: bool = False
    max_length: int = 1024
    long: str = "refuse"
    seed: int = 1234
    cache_dir: str = ".cache/minitron"
    on_bad_record: str = "refuse"

    @property
    def skip(self) -> bool:
        """Bad records are left out."""
        return self.on_bad_record == "skip"

    def faults(self) -> list[str]:
        """Not exactly one origin, a split that leaves nothing."""
        faults = [
            *one_of(self, "path", "package"),
            *template_faults(self),
            *choice(self, "long", ("refuse", "drop")),
            *choice(self, "on_bad_record", ON_BAD_RECORD),
            *positive(self, "max_length"),
            *not_negative(self, "seed"),
        ]
        if self.validation is None and not 0 < self.held_out_fraction < 1:
            faults.append(f"held_out_fraction={self.held_out_fraction}: must lie between 0 and 1")
        return faults
