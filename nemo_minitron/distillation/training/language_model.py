"""NeMo 2's GPT module trained on the text itself, by the vocabulary-parallel cross-entropy.

Also here is the base of all trained models: to NeMo the model is a plain model of its family. Its checkpoints name
``LlamaModel``, ``Qwen2Model``, ... as their class, so plain NeMo opens them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import fiddle as fdl
import torch
from megatron.core.models.gpt import GPTModel as MegatronGPTModel
from nemo.collections.llm.gpt.model.base import GPTConfig, GPTModel
from nemo.lightning.megatron_parallel import MegatronLossReduction

from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.formats.nemo2.config import model_class
from nemo_minitron.checkpoints.live import load_into
from nemo_minitron.distillation.losses.balance import Balance
from nemo_minitron.distillation.losses.fused_head import OutputHead, fused_head_loss, without_output_layer
from nemo_minitron.distillation.losses.vocabulary_parallel import vocabulary_parallel_cross_entropy
from nemo_minitron.errors import NonFiniteError
from nemo_minitron.runtime import versions
from nemo_minitron.runtime.groups import Groups, ParallelLayout, current
from nemo_minitron.runtime.nemo_layer_types import configure_model

if TYPE_CHECKING:
    from nemo.collections.common.tokenizers.tokenizer_spec import TokenizerSpec
    from nemo.lightning.pytorch.optim import OptimizerModule

    from nemo_minitron.quantization.live import LiveRounding

__all__ = ["LM_LOSS", "LanguageModel", "LanguageModelLoss", "TokenLoss", "TrainedModel", "plain_context"]

LM_LOSS = "lm_loss"
"""Cross-entropy with the labels, nats a token, by its name in the metrics."""
_TOKENS = "tokens"
_HEAD = "output_layer_weight"
"""In a micro-batch whose forward pass gave hidden states: the weight that makes logits of them."""


def plain_context(initial: Checkpoint, arguments: dict[str, Any]) -> fdl.Config[GPTModel]:
    """The model's entry in the context of a NeMo checkpoint: a plain model of its family.

    Args:
        initial: the model that is trained, or NeMo's description of it, which has the fields alone.
        arguments: of the model that trains it.
    """
    architecture: Any = initial.architecture
    if isinstance(architecture, fdl.Buildable):
        architecture = fdl.build(architecture)
    plain = {name: value for name, value in arguments.items() if name in ("config", "optim", "tokenizer")}
    return fdl.Config(model_class(architecture), **plain)


class TrainedModel(GPTModel):
    """Base of all trained models. Train only subclasses: NeMo modifies the class of a model that it trains.

    Args:
        config: NeMo's configuration of the model. Its ``calculate_per_token_loss`` is switched on, so that the loss of
            a step is the mean over all valid tokens of its global batch, however they are split over micro-batches and
            ranks.
        initial: weights to start from.
        layout: parallel layout.
        chunked: output layer and loss go together over chunks of tokens
            (:mod:`~nemo_minitron.distillation.losses.fused_head`).
        optim, tokenizer: as in NeMo's ``GPTModel``.

    Attributes:
        balance: gathers the values of the intermediate losses, if there are any.
        further: other values of the last step, by their names in the metrics.
        rounding: of a model that is trained for a quantization, set before it is configured; else None.
    """

    VALIDATED: ClassVar[tuple[str, ...]] = (LM_LOSS,)
    """What a validation measures."""

    _training_loss_reduction: TokenLoss | None
    _validation_loss_reduction: TokenLoss | None

    def __init__(
        self,
        config: GPTConfig,
        initial: Checkpoint,
        layout: ParallelLayout,
        chunked: bool = False,
        optim: OptimizerModule | None = None,
        tokenizer: TokenizerSpec | None = None,
    ) -> None:
        config.calculate_per_token_loss = True
        super().__init__(config, optim=optim, tokenizer=tokenizer)
        self._initial = initial
        self._layout = layout
        self._chunked = chunked
        self.balance = Balance([], dynamic=False)
        self.further: dict[str, float] = {}
        self.rounding: LiveRounding | None = None
        # In a list, because a module assigned to an attribute would become a part of the model.
        self._root: list[TrainedModel] = [self]

    def io_init(self, **kwargs: Any) -> fdl.Config[GPTModel]:
        """See :func:`plain_context`."""
        return plain_context(kwargs["initial"], kwargs)

    def reinit(self) -> TrainedModel:
        """A further chunk of the model: NeMo asks for one per virtual stage.

        Without this method NeMo would build the class that the context names, a plain model.
        """
        raise NotImplementedError

    @property
    def root(self) -> TrainedModel:
        """The first chunk, which NeMo's trainer knows."""
        return self._root[0]

    @property
    def groups(self) -> Groups:
        """Megatron's groups, as NeMo's strategy made them."""
        return current(self._layout)

    @property
    def vocab_size(self) -> int:
        """Size of the true vocabulary: the output layer's further columns are padding."""
        return self._initial.shape.vocab_size

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Build this rank's part of the model and fill it.

        Not earlier: tied embeddings are reduced while models are built, which the stages must do in one order.
        """
        if hasattr(self, "module"):
            return
        stage, architecture = versions.virtual_pipeline_stage(vp_stage), self._initial.architecture
        if architecture.layer_types is None:
            super().configure_model(**stage)
        else:
            self.module = configure_model(
                self.config,
                architecture,
                self.tokenizer,
                transformer_engine=self.groups.device.transformer_engine,
                **stage,
            )
        load_into([self.module], self._initial, self.groups)
        if self.rounding is not None:
            self.rounding.attach(self.module, self._initial, self.groups)

    def forward_step(self, batch: dict[str, Any]) -> torch.Tensor:
        """Logits ``[b, s, V/tp]`` on the last stage, hidden states ``[s (/tp), b, H]`` elsewhere.

        In chunks, on the last stage the hidden states before the output layer, ``[b, s (/tp), H]``.
        """
        inputs = {
            "input_ids": batch["tokens"],
            "position_ids": batch["position_ids"],
            "attention_mask": batch["attention_mask"],
        }
        model = self._megatron
        if not (self._chunked and model.post_process):
            return self.forward(**inputs)
        with without_output_layer(model) as weights:
            hidden: torch.Tensor = self.forward(**inputs)
        (batch[_HEAD],) = weights
        return hidden

    @property
    def _megatron(self) -> Any:
        """Megatron's model, without what the precision wraps around it."""
        model = self.module
        while not isinstance(model, MegatronGPTModel):
            model = model.module
        return model

    def reported(self, values: Mapping[str, float]) -> dict[str, float]:
        """What the metrics state of a step's or a validation's means."""
        return dict(values)

    def loss_reduction(self, *, validation: bool) -> TokenLoss:
        """The loss of this model."""
        raise NotImplementedError

    @property
    def training_loss_reduction(self) -> TokenLoss:
        """The loss that is trained on."""
        if self._training_loss_reduction is None:
            self._training_loss_reduction = self.loss_reduction(validation=False)
        return self._training_loss_reduction

    @property
    def validation_loss_reduction(self) -> TokenLoss:
        """The same loss, with further values that are only measured in validation."""
        if self._validation_loss_reduction is None:
            self._validation_loss_reduction = self.loss_reduction(validation=True)
        return self._validation_loss_reduction


