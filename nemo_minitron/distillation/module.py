"""NeMo 2's GPT module, trained on a teacher's logits, and states inside it, instead of labels.

The teacher is kept outside the module tree, so the student's optimizer, DDP and checkpoints never see it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, cast

import lightning.pytorch as pl
import torch
from nemo.collections.llm.gpt.model.base import GPTConfig
from nemo.lightning.megatron_parallel import MegatronStep

from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.tokenizer.comparison import CommonVocabulary
from nemo_minitron.config import IntermediateConfig, LossConfig
from nemo_minitron.distillation.losses.balance import Balance
from nemo_minitron.distillation.losses.common import CommonTokens
from nemo_minitron.distillation.losses.fused_head import OutputHead, fused_head_loss
from nemo_minitron.distillation.losses.layer_maps import layer_maps
from nemo_minitron.distillation.losses.state_hooks import Plan, StudentLosses, TeacherStates
from nemo_minitron.distillation.losses.vocabulary_parallel import TokenLosses, vocabulary_parallel_loss
from nemo_minitron.distillation.losses.weighted import WeightedLosses
from nemo_minitron.distillation.teachers.frozen import TeacherSource
from nemo_minitron.distillation.teachers.open import loss_of, open_teacher
from nemo_minitron.distillation.teachers.placement import TeacherPlacement
from nemo_minitron.distillation.training.language_model import LM_LOSS, TokenLoss, TrainedModel, plain_context
from nemo_minitron.errors import PreemptedError
from nemo_minitron.runtime import versions
from nemo_minitron.runtime.context import rank_part
from nemo_minitron.runtime.groups import ParallelLayout

if TYPE_CHECKING:
    from nemo.collections.common.tokenizers.tokenizer_spec import TokenizerSpec
    from nemo.lightning.pytorch.optim import OptimizerModule

    from nemo_minitron.distillation.teachers.frozen import Teacher
    from nemo_minitron.distillation.teachers.learning import LearningTeacher

__all__ = ["DistillationLoss", "DistillationModel", "TeacherFirst", "measured_of", "teacher_closed"]

HIDDEN = "teacher_hidden"
STATES = "teacher_states"
KL = "kl"
"""The divergence of teacher and student by its name in the metrics, whichever it is."""


class DistillationModel(TrainedModel):
    """The student, with its teacher.

    Args:
        config: NeMo's configuration of the student; see :class:`TrainedModel`.
        student: initial weights.
        teacher: the model to learn from. None where a cache takes its place.
        layout: parallel layout of the student, and of the teacher unless it has its own.
        loss: of a token's logits.
        intermediate: losses of the states inside the models; None for none.
        kept_layers: the teacher's layers that a student pruned from it kept (see
            :func:`~nemo_minitron.distillation.losses.layer_maps.layer_maps`).
        placement: where the teacher runs; intermediate losses need it on the student's ranks, in the same layout.
        common: the token ids that both share; None where they are all.
        correction: settings of a :class:`~nemo_minitron.distillation.teachers.learning.LearningTeacher`; None for a
            teacher that stays as it is.
        chunked: as of :class:`TrainedModel`; the teacher's logits are made in chunks too.
        optim, tokenizer: as in NeMo's ``GPTModel``.

    Attributes:
        balance: the values of all losses, and the weight of the intermediate ones.
        common_tokens: what the loss of the logits is over; None for the whole vocabulary of both.

    Raises:
        ConfigError: for intermediate losses that the models do not fit, or a loss that a cache does not hold.
    """

    VALIDATED = (KL, LM_LOSS)
    KEPT: ClassVar[tuple[str, ...]] = (HIDDEN, STATES)
    """What a micro-batch holds beyond what NeMo's data step knows."""

    def __init__(
        self,
        config: GPTConfig,
        student: Checkpoint,
        teacher: Checkpoint | None,
        layout: ParallelLayout,
        loss: LossConfig | None = None,
        intermediate: IntermediateConfig | None = None,
        kept_layers: Sequence[int] | None = None,
        placement: TeacherPlacement | None = None,
        correction: Mapping[str, Any] | None = None,
        common: CommonVocabulary | None = None,
        chunked: bool = False,
        optim: OptimizerModule | None = None,
        tokenizer: TokenizerSpec | None = None,
    ) -> None:
        super().__init__(config, student, layout, chunked, optim=optim, tokenizer=tokenizer)
        self._teacher_checkpoint = teacher
        self._placement = placement or TeacherPlacement()
        self._correction = correction
        self._common = common
        # Nothing differs from one vocabulary where there is nothing to leave out.
        whole = common is None or common.whole
        self.common_tokens = None if common is None or whole else CommonTokens(common.size, common.left_out)
        self._loss = loss_of(self._placement, loss or LossConfig())
        self._intermediate = intermediate or IntermediateConfig()
        self._layer_maps = layer_maps(
            self._intermediate,
            student.shape,
            student.shape if teacher is None else teacher.shape,
            tensor=layout.tensor,
            kept_layers=kept_layers,
        )
        self.balance = Balance(list(self._intermediate.weights()), dynamic=self._intermediate.balance == "dynamic")
        self.losses: StudentLosses | None = None
        # In a list, because a module assigned to an attribute would become a part of the student.
        self._teacher: list[TeacherSource] = []

    def io_init(self, **kwargs: Any) -> Any:
        """See :func:`plain_context`."""
        return plain_context(kwargs["student"], kwargs)

    def reinit(self) -> DistillationModel:
        """A further chunk of the student, which shares teacher and balance."""
        chunk = type(self)(
            self.config,
            self._initial,
            self._teacher_checkpoint,
            self._layout,
            self._loss,
            placement=self._placement,
            correction=self._correction,
            common=self._common,
            chunked=self._chunked,
        )
        chunk._intermediate, chunk._layer_maps, chunk.balance = self._intermediate, self._layer_maps, self.balance
        chunk._teacher, chunk._root, chunk.rounding = self._teacher, self._root, self.rounding
        return chunk

    @property
    def teacher(self) -> TeacherSource:
        """The teacher; it exists once the model is configured."""
        return self._teacher[0]

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Build this rank's part of the student and fill it; with the last chunk, the teacher too."""
        if hasattr(self, "module"):
            return
        super().configure_model(**versions.virtual_pipeline_stage(vp_stage))
        groups, plan = self.groups, None
        if self._intermediate.weights():
            assert self._teacher_checkpoint is not None, "intermediate losses are of a model"
            shapes = self._initial.shape, self._teacher_checkpoint.shape
            plan = Plan.of(self._intermediate, self._layer_maps, *shapes, groups)
            self.losses = StudentLosses(plan, self.module, groups, self.balance)
        if (vp_stage or 0) + 1 == (self._layout.virtual_pipeline or 1):
            dtype = torch.bfloat16 if self.config.bf16 else torch.float32
            teacher: TeacherSource
            if self._correction is None:
                teacher = open_teacher(
                    self._placement,
                    self._teacher_checkpoint,
                    groups,
                    dtype=dtype,
                    loss=self._loss,
                    student_rows=self.vocab_size,
                    common=self.common_tokens,
                )
            else:
                from nemo_minitron.distillation.teachers.learning import LearningTeacher

                assert self._teacher_checkpoint is not None, "the configuration was checked"
                teacher = LearningTeacher.load(self._teacher_checkpoint, groups, dtype=dtype, **self._correction)
            if plan is not None:
                near = cast("Teacher | LearningTeacher", teacher)  # the configuration was checked
                near.states = TeacherStates(plan, near.chunks, groups)
            self._teacher.append(teacher)

    def data_step(self, dataloader_iter: Iterator[Any]) -> dict[str, Any]:
        """NeMo's data step; it would drop what it does not know and, on some stages, the mask: they are kept here.

        The batch itself stays as it is: the chunks of a virtual pipeline share it.
        """
        item = next(dataloader_iter)
        batch = item[0] if isinstance(item, tuple) else item
        output: dict[str, Any] = super().data_step(iter([{k: v for k, v in batch.items() if k not in self.KEPT}]))
        output.update({name: batch.get(name) for name in self.KEPT})
        if output["loss_mask"] is None:
            output["loss_mask"] = rank_part(batch["loss_mask"], self.groups, dim=1).cuda(non_blocking=True)
        return output

    def forward_step(self, batch: dict[str, Any]) -> torch.Tensor:
        """See :class:`TrainedModel`."""
        taken = self.losses.micro_batch(batch, batch[STATES]) if self.losses is not None else nullcontext()
        with taken:
            return super().forward_step(batch)

    def loss_reduction(self, *, validation: bool) -> TokenLoss:
        """The divergence; in validation also the language-model loss."""
        return DistillationLoss(self, validation=validation)


