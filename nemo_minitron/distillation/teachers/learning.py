"""A teacher that is trained during the distillation: correction and distillation at the same time.

Before each step of the student, the teacher's forward pass over the step's micro-batches also computes the
language-model loss of their labels, and its backward pass follows in the same schedule. The student learns from the
hidden states of that same forward pass. The teacher's optimizer steps after the student's: until then the output layer
must be the one that belongs to those hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from nemo.core.optim import McoreDistributedOptimizer
from nemo.core.optim.lr_scheduler import CosineAnnealing

from nemo_minitron.distillation.losses.fused_head import OutputHead, fused_head_loss, without_output_layer
from nemo_minitron.distillation.losses.vocabulary_parallel import vocabulary_parallel_cross_entropy
from nemo_minitron.distillation.teachers.frozen import head_of
from nemo_minitron.distillation.training.guards import finite_gradients
from nemo_minitron.errors import CheckpointError, NonFiniteError
from nemo_minitron.runtime.context import rank_batch
from nemo_minitron.runtime.groups import Groups
from nemo_minitron.runtime.masks import documents_masked
from nemo_minitron.runtime.model import build_model

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from nemo_minitron.checkpoints.base import Checkpoint
    from nemo_minitron.distillation.losses.state_hooks import TeacherStates

__all__ = ["CorrectTeacher", "LearningTeacher"]

_STATE = "teacher_correction"
"""The teacher's part of a training checkpoint, and with a dot the beginning of its tensors' names."""


class LearningTeacher:
    """A model that is trained on the labels, in the student's ranks and layout.

    Memory: weights, gradients and a share of the distributed optimizer's state, as of any model that is trained; of
    each micro-batch one ``[s, b, H]`` on the last stage, and what its own backward pass needs while it is in flight.

    Args:
        chunks: of this rank, from :func:`~nemo_minitron.runtime.model.build_model`, filled.
        groups: of this process.
        vocab_size: true vocabulary.
        optimizer: AdamW's settings, the peak learning rate among them.
        min_lr, warmup_steps, steps: as the student's: linear warm-up, then cosine to ``min_lr`` at ``steps``.
        chunked: output layer and loss go together over chunks of tokens
            (:mod:`~nemo_minitron.distillation.losses.fused_head`).

    Attributes:
        states: the states inside the teacher, where intermediate losses need them; else None.
        learns: whether :meth:`run` computes gradients; off in validations.
        lm_loss: of the last training step, nats per token; on the last stage, None elsewhere.
    """

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        groups: Groups,
        *,
        vocab_size: int,
        optimizer: OptimizerConfig,
        min_lr: float,
        warmup_steps: int,
        steps: int,
        chunked: bool = False,
    ) -> None:
        self.groups, self.vocab_size, self.chunked = groups, vocab_size, chunked
        self.states: TeacherStates | None = None
        self.learns = False
        self.lm_loss: float | None = None
        settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=optimizer.bf16)
        for chunk in chunks:
            chunk.config.calculate_per_token_loss = True
            chunk.config.finalize_model_grads_func = finalize_model_grads
            chunk.train()
        self.chunks = list(chunks)
        self.wrapped = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
        self.optimizer = McoreDistributedOptimizer(get_megatron_optimizer(optimizer, self.wrapped))
        for group in self.optimizer.param_groups:
            # Megatron leaves this to its own scheduler: norms and biases are not decayed.
            group["weight_decay"] *= group["wd_mult"]
        self.scheduler = CosineAnnealing(
            self.optimizer, max_steps=steps, warmup_steps=warmup_steps, constant_steps=0, min_lr=min_lr
        )
        self._last = self.chunks[-1] if groups.is_last_stage else None
        self._hidden: list[torch.Tensor] = []
        if self._last is not None:
            # The decoder's output is what the output layer gets: the final norm is in it.
            self._last.decoder.register_forward_hook(
                lambda module, inputs, output: self._hidden.append(output.detach())
            )

    @classmethod
    def load(cls, checkpoint: Checkpoint, groups: Groups, *, dtype: torch.dtype, **settings: Any) -> LearningTeacher:
        """Build this rank's part of the teacher and fill it; ``settings`` as of the class.

        Raises:
            ShapeError: if the layout cannot split it.
            CheckpointError: if the checkpoint cannot be read.
        """
        from nemo_minitron.checkpoints.live import load_into

        # Megatron says with the initialisation alone which parameters are shards; without it, the norm of the gradient
        # would count those of the first tensor-parallel rank only.
        chunks = build_model(checkpoint.shape, checkpoint.architecture, groups, dtype=dtype, initialize=True)
        load_into(chunks, checkpoint, groups)
        return cls(chunks, groups, vocab_size=checkpoint.shape.vocab_size, **settings)

    def run(self, batches: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Run the micro-batches; if :attr:`learns`, also the backward pass: gradients are then complete on every rank.

        Args:
            batches: on every rank, as for :meth:`Teacher.run`, with ``labels`` and ``loss_mask`` ``[b, s]``.

        Returns:
            On the last pipeline stage one ``[s, b, H]`` per micro-batch, elsewhere an empty list.

        Raises:
            NonFiniteError: before any gradient is computed.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self._hidden = []
        if self.learns:
            for chunk in self.wrapped:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        micro_batch, sequence = batches[0]["tokens"].shape
        packed = any((batch["position_ids"][..., 1:] == 0).any() for batch in batches)
        several = len(self.wrapped) > 1
        recorded = self.states.recorded() if self.states is not None else nullcontext()
        with recorded, documents_masked(self.chunks, masked=packed), torch.set_grad_enabled(self.learns):
            reports: list[torch.Tensor] = get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=[iter(batches) for _ in self.wrapped] if several else iter(batches),
                model=self.wrapped if several else self.wrapped[0],
                num_microbatches=len(batches),
                seq_length=sequence,
                micro_batch_size=micro_batch,
                forward_only=not self.learns,
            )
        hidden, self._hidden = self._hidden, []
        if self.learns and self.groups.is_last_stage:
            sums = torch.stack(reports).sum(0)
            dist.all_reduce(sums, group=self.groups.dp_cp)
            self.lm_loss = (sums[0] / sums[1]).item()
        return hidden

    def _forward_step(self, data: Any, model: Any) -> tuple[torch.Tensor, Any]:
        batch = rank_batch(next(data), self.groups)
        device, chunk = next(self.chunks[0].parameters()).device, model.module
        headless = without_output_layer(chunk) if self.chunked and chunk.post_process else nullcontext()
        with headless as weights:
            output = model(
                batch["tokens"].to(device), batch["position_ids"].to(device), batch["attention_mask"].to(device)
            )

        def loss_of(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            mask, labels = batch["loss_mask"].to(device).float().T, batch["labels"].to(device).T
            output = output.transpose(0, 1)
            if weights is not None:
                layer = OutputHead(output, weights[0], chunk.config.sequence_parallel)
                loss = fused_head_loss(
                    layer, None, self.groups.tp, vocab_size=self.vocab_size, loss=None, token_weights=mask,
                    labels=labels,
                ).total  # fmt: skip
            else:
                losses = vocabulary_parallel_cross_entropy(
                    output, labels, self.groups.tp, vocab_size=self.vocab_size, inplace=self.learns
                )
                loss = (losses * mask).sum()
            tokens = mask.sum()
            if not torch.isfinite(loss):
                raise NonFiniteError(
                    f"the teacher's language-model loss is {loss.item()}; nothing was updated. "
                    "Lower teacher_correction.lr, or look for damaged weights with `minitron evaluate`"
                )
            return loss, tokens.to(torch.int), torch.stack([loss.detach(), tokens])

        return output, loss_of

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the output layer, on the last stage: ``[s, b, H]`` -> ``[s, b, V/tp]``."""
        assert self._last is not None, "only the last pipeline stage has an output layer"
        weight = None
        if self._last.share_embeddings_and_output_weights:
            weight = self._last.shared_embedding_or_output_weight()
        logits: torch.Tensor
        logits, _ = self._last.output_layer(hidden, weight=weight)
        return logits

    def head(self, hidden: torch.Tensor) -> OutputHead:
        """See :class:`~nemo_minitron.distillation.teachers.frozen.TeacherSource`."""
        assert self._last is not None, "only the last pipeline stage has an output layer"
        tied = self._last.share_embeddings_and_output_weights
        return head_of(self._last, hidden, self._last.shared_embedding_or_output_weight() if tied else None)

    def step(self) -> float:
        """Update the weights; every rank calls it after :meth:`run`. Returns the norm of the gradient."""
        _, norm, _ = self.optimizer.step()
        self.scheduler.step()
        return float(norm or 0.0)

    def sharded_state(self, *, loading: bool = False) -> dict[str, Any]:
        """Weights and optimizer for Megatron's distributed checkpoints, under names of their own."""
        from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

        model = {f"chunk_{index}": chunk.sharded_state_dict() for index, chunk in enumerate(self.chunks)}
        optimizer = self.optimizer.mcore_optimizer.sharded_state_dict(
            model, is_loading=loading, sharding_type="fully_sharded_model_space"
        )
        state = {"model": model, "optimizer": optimizer}
        add_prefix_for_sharding(state, f"{_STATE}.")
        return state

    def restore(self, weights: Path) -> None:
        """Go on from the state in a training checkpoint's ``weights`` directory.

        Raises:
            CheckpointError: if there is none.
        """
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.core import CheckpointingException

        try:
            # What is not sharded comes back by its place in the checkpoint.
            state = dist_checkpointing.load({_STATE: self.sharded_state(loading=True)}, str(weights))[_STATE]
        except (CheckpointingException, KeyError) as error:
            raise CheckpointError(
                f"{weights}: holds no state of a teacher that is corrected meanwhile ({error}); it was trained without "
                "teacher_correction: go on without it, or begin anew with resume=false"
            ) from error
        for index, chunk in enumerate(self.chunks):
            chunk.load_state_dict(state["model"][f"chunk_{index}"])
        self.optimizer.mcore_optimizer.load_state_dict(state["optimizer"])

    def close(self) -> None:
        """Nothing to close."""


