"""Output layer and loss together, over chunks of tokens: the logits of a batch are never whole in memory.

Logits are ``V / H`` times as large as the hidden states that they come from, and a distillation has them twice, beside
their gradient and the copies that wrappers make. Here a chunk of tokens goes through the student's output layer, the
teacher's and the loss; the derivative, written over the chunk's logits, goes at once into the gradients of the hidden
states and of the output layer. So the memory is that of two chunks of logits and of the two gradients, whatever the
number of tokens. The products are those of the unfused form, none is made twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nemo_minitron.config import LossConfig
from nemo_minitron.distillation.losses.common import CommonTokens
from nemo_minitron.distillation.losses.kernels import TopTokens, wide
from nemo_minitron.distillation.losses.vocabulary_parallel import ChunkLosses, TokenLosses

__all__ = ["HEAD_BYTES", "OutputHead", "SummedLosses", "fused_head_loss", "without_output_layer"]

HEAD_BYTES = {"cpu": 96 * 2**20, "cuda": 256 * 2**20}
"""Of a chunk's logits, of which there are two. Each chunk reads and writes the gradient of the output layer once, which
is as large as the weights: more tokens a chunk make that cheap beside the products."""


@dataclass(frozen=True)
class OutputHead:
    """Hidden states and the output layer that makes logits of them.

    Attributes:
        hidden: ``[s, b, H]``, the output layer's input, the same on every rank of the tensor-parallel group; ``[s/tp,
            b, H]`` of this rank's tokens where ``scattered``.
        weight: ``[V/tp, H]``, this rank's rows.
        scattered: the tokens are split over the tensor-parallel group (sequence parallelism).
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    scattered: bool = False

    def whole(self, group: dist.ProcessGroup) -> torch.Tensor:
        """``[s b, H]`` of all tokens, in the weight's dtype, without a gradient."""
        hidden = self.hidden.detach()
        if self.scattered and dist.get_world_size(group) > 1:
            parts = [torch.empty_like(hidden) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, hidden.contiguous(), group=group)
            hidden = torch.cat(parts)
        return hidden.reshape(-1, hidden.shape[-1]).to(self.weight.dtype)


@dataclass(frozen=True)
class SummedLosses:
    """Losses of a batch.

    Attributes:
        total: sum over the tokens of weight times loss, a scalar in float32 or wider; it alone has a gradient.
        tokens: the values of each token, ``[s, b]``, without gradients. Where there is no teacher, its divergence is
            the cross-entropy.
    """

    total: torch.Tensor
    tokens: TokenLosses


def fused_head_loss(
    student: OutputHead,
    teacher: OutputHead | torch.Tensor | TopTokens | None,
    group: dist.ProcessGroup,
    *,
    vocab_size: int,
    loss: LossConfig | None,
    token_weights: torch.Tensor,
    labels: torch.Tensor | None = None,
    common: CommonTokens | None = None,
) -> SummedLosses:
    """The loss of :func:`~nemo_minitron.distillation.losses.vocabulary_parallel.vocabulary_parallel_loss`, from hidden
    states.

    Equal to it in value and in the gradients of hidden states and weight, to rounding. The gradients are computed in
    the forward pass. In bfloat16 the weight's is summed in float32 and rounded once.

    Memory above the inputs: two chunks of logits of :data:`HEAD_BYTES`, the buffers of the loss, the hidden states of
    all tokens where they are scattered, and between forward and backward the two gradients.

    Communication above the loss's: where the group has several ranks, one all-reduce of the hidden states' gradient (a
    reduce-scatter where they are scattered, and a gather of the hidden states).

    Args:
        student: gradients flow to its hidden states and its weight. The same tensor may be the embedding's weight.
        teacher: hidden states and output layer, of which chunks of logits are made; or its logits ``[s, b, W/tp]``; or
            its likeliest tokens; None without a teacher, when the loss is the cross-entropy alone.
        group: tensor-parallel group.
        vocab_size, labels, common: as of ``vocabulary_parallel_loss``; ``labels`` are ``[s, b]``.
        loss: as there; None for the labels' cross-entropy alone.
        token_weights: ``[s, b]``, each token's weight in the sum, such as 0 where it is masked.

    Raises:
        ValueError: as ``vocabulary_parallel_loss``.
    """
    shape, device = token_weights.shape, student.hidden.device
    flat = None if labels is None else labels.reshape(-1)
    losses = ChunkLosses(
        len(student.weight), group, vocab_size=vocab_size, loss=loss, labels=flat, common=common, device=device
    )
    logits: _Chunks
    if isinstance(teacher, OutputHead):
        logits = _Chunks(teacher.whole(group), teacher.weight.detach())
    elif isinstance(teacher, torch.Tensor):
        logits = _Chunks(teacher.detach().reshape(-1, teacher.shape[-1]), None)
    else:
        logits = _Chunks(teacher, None)
    # Of a parameter a custom function would compute the gradient in a validation, too.
    weight = student.weight if torch.is_grad_enabled() else student.weight.detach()
    total, parts = _FusedHead.apply(
        student.hidden, weight, student.scattered, losses, logits, token_weights.reshape(-1), group
    )
    values = parts.view(len(parts), *shape)
    trained = torch.as_tensor(sum(weight * part for weight, part in zip(losses.weights, values, strict=True) if weight))
    return SummedLosses(total, TokenLosses(trained, values[0], values[-1] if labels is not None else None))


