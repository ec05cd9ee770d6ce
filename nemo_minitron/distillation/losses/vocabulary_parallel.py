"""Losses over logits whose vocabulary is split over a tensor-parallel group, in bounded memory.

One autograd function runs any of :mod:`~nemo_minitron.distillation.losses.kernels` over chunks of tokens. Every rank
computes its own columns, the few numbers that need all columns are reduced over the group, and the gradient is computed
and kept in the forward pass. No rank ever holds the logits of another, logits are never copied whole, and autograd
never sees a collective, so no gradient is counted once per rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nemo_minitron.config import LossConfig
from nemo_minitron.distillation.losses import kernels
from nemo_minitron.distillation.losses.common import CommonTokens, repartition, taking_part
from nemo_minitron.distillation.losses.kernels import Columns, TopTokens
from nemo_minitron.distillation.losses.table import LOGIT_LOSSES, LogitLoss
from nemo_minitron.runtime.cpu.torch_patches import naming_no_device

__all__ = [
    "ChunkLosses",
    "TokenLosses",
    "vocabulary_parallel_cross_entropy",
    "vocabulary_parallel_forward_kl",
    "vocabulary_parallel_loss",
    "vocabulary_parallel_top_k",
]

CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 32 * 2**20}
"""Size of one working buffer; four at most are alive at a time, whatever the number of tokens.

