"""Value and gradient of each loss for one chunk of tokens whose vocabulary is split over a group.

:mod:`nemo_minitron.distillation.losses.vocabulary_parallel` has the chunk loop and autograd; here is the arithmetic.
Every function takes the logits of this rank's columns, in the model's dtype (they may be views of the model's output),
and returns the loss of each token. :func:`forward_kl` writes the derivative by the student's logits into ``out``. The
others take logits that are divided by the temperature, only read them, and return the derivative by the divided logits,
in float32 or wider; the next call may overwrite it. The derivatives are written out, because autograd through a
collective either keeps every intermediate or counts the loss once per rank. The time goes into passes over memory:
the first one subtracts the maximum on the way into a buffer, which is used again and again, and all others write in
place. On CUDA Triton kernels do the forward and the reverse KL in two passes without buffers
(:mod:`nemo_minitron.distillation.losses.triton_choice` decides). Both forms reduce the same numbers over the ranks, in
the same order, so the ranks of a group need not agree on one.

Notation: ``p``, ``q`` are the teacher's and the student's probabilities; ``S`` is a sum over the whole vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from nemo_minitron.distillation.losses.triton_choice import triton_kernels

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

BLOCK_BYTES = {"cpu": 2**18, "cuda": 32 * 2**20}
"""Of one buffer of the tokens that go through several passes at once: on CPU what stays in a core's cache, on CUDA what
is worth a kernel's launch. Five at most are alive at a time."""

