"""Scoring a live Megatron model: forward passes over calibration blocks, under any parallel layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_minitron.errors import DataError, ShapeError
from nemo_minitron.importance.aggregation import aggregation
from nemo_minitron.importance.hooks import Recorder
from nemo_minitron.importance.scores import Scores
from nemo_minitron.runtime.groups import Groups
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["score_model"]

_PASSES_PER_CHECK = 8  # micro-batches between two looks for non-finite activations


def score_model(
    chunks: list[GPTModel],
    blocks: torch.Tensor,
    groups: Groups,
    *,
    shape: ModelShape,
    micro_batch_size: int = 1,
    sequence: str = "mean",
    batch: str = "l2",
    fingerprint: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Score every unit by forward passes (arXiv 2407.14679, section 2.2).

    To be called on every rank; every rank gets all scores.

    With ``a`` the activations of a unit that :mod:`~nemo_minitron.importance.hooks` reads:

    - FFN neurons, hidden channels, heads: ``batch over samples (sequence over tokens (a))``; by default
      ``sqrt(sum_b (1/s sum_t |a|)^2)``. Hidden channels add up over the two normalisations of every layer.
    - query groups: the L2 norm of their heads' scores.
    - layers: block influence ``1 - E[cos(x_in, x_out)]`` over all tokens.

    The schedule is Megatron's own (``get_forward_backward_func``, forward only), so pipelines and virtual stages work;
    it ends before the output layer, whose logits scoring does not need. Memory beyond the model: the activations of
    one layer, and O(units) statistics.

    Args:
        chunks: this rank's part of the model, as ``runtime.model.build_model`` gives it, with weights loaded.
        blocks: ``[n, s + 1]`` int64 tokens, the same on every rank; data-parallel ranks share them out. The last token
            of a block is only a label, and is not run.
        groups: of this process.
        shape: of the whole model.
        micro_batch_size: blocks of one forward pass.
        sequence, batch: aggregations, by their names in :data:`~nemo_minitron.importance.aggregation.AGGREGATIONS`.
        fingerprint: of the weights (:func:`~nemo_minitron.importance.scores.fingerprint`), kept with the scores.
        progress: called with the number of blocks done since its last call.

    Raises:
        DataError: for no calibration blocks.
        ShapeError: if sequence parallelism does not divide the sequence, or a layer is not a dense decoder layer.
        NonFiniteError: if an activation is NaN or infinite, naming layer and module.
        ConfigError: for an aggregation that is not known.
    """
    recorder = Recorder(
        chunks,
        groups,
        sequence=aggregation(sequence, "aggregation.sequence"),
        batch=aggregation(batch, "aggregation.batch"),
    )
    if blocks.ndim != 2 or len(blocks) == 0 or blocks.shape[1] < 2:
        raise DataError(
            f"calibration data is empty (blocks of shape {list(blocks.shape)}); give at least one block of two tokens"
        )
    length = blocks.shape[1] - 1
    if groups.layout.sequence_parallel and length % groups.layout.tensor:
        raise ShapeError(
            f"a sequence of {length} tokens cannot be split over parallel.tensor={groups.layout.tensor}; set "
            "data.sequence_length to a multiple of it, or parallel.sequence_parallel=false"
        )
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_prepared(chunks))
        stack.enter_context(recorder.attached())
        _run(recorder, blocks, micro_batch_size, progress)
    return _collect(recorder, shape, samples=len(blocks), length=length, fingerprint=fingerprint)


