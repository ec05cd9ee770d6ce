"""First-order Taylor importance: how much the loss would change if a unit's activation were zero.

``|sum over tokens of a * dL/da|`` of each sample (Molchanov et al., arXiv 1611.06440, section 2.2, and 1906.10771),
with ``L`` the sample's mean next-token cross-entropy. The Minitron paper (arXiv 2407.14679, section 2.2) names it as
an alternative to activations, at the cost of a backward pass.

With ``loss="kl"`` it is the divergence from the unpruned model that is estimated, to second order. To first order
there is nothing: where the model is unpruned, ``KL(p || q)`` is zero and so is its gradient. The second-order term is
``1/2 E_y[(sum_t a_t * dL/da_t)^2]`` with the Fisher information, that is, with labels ``y`` from the model's own
distribution at every position (Martens, arXiv 1412.1193; for pruning, with the text's labels, Theis et al., arXiv
1801.05787; on the difference, Kunstner et al., arXiv 1905.12558). So one label is drawn at each position, and ``L`` is
their loss. As ``L`` is a mean over ``s`` positions, the square of a sample's value is in expectation ``2/s`` times the
divergence of a position, when the unit's activations are set to zero. The aggregation "l2" over the batch is the root
of the sum of these squares.

The backward pass is that of Megatron's schedule, through frozen weights: no parameter has a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_minitron.config.parts import TAYLOR_LOSSES
from nemo_minitron.data.blocks import Blocks
from nemo_minitron.importance.aggregation import gathered
from nemo_minitron.importance.experts import TokenPlaces
from nemo_minitron.importance.hooks import Key, Reading, Recorder, fused_norm
from nemo_minitron.runtime.groups import Groups

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["TAYLOR_LOSSES", "TaylorRecorder", "differentiable", "label_draws", "own_labels", "sample_losses"]

_SEED = 1234  # of the draws of labels


class TaylorRecorder(Recorder):
    """Running statistics of gradient x activation. Hooks read activations going forward, gradients coming back.

    The value of a unit of several channels (a head, an expert) is the sum over its channels; that of a layer is
    gradient x (output - input), since its removal takes that difference from the residual stream.

    Memory: O(units) statistics; the activations that are read are kept until the micro-batch's backward pass.
    """

    reads = "an activation or gradient"

    def read(self, reading: Reading) -> None:
        """Add the product when the gradient of the activation is computed."""
        key, rows, activation = reading.key, self.rows, reading.x.detach()
        width, places = reading.width, reading.places
        across = reading.partial or (reading.sequence_split and self.groups.layout.sequence_parallel)
        reading.x.register_hook(
            lambda gradient: self._product(key, activation, gradient, width, rows, places=places, across=across)
        )

    def read_block(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add the product when the gradient of a layer's output is computed.

        The difference is computed at once, since a pipeline frees the output.
        """
        rows, change = self.rows, (after - before).detach()
        width, across = change.shape[-1], self.groups.layout.sequence_parallel
        after.register_hook(
            lambda gradient: self._product(Key(layer, "block"), change, gradient, width, rows, across=across)
        )

    def _hook_fused_norm(self, key: Key, linear: Any) -> Any:
        """Read a norm inside Transformer Engine's layer-norm-linear, where its output's gradient is not accessible.

        It is computed from the gradient of the linear's output, as the linear itself does.
        """
        layout = self.groups.layout

        def record(module: Any, args: tuple[torch.Tensor, ...], output: Any) -> None:
            rows, activation = self.rows, fused_norm(module, args[0]).detach()

            def hook(gradient: torch.Tensor) -> None:
                gradient = gradient @ module.weight  # [s, b, O/tp] -> [s, b, H], this rank's summand
                if layout.tensor > 1:
                    dist.all_reduce(gradient, group=self.groups.tp)
                if layout.sequence_parallel:
                    gradient = gradient.chunk(layout.tensor)[self.groups.tp_rank]
                self._product(key, activation, gradient, 1, rows, across=layout.sequence_parallel)

            (output[0] if isinstance(output, tuple) else output).register_hook(hook)

        return linear.register_forward_hook(record)

    @torch.no_grad()
    def _product(
        self,
        key: Key,
        activation: torch.Tensor,
        gradient: torch.Tensor,
        width: int,
        rows: int | None,
        *,
        places: TokenPlaces | None = None,
        across: bool = False,
    ) -> None:
        """``[s, b, units * width]`` twice (an expert: its tokens) -> statistics; ``across``: summed over TP ranks."""
        wide = torch.promote_types(activation.dtype, torch.float32)
        product = activation.to(wide) * gradient.to(wide)
        if width > 1:
            product = product.unflatten(-1, (product.shape[-1] // width, width)).sum(-1)
        product = product[:, :rows] if places is None else places.spread(product)
        sums = product.sum(0, dtype=torch.float64)  # [b, units]
        if across and self.groups.layout.tensor > 1 and sums.numel():
            dist.all_reduce(sums, group=self.groups.tp)
        for criterion in self.criteria:
            self.keep(key, criterion, sums.abs())


@contextmanager
def differentiable(chunks: Sequence[GPTModel]) -> Iterator[None]:
    """Within the block gradients reach every activation, and no parameter has a gradient."""
    parameters = [(p, p.requires_grad) for chunk in chunks for p in chunk.parameters()]
    handles: list[Any] = []
    try:
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        for chunk in chunks:
            if chunk.pre_process:
                handles.append(chunk.embedding.register_forward_hook(_require_gradient))
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required in parameters:
            parameter.requires_grad_(required)


def _require_gradient(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    # With frozen weights the graph begins here.
    return output.requires_grad_()


def label_draws(blocks: Blocks) -> torch.Tensor:
    """``[n, s]`` float64 uniform numbers of the blocks' labels, the same under every layout."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.rand(len(blocks), blocks.sequence_length, generator=generator, dtype=torch.float64)


@torch.no_grad()
def own_labels(logits: torch.Tensor, draws: torch.Tensor, vocab_size: int, groups: Groups) -> torch.Tensor:
    """Labels from the model's own distribution: the first token at which the cumulative probability exceeds the draw.

    Args:
        logits: ``[b, s, V/tp]`` of this tensor-parallel rank; padding rows take no part.
        draws: ``[b, s]`` numbers in [0, 1).
        vocab_size: ``V`` without padding.
        groups: of this process.

    Returns:
        ``[b, s]`` int64, the same on every tensor-parallel rank. Collective over them.
    """
    valid = min(max(0, vocab_size - groups.tp_rank * logits.shape[-1]), logits.shape[-1])
    labels = draws.new_zeros(draws.shape, dtype=torch.int64).to(logits.device)
    draws = draws.to(logits.device)
    for place, row in enumerate(logits):  # a sample at a time: float64 takes memory
        wide = row[:, :valid].double()
        largest = wide.amax(-1) if valid else wide.new_full((len(row),), float("-inf"))
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=groups.tp)
        sums = (wide - largest[:, None]).exp_().cumsum_(-1)  # [s, V/tp]
        totals = gathered((sums[:, -1] if valid else torch.zeros_like(largest))[None], groups.tp)  # [tp, s]
        wanted = draws[place] * totals.sum(0) - totals[: groups.tp_rank].sum(0)
        # Tokens of this rank that lie below: all of the ranks before the label, none of those after it.
        labels[place] = (sums <= wanted[:, None]).sum(-1)
    dist.all_reduce(labels, group=groups.tp)
    return labels.clamp_(max=vocab_size - 1)


def sample_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    groups: Groups,
    counted: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[b, s, V/tp]`` logits of this tensor-parallel rank and ``[b, s]`` labels -> ``[b]`` mean cross-entropies.

    The mean is over the labels that are ``counted`` (``[b, s]`` bool; None: all). The softmax is over the true
    vocabulary: Megatron's padding rows take no part. In the logits' precision, fp32 at least. Memory: one tensor of the
    logits' size, which holds the gradient.
    """
    first = groups.tp_rank * logits.shape[-1]
    if counted is None:
        counted = torch.ones_like(labels, dtype=torch.bool)
    shares = counted.T.double() / counted.sum(dim=1)  # [s, b], of each token in its sample's mean
    return _CrossEntropy.apply(logits, labels - first, max(0, vocab_size - first), shares, groups)


class _CrossEntropy(torch.autograd.Function):
    """Sum over tokens of ``share * (log sum_v exp(z_v) - z_label)``.

    Its gradient is ``(softmax - one-hot) * share``.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, valid: int, shares: torch.Tensor, groups: Groups
    ) -> torch.Tensor:
        # [s, b, V/tp] in memory, as Megatron's output layer makes the logits: its backward pass multiplies a transposed
        # gradient batch by batch, at many times the cost.
        wide = torch.promote_types(logits.dtype, torch.float32)
        gradient = logits.new_empty(logits.transpose(0, 1).shape, dtype=wide).copy_(logits.transpose(0, 1))
        labels = labels.transpose(0, 1)
        gradient[..., valid:] = float("-inf")
        largest = gradient.amax(-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=groups.tp)
        gradient -= largest[..., None]
        mine = (labels >= 0) & (labels < gradient.shape[-1])  # [s, b]
        index = labels.where(mine, torch.zeros_like(labels))[..., None]
        label_logits = gradient.gather(-1, index)[..., 0].where(mine, gradient.new_zeros(()))
        gradient.exp_()
        total = gradient.sum(-1)
        for sums in (label_logits, total):
            dist.all_reduce(sums, group=groups.tp)
        gradient /= total[..., None]
        gradient.scatter_add_(-1, index, -mine.to(gradient.dtype)[..., None])
        shares = shares.to(wide)
        gradient *= shares[..., None]
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return ((total.log() - label_logits) * shares).sum(0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_outputs[0][:, None]).to(ctx.dtype).transpose(0, 1), None, None, None, None