class LanguageModel(TrainedModel):
    """A model trained on labels; arguments as of :class:`TrainedModel`."""

    def reinit(self) -> LanguageModel:
        """See :class:`TrainedModel`."""
        chunk = LanguageModel(self.config, self._initial, self._layout, self._chunked)
        chunk._root, chunk.rounding = self._root, self.rounding
        return chunk

    def loss_reduction(self, *, validation: bool) -> TokenLoss:
        """Cross-entropy."""
        return LanguageModelLoss(self, validation=validation)


class TokenLoss(MegatronLossReduction):
    """The loss of a micro-batch, summed over its valid tokens; Megatron divides by the tokens of the global batch.

    Attributes:
        values: means per valid token of the last reduced step, by their names in the metrics; the same on all ranks of
            the last stage.
        tokens: number of valid tokens of that step.
    """

    NAME: ClassVar[str]
    """Of the loss, in messages."""

    def __init__(self, model: Any, *, validation: bool) -> None:
        super().__init__()
        # Past nn.Module's attribute registration: the model owns this loss.
        object.__setattr__(self, "_model", model)
        self.validation = validation
        self.values: dict[str, float] = {}
        self.tokens = 0.0

    def measure(self, batch: dict[str, Any], logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The training loss of each token, ``[s, b]``, and the reported values by name, the main value first.

        Args:
            batch: a micro-batch.
            logits: ``[s, b, V/tp]``; in training the loss may overwrite them.
        """
        raise NotImplementedError

    def measure_chunks(
        self, batch: dict[str, Any], layer: OutputHead, mask: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As :meth:`measure`, from the hidden states: the training loss summed over the valid tokens, and the values.

        Args:
            batch: a micro-batch.
            layer: hidden states and output layer.
            mask: ``[s, b]``, 1 for valid tokens, else 0.
        """
        raise NotImplementedError

    def forward(
        self, batch: dict[str, Any], forward_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Args: a micro-batch and logits ``[b, s, V/tp]`` or hidden states. Returns: loss sum, valid tokens, report.

        Raises:
            NonFiniteError: before any gradient is computed.
        """
        # Sequence first, as the output layer wrote them: taken batch first, logits would be copied whole.
        mask = batch["loss_mask"].float().T
        if _HEAD in batch:
            layer = OutputHead(forward_out.transpose(0, 1), batch[_HEAD], self._model.groups.layout.sequence_parallel)
            loss, measured = self.measure_chunks(batch, layer, mask)
            tokens = mask.sum()
        else:
            losses, measured = self.measure(batch, forward_out.transpose(0, 1))
            loss, tokens = (losses * mask).sum(), mask.sum()
        if not torch.isfinite(loss):
            step = self._model.root.trainer.global_step
            raise NonFiniteError(
                f"the {self.NAME} loss of step {step} is {loss.item()}; nothing was updated. "
                "Lower lr, raise warmup_steps, or look for damaged weights with `minitron evaluate`"
            )
        self._model.balance.add_logits(loss, tokens)
        report = {name: (values * mask).sum().detach() for name, values in measured.items()}
        return loss, tokens.to(torch.int), {**report, _TOKENS: tokens}

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Mean of the main value per token over all micro-batches and data-parallel ranks, on the last stage."""
        # The names come from the reports: of a virtual pipeline, another chunk's loss may have measured.
        reports = losses_reduced_per_micro_batch
        sums = torch.stack([torch.stack(list(report.values())) for report in reports]).sum(0)
        torch.distributed.all_reduce(sums, group=self._model.groups.dp_cp)
        self.tokens = sums[-1].item()
        means = sums[:-1] / sums[-1]
        self.values = dict(zip((name for name in reports[0] if name != _TOKENS), means.tolist(), strict=True))
        return means[0]


class LanguageModelLoss(TokenLoss):
    """Cross-entropy with the labels over the true vocabulary."""

    NAME = "language-model"

    def measure(self, batch: dict[str, Any], logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See :class:`TokenLoss`."""
        model: LanguageModel = self._model
        losses = vocabulary_parallel_cross_entropy(
            logits, batch["labels"].T, model.groups.tp, vocab_size=model.vocab_size, inplace=not self.validation
        )
        return losses, {LM_LOSS: losses.detach()}

    def measure_chunks(
        self, batch: dict[str, Any], layer: OutputHead, mask: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See :class:`TokenLoss`."""
        model: LanguageModel = self._model
        losses = fused_head_loss(
            layer,
            None,
            model.groups.tp,
            vocab_size=model.vocab_size,
            loss=None,
            token_weights=mask,
            labels=batch["labels"].T,
        )
        return losses.total, {LM_LOSS: losses.tokens.total}
