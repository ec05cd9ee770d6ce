"""Preference pairs as NeMo-Aligner's DPO model takes them, and how well a model tells them apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from nemo_minitron.alignment.batches import Sample
from nemo_minitron.runtime.groups import Groups

__all__ = ["Pair", "Pairs", "preference_statistics"]

IGNORED = -100
"""Label of a token without loss, as Aligner has it."""


class Pair(NamedTuple):
    """A prompt with its chosen and with its rejected answer.

    Attributes:
        chosen, rejected: the conversation with each answer; only the answer's tokens are trained.
        chosen_reward, rejected_reward: for RPO.
    """

    chosen: Sample
    rejected: Sample
    chosen_reward: float
    rejected_reward: float


class Pairs(Dataset[dict[str, Any]]):
    """Items as ``nemo_aligner.data.nlp.datasets.DPOModelDataset`` gives them, from tokens instead of text.

    An item has ``chosen``, ``rejected``, ``chosen_labels``, ``rejected_labels`` ``[longer of the two]``, lengths and
    rewards: inputs without the last token, labels without the first, padding behind.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        longest = max(len(pair.chosen.ids), len(pair.rejected.ids)) - 1
        item: dict[str, Any] = {
            "chosen_reward": pair.chosen_reward,
            "rejected_reward": pair.rejected_reward,
            "ignore_example": False,
        }
        for name, sample in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            length = len(sample.ids) - 1
            tokens = torch.zeros(longest, dtype=torch.long)
            labels = torch.full((longest,), IGNORED)
            ids = torch.tensor(sample.ids)
            tokens[:length] = ids[:-1]
            labels[:length] = torch.where(torch.tensor(sample.trained)[1:], ids[1:], IGNORED)
            item |= {name: tokens, f"{name}_labels": labels, f"{name}_length": length}
        return item


@torch.no_grad()
def preference_statistics(
    model: Any, batches: Iterable[Any], collate: Callable[..., dict[str, Any]], groups: Groups, *, beta: float
) -> dict[str, float]:
    """How a policy ranks pairs, by itself and against its reference. Collective.

    Args:
        model: Aligner's DPO model, with its reference.
        batches: lists of :class:`Pairs`' items, this data-parallel rank's part of each global batch.
        collate: Aligner's function from items to a batch.
        groups: of this process.
        beta: of the loss.

    Returns:
        Over all pairs, with ``r = beta (log pi - log pi_ref)`` of an answer: ``accuracy`` (share with a larger ``r`` of
        the chosen answer, a tie is a half), ``margin`` (mean difference of ``r``), ``chosen_reward``,
        ``rejected_reward`` (mean ``r``). ``likelihood_accuracy`` and ``likelihood_margin`` are the same with the mean
        log-probability of a token in place of ``r``, without the reference. ``pairs`` is the number of pairs.
    """
    rows: list[torch.Tensor] = []
    for items in batches:
        batch = collate(items)
        labels = torch.cat([batch["chosen_labels"], batch["rejected_labels"]])
        mask = labels != IGNORED
        policy = _answer_sums(model.get_logprob_batch(batch), mask)
        reference = _answer_sums(model.get_ref_policy_logprobs(batch), mask)
        rewards = (beta * (policy - reference)).chunk(2)
        tokens = (policy / mask.sum(-1).clamp(min=1)).chunk(2)
        rows.append(torch.stack([*rewards, *tokens], dim=1).double())
    chosen, rejected, likely, unlikely = torch.cat(rows).unbind(1)
    sums = torch.stack(
        [
            torch.tensor(float(len(chosen)), dtype=torch.double),
            _wins(chosen - rejected),
            (chosen - rejected).sum().cpu(),
            chosen.sum().cpu(),
            rejected.sum().cpu(),
            _wins(likely - unlikely),
            (likely - unlikely).sum().cpu(),
        ]
    ).to(chosen.device)
    torch.distributed.all_reduce(sums, group=groups.dp)
    count, *means = sums.tolist()
    names = (
        "accuracy", "margin", "chosen_reward", "rejected_reward", "likelihood_accuracy", "likelihood_margin",
    )  # fmt: skip
    return {"pairs": count, **{name: value / count for name, value in zip(names, means, strict=True)}}


def _answer_sums(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``[2 b]`` log-probabilities of the answers."""
    return (logprobs.float() * mask.to(logprobs.device)).sum(-1)


def _wins(differences: torch.Tensor) -> torch.Tensor:
    return ((differences > 0).double() + 0.5 * (differences == 0).double()).sum().cpu()