LossAndGradient = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Columns:
    """This rank's columns of the vocabulary.

    Attributes:
        group: tensor-parallel group.
        first: global index of the first column.
        valid: number of columns that are not padding; the buffers have so many.
        buffers: buffers of :meth:`buffer`, which live as long as this object.
    """

    group: dist.ProcessGroup
    first: int
    valid: int
    buffers: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, columns: int, vocab_size: int, group: dist.ProcessGroup) -> Columns:
        """The columns of a rank that holds ``columns`` of them; columns from ``vocab_size`` on are padding."""
        first = dist.get_rank(group) * columns
        return cls(group, first, min(max(vocab_size - first, 0), columns))

    def buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A wide buffer of the shape of ``like``; it still holds values of the chunk before.

        Allocating one for each chunk would cause page faults, which cost more than the arithmetic.
        """
        held = self.buffers.get(name)
        if held is None or held.numel() < like.numel() or held.dtype != wide(like) or held.device != like.device:
            held = self.buffers[name] = torch.empty(like.numel(), dtype=wide(like), device=like.device)
        return held[: like.numel()].view(like.shape)

    def divided(self, name: str, logits: torch.Tensor, temperature: float, *, widened: bool = False) -> torch.Tensor:
        """Logits divided by the temperature, in the wide buffer of that name.

        At a temperature of 1 the logits are returned as they are if they are wide already, or if ``widened`` is False.
        """
        if temperature == 1 and not (widened and logits.dtype != wide(logits)):
            return logits
        return self.buffer(name, logits).copy_(logits).div_(temperature)

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
        """Global token ids -> whether this rank has each, and its column (0 where it does not)."""
        local = tokens - self.first
        held = (local >= 0) & (local < self.valid)
        return held, torch.where(held, local, 0)


@dataclass(frozen=True)
class TopTokens:
    """A teacher's likeliest tokens, the same on every rank.

    Attributes:
        tokens: ``[n, k]`` global token ids, all different; -1 where there is none.
        log_probabilities: ``[n, k]``, at the temperature of the loss; minus infinity where there is no token.
        log_rest: ``[n]`` log of the probability of all other tokens.
        full: there are k tokens everywhere.
    """

    tokens: torch.Tensor
    log_probabilities: torch.Tensor
    log_rest: torch.Tensor
    full: bool = True

    def to(self, device: torch.device) -> TopTokens:
        """The same on a device."""
        return TopTokens(self.tokens.to(device), self.log_probabilities.to(device), self.log_rest.to(device), self.full)

    def __getitem__(self, part: slice) -> TopTokens:
        """Those of some of the n positions."""
        return TopTokens(self.tokens[part], self.log_probabilities[part], self.log_rest[part], self.full)


def wide(logits: torch.Tensor) -> torch.dtype:
    """The dtype for sums: float32 for anything narrower."""
    return torch.promote_types(logits.dtype, torch.float32)


def forward_kl(
    p: torch.Tensor, q: torch.Tensor, columns: Columns, *, temperature: float, out: torch.Tensor | None
) -> torch.Tensor:
    """``T^2 S p (log p - log q)`` at temperature T, of logits that are *not* divided by it yet.

    This is the default loss, so it is optimised most: its passes over memory are as few as possible. Tokens go through
    in blocks that fit a core's cache. The exponentials are taken less this rank's *local* maximum; the error is one
    factor per token and rank, which two all-reduces correct. Only a few numbers per token wait for them, so all tokens
    share these two all-reduces. Then the teacher's exponentials are computed a second time, which costs less than
    storing and reading them would.

    Args:
        p, q: ``[n, valid]``.
        columns: of this rank.
        temperature: above 0.
        out: ``[n, valid]``, gets the derivative by the student's logits, ``T (q - p)``; may be these logits themselves.
            None: no derivative is computed.

    Returns:
        ``[n]``.
    """
    if (triton := triton_kernels(p, q, out)) is not None:
        maxima, sums = triton.statistics(p, q, temperature=temperature)
        top, sums = _over_ranks(maxima, sums, columns)
        if out is not None:
            triton.derivative(p, q, out, top, temperature / sums[:2], temperature=temperature)
        return _kl(top, sums).mul_(temperature * temperature)
    alone = dist.get_world_size(columns.group) == 1
    maxima = q.new_full((2, len(q)), torch.finfo(wide(q)).min, dtype=wide(q))
    sums = maxima.new_zeros(3, len(q))
    # The memory of a wide derivative holds the student's exponentials in the meantime.
    held = out if out is not None and out.dtype == wide(q) else None
    blocks = _blocks(q) if columns.valid else []
    for block in blocks:
        logits_p, logits_q = (
            columns.divided(name, logits[block], temperature, widened=True) for name, logits in (("p", p), ("q", q))
        )
        torch.amax(logits_p, -1, out=maxima[0, block])
        torch.amax(logits_q, -1, out=maxima[1, block])
        difference = torch.sub(logits_p, logits_q, out=columns.buffer("difference", logits_p))
        exp_p = _exp(logits_p, maxima[0, block], columns.buffer("exp_p", logits_p))
        exp_q = _exp(logits_q, maxima[1, block], columns.buffer("exp_q", logits_q) if held is None else held[block])
        torch.sum(exp_p, -1, out=sums[0, block])
        torch.sum(exp_q, -1, out=sums[1, block])
        torch.sum(difference.mul_(exp_p), -1, out=sums[2, block])
        if alone and out is not None:  # nothing to wait for, and all is still in the cache
            _combine(exp_q, temperature / sums[1, block], exp_p, temperature / sums[0, block], out[block])
    top, sums = _over_ranks(maxima, sums, columns)
    if out is not None and not alone:
        scale_p, scale_q = temperature * (maxima - top).exp() / sums[:2]
        for block in blocks:
            logits_p = columns.divided("p", p[block], temperature, widened=True)
            exp_p = _exp(logits_p, maxima[0, block], columns.buffer("exp_p", logits_p))
            if held is None:
                logits_q = columns.divided("q", q[block], temperature, widened=True)
                exp_q = _exp(logits_q, maxima[1, block], columns.buffer("exp_q", logits_q))
            else:
                exp_q = held[block]
            _combine(exp_q, scale_q[block], exp_p, scale_p[block], out[block])
    return _kl(top, sums).mul_(temperature * temperature)


def reverse_kl(p: torch.Tensor, q: torch.Tensor, columns: Columns) -> LossAndGradient:
    """``S q (log q - log p)``; derivative ``q (log q - log p - loss)``."""
    if (triton := triton_kernels(p, q)) is not None:
        maxima, sums = triton.statistics(p, q, temperature=1.0, reverse=True)
        top, sums = _over_ranks(maxima, sums, columns, of=1)
        mean, gradient = sums[2] / sums[1], columns.buffer("difference", q)
        triton.derivative(p, q, gradient, top, 1 / sums[:2], temperature=1.0, means=mean)
        return _kl(top.flip(0), (sums[1], sums[0], sums[2])), gradient
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

    The derivative by ``q`` itself is ``(1 - b) log q/m`` plus a constant from ``m``, which the derivative of the
    softmax cancels.
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

    Communication: per token ``2 k`` numbers from every rank, one maximum and one sum.
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
    """KL over the top tokens and a ghost token for all others; derivative ``q - p`` at the top tokens.

    At the other tokens it is ``(q_ghost - p_ghost)``, divided among them in proportion to the student's probabilities.
    """
    q = q.to(wide(q), copy=True)
    mine, local = columns.here(top.tokens)
    at_top = torch.where(mine, q.gather(-1, local), 0.0) if columns.valid else q.new_zeros(mine.shape)
    shift = _shift_rest(q, top.tokens, columns)
    packed = columns.total(*at_top.unbind(-1), q.exp_().sum(-1))
    log_top, sum_rest = packed[:-1].T, packed[-1]
    if not top.full:
        log_top = log_top.masked_fill(top.tokens < 0, float("-inf"))
    log_rest = sum_rest.log() + shift
    log_sum = torch.logaddexp(log_top.logsumexp(-1), log_rest)
    log_top, log_rest = log_top - log_sum[:, None], log_rest - log_sum
    log_p, log_p_rest = top.log_probabilities.to(q.dtype), top.log_rest.to(q.dtype)
    p, p_rest = log_p.exp(), log_p_rest.exp()
    terms = p * (log_p - log_top)
    if not top.full:
        terms = terms.masked_fill(top.tokens < 0, 0.0)
    loss = terms.sum(-1) + p_rest * (log_p_rest - log_rest)
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


def _over_ranks(
    maxima: torch.Tensor, sums: torch.Tensor, columns: Columns, of: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[2, n]`` maxima and ``[3, n]`` sums of this rank's columns -> of the vocabulary, by two all-reduces.

    A sum is of exponentials less the maximum: the teacher's, the student's, and the third of these by number ``of``.
    """
    top = columns.largest(maxima.clone())
    factors = (maxima - top).exp()
    return top, columns.total(*(part * factors[which] for part, which in zip(sums, (0, 1, of), strict=True)))