A chunk should be worth its kernel launches and its two all-reduces."""


@dataclass(frozen=True)
class TokenLosses:
    """Losses of each token, ``[...]`` float32 (float64 for float64 logits), the same on every rank of the group.

    Attributes:
        total: the loss that is trained; only it has a gradient.
        divergence: of teacher and student, times T squared.
        cross_entropy: with the labels; None where none were given.
    """

    total: torch.Tensor
    divergence: torch.Tensor
    cross_entropy: torch.Tensor | None = None


def vocabulary_parallel_loss(
    student: torch.Tensor,
    teacher: torch.Tensor | TopTokens,
    group: dist.ProcessGroup,
    *,
    vocab_size: int,
    loss: LossConfig,
    labels: torch.Tensor | None = None,
    inplace: bool = False,
    common: CommonTokens | None = None,
) -> TokenLosses:
    """The loss of each token from vocabulary-parallel logits.

    Equal in value and gradient to :mod:`nemo_minitron.distillation.losses.reference` on the gathered logits.

    Memory above the inputs: one gradient in the student's dtype (none if ``inplace``), and four buffers of
    :data:`CHUNK_BYTES`; for the forward KL without labels only five of ``kernels.BLOCK_BYTES``. Where tokens are left
    out, two more of :data:`CHUNK_BYTES`; where the teacher's columns lie on other ranks, these columns once more.

    Communication a chunk of tokens, which for the forward KL without labels is all of them: an all-reduce of 2 and one
    of 3 numbers a token for the KLs; one more of 2 numbers for Jensen-Shannon; see :func:`vocabulary_parallel_top_k`
    for top-k; an all-reduce of 1 and one of 2 numbers a token for labels. Where the teacher's columns lie on other
    ranks, see :func:`~nemo_minitron.distillation.losses.common.repartition`.

    Args:
        student: ``[..., V/tp]`` logits of this rank's columns; gradients flow here. Contiguous, or it is copied whole.
        teacher: ``[..., V/tp]`` logits of the same columns (contiguous too), or for "top_k" its likeliest
            tokens, ``n`` being the number of the student's tokens. With ``common`` the logits may have another number
            of columns, ``[..., W/tp]``; they are then those of the teacher's own partition.
        group: tensor-parallel group; its rank ``r`` holds columns ``r V/tp`` to ``(r + 1) V/tp - 1``.
        vocab_size: true vocabulary; columns from there on are padding, and take no part.
        loss: its kind is a key of :data:`~nemo_minitron.distillation.losses.table.LOGIT_LOSSES`.
        labels: ``[...]`` token ids; the caller must mask ids outside the vocabulary (ignored labels). Their
            cross-entropy is computed whenever they are given, whatever its weight.
        inplace: write the gradient over the student's logits, which the caller then may not read again (as
            Megatron's own vocabulary-parallel cross-entropy does with its logits).
        common: the tokens that the divergence is over, where they are not the student's whole vocabulary. Labels are
            always of that.

    Raises:
        ValueError: if the shapes differ, labels are lacking, or the loss is impossible.
    """
    if faults := loss.faults():
        raise ValueError("; ".join(faults))
    if loss.label_weight and labels is None:
        raise ValueError(f"label_weight={loss.label_weight}: needs labels")
    if not isinstance(teacher, TopTokens) and teacher.shape != student.shape:
        if common is None or teacher.shape[:-1] != student.shape[:-1]:
            raise ValueError(
                f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)} differ in shape"
            )
        if dist.get_world_size(group) > 1:  # alone, a rank has all that it needs
            teacher = repartition(teacher.detach(), student.shape[-1], common.size, group)
    common = common or CommonTokens(vocab_size)
    # Without labels, tokens above the common ones take no part in anything: they are as padding.
    taken = vocab_size if labels is not None else min(vocab_size, common.size)
    columns = Columns.of(student.shape[-1], taken, group)
    restricted = common.size < taken or bool(common.left_out)  # on every rank or on none
    entry = LOGIT_LOSSES[loss.kind]
    if entry.over_all is not None and not isinstance(teacher, TopTokens) and loss.k >= len(common):
        entry = LOGIT_LOSSES[entry.over_all]
    blockwise = labels is None and entry.fused is not None and not restricted
    part = _Part(columns, common, student.device) if restricted else None
    divergence = _divergence(student, teacher, columns, loss, entry, blockwise, part)
    kernel, weights = [divergence], [1 - loss.label_weight]
    if labels is not None:
        flat = labels.reshape(-1)
        kernel.append(lambda chunk, q, out: kernels.cross_entropy(flat[chunk], q, columns))
        weights.append(loss.label_weight)
    total, parts = _Chunked.apply(student, columns, kernel, weights, inplace, blockwise)
    shaped = parts.view(len(kernel), *student.shape[:-1])
    return TokenLosses(total, shaped[0], shaped[1] if labels is not None else None)


def vocabulary_parallel_forward_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    group: dist.ProcessGroup,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    inplace: bool = False,
) -> torch.Tensor:
    """``T^2 KL(p_teacher || p_student)`` of each token: :func:`vocabulary_parallel_loss` with the default loss."""
    loss = LossConfig("forward_kl", temperature)
    return vocabulary_parallel_loss(student, teacher, group, vocab_size=vocab_size, loss=loss, inplace=inplace).total


def vocabulary_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup, *, vocab_size: int, inplace: bool = False
) -> torch.Tensor:
    """``-log p(label)`` of each token. Unlike Megatron's own, it leaves padding out, and copies no logits whole.

    Args:
        logits: ``[..., V/tp]``.
        labels: ``[...]``.
        group, vocab_size, inplace: as for :func:`vocabulary_parallel_loss`.
    """
    columns = Columns.of(logits.shape[-1], vocab_size, group)
    flat = labels.reshape(-1)
    kernel: Kernel = lambda chunk, q, out: kernels.cross_entropy(flat[chunk], q, columns)  # noqa: E731
    total, _ = _Chunked.apply(logits, columns, [kernel], [1.0], inplace, False)
    return total


@torch.no_grad()
def vocabulary_parallel_top_k(
    teacher: torch.Tensor, group: dist.ProcessGroup, *, vocab_size: int, k: int, temperature: float = 1.0
) -> TopTokens:
    """The teacher's ``k`` likeliest tokens and the probability of all others, the same on every rank.

    Communication per token: ``2 k`` numbers of every rank, one maximum and one sum. Memory: a chunk.

    Args:
        teacher: ``[..., V/tp]`` logits.
        group, vocab_size: as for :func:`vocabulary_parallel_loss`.
        k: less than ``vocab_size``.
        temperature: of the distribution.
    """
    columns = Columns.of(teacher.shape[-1], vocab_size, group)
    flat = teacher.reshape(-1, teacher.shape[-1])
    parts = [
        kernels.top_k_of(columns.divided("p", flat[chunk, : columns.valid], temperature), columns, k=k)
        for chunk in _chunks(flat, columns)
    ]
    return TopTokens(
        torch.cat([top.tokens for top in parts]),
        torch.cat([top.log_probabilities for top in parts]),
        torch.cat([top.log_rest for top in parts]),
    )


Kernel = Callable[[slice, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]]
"""``(chunk of tokens, [n, valid] logits of the student, out) -> [n] losses, [n, valid] gradient``