@contextmanager
def without_output_layer(model: Any) -> Iterator[list[torch.Tensor]]:
    """Within the block, a Megatron ``GPTModel`` of the last pipeline stage returns hidden states, not logits.

    Yields:
        A list that gets the weight with which the output layer was called, ``[V/tp, H]``.
    """
    weights: list[torch.Tensor] = []

    def forward(
        hidden: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, None]:
        weights.append(model.output_layer.weight if weight is None else weight)
        return hidden, None

    model.output_layer.forward = forward
    try:
        yield weights
    finally:
        del model.output_layer.forward  # the class's again


class _Chunks:
    """The teacher's side of a chunk of tokens."""

    def __init__(self, source: torch.Tensor | TopTokens | None, weight: torch.Tensor | None) -> None:
        self._source, self._weight = source, weight
        self._buffer: torch.Tensor | None = None

    def of(self, chunk: slice) -> torch.Tensor | TopTokens | None:
        """Logits ``[n, W/tp]`` (of an output layer in memory that the next call overwrites), or likeliest tokens."""
        if self._source is None:
            return None
        part = self._source[chunk]
        if self._weight is None:
            return part
        assert isinstance(part, torch.Tensor)
        if self._buffer is None or len(self._buffer) < len(part):
            self._buffer = part.new_empty(len(part), len(self._weight))
        return torch.mm(part, self._weight.t(), out=self._buffer[: len(part)])


class _FusedHead(torch.autograd.Function):
    """The weighted sum of the losses, with the gradients of hidden states and weight from the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        scattered: bool,
        losses: ChunkLosses,
        teacher: _Chunks,
        token_weights: torch.Tensor,
        group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight = weight.detach()
        states = OutputHead(hidden, weight, scattered).whole(group)
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        trained = to_hidden or to_weight
        exact = wide(weight)
        values = torch.empty(len(losses.weights), len(states), dtype=exact, device=states.device)
        token_weights = token_weights.to(exact)
        every = bool((token_weights == 1).all())
        size = max(1, HEAD_BYTES[states.device.type] // (len(weight) * weight.element_size()))
        buffer = states.new_empty(min(size, len(states)), len(weight))
        hidden_gradient = torch.empty_like(states) if to_hidden else None
        weight_gradient: torch.Tensor | None = None
        for start in range(0, len(states), size):
            chunk = slice(start, min(start + size, len(states)))
            logits = torch.mm(states[chunk], weight.t(), out=buffer[: chunk.stop - start])
            losses(chunk, logits, teacher.of(chunk), logits if trained else None, values[:, chunk])
            if trained and not every:
                logits.mul_(token_weights[chunk, None].to(logits.dtype))
            if hidden_gradient is not None:
                torch.mm(logits, weight, out=hidden_gradient[chunk])
            if to_weight:
                weight_gradient = _add_product(weight_gradient, logits, states[chunk], last=chunk.stop == len(states))
        total = sum(
            (share * (part * token_weights).sum() for share, part in zip(losses.weights, values, strict=True) if share),
            start=values.new_zeros(()),
        )
        if hidden_gradient is not None:
            hidden_gradient = _summed(hidden_gradient.view(-1, *hidden.shape[1:]), scattered, group).to(hidden.dtype)
        if weight_gradient is not None:
            weight_gradient = weight_gradient.to(weight.dtype)
        ctx.gradients = hidden_gradient, weight_gradient
        ctx.mark_non_differentiable(values)
        return total, values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale, (hidden, weight) = grad_outputs[0], ctx.gradients
        ctx.gradients = None  # the caller has them now
        if scale.is_cuda or scale.item() != 1:  # a pass over memory that most steps are spared
            for gradient in (hidden, weight):
                if gradient is not None:
                    gradient.mul_(scale.to(gradient.dtype))
        return hidden, weight, None, None, None, None, None


def _add_product(
    held: torch.Tensor | None, derivative: torch.Tensor, states: torch.Tensor, *, last: bool
) -> torch.Tensor:
    """Add ``derivative^T states`` to what is held: in place, and in float32 or wider while more is to come."""
    if held is None:
        product = derivative.t() @ states
        return product if last else product.to(wide(product))
    if held.dtype == derivative.dtype:
        return held.addmm_(derivative.t(), states)
    return held.add_(derivative.t() @ states)


def _summed(gradient: torch.Tensor, scattered: bool, group: dist.ProcessGroup) -> torch.Tensor:
    """The ranks' parts of the hidden states' gradient ``[s, b, H]``, summed: of all tokens, or of this rank's."""
    world = dist.get_world_size(group)
    if world == 1:
        return gradient
    if not scattered:
        dist.all_reduce(gradient, group=group)
        return gradient
    if not gradient.is_cuda:  # gloo has no reduce-scatter of tensors
        dist.all_reduce(gradient, group=group)
        return gradient.chunk(world)[dist.get_rank(group)].contiguous()
    own = gradient.new_empty(len(gradient) // world, *gradient.shape[1:])
    dist.reduce_scatter_tensor(own, gradient, group=group)
    return own
