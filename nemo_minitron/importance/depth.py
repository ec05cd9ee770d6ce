"""Measure a live Megatron model without some of its layers, under any parallel layout.

The depth criteria of Minitron (arXiv 2407.14679, section 2.2; arXiv 2408.11796, section 4): the loss, and the accuracy
on a task, with layers left out. Block influence needs one ordinary pass and comes with the scores
(:mod:`~nemo_minitron.importance.score`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from nemo_minitron.data.blocks import Blocks
from nemo_minitron.importance.candidates import Candidate, diverge
from nemo_minitron.importance.depth_problem import DepthProblem, accuracy_of
from nemo_minitron.importance.depth_scores import DepthScores, Measurement
from nemo_minitron.importance.masking import Prefix, left_out
from nemo_minitron.runtime.forward import block_losses
from nemo_minitron.runtime.groups import Groups
from nemo_minitron.runtime.journal import Journal
from nemo_minitron.runtime.progress import Advance
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from nemo_minitron.data.tasks import EncodedTask

__all__ = ["layer_importance", "task_accuracy"]


def layer_importance(
    chunks: list[GPTModel],
    blocks: torch.Tensor | Blocks,
    groups: Groups,
    *,
    shape: ModelShape,
    micro_batch_size: int = 1,
    single: bool = True,
    block_lengths: Sequence[int] = (),
    greedy: int = 0,
    greedy_by: str = "loss",
    task: EncodedTask | None = None,
    task_name: str = "task",
    fingerprint: str | None = None,
    journal: Journal[tuple[Candidate, Measurement]] | None = None,
    reuse_prefix: bool = True,
    progress: Advance | None = None,
) -> DepthScores:
    """Measure the model without each layer, without each run of layers, and with layers removed greedily.

    Every rank calls it, and every rank gets all results. Layers are masked (:func:`~.masking.left_out`): the loss
    without a layer is that of the model with the layer deleted, and no weight is copied. The passes of neighbouring
    candidates begin alike; with ``reuse_prefix`` the hidden states at the end of the common beginning are kept, so that
    measuring all single layers runs half of the layers. Results are the same bit by bit. Memory beyond the model: that
    of :func:`~nemo_minitron.runtime.forward.block_losses`, and on the CPU the kept states, ``tokens x H`` of this
    data-parallel rank's share of the data on one pipeline stage.

    Args:
        chunks: this rank's part of the model, as ``runtime.model.build_model`` gives it, with weights loaded.
        blocks: ``[n, s + 1]`` int64 calibration tokens, the same on every rank. Where they say which documents they
            hold and which labels count, attention stays within each document and the loss is over those labels.
        groups: of this process.
        shape: of the whole model.
        micro_batch_size: blocks, or choices of the task, of one forward pass.
        single: measure without each layer alone.
        block_lengths: measure without each run of so many neighbouring layers.
        greedy: remove up to so many layers, one a round: the layer that costs least is removed, and all others are
            measured again without it.
        greedy_by: criterion of ``greedy``, "loss" or "task".
        task: measure the accuracy on it, too.
        task_name: kept with the results.
        fingerprint: of the weights, kept with the results.
        journal: takes each result as it comes, and gives those of an earlier process; used on global rank 0.
        reuse_prefix: keep hidden states of the common beginning of passes.
        progress: called with 1 for each candidate (those of the journal at once), the whole model not counted.

    Raises:
        DataError: for no calibration blocks, or one in which no label counts.
        ShapeError: for blocks that are longer than the model or leave no layer, or a sequence that sequence parallelism
            does not divide.
        ConfigError: if nothing is to be measured, or not the criterion of ``greedy_by``.
        NonFiniteError: if a loss is NaN or infinite, naming the layers that were left out.
    """
    problem = DepthProblem(
        Blocks.of(blocks),
        shape,
        single=single,
        block_lengths=block_lengths,
        greedy=greedy,
        greedy_by=greedy_by,
        task=task,
        task_name=task_name,
        fingerprint=fingerprint,
    )
    blocks, counted = problem.blocks, problem.counted
    prefix: Prefix | None = None

    def measure(layers: Candidate, following: Candidate | None) -> Measurement:
        """Measure a candidate, from ``prefix`` on if it fits, and keep the states that ``following`` can start from."""
        nonlocal prefix
        start = prefix if prefix is not None and prefix.serves(layers) else None
        split = diverge(layers, following) if reuse_prefix and following is not None else None
        keep = split if split is not None and (start is None or split >= start.layer) else None
        with left_out(chunks, layers, start=start, keep=keep) as prefix:
            losses = block_losses(
                chunks,
                groups,
                blocks.tokens,
                micro_batch_size,
                vocab_size=shape.vocab_size,
                counted=counted,
                segments=blocks.segments,
            )
            accuracy = None if task is None else task_accuracy(chunks, groups, task, micro_batch_size, shape.vocab_size)
        return problem.measurement(layers, losses, accuracy)

    def measure_all(candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Measurement]]:
        for layers, following in itertools.zip_longest(candidates, candidates[1:]):
            yield layers, measure(layers, following)

    device = next(chunks[0].parameters()).device
    return problem.solve(measure_all, device=device, journal=journal, progress=progress)


def task_accuracy(
    chunks: list[GPTModel], groups: Groups, task: EncodedTask, micro_batch_size: int, vocab_size: int
) -> float:
    """Share of the questions whose right choice has the highest log-likelihood for its length in characters.

    The ``acc_norm`` of lm-eval. On every rank; every rank gets it. NaN if any log-likelihood is NaN or infinite.
    """
    rows = []
    for tokens, counted in zip(task.tokens, task.counted, strict=True):
        means = block_losses(chunks, groups, tokens, micro_batch_size, vocab_size=vocab_size, counted=counted)
        rows.append(means * counted.sum(dim=1))
    return accuracy_of(task, rows)
