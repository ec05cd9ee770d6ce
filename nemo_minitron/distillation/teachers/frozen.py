"""The interface of a teacher, and the default teacher: the frozen model on the student's ranks, in the same layout.

It runs before the student, as a forward-only pass of Megatron's own schedule over the same micro-batches. So nothing of
it goes through the student's pipeline, the depths of the two models may differ, and tensor, pipeline and sequence
parallelism work as in any Megatron model. Until the student's pass, the last hidden state of each micro-batch,
``[s, b, H]``, is kept, not its logits, which are V/H times larger; the output layer is applied when the loss needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch

from nemo_minitron.distillation.losses.fused_head import OutputHead
from nemo_minitron.runtime.context import rank_batch
from nemo_minitron.runtime.groups import Groups
from nemo_minitron.runtime.masks import documents_masked
from nemo_minitron.runtime.model import build_model

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from nemo_minitron.checkpoints.base import Checkpoint
    from nemo_minitron.distillation.losses.kernels import TopTokens
    from nemo_minitron.distillation.losses.state_hooks import TeacherStates

__all__ = ["Teacher", "TeacherSource", "forward_only", "head_of"]


class TeacherSource(Protocol):
    """Source of the teacher's logits: a model on the same or other ranks (:mod:`placement`), or a cache.

    Attributes:
        states: the states inside the teacher; None where they are not available.
    """

    states: TeacherStates | None

    def run(self, batches: Sequence[dict[str, torch.Tensor]]) -> list[Any]:
        """Prepare the micro-batches of a step; every rank calls it.

        Returns:
            On the last pipeline stage what is kept of each micro-batch for its loss, elsewhere an empty list.
        """
        ...

    def logits(self, kept: Any) -> torch.Tensor | TopTokens:
        """Input of a micro-batch's loss, on the last pipeline stage: ``[s, b, V/tp]`` logits, or likeliest tokens.

        The columns are those of the student's partition, or of the teacher's own in the student's tensor-parallel
        group; where the number of columns on a rank is the same, so are these.
        """
        ...

    def head(self, kept: Any) -> OutputHead | None:
        """The hidden states of a micro-batch and the output layer that makes :meth:`logits` of them, on the last
        pipeline stage; None where the logits come from elsewhere.
        """
        ...

    def close(self) -> None:
        """The training is over."""
        ...


class Teacher:
    """A model that only runs forward.

    Memory: its weights, and for each micro-batch of a step one ``[s, b, H]`` on the last stage (``s / tp`` under
    sequence parallelism).

    Attributes:
        states: the states inside the teacher, where intermediate losses need them; else None.
    """

    def __init__(self, chunks: Sequence[GPTModel], groups: Groups) -> None:
        self.groups = groups
        self.chunks = list(chunks)
        for chunk in self.chunks:
            chunk.requires_grad_(False)
            chunk.eval()
        self.states: TeacherStates | None = None
        self._last = self.chunks[-1] if groups.is_last_stage else None
        self._output_weight: torch.Tensor | None = None
        if self._last is not None:
            if self._last.share_embeddings_and_output_weights:
                self._output_weight = self._last.shared_embedding_or_output_weight()
            # GPTModel then returns what its output layer would get; the decoder still applies the final norm.
            self._last.post_process = False

    @classmethod
    def load(cls, checkpoint: Checkpoint, groups: Groups, *, dtype: torch.dtype = torch.float32) -> Teacher:
        """Build this rank's part of the teacher and fill it.

        Raises:
            ShapeError: if the layout cannot split it.
            CheckpointError: if the checkpoint cannot be read.
        """
        from nemo_minitron.checkpoints.live import load_into

        chunks = build_model(checkpoint.shape, checkpoint.architecture, groups, dtype=dtype)
        load_into(chunks, checkpoint, groups)
        return cls(chunks, groups)

    def drop_output_layer(self) -> None:
        """Free the output layer, if another object applies it to the hidden states."""
        if self._last is not None:
            self._output_weight = None
            self._last.output_layer = None

    @torch.no_grad()
    def run(self, batches: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Run the micro-batches.

        Args:
            batches: on every rank; each with ``tokens`` and ``position_ids`` ``[b, s]`` and ``attention_mask``
                ``[b or 1, 1, s, s]`` (True where attention is not allowed), all of one shape.

        Returns:
            On the last pipeline stage one ``[s (/cp), b, H]`` per micro-batch, elsewhere an empty list.
        """
        recorded = self.states.recorded() if self.states is not None else nullcontext()
        with recorded:
            return forward_only(self.chunks, self.groups, batches)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the output layer, on the last stage.

        Args:
            hidden: ``[s, b, H]``.

        Returns:
            ``[s, b, V/tp]``.
        """
        assert self._last is not None, "only the last pipeline stage has an output layer"
        logits: torch.Tensor
        logits, _ = self._last.output_layer(hidden, weight=self._output_weight)
        return logits

    def head(self, hidden: torch.Tensor) -> OutputHead:
        """See :class:`TeacherSource`."""
        return head_of(self._last, hidden, self._output_weight)

    def close(self) -> None:
        """Nothing to close."""


def head_of(model: GPTModel | None, hidden: torch.Tensor, weight: torch.Tensor | None) -> OutputHead:
    """Hidden states and the output layer of a model's last chunk.

    Args:
        model: the chunk.
        hidden: ``[s, b, H]``, ``[s/tp, b, H]`` under sequence parallelism.
        weight: of the output layer where it is tied to the embedding; else None.
    """
    assert model is not None, "only the last pipeline stage has an output layer"
    return OutputHead(
        hidden, model.output_layer.weight if weight is None else weight, scattered=model.config.sequence_parallel
    )


def forward_only(
    chunks: Sequence[GPTModel],
    groups: Groups,
    batches: Sequence[dict[str, torch.Tensor]],
    *,
    keep: Callable[[torch.Tensor], torch.Tensor] = lambda output: output,
) -> list[torch.Tensor]:
    """Run micro-batches through a model by Megatron's schedule. Every rank of the model calls it.

    Args:
        chunks: of this rank.
        groups: of this process.
        batches: see :meth:`Teacher.run`.
        keep: what is kept of an output.

    Returns:
        On the last pipeline stage what is kept of each micro-batch, elsewhere an empty list.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    device = next(chunks[0].parameters()).device

    def forward_step(data: Any, model: GPTModel) -> tuple[torch.Tensor, Any]:
        batch = rank_batch(next(data), groups)
        output = model(
            batch["tokens"].to(device),
            batch["position_ids"].to(device),
            batch["attention_mask"].to(device),
        )
        return output, lambda hidden, non_loss_data=False: keep(hidden)

    chunks = list(chunks)
    micro_batch, sequence = batches[0]["tokens"].shape
    packed = any((batch["position_ids"][..., 1:] == 0).any() for batch in batches)
    with documents_masked(chunks, masked=packed):
        outputs: list[torch.Tensor] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(batches),
            seq_length=sequence,
            micro_batch_size=micro_batch,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return outputs if groups.is_last_stage else []
