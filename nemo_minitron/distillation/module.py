"""NeMo 2's GPT module, trained on a teacher's logits, and states inside it, instead of labels.

:class:`DistillationModel` is a plain model of its family to NeMo in every way: its checkpoints name ``LlamaModel``,
``Qwen2Model``, ... as their class, so a checkpoint of a distillation opens with plain NeMo. The teacher lives beside
it, outside the module tree: no optimizer, no DDP and no checkpoint ever sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import fiddle as fdl
import lightning.pytorch as pl
import torch
from nemo.collections.llm.gpt.model.base import GPTConfig, GPTModel
from nemo.lightning.megatron_parallel import MegatronLossReduction, MegatronStep

from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.live import load_into
from nemo_minitron.checkpoints.nemo2_config import model_class
from nemo_minitron.config import IntermediateConfig, LossConfig
from nemo_minitron.distillation.attach import Plan, StudentLosses, TeacherStates
from nemo_minitron.distillation.balance import Balance
from nemo_minitron.distillation.layers import layer_maps
from nemo_minitron.distillation.teacher import Teacher
from nemo_minitron.distillation.vocabulary_parallel import vocabulary_parallel_loss
from nemo_minitron.errors import NonFiniteError
from nemo_minitron.runtime.groups import Groups, ParallelLayout, current

if TYPE_CHECKING:
    from nemo.collections.common.tokenizers.tokenizer_spec import TokenizerSpec
    from nemo.lightning.pytorch.optim import OptimizerModule

__all__ = ["DistillationLoss", "DistillationModel", "TeacherFirst"]

HIDDEN = "teacher_hidden"
STATES = "teacher_states"


class DistillationModel(GPTModel):
    """The student, with its teacher.

    Args:
        config: NeMo's configuration of the student. Its ``calculate_per_token_loss`` is switched on, so that the loss
            of a step is the mean over all valid tokens of its global batch, however they fall on micro-batches and
            ranks.
        student: initial weights.
        teacher: the model to learn from; same vocabulary.
        layout: parallel layout of both.
        loss: of a token's logits.
        intermediate: losses of the states inside the models; None for none.
        kept_layers: of a student that was cut from the teacher, the layers that it kept (see
            :func:`~nemo_minitron.distillation.layers.layer_maps`).
        optim, tokenizer: as in NeMo's ``GPTModel``.

    Attributes:
        balance: the values of all losses, and the weight of the intermediate ones.

    Raises:
        ConfigError: for intermediate losses that the models do not fit.
    """

    _training_loss_reduction: DistillationLoss | None
    _validation_loss_reduction: DistillationLoss | None

    def __init__(
        self,
        config: GPTConfig,
        student: Checkpoint,
        teacher: Checkpoint,
        layout: ParallelLayout,
        loss: LossConfig | None = None,
        intermediate: IntermediateConfig | None = None,
        kept_layers: Sequence[int] | None = None,
        optim: OptimizerModule | None = None,
        tokenizer: TokenizerSpec | None = None,
    ) -> None:
        config.calculate_per_token_loss = True
        super().__init__(config, optim=optim, tokenizer=tokenizer)
        self._student_checkpoint = student
        self._teacher_checkpoint = teacher
        self._layout = layout
        self._loss = loss or LossConfig()
        self._intermediate = intermediate or IntermediateConfig()
        self._layer_maps = layer_maps(
            self._intermediate, student.shape, teacher.shape, tensor=layout.tensor, kept_layers=kept_layers
        )
        self.balance = Balance(list(self._intermediate.weights()), dynamic=self._intermediate.balance == "dynamic")
        self.losses: StudentLosses | None = None
        # In a list, because a module assigned to an attribute would become a part of the student.
        self._teacher: list[Teacher] = []
        self._root: list[DistillationModel] = [self]

    def io_init(self, **kwargs: Any) -> fdl.Config[GPTModel]:
        """What NeMo writes into the context of a checkpoint: the student as the plain model that it is."""
        plain = {name: value for name, value in kwargs.items() if name in ("config", "optim", "tokenizer")}
        return fdl.Config(model_class(kwargs["student"].architecture.family), **plain)

    def reinit(self) -> DistillationModel:
        """A further chunk of the student, which shares teacher and balance: NeMo asks for one a virtual stage.

        Without this method NeMo would build what the context names, a plain model.
        """
        chunk = DistillationModel(
            self.config, self._student_checkpoint, self._teacher_checkpoint, self._layout, self._loss
        )
        chunk._intermediate, chunk._layer_maps, chunk.balance = self._intermediate, self._layer_maps, self.balance
        chunk._teacher, chunk._root = self._teacher, self._root
        return chunk

    @property
    def root(self) -> DistillationModel:
        """The first chunk, which NeMo's trainer knows."""
        return self._root[0]

    @property
    def groups(self) -> Groups:
        """Megatron's groups, as NeMo's strategy made them."""
        return current(self._layout)

    @property
    def teacher(self) -> Teacher:
        """The teacher; there once the model is configured."""
        return self._teacher[0]

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Build this rank's part of the student and fill it; with the last chunk, the teacher too.

        Not earlier: tied embeddings are reduced while models are built, which the stages must do in one order.
        """
        if hasattr(self, "module"):
            return
        super().configure_model(vp_stage=vp_stage)
        groups = self.groups
        load_into([self.module], self._student_checkpoint, groups)
        plan = None
        if self._intermediate.weights():
            shapes = self._student_checkpoint.shape, self._teacher_checkpoint.shape
            plan = Plan.of(self._intermediate, self._layer_maps, *shapes, groups)
            self.losses = StudentLosses(plan, self.module, groups, self.balance)
        if (vp_stage or 0) + 1 == (self._layout.virtual_pipeline or 1):
            dtype = torch.bfloat16 if self.config.bf16 else torch.float32
            teacher = Teacher.load(self._teacher_checkpoint, groups, dtype=dtype)
            if plan is not None:
                teacher.states = TeacherStates(plan, teacher.chunks, groups)
            self._teacher.append(teacher)

    def data_step(self, dataloader_iter: Iterator[Any]) -> dict[str, Any]:
        """NeMo's own data step; what it would drop is carried past it: the teacher's states, on each stage the mask.

        The batch itself stays as it is: the chunks of a virtual pipeline share it.
        """
        item = next(dataloader_iter)
        batch = item[0] if isinstance(item, tuple) else item
        output: dict[str, Any] = super().data_step(
            iter([{k: v for k, v in batch.items() if k not in (HIDDEN, STATES)}])
        )
        output[HIDDEN], output[STATES] = batch.get(HIDDEN), batch.get(STATES)
        if output["loss_mask"] is None:
            output["loss_mask"] = batch["loss_mask"].cuda(non_blocking=True)
        return output

    def forward_step(self, batch: dict[str, Any]) -> torch.Tensor:
        """Logits ``[b, s, V/tp]`` on the last stage, hidden states ``[s (/tp), b, H]`` elsewhere."""
        taken = self.losses.micro_batch(batch, batch[STATES]) if self.losses is not None else nullcontext()
        with taken:
            return self.forward(
                input_ids=batch["tokens"],
                position_ids=batch["position_ids"],
                attention_mask=batch["attention_mask"],
            )

    @property
    def training_loss_reduction(self) -> DistillationLoss:
        """The loss that is trained on."""
        if self._training_loss_reduction is None:
            self._training_loss_reduction = DistillationLoss(self, validation=False)
        return self._training_loss_reduction

    @property
    def validation_loss_reduction(self) -> DistillationLoss:
        """The same loss, and the language-model loss beside it."""
        if self._validation_loss_reduction is None:
            self._validation_loss_reduction = DistillationLoss(self, validation=True)
        return self._validation_loss_reduction


class DistillationLoss(MegatronLossReduction):
    """The loss of a micro-batch, summed over its valid tokens; Megatron divides by the tokens of the global batch.

    Attributes:
        lm_loss: of the last validation step that was reduced: cross-entropy of the student with the labels, nats a
            token.
    """

    def __init__(self, model: DistillationModel, *, validation: bool) -> None:
        super().__init__()
        # Past nn.Module's attribute registration: the model owns this loss.
        object.__setattr__(self, "_model", model)
        self.validation = validation
        self.lm_loss: float | None = None

    def forward(
        self, batch: dict[str, Any], forward_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Args: a micro-batch and the student's logits ``[b, s, V/tp]``. Returns: loss sum, valid tokens, report.

        Raises:
            NonFiniteError: before any gradient is computed.
        """
        model: DistillationModel = self._model
        # Sequence first, as the output layers wrote them: taken batch first, logits would be copied whole.
        mask, labels = batch["loss_mask"].float().T, batch["labels"].T
        losses = vocabulary_parallel_loss(
            forward_out.transpose(0, 1),
            model.teacher.logits(batch[HIDDEN]),
            model.groups.tp,
            vocab_size=model._student_checkpoint.shape.vocab_size,
            loss=model._loss,
            labels=labels if self.validation or model._loss.label_weight else None,
            inplace=not self.validation,
        )
        loss, tokens = (losses.total * mask).sum(), mask.sum()
        if not torch.isfinite(loss):
            step = model.root.trainer.global_step
            raise NonFiniteError(
                f"the distillation loss of step {step} is {loss.item()}; nothing was updated. "
                "Lower lr, raise warmup_steps, or look for damaged weights with `minitron evaluate`"
            )
        model.balance.add_logits(loss, tokens)
        lm_loss = losses.cross_entropy if losses.cross_entropy is not None else torch.zeros_like(losses.divergence)
        report = torch.stack([(losses.divergence * mask).sum(), (lm_loss * mask).sum(), tokens])
        return loss, tokens.to(torch.int), {"sums": report.detach()}

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Mean KL a token over all micro-batches and data-parallel ranks, on the last stage."""
        groups = self._model.groups
        sums = torch.stack([report["sums"] for report in losses_reduced_per_micro_batch]).sum(0)
        torch.distributed.all_reduce(sums, group=groups.dp)
        self.lm_loss = (sums[1] / sums[2]).item() if self.validation else None
        return sums[0] / sums[2]


class TeacherFirst(pl.Callback):
    """Before each step, runs the teacher over the step's micro-batches and lays its states beside them.

    After the step, gathers its losses.

    NeMo calls ``on_megatron_microbatches_start`` when the number of micro-batches is known and none is drawn yet, and
    ``on_megatron_microbatches_end`` on every rank when all have run. The balance of the losses is this callback's state
    in a checkpoint.
    """

    def __init__(self, model: DistillationModel) -> None:
        self._model = model

    def on_megatron_microbatches_start(self, step: MegatronStep) -> None:
        """Replaces the step's data by the same micro-batches with the teacher's states in them."""
        items = [next(step.data) for _ in range(step.num_microbatches)]
        batches = [item[0] if isinstance(item, tuple) else item for item in items]
        teacher = self._model.teacher
        for batch, hidden in zip(batches, teacher.hidden_states(batches), strict=False):
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
