"""Stages that align a model with NeMo-Aligner: on answers, and on preferences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts import (
    AlignmentSchedule,
    ChatDataConfig,
    ParallelLayout,
    Preferences,
    batch_faults,
    format_list_faults,
    positive,
)
from nemo_minitron.config.stages.base import NEEDS_ALIGNMENT, StageConfig
from nemo_minitron.config.tables import Choices, WrittenFormats

__all__ = ["AlignConfig", "DpoConfig", "SftConfig"]


@dataclass
class AlignConfig(AlignmentSchedule, StageConfig):
    """The settings of every training with NeMo-Aligner.

    Attributes:
        model: checkpoint to start from (Llama, Qwen2 or Nemotron: the families of NeMo 1).
        data: what to train on.
        resume: go on from the last checkpoint in ``output``, under the same settings; layout, micro-batches, time
            limit, intervals and formats may change.
        formats: formats that the aligned model is written in, besides ``model`` (NeMo 2), any of these
        verify: compare the logits of the written formats with those of ``model``.
        parallel: layout of the model.
    """

    NEEDS: ClassVar[tuple[str, ...]] = NEEDS_ALIGNMENT
    LEVEL: ClassVar[str] = "aligner"
    INPUTS: ClassVar[tuple[str, ...]] = ("model", "data.path", "data.validation")
    TABLES: ClassVar[dict[str, Choices]] = {"formats": WrittenFormats("nemo2")}
    RESUMABLE_CHANGES: ClassVar[tuple[str, ...] | None] = (
        "parallel", "micro_batch_size", "max_minutes", "save_every", "validate_every", "validation_batches", "formats",
        "verify",
    )  # fmt: skip

    model: str = MISSING
    data: ChatDataConfig = field(default_factory=ChatDataConfig)
    resume: bool = True
    formats: list[str] = field(default_factory=list)
    verify: bool = True
    parallel: ParallelLayout = field(default_factory=ParallelLayout)

    def faults(self) -> list[str]:
        """Ranges, batches that do not divide, what NeMo-Aligner cannot run."""
        faults = [
            *super().faults(),
            *format_list_faults(self.formats),
            *batch_faults(self, self.parallel.data),
        ]
        if self.parallel.virtual_pipeline is not None:
            faults.append(
                f"parallel.virtual_pipeline={self.parallel.virtual_pipeline}: NeMo-Aligner has no interleaved "
                "schedule; set it to null"
            )
        return faults


@dataclass
class SftConfig(AlignConfig):
    """Supervised fine-tuning on the answers of conversations, with NeMo-Aligner's ``GPTSFTModel``.

    Attributes:
        pack: put several conversations into one sequence of ``data.max_length``; none sees another.
    """

    STAGE: ClassVar[str] = "sft"
    HELP: ClassVar[str] = "Train a model on the answers of conversations."
    MAKES_MODEL: ClassVar[bool] = True
    ROLE: ClassVar[str] = "aligned"
    DONE: ClassVar[str] = "fine-tuned"

    pack: bool = False


@dataclass
class DpoConfig(Preferences, AlignConfig):
    """Preference optimization with NeMo-Aligner's ``MegatronGPTDPOModel``: DPO, IPO and RPO.

    Attributes:
        chosen_reward, rejected_reward: reward of that answer in pairs that carry none (RPO).
        rounds: number of trainings, each from the result of the one before.
        reference: the reference policy of each round: "round" for the model that the round starts from, "first" for
            ``model`` in all rounds, or a checkpoint.
        rounds_data: one file of preference pairs for each round; empty takes ``data`` in all.
    """

    STAGE: ClassVar[str] = "dpo"
    HELP: ClassVar[str] = "Train a model to prefer chosen over rejected answers: DPO, IPO, RPO."
    MAKES_MODEL: ClassVar[bool] = True
    ROLE: ClassVar[str] = "aligned"
    DONE: ClassVar[str] = "trained on preferences ({loss})"
    PATHS: ClassVar[tuple[str, ...]] = ("output", "reference", "rounds_data")

    lr: float = 1e-6
    min_lr: float = 1e-7
    chosen_reward: float = 1.0
    rejected_reward: float = 0.0
    rounds: int = 1
    reference: str = "round"
    rounds_data: list[str] = field(default_factory=list)

    def is_path(self, name: str, value: str) -> bool:
        """``reference`` may also be a word."""
        return name != "reference" or value not in ("round", "first")

    def inputs(self) -> dict[str, str]:
        """The base's, each round's data, and a reference that is a checkpoint."""
        inputs = super().inputs()
        inputs |= {f"rounds_data.{number}": path for number, path in enumerate(self.rounds_data, 1)}
        if self.is_path("reference", self.reference):
            inputs["reference"] = self.reference
        return inputs

    def faults(self) -> list[str]:
        """The base's, unknown losses, weights that leave no loss, rounds without data."""
        faults = [
            *Preferences.faults(self),
            *AlignConfig.faults(self),
            *positive(self, "rounds"),
        ]
        if self.chosen_reward < self.rejected_reward:
            faults.append(f"chosen_reward={self.chosen_reward}: lies below rejected_reward={self.rejected_reward}")
        if self.rounds_data and len(self.rounds_data) != self.rounds:
            faults.append(f"rounds_data: names {len(self.rounds_data)} files for rounds={self.rounds}")
        return faults
