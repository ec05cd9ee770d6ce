"""Distillation on the student's own answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_minitron.config.parts.chat import template_faults
from nemo_minitron.config.parts.checks import choice, not_negative, positive
from nemo_minitron.config.parts.generation import PromptsConfig, Sampling

__all__ = ["OnPolicyConfig", "OnPolicyPrompts", "STALE_ANSWERS"]

#: What becomes of answers that are older than allowed.
STALE_ANSWERS = ("refuse", "reweight")


@dataclass
class OnPolicyPrompts(PromptsConfig):
    """The prompts that the student answers; there are none where it answers nothing."""

    def faults(self) -> list[str]:
        """The base's; that no origin is given is a fault of :class:`OnPolicyConfig`, if it is one."""
        faults = super().faults()
        return faults if self.given else [fault for fault in faults if not fault.startswith("path: give exactly one")]

    @property
    def given(self) -> bool:
        """Whether an origin is named."""
        return any(origin is not None for origin in (self.path, self.package, self.texts))


@dataclass
class OnPolicyConfig:
    """Sequences that the student writes itself during its training, for the teacher to judge (arXiv 2306.13649).

    Attributes:
        share: part of the training sequences that are the student's own answers, 0 to 1; 0 is off. They stand in the
            places of blocks of the data, evenly spread; the loss of such a sequence is over the answer alone.
        prompts: what the student answers.
        system: system message of conversations that have none.
        template: "chatml", "llama3", "nemotron", "own" (the tokenizer's; "own:rag" for one that it names "rag"), or
            "none" for a prompt as plain text that the student goes on with.
        sampling: how answers are drawn; prompt and answer together have at most ``data.sequence_length + 1`` tokens.
        batch_size: answers that a replica works on at once.
        refresh: steps for which answers are made at once, by the weights before the first of them; 1 makes those of
            each step by its own weights.
        max_age: steps that an answer may be older than the weights; older ones are stale. Null: none is stale.
        stale: "refuse" does not start a training that would have stale answers; "reweight" multiplies the loss of a
            token of a stale answer by the probability of the answer's tokens before it under the weights now, divided
            by that under the weights that wrote it.
        clip: c of ``stale=reweight``: a factor lies within 1/c and c.
    """

    share: float = 0.0
    prompts: OnPolicyPrompts = field(default_factory=OnPolicyPrompts)
    system: str | None = None
    template: str = "own"
    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = 8
    refresh: int = 1
    max_age: int | None = None
    stale: str = "refuse"
    clip: float = 2.0

    @property
    def reweighted(self) -> bool:
        """Whether any answer of a training is stale, and weighed."""
        return self.stale == "reweight" and self.max_age is not None and self.refresh - 1 > self.max_age

    def faults(self) -> list[str]:
        """Values out of range, prompts that are missing, stale answers that are refused."""
        faults = [
            *positive(self, "batch_size", "refresh"),
            *not_negative(self, "max_age"),
            *choice(self, "stale", STALE_ANSWERS),
            *template_faults(self, "none"),
        ]
        if not 0 <= self.share <= 1:
            faults.append(f"share={self.share}: must lie between 0 (off) and 1 (all sequences)")
        elif self.share > 0 and not self.prompts.given:
            faults.append("prompts.path: none is given for the student to answer; give path, package or texts")
        if not self.clip >= 1:
            faults.append(f"clip={self.clip}: must be at least 1, which leaves the loss as it is")
        if self.system is not None and self.template == "none":
            faults.append("system: has no place in plain text; choose a template, or leave it out")
        if self.stale == "refuse" and self.max_age is not None and self.refresh - 1 > self.max_age >= 0:
            faults.append(
                f"refresh={self.refresh}: answers would be up to {self.refresh - 1} steps older than the weights, more "
                f"than max_age={self.max_age}; lower refresh, raise max_age, or set stale=reweight"
            )
        return faults
