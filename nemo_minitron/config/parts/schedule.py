"""Hyper-parameters of trainings: steps, batches, learning rates, intervals.

A stage's configuration is derived from one of these classes, and the training takes it as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from nemo_minitron.config.parts.checks import AUTO, LOGITS, RECOMPUTE, choice, not_negative, positive

__all__ = ["AlignmentSchedule", "PRECISIONS", "Schedule", "ShortAlignmentSchedule", "ShortSchedule", "batch_faults"]

PRECISIONS = ("32", "bf16-mixed")
#: Steps of the warm-up where none are given and the training has more.
WARMUP = 10


@dataclass
class ShortSchedule:
    """The settings that even a short training on text has.

    Attributes:
        steps: optimizer steps.
        micro_batch_size: blocks of one forward pass on one data-parallel rank.
        global_batch_size: blocks of one optimizer step.
        lr: peak learning rate, reached by a linear warm-up and followed by a cosine decay.
        min_lr: learning rate at the last step.
        warmup_steps: steps of the linear warm-up; null takes 10, and half of the steps of a training of 10 or fewer.
        precision: "32", "bf16-mixed", or "auto": bf16-mixed where the machine computes faster in bfloat16, as measured
            at the start (on CUDA from compute capability 8.0 on), else 32; a resumed training keeps what it took.
    """

    steps: int = 300
    micro_batch_size: int = 1
    global_batch_size: int = 8
    lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_steps: int | None = None
    precision: str = "32"

    def warmup(self) -> int:
        """Steps of the linear warm-up."""
        return _warmup_steps(self.warmup_steps, self.steps)

    def settled(self) -> dict[str, Any]:
        """The values of settings that are left to the suite, as an output's identity has them."""
        return {"warmup_steps": self.warmup()}

    def faults(self) -> list[str]:
        """Ranges, and a warm-up that leaves nothing."""
        return [*positive(self, "steps"), *_rate_faults(self), *choice(self, "precision", PRECISIONS, also=(AUTO,))]


@dataclass
class Schedule(ShortSchedule):
    """The hyper-parameters of a training on text.

    Attributes:
        weight_decay: weight decay of AdamW.
        beta1, beta2: AdamW's coefficients of the running averages of the gradient and of its square.
        clip_grad: norm that gradients are clipped to; 0 for no clipping.
        max_minutes: stop in good order, with a checkpoint, when this time is used up; null for no limit.
        validate_every: steps between validations.
        validation_batches: global batches of one validation.
        log_every: steps between two lines of metrics.
        save_every: steps between checkpoints.
        keep_best: beside the last checkpoint, keep the weights of the validation with the lowest "kl" or "lm_loss";
            null keeps none.
        recompute: activations that the backward pass computes again instead of keeping them: "none", "selective" (the
            core of the attention) or "full" (whole layers; not with intermediate losses).
        logits: "whole" makes all logits of a micro-batch before their loss; "chunks" takes a chunk of tokens through
            output layer and loss together, so that memory does not grow with tokens times vocabulary.
    """

    #: Settings that a later release added; see ``StageConfig.ADDED``.
    ADDED: ClassVar[tuple[str, ...]] = ("logits",)

    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_grad: float = 1.0
    max_minutes: float | None = None
    validate_every: int = 50
    validation_batches: int = 8
    log_every: int = 1
    save_every: int = 100
    keep_best: str | None = None
    recompute: str = "none"
    logits: str = "whole"

    def faults(self) -> list[str]:
        """The base's and further ranges."""
        return [
            *super().faults(),
            *_optimizer_faults(self),
            *positive(self, "validate_every", "validation_batches", "log_every", "save_every"),
            *choice(self, "recompute", RECOMPUTE),
            *choice(self, "logits", LOGITS),
        ]