class DistillationLoss(TokenLoss):
    """The loss of the logits, as configured. Reports ``kl``, the divergence; where labels take part, ``lm_loss``."""

    NAME = "distillation"

    def measure(self, batch: dict[str, Any], logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See :class:`TokenLoss`."""
        model: DistillationModel = self._model
        losses = vocabulary_parallel_loss(
            logits,
            model.teacher.logits(batch[HIDDEN]),
            model.groups.tp,
            vocab_size=model.vocab_size,
            loss=model._loss,
            labels=batch["labels"].T if self.validation or model._loss.label_weight else None,
            inplace=not self.validation,
            common=model.common_tokens,
        )
        return losses.total, measured_of(losses)

    def measure_chunks(
        self, batch: dict[str, Any], layer: OutputHead, mask: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See :class:`TokenLoss`."""
        model: DistillationModel = self._model
        kept = batch[HIDDEN]
        theirs = model.teacher.head(kept)
        losses = fused_head_loss(
            layer,
            model.teacher.logits(kept) if theirs is None else theirs,
            model.groups.tp,
            vocab_size=model.vocab_size,
            loss=model._loss,
            token_weights=mask,
            labels=batch["labels"].T if self.validation or model._loss.label_weight else None,
            common=model.common_tokens,
        )
        return losses.total, measured_of(losses.tokens)


def measured_of(losses: TokenLosses | WeightedLosses) -> dict[str, torch.Tensor]:
    """The values of each token by their names in the metrics."""
    measured = {KL: losses.divergence}
    if losses.cross_entropy is not None:
        measured[LM_LOSS] = losses.cross_entropy
    return measured


@contextmanager
def teacher_closed(model: DistillationModel) -> Iterator[None]:
    """A training, after which the teacher is closed; after a stop in good order too, where all ranks stop at one step,
    and ranks of the teacher's own are to end as well.
    """
    try:
        yield
    except PreemptedError:
        model.teacher.close()
        raise
    model.teacher.close()


class TeacherFirst(pl.Callback):
    """Before each step, runs the teacher over the step's micro-batches and adds its states to them.

    After the step, gathers its losses.

    NeMo calls ``on_megatron_microbatches_start`` when the number of micro-batches is known and none has been drawn, and
    ``on_megatron_microbatches_end`` on every rank when all have run. This callback's state in a checkpoint is the
    balance of the losses.
    """

    def __init__(self, model: DistillationModel) -> None:
        self._model = model

    def on_megatron_microbatches_start(self, step: MegatronStep) -> None:
        """Replaces the step's micro-batches by copies that also hold the teacher's states."""
        items = [next(step.data) for _ in range(step.num_microbatches)]
        batches = [item[0] if isinstance(item, tuple) else item for item in items]
        teacher = self._model.teacher
        for batch, hidden in zip(batches, teacher.run(batches), strict=False):
            batch[HIDDEN] = hidden
        if teacher.states is not None:
            micro_batch, sequence = batches[0]["tokens"].shape
            for batch, states in zip(
                batches, teacher.states.exchanged(len(batches), micro_batch, sequence), strict=True
            ):
                batch[STATES] = states
        self._model.balance.begin(self._model.groups)
        step.data = iter(items)

    def on_megatron_microbatches_end(self, step: MegatronStep, microbatch_outputs: list[Any]) -> None:
        """Sums the losses over all ranks, where there are several to be weighed."""
        if self._model.balance.weighs:
            self._model.balance.end(self._model.groups, training=not step.forward_only)

    def state_dict(self) -> dict[str, Any]:
        """The weight of the intermediate losses in the next step."""
        return self._model.balance.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self._model.balance.load_state_dict(state_dict)
