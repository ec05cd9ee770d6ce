"""The stage that lets a model answer prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts import (
    ParallelLayout,
    PromptsConfig,
    Sampling,
    positive,
    template_faults,
)
from nemo_minitron.config.stages.base import NEEDS_MODEL, StageConfig

__all__ = ["GenerateConfig"]


@dataclass
class GenerateConfig(StageConfig):
    """Answer prompts with a Megatron model: sampling, key-value cache, any layout.

    Attributes:
        model: checkpoint that answers.
        prompts: the prompts.
        system: system message of conversations that have none.
        template: "chatml", "llama3", "nemotron", "own" (the tokenizer's; "own:rag" for one that it names "rag"), or
            "none" for the question as plain text.
        attributes: values that the answers shall have, for a model that SteerLM trained ("verbosity" -> 1).
        sampling: how answers are drawn.
        samples: answers to each prompt.
        batch_size: answers that a replica works on at once.
        max_length: tokens of prompt and answer together; null takes the model's context.
        parallel: layout of the model; the prompts are divided among data-parallel replicas.
    """

    STAGE: ClassVar[str] = "generate"
    HELP: ClassVar[str] = "Answer prompts with a model: for distillation on its answers, or to try it."
    NEEDS: ClassVar[tuple[str, ...]] = NEEDS_MODEL
    INPUTS: ClassVar[tuple[str, ...]] = ("model", "prompts.path")

    model: str = MISSING
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    system: str | None = None
    template: str = "own"
    attributes: dict[str, int] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    samples: int = 1
    batch_size: int = 8
    max_length: int | None = None
    parallel: ParallelLayout = field(default_factory=ParallelLayout)

    def faults(self) -> list[str]:
        """Ranges, an unknown template, what plain text has no place for, samples that would all be the same."""
        faults = [
            *positive(self, "samples", "batch_size", "max_length"),
            *template_faults(self, "none"),
            *(f"attributes.{name}={value}: must be 0 or more" for name, value in self.attributes.items() if value < 0),
        ]
        if self.template == "none":
            faults += [
                f"{name}: has no place in plain text; choose a template, or leave it out"
                for name in ("system", "attributes")
                if getattr(self, name)
            ]
        if self.sampling.greedy and self.samples > 1:
            faults.append(f"samples={self.samples}: greedy answers to one prompt are all the same; set it to 1")
        return faults
