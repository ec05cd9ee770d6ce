"""What a loss does with one chunk of tokens whose vocabulary is split over a group: its value and its gradient.

The chunk loop and autograd are :mod:`nemo_minitron.distillation.vocabulary_parallel`'s; here is the arithmetic. Every
function takes the logits of this rank's columns, divided by the temperature, which it only reads (they may be views of
the model's own, in its dtype), and returns the loss of each token and the derivative by the student's (divided) logits,
in float32 or wider, which the next call may overwrite. The derivatives are written out, because autograd through a
collective either keeps every intermediate or counts the loss once per rank. The time goes into passes over memory: the
first one subtracts the maximum on the way into a buffer, which all chunks share, and all others write in place.

Notation: ``p``, ``q`` are the teacher's and the student's probabilities; ``S`` is a sum over the whole vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

__all__ = [
    "Columns",
    "TopTokens",
    "cross_entropy",
    "forward_kl",
    "jensen_shannon",
    "reverse_kl",
    "top_k_kl",
    "top_k_of",
    "wide",
]

BLOCK_BYTES = {"cpu": 2**19, "cuda": 2**62}
"""Of one buffer of the tokens that go through several passes at once. On CUDA a pass is a kernel launch, and the whole
chunk goes through."""

LossAndGradient = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Columns:
    """This rank's run of the vocabulary.

    Attributes:
        group: tensor-parallel group.
        first: global number of the first column.
        valid: columns that are not padding; the buffers have exactly these.
        buffers: of :meth:`buffer`, which live as long as this.
    """

    group: dist.ProcessGroup
    first: int
    valid: int
    buffers: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, columns: int, vocab_size: int, group: dist.ProcessGroup) -> Columns:
        """Of a rank that holds ``columns`` columns, those from ``vocab_size`` on being padding."""
        first = dist.get_rank(group) * columns
        return cls(group, first, min(max(vocab_size - first, 0), columns))

    def buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A wide buffer of the shape of ``like``, what is in it being left from the chunk before.

        A fresh one for each chunk would be paid for in page faults, which cost more than the arithmetic.
        """
        held = self.buffers.get(name)
        if held is None or held.numel() < like.numel() or held.dtype != wide(like) or held.device != like.device:
            held = self.buffers[name] = torch.empty(like.numel(), dtype=wide(like), device=like.device)
        return held[: like.numel()].view(like.shape)

    def maximum(self, *rows: torch.Tensor) -> torch.Tensor:
        """``[n, v]`` each -> ``[len(rows), n]``: largest value over the vocabulary, by one all-reduce."""
        if self.valid:
            local = torch.stack([row.amax(-1).to(wide(row)) for row in rows])
        else:
            local = rows[0].new_full((len(rows), len(rows[0])), float("-inf"), dtype=wide(rows[0]))
        return self.largest(local)

    def largest(self, local: torch.Tensor) -> torch.Tensor:
        """The largest of each number over the ranks, in place, by one all-reduce."""
        if dist.get_world_size(self.group) > 1:
            dist.all_reduce(local, op=dist.ReduceOp.MAX, group=self.group)
        return local

    def total(self, *sums: torch.Tensor) -> torch.Tensor:
        """``[n]`` each -> ``[len(sums), n]``, summed over the ranks by one all-reduce."""
        packed = torch.stack(sums)
        if dist.get_world_size(self.group) > 1:
            dist.all_reduce(packed, group=self.group)
        return packed

    def here(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Global token numbers -> whether this rank has each, and its column (0 where it has not)."""
        local = tokens - self.first
        mine = (local >= 0) & (local < self.valid)
        return mine, torch.where(mine, local, 0)


@dataclass(frozen=True)
class TopTokens:
    """A teacher's likeliest tokens, the same on every rank.

    Attributes:
        tokens: ``[n, k]`` global token numbers, all different.
        log_probabilities: ``[n, k]`` of them, at the temperature of the loss.
        log_rest: ``[n]`` log of the probability of all other tokens.
    """

    tokens: torch.Tensor
    log_probabilities: torch.Tensor
    log_rest: torch.Tensor


def wide(logits: torch.Tensor) -> torch.dtype:
    """What sums are taken in: float32 for anything narrower."""
    return torch.promote_types(logits.dtype, torch.float32)


def forward_kl(p: torch.Tensor, q: torch.Tensor, columns: Columns) -> LossAndGradient:
    """``S p (log p - log q)``; derivative ``q - p``.

    The recipe's own loss, so the one whose passes are counted: tokens go through in blocks that stay in a core's
    cache, each less its *local* maximum, and what that leaves wrong is one factor a token and rank.
    """
    exp_p, exp_q = columns.buffer("exp_p", p), columns.buffer("exp_q", q)
    maxima, sums = exp_p.new_full((2, len(p)), torch.finfo(exp_p.dtype).min), exp_p.new_zeros(3, len(p))
    blocks = _blocks(exp_p) if columns.valid else []
    for block in blocks:
        top = torch.stack([logits[block].amax(-1).to(exp_p.dtype) for logits in (p, q)])
        maxima[:, block] = top.clamp_(min=torch.finfo(exp_p.dtype).min)  # of a rank without any finite logit, too
        of_p, of_q = exp_p[block], exp_q[block]
        torch.sub(p[block], top[0, :, None], out=of_p)
        torch.sub(q[block], top[1, :, None], out=of_q)
        difference = torch.sub(of_p, of_q, out=columns.buffer("difference", of_p))
        torch.sum(of_p.exp_(), -1, out=sums[0, block])
        torch.sum(of_q.exp_(), -1, out=sums[1, block])
        sums[2, block] = torch.linalg.vecdot(of_p, difference)
    apart = maxima - columns.largest(maxima.clone())
    factors = apart.exp()
    # S p' (p' logit - q' logit), both less the global maxima
    sums[2] += sums[0] * (apart[0] - apart[1])
    sum_p, sum_q, cross = columns.total(sums[0] * factors[0], sums[1] * factors[1], sums[2] * factors[0])
    # log p is the shifted logit minus log sum_p
    loss = cross / sum_p - sum_p.log() + sum_q.log()
    scale_q, scale_p = factors[1] / sum_q, -factors[0] / sum_p
    for block in blocks:
        exp_q[block].mul_(scale_q[block, None]).addcmul_(exp_p[block], scale_p[block, None])
    return loss, exp_q


def reverse_kl(p: torch.Tensor, q: torch.Tensor, columns: Columns) -> LossAndGradient:
    """``S q (log q - log p)``; derivative ``q (log q - log p - loss)``."""
    p, q = _shifted(p, q, columns)
    difference = torch.sub(q, p, out=columns.buffer("difference", p))
    p.exp_()
    q.exp_()
    sum_p, sum_q, cross = columns.total(p.sum(-1), q.sum(-1), torch.linalg.vecdot(q, difference))
    mean = cross / sum_q
    loss = mean - sum_q.log() + sum_p.log()
    # the normalisers cancel: log q - log p - loss = difference - its mean under q
    return loss, difference.sub_(mean[:, None]).mul_(q.div_(sum_q[:, None]))


def jensen_shannon(p: torch.Tensor, q: torch.Tensor, columns: Columns, *, beta: float) -> LossAndGradient:
    """``b S p (log p - log m) + (1 - b) S q (log q - log m)``; derivative ``(1 - b) q (log q/m - KL(q || m))``.

    The derivative by ``q`` itself is ``(1 - b) log q/m``: what ``m`` adds to it sums to a constant, which the softmax
    takes away.
    """
    p, q = _shifted(p, q, columns)
    log_sums = columns.total(p.exp().sum(-1), q.exp().sum(-1)).log_()
    p.sub_(log_sums[0][:, None])
    q.sub_(log_sums[1][:, None])
    log_m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    to_p = torch.linalg.vecdot(p.exp(), p.sub_(log_m))
    ratio = q - log_m
    q.exp_()
    teacher, student = columns.total(to_p, torch.linalg.vecdot(q, ratio))
    loss = beta * teacher + (1 - beta) * student
    return loss, ratio.sub_(student[:, None]).mul_(q).mul_(1 - beta)


def top_k_of(p: torch.Tensor, columns: Columns, *, k: int) -> TopTokens:
    """The ``k`` likeliest tokens of a teacher; ``k`` is less than the true vocabulary.

    Communication: ``2 k`` numbers a token from every rank, beside one maximum and one sum.
    """
    p = p.to(wide(p), copy=True)
    # Every rank offers k; one that has fewer fills up with offers that lose.
    offered = min(k, columns.valid)
    values = p.new_full((len(p), k), float("-inf"))
    tokens = torch.zeros(len(p), k, dtype=torch.int64, device=p.device)
    if offered:
        best = p.topk(offered, dim=-1)
        values[:, :offered], tokens[:, :offered] = best.values, best.indices + columns.first
    world = dist.get_world_size(columns.group)
    all_values, all_tokens = ([torch.empty_like(part) for _ in range(world)] for part in (values, tokens))
    dist.all_gather(all_values, values, group=columns.group)
    dist.all_gather(all_tokens, tokens, group=columns.group)
    chosen = torch.cat(all_values, -1).topk(k, dim=-1)
    top = torch.cat(all_tokens, -1).gather(-1, chosen.indices)
    shift = _shift_rest(p, top, columns)
    log_rest = columns.total(p.exp_().sum(-1))[0].log_().add_(shift)
    log_sum = torch.logaddexp(chosen.values.logsumexp(-1), log_rest)
    return TopTokens(top, chosen.values - log_sum[:, None], log_rest - log_sum)


def top_k_kl(top: TopTokens, q: torch.Tensor, columns: Columns) -> LossAndGradient:
    """KL over the top tokens and the ghost; derivative ``q - p`` at the top.

    Elsewhere it is ``(q_ghost - p_ghost)``, shared out by the student's probabilities among the other tokens.
    """
    q = q.to(wide(q), copy=True)
    mine, local = columns.here(top.tokens)
    at_top = torch.where(mine, q.gather(-1, local), 0.0) if columns.valid else q.new_zeros(mine.shape)
    shift = _shift_rest(q, top.tokens, columns)
    packed = columns.total(*at_top.unbind(-1), q.exp_().sum(-1))
    log_top, sum_rest = packed[:-1].T, packed[-1]
    log_rest = sum_rest.log() + shift
    log_sum = torch.logaddexp(log_top.logsumexp(-1), log_rest)
    log_top, log_rest = log_top - log_sum[:, None], log_rest - log_sum
    log_p, log_p_rest = top.log_probabilities.to(q.dtype), top.log_rest.to(q.dtype)
    p, p_rest = log_p.exp(), log_p_rest.exp()
    loss = (p * (log_p - log_top)).sum(-1) + p_rest * (log_p_rest - log_rest)
    gradient = q.mul_(((log_rest.exp() - p_rest) / sum_rest)[:, None])
    if columns.valid:
        # q is zero at the top tokens
        gradient.scatter_add_(-1, local, torch.where(mine, log_top.exp() - p, 0.0))
    return loss, gradient


def cross_entropy(labels: torch.Tensor, q: torch.Tensor, columns: Columns) -> LossAndGradient:
    """``-log q(label)``; derivative ``q - [label]``."""
    q = q - columns.maximum(q)[0][:, None]
    mine, local = columns.here(labels[:, None])
    at_label = torch.where(mine, q.gather(-1, local), 0.0)[:, 0] if columns.valid else q.new_zeros(len(q))
    total, logit = columns.total(q.exp_().sum(-1), at_label)
    gradient = q.div_(total[:, None])
    if columns.valid:
        gradient.scatter_add_(-1, local, -mine.to(q.dtype))
    return total.log() - logit, gradient


def _blocks(buffer: torch.Tensor) -> list[slice]:
    """Rows of ``[n, v]`` that fit :data:`BLOCK_BYTES` together, one at least."""
    row = buffer.shape[-1] * buffer.itemsize
    size = max(1, BLOCK_BYTES["cuda" if buffer.is_cuda else "cpu"] // row)
    return [slice(start, min(start + size, len(buffer))) for start in range(0, len(buffer), size)]


def _shifted(p: torch.Tensor, q: torch.Tensor, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """Less each row's maximum over the vocabulary, in wide buffers of their own."""
    maxima = columns.maximum(p, q)
    return (
        torch.sub(p, maxima[0][:, None], out=columns.buffer("exp_p", p)),
        torch.sub(q, maxima[1][:, None], out=columns.buffer("exp_q", q)),
    )


def _shift_rest(values: torch.Tensor, top: torch.Tensor, columns: Columns) -> torch.Tensor:
    """In place: minus infinity at the ``[n, k]`` top tokens that this rank has, the others less their maximum.

    The ghost is summed from its own tokens, at their own scale: one minus the top cancels where a model is sure.

    Returns:
        ``[n]``, what was subtracted.
    """
    if columns.valid:
        mine, local = columns.here(top)
        # A token of another rank stands for column 0, which the minimum with infinity leaves alone.
        bound = torch.where(mine, float("-inf"), float("inf")).to(values.dtype)
        values.scatter_reduce_(-1, local, bound, "amin")
    shift = columns.maximum(values)[0]
    values.sub_(shift[:, None])
    return shift
