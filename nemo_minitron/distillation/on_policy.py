"""Distillation on the student's own answers: generalized knowledge distillation, GKD (arXiv 2306.13649).

A share of the training sequences is written by the student as it is at that time; the teacher judges every token of
them, wherever it runs. Nothing is differentiated through the sampling, as in GKD. With the reverse KL this is the
token-level part of MiniLLM (arXiv 2306.08543), without its policy gradient for the later tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from megatron.core.models.gpt import GPTModel
from nemo.lightning.megatron_parallel import MegatronStep

from nemo_minitron.checkpoints.tokenizer.comparison import CommonVocabulary
from nemo_minitron.distillation.losses.fused_head import OutputHead
from nemo_minitron.distillation.losses.vocabulary_parallel import vocabulary_parallel_cross_entropy
from nemo_minitron.distillation.module import KL, DistillationLoss, DistillationModel
from nemo_minitron.distillation.own_answers import OnPolicy, OwnAnswers, answer_weights, own_sequence
from nemo_minitron.distillation.training.language_model import TokenLoss
from nemo_minitron.errors import CheckpointError, ConfigError
from nemo_minitron.generation.decode import generate_tokens

__all__ = ["AnswersFirst", "OnPolicyLoss", "OnPolicyModel"]

OWN, STALE, LOGPROBS = "own_answer", "stale_answer", "answer_logprobs"
OWN_KL, DATA_KL, OWN_WEIGHT, _OWN_TOKENS = "own_kl", "data_kl", "own_weight", "own_tokens"
_MANY = 0.5
"""Share of answers that are cut, or empty, from which on a warning says so."""
logger = logging.getLogger(__name__)


class OnPolicyModel(DistillationModel):
    """The student, trained on its own answers too; arguments as of :class:`DistillationModel`.

    Attributes:
        on_policy: where its answers come from; set before it is trained.
    """

    KEPT: ClassVar[tuple[str, ...]] = (*DistillationModel.KEPT, OWN, STALE, LOGPROBS)
    on_policy: OnPolicy

    def reinit(self) -> DistillationModel:
        """See :class:`DistillationModel`."""
        chunk = super().reinit()
        chunk.on_policy = self.on_policy
        return chunk

    def loss_reduction(self, *, validation: bool) -> TokenLoss:
        """The divergence, on answers and data apart; in validation, which is on data alone, as without answers."""
        return OnPolicyLoss(self, validation=validation)


class OnPolicyLoss(DistillationLoss):
    """Reports beside ``kl``: ``own_kl`` and ``data_kl``, each the mean over its own tokens, and ``own_weight``."""

    def measure(self, batch: dict[str, Any], logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See :class:`TokenLoss`."""
        if self.validation:
            return super().measure(batch, logits)
        weights = self._weights(batch, logits) if self._model.on_policy.config.reweighted else None
        total, measured = super().measure(batch, logits)
        measured = self._apart(batch, measured)
        if weights is not None:
            total = total * weights
            measured[OWN_WEIGHT] = weights * batch[OWN].to(weights)
        return total, measured

    def measure_chunks(
        self, batch: dict[str, Any], layer: OutputHead, mask: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See :class:`TokenLoss`; without weights of stale answers, which the configuration refuses."""
        total, measured = super().measure_chunks(batch, layer, mask)
        return total, measured if self.validation else self._apart(batch, measured)

    def _apart(self, batch: dict[str, Any], measured: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The values, with the divergence of answers and data apart."""
        divergence = measured[KL]
        own = batch[OWN].to(divergence).expand_as(divergence)
        return {**measured, OWN_KL: divergence * own, DATA_KL: divergence * (1 - own), _OWN_TOKENS: own}

    @torch.no_grad()
    def _weights(self, batch: dict[str, Any], logits: torch.Tensor) -> torch.Tensor:
        """``[s, b]`` factors of the losses; the logits stay as they are."""
        model, labels = self._model, batch["labels"].T
        common = model._common
        now = -vocabulary_parallel_cross_entropy(
            logits, labels, model.groups.tp, vocab_size=model.vocab_size if common is None else common.size
        )
        then, mask = batch[LOGPROBS].to(now).T, batch["loss_mask"].to(now).T
        weights = answer_weights((now - then) * mask, clip=model.on_policy.config.clip)
        return torch.where(batch[STALE].to(now.device), weights, 1.0)

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """See :class:`TokenLoss`. A part without any token is not reported."""
        mean = super().reduce(losses_reduced_per_micro_batch)
        own = self.values.pop(_OWN_TOKENS, None)
        if own is not None:
            for name, part in ((OWN_KL, own), (DATA_KL, 1 - own), (OWN_WEIGHT, own)):
                value = self.values.pop(name, None)
                if value is not None and part * self.tokens > 0.5:
                    self.values[name] = value / part
        return mean


class AnswersFirst(pl.Callback):
    """Before each step, puts the student's answers into its micro-batches; at the first of ``refresh`` steps it lets
    the student write those of all these steps. Before :class:`~nemo_minitron.distillation.module.TeacherFirst`.

    Memory: the answers of these steps on every rank (12 bytes a token), and during the generation its keys and values.
    This callback's state in a checkpoint are the answers in use.

    Args:
        model: the student.
        steps: of the training.
        global_batch_size: sequences of a step.
        sequence_length: s of these.
        common: the ids that student and teacher share.

    Raises:
        ConfigError: if prompts would be repeated within a step, and answered greedily.
    """

    def __init__(
        self,
        model: OnPolicyModel,
        *,
        steps: int,
        global_batch_size: int,
        sequence_length: int,
        common: CommonVocabulary,
    ) -> None:
        self._model, self._on_policy = model, model.on_policy
        self._steps, self._batch, self._length = steps, global_batch_size, sequence_length
        self._vocab_size = min(model.vocab_size, common.size)
        self._answers: OwnAnswers | None = None
        self._warned: set[str] = set()
        wanted, there = self._on_policy.most(global_batch_size), len(self._on_policy.prompts)
        self._few = None
        if there < wanted:
            self._few = f"on_policy: {there} prompts are fewer than the {wanted} answers of a step"
            if self._on_policy.config.sampling.greedy:
                raise ConfigError(
                    f"{self._few}, and greedy answers to one prompt are all the same; give more prompts, or set "
                    "on_policy.sampling.greedy=false"
                )

    def on_megatron_microbatches_start(self, step: MegatronStep) -> None:
        """Replaces sequences of the step's micro-batches, where it is a training step."""
        if step.forward_only:
            return
        items = [next(step.data) for _ in range(step.num_microbatches)]
        now = self._model.root.trainer.global_step
        samples = self._on_policy.samples(now * self._batch, (now + 1) * self._batch)
        answers = self._in_use(now, samples)
        for item in items:
            self._put(item[0] if isinstance(item, tuple) else item, answers, set(samples), now)
        self._model.root.further = self._figures(answers, samples, now)
        step.data = iter(items)

    def _in_use(self, now: int, samples: list[int]) -> OwnAnswers | None:
        """The answers of this step, made now if they are due; None if it has none."""
        refresh = self._on_policy.config.refresh
        if now % refresh == 0:
            self._answers = self._made(now, min(now + refresh, self._steps))
        elif samples and not (self._answers and self._answers.covers(samples)):
            raise CheckpointError(
                f"the training state of step {now} lacks the student's answers of this step; remove it, so that the "
                "training goes on from the one before, or begin again with overwrite=true"
            )
        return self._answers

    def _made(self, now: int, end: int) -> OwnAnswers | None:
        """Let the student answer the prompts of the steps from now to before ``end``. Collective."""
        on_policy, groups = self._on_policy, self._model.groups
        samples = on_policy.samples(now * self._batch, end * self._batch)
        if not samples:
            return None
        if self._few:
            self._warn("few", "%s: they are repeated, each time with other draws", self._few)
        parallel: Any = self._model.root.trainer.strategy.megatron_parallel
        chunks = [next(part for part in chunk.modules() if isinstance(part, GPTModel)) for chunk in parallel]
        context = self._model._initial.architecture.max_position_embeddings
        prompts = [on_policy.prompt(sample) for sample in samples]
        answers = generate_tokens(
            chunks,
            groups,
            prompts,
            sampling=on_policy.config.sampling,
            seed=on_policy.seed,
            ends=on_policy.ends,
            vocab_size=self._vocab_size,
            max_length=min(self._length + 1, context),
            requests=samples,
            batch_size=on_policy.config.batch_size,
        )
        made = OwnAnswers.of(now, samples, prompts, answers, self._length)
        cut = 1 - made.stopped.float().mean().item()
        if cut > _MANY:
            self._warn(
                "cut",
                "on_policy: %.0f %% of the %d answers of step %d were cut off, at on_policy.sampling.max_new_tokens or "
                "the end of the sequence; a student that learns from many of them learns not to end its answers",
                100 * cut,
                len(samples),
                now,
            )
        empty = (made.stopped & (made.end - made.start == 1)).float().mean().item()
        if empty > _MANY:
            self._warn(
                "empty",
                "on_policy: %.0f %% of the %d answers of step %d are empty, an end token and nothing before it; check "
                "the prompts and on_policy.template",
                100 * empty,
                len(samples),
                now,
            )
        return made

    def _warn(self, what: str, message: str, *values: Any) -> None:
        if what not in self._warned and self._model.groups.is_main:
            logger.warning(message, *values)
        self._warned.add(what)

    def _put(self, batch: dict[str, torch.Tensor], answers: OwnAnswers | None, own: set[int], now: int) -> None:
        """Replace the sequences of a micro-batch ``[b, s]`` that are answers, and mark them."""
        numbers = batch.pop("sample").tolist()
        batch[OWN] = torch.tensor([float(number in own) for number in numbers])
        batch[STALE] = torch.zeros(len(numbers), dtype=torch.bool)
        batch[LOGPROBS] = torch.zeros(batch["tokens"].shape)
        oldest = self._on_policy.config.max_age
        for place, number in enumerate(numbers):
            if number not in own:
                continue
            assert answers is not None, "they were made"
            (row,) = answers.rows([number])
            for name, value in own_sequence(answers, row).items():
                batch[name][place] = value
            batch[LOGPROBS][place] = answers.logprobs[row]
            batch[STALE][place] = oldest is not None and now - int(answers.step) > oldest

    def _figures(self, answers: OwnAnswers | None, samples: list[int], now: int) -> dict[str, float]:
        """The step's values in the metrics."""
        figures = {"own_share": len(samples) / self._batch}
        if answers is None or not samples:
            return figures
        rows = answers.rows(samples)
        return {
            **figures,
            "own_length": (answers.end - answers.start)[rows].double().mean().item(),
            "own_cut": 1 - answers.stopped[rows].double().mean().item(),
            "own_age": now - int(answers.step),
        }

    def state_dict(self) -> dict[str, Any]:
        """The answers; NeMo saves it with the first rank's, and all ranks have the same."""
        return {} if self._answers is None else self._answers.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with them."""
        self._answers = OwnAnswers(**state_dict) if state_dict else None