def _kl(top: torch.Tensor, sums: Iterable[torch.Tensor]) -> torch.Tensor:
    """``[n]`` ``S a (log a - log b)``, of the maxima of ``a`` and ``b``, their sums and ``S exp_a (a - b)``."""
    sum_a, sum_b, cross = sums
    # log a is the logit less the maximum and log sum_a
    return cross / sum_a + (top[1] - top[0]) + (sum_b.log() - sum_a.log())


def _blocks(logits: torch.Tensor) -> list[slice]:
    """Slices of rows of ``[n, v]``, at least one row each, that fit into :data:`BLOCK_BYTES` in the wide dtype."""
    row = logits.shape[-1] * wide(logits).itemsize
    size = max(1, BLOCK_BYTES["cuda" if logits.is_cuda else "cpu"] // row)
    return [slice(start, min(start + size, len(logits))) for start in range(0, len(logits), size)]


def _exp(logits: torch.Tensor, less: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``exp(logits - less)``, ``[n, v]`` and ``[n]``."""
    return torch.sub(logits, less[:, None], out=out).exp_()


def _combine(
    exp_q: torch.Tensor, scale_q: torch.Tensor, exp_p: torch.Tensor, scale_p: torch.Tensor, out: torch.Tensor
) -> None:
    """Write ``scale_q exp_q - scale_p exp_p`` into ``exp_q``, and into ``out`` where that is narrower."""
    exp_q.mul_(scale_q[:, None]).addcmul_(exp_p, scale_p[:, None], value=-1)
    if out.dtype != exp_q.dtype:
        out.copy_(exp_q)


def _shifted(p: torch.Tensor, q: torch.Tensor, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits less each row's maximum over the vocabulary, in wide buffers."""
    maxima = columns.maximum(p, q)
    return (
        torch.sub(p, maxima[0][:, None], out=columns.buffer("exp_p", p)),
        torch.sub(q, maxima[1][:, None], out=columns.buffer("exp_q", q)),
    )


def _shift_rest(values: torch.Tensor, top: torch.Tensor, columns: Columns) -> torch.Tensor:
    """In place: minus infinity at this rank's part of the ``[n, k]`` top tokens; the others less their maximum.

    The ghost's probability is the sum over its tokens at their own scale: one minus the top tokens' probability would
    cancel where a model is confident.

    Returns:
        ``[n]``, the maximum that was subtracted.
    """
    if columns.valid:
        held, local = columns.here(top)
        # A token of another rank stands for column 0, which the minimum with infinity leaves alone.
        bound = torch.where(held, float("-inf"), float("inf")).to(values.dtype)
        values.scatter_reduce_(-1, local, bound, "amin")
    shift = columns.maximum(values)[0]
    values.sub_(shift[:, None])
    return shift