@dataclass
class ShortAlignmentSchedule:
    """The settings that even a training within another stage has, with NeMo-Aligner.

    Attributes:
        epochs: passes over the data.
        steps: optimizer steps; null takes those of ``epochs``, a number wins over it.
        micro_batch_size: samples of one forward pass on one data-parallel rank.
        global_batch_size: samples of one optimizer step.
        lr: peak learning rate, reached by a linear warm-up and followed by a cosine decay.
        min_lr: learning rate at the last step.
        warmup_steps: steps of the linear warm-up; null takes 10, and half of the steps of a training of 10 or fewer.
        validate_every: steps between validations.
        save_every: steps between checkpoints, a multiple of ``validate_every``.
    """

    epochs: int = 1
    steps: int | None = None
    micro_batch_size: int = 1
    global_batch_size: int = 8
    lr: float = 1e-5
    min_lr: float = 1e-6
    warmup_steps: int | None = None
    validate_every: int = 50
    save_every: int = 50

    def warmup(self, steps: int | None = None) -> int:
        """Steps of the linear warm-up.

        Args:
            steps: optimizer steps of the training, where only the data say them; null takes the schedule's own.
        """
        return _warmup_steps(self.warmup_steps, self.steps if steps is None else steps)

    def settled(self) -> dict[str, Any]:
        """The values of settings that are left to the suite, as an output's identity has them."""
        return {"warmup_steps": self.warmup()}

    def faults(self) -> list[str]:
        """Ranges, a warm-up that leaves nothing, intervals that NeMo-Aligner cannot keep."""
        faults = [*positive(self, "epochs", "steps", "validate_every", "save_every"), *_rate_faults(self)]
        if self.validate_every > 0 and self.save_every > 0 and self.save_every % self.validate_every:
            faults.append(
                f"save_every={self.save_every}: is not a multiple of validate_every={self.validate_every}; "
                "NeMo-Aligner validates before it saves"
            )
        return faults


@dataclass
class AlignmentSchedule(ShortAlignmentSchedule):
    """The hyper-parameters of a training with NeMo-Aligner.

    Attributes:
        weight_decay: weight decay of AdamW.
        beta1, beta2: AdamW's coefficients of the running averages of the gradient and of its square.
        clip_grad: norm that gradients are clipped to; 0 for no clipping.
        max_minutes: stop in good order, with a checkpoint, when this time is used up; null for no limit.
        validation_batches: global batches of one validation; null takes all.
        precision: "32", "bf16-mixed", or "auto": bf16-mixed where the machine computes faster in bfloat16, as measured
            at the start (on CUDA from compute capability 8.0 on), else 32; a resumed training keeps what it took.
    """

    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    clip_grad: float = 1.0
    max_minutes: float | None = None
    validation_batches: int | None = None
    precision: str = "32"

    def faults(self) -> list[str]:
        """The base's and further ranges."""
        return [
            *super().faults(),
            *_optimizer_faults(self),
            *positive(self, "validation_batches"),
            *choice(self, "precision", PRECISIONS, also=(AUTO,)),
        ]


def batch_faults(schedule: ShortSchedule | ShortAlignmentSchedule, data: int) -> list[str]:
    """Why a global batch is not whole micro-batches of so many data-parallel ranks."""
    one_pass = schedule.micro_batch_size * data
    if one_pass <= 0 or schedule.global_batch_size <= 0 or schedule.global_batch_size % one_pass == 0:
        return []
    return [
        f"global_batch_size={schedule.global_batch_size}: is not a multiple of "
        f"micro_batch_size * parallel.data = {one_pass}"
    ]


def _warmup_steps(given: int | None, steps: int | None) -> int:
    """The given warm-up, else that of a training of so many steps (None: not known yet, and then not few)."""
    if given is not None:
        return given
    return WARMUP if steps is None or steps > WARMUP else max(steps, 0) // 2


def _rate_faults(schedule: ShortSchedule | ShortAlignmentSchedule) -> list[str]:
    faults = [
        *positive(schedule, "micro_batch_size", "global_batch_size", "lr"),
        *not_negative(schedule, "min_lr", "warmup_steps"),
    ]
    if schedule.min_lr > schedule.lr > 0:
        faults.append(f"min_lr={schedule.min_lr}: lies above lr={schedule.lr}")
    if schedule.steps is not None and 0 < schedule.steps <= schedule.warmup():
        faults.append(
            f"warmup_steps={schedule.warmup_steps}: leaves nothing of steps={schedule.steps}; lower it, or leave it out"
        )
    return faults


def _optimizer_faults(schedule: Schedule | AlignmentSchedule) -> list[str]:
    return [
        *positive(schedule, "max_minutes"),
        *not_negative(schedule, "weight_decay", "clip_grad"),
        *(f"{b}: must lie in [0, 1)" for b in ("beta1", "beta2") if not 0 <= getattr(schedule, b) < 1),
    ]
