"""Log-likelihoods of continuations after their contexts, by a live Megatron model under any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_minitron.errors import DataError, NonFiniteError
from nemo_minitron.runtime.forward import evaluating, mask_padding
from nemo_minitron.runtime.groups import Groups

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["continuation_scores"]

_PASSES = 8  # micro-batches of one schedule, all padded to the longest of their texts


@torch.no_grad()
def continuation_scores(
    chunks: list[GPTModel],
    groups: Groups,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    vocab_size: int,
    max_length: int,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation, and whether greedy decoding gives it. Collective; every rank gets all.

    Texts of similar length share a batch and are padded on the right; causal attention never sees the padding. Memory
    beyond the model: the activations of one layer and some three float32 tensors ``[batch_size, s, V/tp]``.

    Args:
        chunks: this rank's part of the model, with weights loaded.
        groups: of this process; the texts are divided among data-parallel ranks.
        pairs: ``(context, continuation)`` token ids, neither of them empty, the same on every rank.
        vocab_size: true vocabulary; logits beyond it are padding.
        max_length: tokens of one forward pass; longer texts lose the beginning of their context.
        batch_size: texts of one forward pass.
        progress: called with the number of texts done since its last call.

    Returns:
        For each ``(log-likelihood, greedy)``: the sum over the continuation's tokens in nats, and whether each of them
        has the largest logit (an equal one elsewhere does not count against it).

    Raises:
        DataError: for an empty context or continuation, or a continuation longer than ``max_length``.
        NonFiniteError: where a log-likelihood is NaN or infinite.
    """
    for number, (context, continuation) in enumerate(pairs):
        if not len(context) or not 0 < len(continuation) <= max_length:
            raise DataError(
                f"text {number}: a context of {len(context)} and a continuation of {len(continuation)} tokens cannot "
                f"be scored with a context window of {max_length}"
            )
    layout = groups.layout
    device = next(chunks[0].parameters()).device
    order = sorted(range(len(pairs)), key=lambda number: (-sum(map(len, pairs[number])), number))
    table = torch.zeros(len(pairs), 2, dtype=torch.float64, device=device)
    # The interleaved schedule wants a multiple of the pipeline's length; each replica the same number of passes.
    unit = batch_size * (layout.pipeline if layout.virtual_pipeline else 1)
    step = min(unit * _PASSES, -(-len(pairs) // (unit * layout.data)) * unit)
    with evaluating(chunks):
        for start in range(0, len(order), max(1, step * layout.data)):
            shared = order[start : start + step * layout.data]
            assigned = shared[groups.dp_rank :: layout.data]
            filled = -(-len(assigned) // unit) * unit if assigned else 0
            texts = [pairs[number] for number in assigned] + [pairs[shared[-1]]] * (filled - len(assigned))
            if texts:
                scores = _run(chunks, groups, texts, batch_size, vocab_size, max_length, device)
                if groups.is_last_stage:
                    table[assigned] = scores[: len(assigned)]
            if progress is not None:
                progress(len(shared))
    dist.broadcast(table, src=dist.get_global_rank(groups.pp, layout.pipeline - 1), group=groups.pp)
    dist.all_reduce(table, group=groups.dp)
    if not torch.isfinite(table).all():
        raise NonFiniteError("the model gave log-likelihoods that are NaN or infinite; its weights are damaged")
    return [(float(score), bool(greedy)) for score, greedy in table.tolist()]


def _run(
    chunks: list[GPTModel],
    groups: Groups,
    texts: list[tuple[Sequence[int], Sequence[int]]],
    batch_size: int,
    vocab_size: int,
    max_length: int,
    device: torch.device,
) -> torch.Tensor:
    """``[n, 2]`` log-likelihoods and greediness of ``n`` texts, a multiple of ``batch_size``; on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    layout = groups.layout
    whole = [[*context, *continuation][-(max_length + 1) :] for context, continuation in texts]
    width = max(map(len, whole)) - 1
    width += -width % (layout.tensor if layout.sequence_parallel else 1)
    tokens = torch.zeros(len(texts), width + 1, dtype=torch.int64)
    counted = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, (ids, (_, continuation)) in enumerate(zip(whole, texts, strict=True)):
        tokens[row, : len(ids)] = torch.tensor(ids)
        counted[row, len(ids) - 1 - len(continuation) : len(ids) - 1] = True
    batches = list(zip(tokens.split(batch_size), counted.split(batch_size), strict=True))

    def forward_step(
        iterator: Iterator[tuple[torch.Tensor, torch.Tensor]], model: GPTModel
    ) -> tuple[torch.Tensor, Any]:
        batch, labelled = (tensor.to(device) for tensor in next(iterator))
        inputs = batch[:, :-1].contiguous()
        positions = torch.arange(width, device=device).expand_as(inputs)
        collect = partial(
            _scores, labels=batch[:, 1:].contiguous(), counted=labelled, groups=groups, vocab_size=vocab_size
        )
        return model(inputs, positions, None), collect

    iterators = [iter(batches) for _ in chunks]
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=width,
        micro_batch_size=batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return torch.cat(outputs) if groups.is_last_stage else torch.zeros(len(texts), 2, dtype=torch.float64)


def _scores(
    logits: torch.Tensor,
    *,
    labels: torch.Tensor,
    counted: torch.Tensor,
    groups: Groups,
    vocab_size: int,
    non_loss_data: bool = True,
) -> torch.Tensor:
    """``[b, s, V/tp]`` logits of this tensor-parallel rank, ``[b, s]`` labels -> ``[b, 2]`` float64."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits = mask_padding(logits.float(), vocab_size)
    largest = logits.amax(dim=-1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=groups.tp)
    own = labels - groups.tp_rank * logits.shape[-1]
    here = (own >= 0) & (own < logits.shape[-1])
    label = logits.gather(-1, own.where(here, 0)[..., None]).squeeze(-1).where(here, 0.0)
    dist.all_reduce(label, group=groups.tp)
    greedy = (label == largest) | ~counted
    # Last, since it works in the memory of the logits.
    losses = vocab_parallel_cross_entropy(logits, labels).double()
    return torch.stack([-losses.where(counted, 0.0).sum(dim=1), greedy.all(dim=1).double()], dim=1)
