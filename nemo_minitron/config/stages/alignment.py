"""Stages that align a model with NeMo-Aligner: on answers, and on preferences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts import FORMATS, ChatDataConfig, ParallelLayout, choice, not_negative, positive
from nemo_minitron.config.stages.base import StageConfig

PREFERENCE_LOSSES = ("dpo", "ipo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl")


@dataclass
class AlignConfig(StageConfig):
    """What every training with NeMo-Aligner has.

    Attributes:
        model: checkpoint to start from (Llama, Qwen2 or Nemotron: the families of NeMo 1).
        data: what to train on.
        epochs: passes over the data.
        steps: optimizer steps; null takes those of ``epochs``, a number wins over it.
        micro_batch_size: samples of one forward pass on one data-parallel rank.
        global_batch_size: samples of one optimizer step.
        lr: peak learning rate, reached by a linear warm-up and followed by a cosine decay.
        min_lr: learning rate at the last step.
        warmup_steps: steps of the linear warm-up.
        weight_decay: weight decay of AdamW.
        beta1, beta2: AdamW's coefficients of the running averages of the gradient and of its square.
        clip_grad: norm that gradients are clipped to; 0 for no clipping.
        max_minutes: stop in good order, with a checkpoint, when this time is used up; null for no limit.
        validate_every: steps between validations.
        save_every: steps between checkpoints, a multiple of ``validate_every``.
        validation_batches: global batches of one validation; null takes all.
        resume: go on from the last checkpoint in ``output``, under the same settings; layout, micro-batches, time
            limit, intervals and formats may change.
        precision: "32" or "bf16-mixed".
        formats: besides ``model`` (NeMo 2), what the aligned model is written as: "hf", "nemo".
        verify: compare the logits of what was written with those of ``model``.
        parallel: layout of the model.
    """

    INPUTS: ClassVar[tuple[str, ...]] = ("model", "data.path", "data.validation")
    GOES_ON_WITH: ClassVar[tuple[str, ...] | None] = (
        "parallel", "micro_batch_size", "max_minutes", "save_every", "validate_every", "validation_batches", "formats",
        "verify",
    )  # fmt: skip

    model: str = MISSING
    data: ChatDataConfig = field(default_factory=ChatDataConfig)
    epochs: int = 1
    steps: int | None = None
    micro_batch_size: int = 1
    global_batch_size: int = 8
    lr: float = 1e-5
    min_lr: float = 1e-6
    warmup_steps: int = 10
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    clip_grad: float = 1.0
    max_minutes: float | None = None
    validate_every: int = 50
    save_every: int = 50
    validation_batches: int | None = None
    resume: bool = True
    precision: str = "32"
    formats: list[str] = field(default_factory=list)
    verify: bool = True
    parallel: ParallelLayout = field(default_factory=ParallelLayout)

    def faults(self) -> list[str]:
        """Ranges, batches that do not divide, what NeMo-Aligner cannot run."""
        found = [
            *positive(
                self, "epochs", "steps", "micro_batch_size", "global_batch_size", "lr", "max_minutes",
                "validate_every", "save_every", "validation_batches",
            ),
            *not_negative(self, "min_lr", "warmup_steps", "weight_decay", "clip_grad"),
            *choice(self, "precision", ("32", "bf16-mixed")),
            *(f"{b}: must lie in [0, 1)" for b in ("beta1", "beta2") if not 0 <= getattr(self, b) < 1),
            *(f"formats: {form!r} must be one of {', '.join(FORMATS)}" for form in self.formats if form not in FORMATS),
        ]  # fmt: skip
        if self.min_lr > self.lr:
            found.append(f"min_lr={self.min_lr}: lies above lr={self.lr}")
        if self.steps is not None and self.warmup_steps >= self.steps > 0:
            found.append(f"warmup_steps={self.warmup_steps}: leaves nothing of steps={self.steps}")
        if self.validate_every > 0 and self.save_every > 0 and self.save_every % self.validate_every:
            found.append(
                f"save_every={self.save_every}: is not a multiple of validate_every={self.validate_every}; "
                "NeMo-Aligner validates before it saves"
            )
        one_pass = self.micro_batch_size * self.parallel.data
        if one_pass > 0 and self.global_batch_size > 0 and self.global_batch_size % one_pass:
            found.append(
                f"global_batch_size={self.global_batch_size}: is not a multiple of "
                f"micro_batch_size * parallel.data = {one_pass}"
            )
        if self.parallel.virtual_pipeline is not None:
            found.append(
                f"parallel.virtual_pipeline={self.parallel.virtual_pipeline}: NeMo-Aligner has no interleaved "
                "schedule; set it to null"
            )
        return found


@dataclass
class SftConfig(AlignConfig):
    """Supervised fine-tuning on the answers of conversations, with NeMo-Aligner's ``GPTSFTModel``.

    Attributes:
        pack: put several conversations into one sequence of ``data.max_length``; none sees another.
    """

    STAGE: ClassVar[str] = "sft"

    pack: bool = False


@dataclass
class DpoConfig(AlignConfig):
    """Preference optimization with NeMo-Aligner's ``MegatronGPTDPOModel``: DPO, IPO and RPO.

    Attributes:
        loss: "dpo" (arXiv 2305.18290), "ipo" (arXiv 2310.12036), or RPO's (arXiv 2406.11704, section 3.3.3) "rpo_sq",
            "rpo_bwd_kl" and "rpo_fwd_kl".
        beta: NeMo-Aligner's ``ref_policy_kl_penalty``; the tau of IPO.
        reward_scale: RPO's eta, the factor of the reward gap.
        chosen_reward, rejected_reward: reward of that answer in pairs that carry none (RPO).
        preference_loss_weight: weight of the preference loss.
        sft_loss_weight: weight of the chosen answer's negative log-likelihood.
        preference_average_log_probs, sft_average_log_probs: in that loss, divide an answer's log-probability by its
            length.
        rounds: trainings one after the other, each from the result of the one before.
        reference: the policy that rounds are held to: "round" for the one that a round starts from, "first" for
            ``model`` in all of them, or a checkpoint of its own.
        rounds_data: one file of preference pairs for each round; empty takes ``data`` in all.
    """

    STAGE: ClassVar[str] = "dpo"
    PATHS: ClassVar[tuple[str, ...]] = ("output", "reference", "rounds_data")

    lr: float = 1e-6
    min_lr: float = 1e-7
    loss: str = "dpo"
    beta: float = 0.1
    reward_scale: float = 1.0
    chosen_reward: float = 1.0
    rejected_reward: float = 0.0
    preference_loss_weight: float = 1.0
    sft_loss_weight: float = 0.0
    preference_average_log_probs: bool = False
    sft_average_log_probs: bool = False
    rounds: int = 1
    reference: str = "round"
    rounds_data: list[str] = field(default_factory=list)

    def is_path(self, name: str, value: str) -> bool:
        """``reference`` may also be a word."""
        return name != "reference" or value not in ("round", "first")

    def inputs(self) -> dict[str, str]:
        """The base's, each round's data, and a reference that is a checkpoint."""
        found = super().inputs()
        found |= {f"rounds_data.{number}": path for number, path in enumerate(self.rounds_data, 1)}
        if self.is_path("reference", self.reference):
            found["reference"] = self.reference
        return found

    def faults(self) -> list[str]:
        """The base's, unknown losses, weights that leave no loss, rounds without data."""
        found = [
            *super().faults(),
            *choice(self, "loss", PREFERENCE_LOSSES),
            *positive(self, "beta", "reward_scale", "rounds"),
            *not_negative(self, "preference_loss_weight", "sft_loss_weight"),
        ]
        if self.preference_loss_weight == 0 and self.sft_loss_weight == 0:
            found.append("preference_loss_weight and sft_loss_weight are both 0: no loss is left")
        if self.chosen_reward < self.rejected_reward:
            found.append(f"chosen_reward={self.chosen_reward}: lies below rejected_reward={self.rejected_reward}")
        if self.rounds_data and len(self.rounds_data) != self.rounds:
            found.append(f"rounds_data: names {len(self.rounds_data)} files for rounds={self.rounds}")
        return found
