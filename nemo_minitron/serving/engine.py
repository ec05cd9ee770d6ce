"""What a model can be run with: one class for all, which times a prompt and the tokens after it.

Each engine runs as its users run it: transformers by ``generate``, Megatron by the suite's own generation with its
cache of keys and values, llama.cpp by ``llama_decode``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Engine", "Options", "Timing"]


@dataclass(frozen=True)
class Options:
    """How an engine is set up.

    Attributes:
        dtype: of weights and activations, "float32" or "bfloat16"; a GGUF file has its own.
        device: "auto", "cpu" or "cuda".
        threads: of the processor.
        context: tokens of a sequence that there must be room for.
        batch_size: sequences at once.
        seed: of the process.
    """

    dtype: str = "float32"
    device: str = "auto"
    threads: int = 1
    context: int = 512
    batch_size: int = 1
    seed: int = 1234


@dataclass(frozen=True)
class Timing:
    """Seconds of one generation.

    Attributes:
        first: until each sequence has its first token: the prompts' forward pass and the choice of a token.
        further: of all tokens after it.
    """

    first: float
    further: float


class Engine(Protocol):
    """A loaded model.

    Attributes:
        name: of the engine, one of :data:`~nemo_minitron.config.stages.benchmark.ENGINES`.
        version: of the library.
        device: that it computes on: "cpu" or "cuda".
        vocab_size: ids that it takes.
        parameters: of the model; tied embeddings count once.
        weights: how the weights are held: "float32", "Q8_0".
    """

    name: str
    version: str
    device: str
    vocab_size: int
    parameters: int
    weights: str

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[Timing, list[list[int]]]:
        """Answer prompts of equal length greedily, and do not stop at end tokens.

        Args:
            prompts: ``[b, s]`` ids.
            new_tokens: that follow the first one, 1 or more.

        Returns:
            The times, and ``[b, 1 + new_tokens]`` ids.
        """

    def losses(self, blocks: Sequence[Sequence[int]]) -> list[float]:
        """Mean next-token cross-entropy of each ``[s + 1]`` block, in nats."""
