"""Which training sequences are the student's own answers, to which prompts, and the answers as sequences.

A training has ``steps * global_batch_size`` sequences, numbered from 0. With a share λ, sequence i is an answer where
``floor((i + 1) λ) > floor(i λ)``: exactly that share, evenly spread, the same under every layout. The n-th answer is to
the n-th prompt of passes over all prompts, each pass in an order of its own. The random draws of an answer follow from
the seed and the sequence's number alone. So nothing of this depends on what ran before, and a resumed training goes on
with the same answers: a checkpoint holds those in use.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from math import ceil, floor

import torch

from nemo_minitron.checkpoints.tokenizer.comparison import CommonVocabulary
from nemo_minitron.config import OnPolicyConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.generation import Answer

__all__ = ["OnPolicy", "OwnAnswers", "answer_weights", "check_on_policy", "own_sequence"]


@dataclass(frozen=True)
class OnPolicy:
    """Where the student's own answers come from.

    Attributes:
        config: share, sampling, and how long answers are used.
        prompts: token ids of each.
        ends: ids that end an answer.
        seed: of the order of the prompts, and of the random draws.

    Raises:
        ConfigError: for a share without prompts.
    """

    config: OnPolicyConfig
    prompts: Sequence[Sequence[int]]
    ends: tuple[int, ...]
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 0 <= self.config.share <= 1:
            raise ConfigError(f"on_policy.share={self.config.share}: must lie between 0 (off) and 1 (all sequences)")
        if self.config.share and not self.prompts:
            raise ConfigError("on_policy.prompts: there is no prompt for the student to answer")

    @property
    def share(self) -> Fraction:
        """The share as it was written: 0.3 is three tenths."""
        return Fraction(str(self.config.share))

    def samples(self, first: int, end: int) -> list[int]:
        """Numbers of the sequences from ``first`` to before ``end`` that are answers."""
        return [sample for sample in range(first, end) if self._before(sample + 1) > self._before(sample)]

    def most(self, count: int) -> int:
        """The largest number of answers among so many sequences in a row."""
        return ceil(count * self.share)

    def prompt(self, sample: int) -> list[int]:
        """The prompt of a sequence that is an answer."""
        turn, place = divmod(self._before(sample), len(self.prompts))
        return list(self.prompts[_order(len(self.prompts), self.seed + turn)[place]])

    def _before(self, sample: int) -> int:
        """Answers before a sequence."""
        return floor(sample * self.share)


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int) -> list[int]:
    """The order of one pass over so many prompts."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


@dataclass(frozen=True)
class OwnAnswers:
    """Answers that were made together, each as a training sequence. The same on every rank.

    Attributes:
        step: of the weights that wrote them, ``[]`` int64.
        sample: ``[n]`` int64 numbers of the sequences, ascending.
        tokens: ``[n, s + 1]`` int64: prompt, answer, zeros.
        start, end: ``[n]`` int64 positions of an answer's first token, and after its last.
        logprobs: ``[n, s]`` float32 log-probability of each label in an answer under the weights that wrote it, before
            temperature and truncation; 0 for other labels.
        stopped: ``[n]`` bool: an end token ended the answer.
    """

    step: torch.Tensor
    sample: torch.Tensor
    tokens: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    logprobs: torch.Tensor
    stopped: torch.Tensor

    @classmethod
    def of(
        cls,
        step: int,
        samples: Sequence[int],
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Answer],
        sequence_length: int,
    ) -> OwnAnswers:
        """Answers as :func:`~nemo_minitron.generation.generate_tokens` gives them.

        Args:
            step: of the weights.
            samples: number of each.
            prompts, answers: together at most ``sequence_length + 1`` tokens.
            sequence_length: s.
        """
        count = len(samples)
        tokens = torch.zeros(count, sequence_length + 1, dtype=torch.int64)
        logprobs = torch.zeros(count, sequence_length)
        start = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)
        end = start + torch.tensor([len(answer.tokens) for answer in answers], dtype=torch.int64)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            tokens[row, : end[row]] = torch.tensor([*prompt, *answer.tokens])
            logprobs[row, start[row] - 1 : end[row] - 1] = torch.tensor(answer.logprobs, dtype=torch.float32)
        stopped = torch.tensor([answer.finish == "stop" for answer in answers], dtype=torch.bool)
        return cls(torch.tensor(step), torch.tensor(samples), tokens, start, end, logprobs, stopped)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every attribute by its name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def rows(self, samples: Sequence[int]) -> list[int]:
        """Where the answers of some sequences stand; they are among these."""
        place = {sample: row for row, sample in enumerate(self.sample.tolist())}
        return [place[sample] for sample in samples]

    def covers(self, samples: Sequence[int]) -> bool:
        """Whether all of some sequences are among these."""
        return set(samples) <= set(self.sample.tolist())


def own_sequence(answers: OwnAnswers, row: int) -> dict[str, torch.Tensor]:
    """An answer as a sample of :class:`~nemo_minitron.distillation.training.blocks_module.BlockDataset`.

    The zeros after the answer need no mask of their own: what stands to the right of a causal text is not seen by it.
    """
    tokens = answers.tokens[row]
    places = torch.arange(len(tokens) - 1)
    counted = (places + 1 >= answers.start[row]) & (places + 1 < answers.end[row])
    return {
        "tokens": tokens[:-1],
        "labels": tokens[1:],
        "loss_mask": counted.float(),
        "position_ids": places,
        "attention_mask": torch.ones(len(places), len(places), dtype=torch.bool).triu(diagonal=1)[None],
    }


def answer_weights(log_ratios: torch.Tensor, *, clip: float) -> torch.Tensor:
    """Importance weights of the tokens of answers that other weights wrote.

    The divergence of a token is over all its alternatives, so what was drawn before it counts, not the token itself:
    ``clip(prod_{i < t} q_now(y_i) / q_then(y_i), 1 / c, c)``.

    Args:
        log_ratios: ``[s, b]`` log of ``q_now / q_then`` of each label; 0 for labels outside of the answer.
        clip: c.

    Returns:
        ``[s, b]``.
    """
    before = log_ratios.cumsum(0) - log_ratios
    return before.exp().clamp(1 / clip, clip)


def check_on_policy(common: CommonVocabulary, others: Mapping[str, object]) -> None:
    """Check that the teacher can judge whatever the student may write, and nothing else stands against it.

    Rows that only one of them has are no obstacle: answers are drawn from the ids that both have.

    Args:
        common: the ids that both have.
        others: what cannot be had together with own answers, true where it is there, by name.

    Raises:
        ConfigError: with what stands against it, or if an id does not mean the same to both.
    """
    faults = [f"on_policy: is not offered with {name}" for name, there in others.items() if there]
    if common.left_out:
        faults.append(
            f"on_policy: {len(common.left_out)} of the student's tokens (the first is id {common.left_out[0]}) do not "
            "mean the same to the teacher, which could not judge answers with them; use a teacher of the student's "
            "vocabulary, or on_policy.share=0"
        )
    if faults:
        raise ConfigError(faults)