class CorrectTeacher(pl.Callback):
    """Lets the teacher learn in training steps, and keeps its state in the training's checkpoints."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @property
    def _teacher(self) -> LearningTeacher:
        teacher: LearningTeacher = self._model.teacher
        return teacher

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on from a checkpoint."""
        from nemo.lightning.io.pl import ckpt_to_weights_subdir

        if trainer.ckpt_path is not None and trainer.global_step:
            self._teacher.restore(Path(ckpt_to_weights_subdir(trainer.ckpt_path, is_saving=False)))

    def on_train_batch_start(self, *_: Any) -> None:
        """Switch learning on: a training step follows."""
        self._teacher.learns = True

    def on_validation_start(self, *_: Any) -> None:
        """Switch learning off: a validation follows."""
        self._teacher.learns = False

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Before either model is updated.

        Raises:
            NonFiniteError: for a gradient that is not finite; nothing was updated.
        """
        finite_gradients(self._teacher.wrapped, pl_module.groups, f"the teacher at step {trainer.global_step}")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """The student's step has ended: the teacher's follows."""
        teacher = self._teacher
        lr = teacher.optimizer.param_groups[0]["lr"]
        norm = teacher.step()
        if teacher.lm_loss is not None:
            pl_module.further = {"teacher_lm_loss": teacher.lm_loss, "teacher_lr": lr, "teacher_grad_norm": norm}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the teacher's sharded state; NeMo writes it as it writes the student's."""
        checkpoint[_STATE] = self._teacher.sharded_state()

    def state_dict(self) -> dict[str, Any]:
        """The position of the learning rate."""
        return {"scheduler": self._teacher.scheduler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self._teacher.scheduler.load_state_dict(state_dict["scheduler"])