@contextmanager
def _prepared(chunks: list[GPTModel]) -> Iterator[None]:
    """Dropout off; the forward pass ends with the last layer: ``GPTModel`` skips what ``post_process`` stands for."""
    were = [(chunk.training, chunk.post_process) for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
        chunk.post_process = False
    try:
        yield
    finally:
        for chunk, (training, post_process) in zip(chunks, were, strict=True):
            chunk.train(training)
            chunk.post_process = post_process


def _run(
    recorder: Recorder, blocks: torch.Tensor, micro_batch_size: int, progress: Callable[[int], None] | None
) -> None:
    layout = recorder.groups.layout
    mine = blocks[recorder.groups.dp_rank :: layout.data]
    # Equally many passes on every data-parallel rank, whose checks are collective; the interleaved schedule wants a
    # multiple of the pipeline's length.
    unit = micro_batch_size * (layout.pipeline if layout.virtual_pipeline else 1)
    step = unit * _PASSES_PER_CHECK
    longest = -(-len(blocks) // layout.data)
    for start in range(0, longest, step):
        part = mine[start : start + step]
        passes = -(-min(step, longest - start) // unit) * unit // micro_batch_size
        _run_schedule(recorder, part, passes, micro_batch_size, filler=blocks[:1])
        recorder.check_finite()
        if progress is not None:
            done = min(len(blocks), (start + step) * layout.data) - start * layout.data
            progress(done)


def _run_schedule(
    recorder: Recorder, blocks: torch.Tensor, passes: int, micro_batch_size: int, filler: torch.Tensor
) -> None:
    """``[n, s + 1]`` blocks in ``passes`` micro-batches; samples beyond ``n`` are ``filler`` and do not count."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    chunks = recorder.chunks
    missing = passes * micro_batch_size - len(blocks)
    filled = torch.cat([blocks, filler.expand(missing, -1)])
    rows = [min(max(len(blocks) - i * micro_batch_size, 0), micro_batch_size) for i in range(passes)]
    batches = list(zip(filled.split(micro_batch_size), rows, strict=True))
    width = blocks.shape[1]

    def forward_step(iterator: Iterator[tuple[torch.Tensor, int]], model: GPTModel) -> tuple[torch.Tensor, Any]:
        batch, recorder.rows = next(iterator)
        inputs = batch[:, :-1].to(next(model.parameters()).device).contiguous()
        positions = torch.arange(width - 1, device=inputs.device).expand_as(inputs)
        # No mask: Megatron's attention is causal of itself.
        return model(inputs, positions, None), _nothing

    # Each chunk of an interleaved pipeline reads the micro-batches for itself.
    iterators = [iter(batches) for _ in chunks]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=passes,
        seq_length=width - 1,
        micro_batch_size=micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )


def _nothing(output: torch.Tensor, *, non_loss_data: bool = True) -> None:
    """What is kept of a pass: the hooks have it already. The signature is Megatron's ``collect_non_loss_data``."""


def _collect(recorder: Recorder, shape: ModelShape, *, samples: int, length: int, fingerprint: str | None) -> Scores:
    """Statistics of this rank's units over its samples -> scores of all units over all samples, on every rank."""
    groups, batch = recorder.groups, recorder.batch
    device = next(recorder.chunks[0].parameters()).device

    def units(site: str, size: int, *, tensor_parallel: bool) -> torch.Tensor:
        """``[L, size]`` scores of one site."""
        scores = torch.zeros(shape.num_layers, size, dtype=torch.float64, device=device)
        for (layer, where), statistics in sorted(recorder.statistics.items()):
            if where == site:
                found = batch.finish(batch.all_reduce(statistics, groups.dp), samples)
                scores[layer] = _gather(found, groups.tp) if tensor_parallel else found
        # Each layer is on one pipeline stage; the others hold zeros for it.
        dist.all_reduce(scores, group=groups.pp)
        return scores.cpu()

    heads = units("attention", shape.num_attention_heads, tensor_parallel=True)
    norms = [units(site, shape.hidden_size, tensor_parallel=False) for site in ("input_norm", "mlp_norm")]
    cosines = torch.zeros(shape.num_layers, dtype=torch.float64, device=device)
    for (layer, where), statistics in recorder.statistics.items():
        if where == "block":
            cosines[layer] = statistics[0, 0]
    for group in (groups.pp, groups.dp, *([groups.tp] if groups.layout.sequence_parallel else [])):
        dist.all_reduce(cosines, group=group)
    return Scores(
        ffn=units("ffn", shape.ffn_hidden_size, tensor_parallel=True),
        heads=heads,
        groups=torch.linalg.vector_norm(heads.view(shape.num_layers, shape.num_query_groups, -1), dim=-1),
        hidden=sum(norms, torch.zeros(())).sum(0),
        layers=1 - cosines.cpu() / (samples * length),
        shape=shape,
        samples=samples,
        tokens=samples * length,
        sequence=recorder.sequence.name,
        batch=batch.name,
        fingerprint=fingerprint,
    )


def _gather(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """``[units/tp]`` -> ``[units]``: Megatron cuts heads and neurons into equal runs by rank."""
    world = dist.get_world_size(group)
    if world == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world)]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts)