``out`` is a buffer for the gradient, or None if no gradient is wanted; the gradient may then be None. ``out`` may alias
the logits; apart from that a kernel must not write to them. A kernel may ignore ``out`` and return a new tensor."""


class _Part:
    """Leaves out the tokens of this rank that take no part in the divergence."""

    def __init__(self, columns: Columns, common: CommonTokens, device: torch.device) -> None:
        self.columns = columns
        self.outside = torch.tensor(common.outside(columns), dtype=torch.int64, device=device)

    def of(self, name: str, logits: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """See :func:`taking_part`."""
        return taking_part(name, logits, like, self.outside, self.columns)


def _divergence(
    student: torch.Tensor,
    teacher: torch.Tensor | TopTokens,
    columns: Columns,
    loss: LossConfig,
    entry: LogitLoss,
    blockwise: bool,
    restricted: _Part | None,
) -> Kernel:
    """Teacher against student at the loss's temperature."""
    t, options = loss.temperature, entry.kernel_options(loss)
    kernel, from_top_k, fused = entry.kernel, entry.from_top_k, entry.fused
    if isinstance(teacher, TopTokens):
        if from_top_k is None:
            raise ValueError(f"kind={loss.kind!r}: needs the teacher's logits, not only its likeliest tokens")
        tokens = student[..., 0].numel()
        if len(teacher.tokens) != tokens:
            raise ValueError(f"the teacher's tokens are of {len(teacher.tokens)} positions, the student has {tokens}")

        def top(chunk: slice, q: torch.Tensor, out: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            part = teacher[chunk]
            q = q if restricted is None else restricted.of("common_q", q, q)
            value, gradient = from_top_k(part, columns.divided("q", q, t), columns, **options)
            return value.mul_(t * t), gradient if t == 1 else gradient.mul_(t)

        return top

    p_logits = teacher.detach().reshape(-1, teacher.shape[-1])

    def both(chunk: slice, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if restricted is None:
            return p_logits[chunk, : columns.valid], q
        return restricted.of("common_p", p_logits[chunk], q), restricted.of("common_q", q, q)

    if fused is not None:

        def whole(chunk: slice, q: torch.Tensor, out: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
            if out is not None and not blockwise:
                out = columns.buffer("gradient", q)  # the next kernel reads the logits, whose memory `out` may be
            p, q = both(chunk, q)
            return fused(p, q, columns, temperature=t, out=out, **options), out

        return whole

    def full(chunk: slice, q: torch.Tensor, out: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        p, q = both(chunk, q)
        p, q = columns.divided("p", p, t), columns.divided("q", q, t)
        if from_top_k is not None:
            value, gradient = from_top_k(kernels.top_k_of(p, columns, k=loss.k), q, columns, **options)
        else:
            assert kernel is not None, "an entry has one of the three"
            value, gradient = kernel(p, q, columns, **options)
        # d/dz of T^2 D(z / T)
        return value.mul_(t * t), gradient if t == 1 else gradient.mul_(t)

    return full


class _Chunked(torch.autograd.Function):
    """A weighted sum of kernels over chunks of tokens, its gradient kept from the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        columns: Columns,
        chunk_kernels: list[Kernel],
        weights: list[float],
        inplace: bool,
        blockwise: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = student.detach().reshape(-1, student.shape[-1])
        gradient = None
        if inplace:
            gradient = logits
        elif ctx.needs_input_grad[0]:
            gradient = torch.empty_like(logits)
        parts = torch.empty(len(chunk_kernels), len(logits), dtype=kernels.wide(student), device=student.device)
        _run(logits, columns, chunk_kernels, weights, gradient, blockwise, parts)
        if gradient is not None:
            ctx.save_for_backward(gradient.view(student.shape))
        total = sum(weight * part for weight, part in zip(weights, parts, strict=True) if weight)
        ctx.mark_non_differentiable(parts)
        return torch.as_tensor(total).view(student.shape[:-1]), parts

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_outputs[0][..., None].to(gradient.dtype)), None, None, None, None, None


def _run(
    logits: torch.Tensor,
    columns: Columns,
    chunk_kernels: list[Kernel],
    weights: list[float],
    gradient: torch.Tensor | None,
    blockwise: bool,
    parts: torch.Tensor,
) -> None:
    """Run the kernels over ``[n, V/tp]`` logits: their values into ``parts``, their weighted derivative into
    ``gradient``, which may be the logits themselves.
    """
    with naming_no_device():
        # The only kernel, and it goes through its tokens in blocks of its own: it takes all of them at once.
        for chunk in [slice(0, len(logits))] if blockwise else _chunks(logits, columns):
            summed, out = None, None if gradient is None else gradient[chunk, : columns.valid]
            for index, (kernel, weight) in enumerate(zip(chunk_kernels, weights, strict=True)):
                parts[index, chunk], derivative = kernel(chunk, logits[chunk, : columns.valid], out)
                if weight and derivative is not None:
                    derivative = derivative if weight == 1 else derivative.mul_(weight)
                    summed = derivative if summed is None else summed.add_(derivative)
            if gradient is not None and summed is not None and not blockwise:
                gradient[chunk, : columns.valid] = summed
    if gradient is not None:
        gradient[:, columns.valid :] = 0


class ChunkLosses:
    """The losses of :func:`vocabulary_parallel_loss` for one chunk of a batch's tokens after the other, without
    autograd.

    Args:
        columns: of a rank, padding included.
        group, vocab_size, loss, common: as of :func:`vocabulary_parallel_loss`; a loss of None is the labels'
            cross-entropy alone.
        labels: ``[n]`` of all tokens of the batch, or None.
        device: of the logits.

    Attributes:
        weights: of each value that a call returns in the loss that is trained.

    Raises:
        ValueError: as :func:`vocabulary_parallel_loss`.
    """

    def __init__(
        self,
        columns: int,
        group: dist.ProcessGroup,
        *,
        vocab_size: int,
        loss: LossConfig | None,
        labels: torch.Tensor | None,
        common: CommonTokens | None,
        device: torch.device,
    ) -> None:
        if faults := [] if loss is None else loss.faults():
            raise ValueError("; ".join(faults))
        if labels is None and (loss is None or loss.label_weight):
            raise ValueError(
                "the loss needs labels" if loss is None else f"label_weight={loss.label_weight}: needs labels"
            )
        self._group, self._width, self._loss, self._labels = group, columns, loss, labels
        self._common, self._given = common or CommonTokens(vocab_size), common
        taken = vocab_size if labels is not None else min(vocab_size, self._common.size)
        self._columns = Columns.of(columns, taken, group)
        restricted = self._common.size < taken or bool(self._common.left_out)
        self._part = _Part(self._columns, self._common, device) if restricted else None
        self.weights = [1.0] if loss is None else [1 - loss.label_weight]
        if loss is not None and labels is not None:
            self.weights.append(loss.label_weight)

    def __call__(
        self,
        chunk: slice,
        logits: torch.Tensor,
        teacher: torch.Tensor | TopTokens | None,
        gradient: torch.Tensor | None,
        parts: torch.Tensor,
    ) -> None:
        """Collective over the group.

        Args:
            chunk: the tokens of the batch.
            logits: ``[n, V/tp]`` of these.
            teacher: its logits of these tokens, ``[n, W/tp]``, or its likeliest tokens; None without a teacher.
            gradient: ``[n, V/tp]``, gets the derivative of each token's trained loss; it may be ``logits``. None for
                none.
            parts: ``[k, n]``, gets the values: the divergence, then the cross-entropy if there are labels.
        """
        kernel: list[Kernel] = []
        blockwise = False
        if self._loss is not None:
            assert teacher is not None, "a divergence is from a teacher"
            if not isinstance(teacher, TopTokens) and teacher.shape != logits.shape:
                if self._given is None or teacher.shape[:-1] != logits.shape[:-1]:
                    raise ValueError(
                        f"student logits {list(logits.shape)} and teacher logits {list(teacher.shape)} differ in shape"
                    )
                if dist.get_world_size(self._group) > 1:
                    teacher = repartition(teacher, self._width, self._common.size, self._group)
            entry = LOGIT_LOSSES[self._loss.kind]
            if entry.over_all is not None and not isinstance(teacher, TopTokens) and self._loss.k >= len(self._common):
                entry = LOGIT_LOSSES[entry.over_all]
            blockwise = self._labels is None and entry.fused is not None and self._part is None
            kernel.append(_divergence(logits, teacher, self._columns, self._loss, entry, blockwise, self._part))
        if self._labels is not None:
            labels = self._labels[chunk]
            kernel.append(lambda some, q, out: kernels.cross_entropy(labels[some], q, self._columns))
        _run(logits, self._columns, kernel, self.weights, gradient, blockwise, parts)


def _chunks(logits: torch.Tensor, columns: Columns) -> list[slice]:
    """``[tokens, V/tp]`` in chunks of tokens; all ranks of the group have equally many columns, so equal chunks."""
    budget = CHUNK_BYTES["cuda" if logits.is_cuda else "cpu"]
    size = max(1, budget // (max(logits.shape[-1], 1) * kernels.wide(logits).itemsize))
    return [slice(start, min(start + size, len(logits))) for start in range(0, len(logits), size)]
