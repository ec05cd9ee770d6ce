"""Tokens, batches, steps and learning rates of the trainings, from the papers' and scaled to model and text.

The anchors: Llama-3.1-Minitron-4B was distilled with 94 B tokens in steps of 1,152 x 8,192, 1e-4 to 1e-5, with a
warm-up of 40 steps (arXiv 2408.11796, table 4); SmolLM2-135M to 93 M parameters with 46,080 tokens in 90 steps of
2 x 256, 3e-4 to 3e-5 (``configs/demo.yaml``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = [
    "BATCH_LIMIT",
    "Amount",
    "amount",
    "correction_rate",
    "dpo_rate",
    "peak_rate",
    "sft_rate",
    "steps_of",
    "tokens_of",
    "warmup_of",
    "wanted_tokens",
]

#: Tokens of the papers' largest batch: 1,152 x 8,192 (arXiv 2408.11796, table 4).
BATCH_LIMIT = 1152 * 8192
_FEWEST_STEPS = 4


def wanted_tokens(parameters: float) -> float:
    """Tokens after which more help little: 20 for a parameter, as compute-optimal training has (arXiv 2203.15556), and
    as Llama-3.1-Minitron-4B was given (94 B for 4.5 B parameters; arXiv 2408.11796).
    """
    return 20 * parameters


def steps_of(tokens: float) -> float:
    """Optimizer steps for so many tokens: with their cube root, through both anchors, within the largest batch."""
    return max(_FEWEST_STEPS, 100 * (tokens / 50_000) ** (1 / 3), tokens / BATCH_LIMIT)


def tokens_of(steps: int) -> float:
    """Tokens for so many steps; :func:`steps_of` the other way round."""
    return min(50_000 * (steps / 100) ** 3, steps * BATCH_LIMIT)


def peak_rate(parameters: float) -> float:
    """Peak learning rate of a distillation: 1e-4 at 4.5 B parameters (arXiv 2408.11796, table 4), by the fourth root of
    their number, which meets 3e-4 at 93 M (``configs/demo.yaml``) within a sixth; at most 1e-3.
    """
    return _digits(min(1e-3, 1e-4 * (4.5e9 / parameters) ** 0.25))


def correction_rate(parameters: float) -> float:
    """Peak learning rate of a teacher's correction, 0.6 of what a distillation of that size has: 6e-5 beside 1e-4 for
    Llama-3.1-8B (a fifth of the teacher's own rate; arXiv 2408.11796, section 2).
    """
    return _digits(0.6 * peak_rate(parameters))


def sft_rate(parameters: float) -> float:
    """Peak learning rate of fine-tuning: 1e-5 at 8 B parameters, as is usual, by the root of their number, which meets
    1e-4 at 93 M (``configs/demo-align.yaml``). Not from the papers.
    """
    return _digits(min(2e-4, 1e-5 * (8e9 / parameters) ** 0.5))


def dpo_rate(parameters: float) -> float:
    """Peak learning rate of preference optimization, a tenth of fine-tuning's. Not from the papers."""
    return _digits(sft_rate(parameters) / 10)


def warmup_of(steps: int, *, most: int = 40) -> int:
    """Steps of warm-up: 40 in the papers' long trainings (arXiv 2408.11796, table 4), a fifteenth of a short one."""
    return min(most, max(1, steps // 15)) if steps > 1 else 0


@dataclass(frozen=True)
class Amount:
    """How much a training does.

    Attributes:
        steps: optimizer steps.
        batch: sequences of a step.
        sequence_length: tokens of a sequence.
        seconds: that it is expected to take.
        bound: what limits it: "parameters" (:func:`wanted_tokens`), "text", "time" or "steps".
    """

    steps: int
    batch: int
    sequence_length: int
    seconds: float
    bound: str

    @property
    def tokens(self) -> int:
        """Tokens of the training."""
        return self.steps * self.batch * self.sequence_length


def amount(
    sequence_length: int,
    *,
    wanted: float,
    blocks: int,
    seconds: float | None,
    step_seconds: Callable[[int], float],
    multiple: int = 1,
    steps: int | None = None,
    most_batch: int | None = None,
) -> Amount:
    """Steps and batch of a training on text.

    Args:
        sequence_length: tokens of a sequence.
        wanted: tokens that the model wants.
        blocks: sequences that the text has; none is seen twice.
        seconds: that the training may take; None for no limit.
        step_seconds: of a step with so many sequences.
        multiple: of the batch, for data-parallel ranks.
        steps: given by the user, instead of what follows from the tokens.
        most_batch: largest batch, for a validation that needs as many sequences.
    """

    def made(tokens: float, bound: str) -> Amount:
        count = steps or round(steps_of(tokens))
        batch = max(multiple, round(tokens / count / sequence_length / multiple) * multiple)
        if most_batch is not None:
            batch = min(batch, max(multiple, most_batch // multiple * multiple))
        count = min(count, max(1, blocks // batch))
        if steps is None:
            count = max(min(_FEWEST_STEPS, count), min(count, round(tokens / batch / sequence_length)))
        return Amount(count, batch, sequence_length, count * step_seconds(batch), bound)

    held = blocks * sequence_length
    if steps is not None:
        return made(min(tokens_of(steps), held), "steps")
    tokens, bound = min((wanted, "parameters"), (float(held), "text"))
    best = made(tokens, bound)
    if seconds is None or best.seconds <= seconds:
        return best
    low, high = math.log(sequence_length), math.log(tokens)
    best = made(sequence_length, "time")
    for _ in range(40):
        middle = (low + high) / 2
        tried = made(math.exp(middle), "time")
        if tried.seconds <= seconds:
            low, best = middle, tried
        else:
            high = middle
    return best


def _digits(value: float) -> float:
    """Two significant digits."""
    return float(f"{value:.1e}")
