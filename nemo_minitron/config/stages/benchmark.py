"""The stage that measures what models cost to serve."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import ClassVar

from nemo_minitron.config.parts import OptionalDataConfig, not_negative, positive
from nemo_minitron.config.stages.base import NEEDS_MODEL, StageConfig

__all__ = ["ENGINES", "BenchmarkConfig"]

#: What a model can be run with.
ENGINES = ("transformers", "megatron", "llama.cpp")


@dataclass
class BenchmarkConfig(StageConfig):
    """Size, memory and speed of several models, side by side.

    Attributes:
        models: path of each model by the name that the report shows; a ``.gguf`` file too.
        baseline: name of the model that the others are compared with; null takes the first. An engine that does not run
            it compares with the first of its own.
        engines: what the models are run with, any of "transformers" and "megatron" (checkpoints of Hugging Face and
            NeMo) and "llama.cpp" (GGUF files).
        batch_size: sequences at once.
        prompt_tokens: length of each prompt.
        new_tokens: tokens that are generated after each prompt, and timed as decoding.
        repeats: measurements of each model, in turns with the others; a first one of each is dropped.
        together: all models stay in memory and take turns. Off: each is loaded anew for each of its turns, for models
            that do not fit into memory together.
        skip_missing: GGUF files have their size and loss alone where llama.cpp is not installed; off, the stage is
            refused there.
        evaluation: output of ``evaluate``, for the losses of these models: of the same path, or, for what is no GGUF
            file, of the same name.
        tokens: instead, held-out tokens on which each model's loss is computed, by the first engine that runs it; 0
            computes none.
        data: text for that.
    """

    STAGE: ClassVar[str] = "benchmark"
    HELP: ClassVar[str] = "Size, memory and speed of several models, through transformers, Megatron and llama.cpp."
    NEEDS: ClassVar[tuple[str, ...]] = NEEDS_MODEL
    LEVEL: ClassVar[str] = "torch"
    INPUTS: ClassVar[tuple[str, ...]] = ("models", "evaluation")

    models: dict[str, str] = field(default_factory=dict)
    baseline: str | None = None
    engines: list[str] = field(default_factory=lambda: list(ENGINES))
    batch_size: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 5
    together: bool = True
    skip_missing: bool = False
    evaluation: str | None = None
    tokens: int = 0
    data: OptionalDataConfig = field(default_factory=OptionalDataConfig)

    def runs(self) -> list[tuple[str, str]]:
        """``(model, engine)`` of everything that is measured."""
        return [
            (name, engine)
            for name, path in self.models.items()
            for engine in dict.fromkeys(self.engines)
            if (engine == "llama.cpp") == is_gguf_name(path)
        ]

    def faults(self) -> list[str]:
        """No models, unknown names, a model that no engine runs, losses from two places."""
        faults = positive(self, "batch_size", "prompt_tokens", "new_tokens", "repeats")
        faults += not_negative(self, "tokens")
        faults += [
            f"engines: {name!r} must be one of {', '.join(ENGINES)}" for name in self.engines if name not in ENGINES
        ]
        if not self.models:
            faults.append("models: none is given; map at least one name to a path")
        if self.baseline is not None and self.baseline not in self.models:
            faults.append(f"baseline={self.baseline}: is none of the models ({', '.join(self.models)})")
        run = {name for name, _ in self.runs()}
        for name, path in self.models.items():
            if name not in run:
                wanted = "llama.cpp" if is_gguf_name(path) else "transformers or megatron"
                faults.append(f"models.{name}={path}: none of the engines runs it; add {wanted} to engines")
        if self.tokens and self.evaluation is not None:
            faults.append(f"tokens={self.tokens}: evaluation={self.evaluation} gives the losses; leave one of them out")
        elif self.tokens and not (self.data.sources or self.data.blend):
            faults.append(f"tokens={self.tokens}: data.sources has no text for it; list at least one {{name, path}}")
        if 0 < self.tokens < self.data.sequence_length:
            faults.append(
                f"tokens={self.tokens}: less than one block of data.sequence_length={self.data.sequence_length}"
            )
        if self.tokens and self.data.documents == "mask":
            faults.append("data.documents=mask: llama.cpp and transformers take no mask; set it to join")
        return faults


def is_gguf_name(path: str) -> bool:
    """Whether a path is that of a GGUF file, by its name."""
    return PurePath(path).suffix == ".gguf"
