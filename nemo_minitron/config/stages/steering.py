"""Stages around attribute values of answers: a model that predicts them, labels, SteerLM, and REINFORCE on them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts import (
    AttributesConfig,
    ChatDataConfig,
    ParallelLayout,
    ShortAlignmentSchedule,
    choice,
    not_negative,
    positive,
)
from nemo_minitron.config.stages.alignment import AlignConfig, SftConfig
from nemo_minitron.config.stages.base import NEEDS_ALIGNMENT, NEEDS_TORCH, StageConfig

__all__ = [
    "LabelConfig",
    "REWARD_RULES",
    "ReinforceConfig",
    "RewardConfig",
    "RewardTrainingConfig",
    "Steerlm2Config",
    "SteerlmConfig",
]

REWARD_RULES = ("short", "long", "ends")


@dataclass
class RewardConfig(AlignConfig):
    """Train a model that predicts attribute values (NeMo-Aligner's ``MegatronGPTRegressionRewardModel``).

    Attributes:
        data: conversations with the values of their last answers, or preference pairs whose values are derived.
        pairs: ``data.path`` holds preference pairs; a package says so itself.
        attributes: which attributes there are.
    """

    STAGE: ClassVar[str] = "reward"
    HELP: ClassVar[str] = "Train a model that predicts the attribute values of answers."

    pairs: bool = False
    attributes: AttributesConfig = field(default_factory=AttributesConfig)

    def faults(self) -> list[str]:
        """The base's, and pairs that nothing labels."""
        faults = super().faults()
        if self.pairs and not self.attributes.derive:
            faults.append("pairs=true: the values of a pair's answers are derived; set attributes.derive=true")
        if self.formats:
            faults.append("formats: a reward model is kept as NeMo 2 with its head beside it; leave formats empty")
        if self.parallel.sequence_parallel:
            faults.append(
                "parallel.sequence_parallel=true: NeMo-Aligner's reward head reads the last token of an unsplit "
                "sequence; set it to false"
            )
        return faults


@dataclass
class LabelConfig(StageConfig):
    """Predict the attribute values of answers and write them into the conversations.

    Attributes:
        reward: output of ``minitron reward``.
        data: conversations; their template is the reward model's.
        micro_batch_size: conversations of one forward pass.
        batch: conversations between two saves; a killed stage goes on after the last of them.
        resume: keep the labels of an earlier run of the stage, and go on.
        parallel: layout of the reward model.
    """

    STAGE: ClassVar[str] = "label"
    HELP: ClassVar[str] = "Predict the attribute values of answers, for conversations without them."
    NEEDS: ClassVar[tuple[str, ...]] = NEEDS_ALIGNMENT
    LEVEL: ClassVar[str] = "aligner"
    INPUTS: ClassVar[tuple[str, ...]] = ("reward", "data.path")

    reward: str = MISSING
    data: ChatDataConfig = field(default_factory=ChatDataConfig)
    micro_batch_size: int = 4
    batch: int = 64
    resume: bool = True
    parallel: ParallelLayout = field(default_factory=ParallelLayout)

    def faults(self) -> list[str]:
        """Sizes below 1, an interleaved schedule."""
        faults = positive(self, "micro_batch_size", "batch")
        if self.parallel.virtual_pipeline is not None:
            faults.append(
                f"parallel.virtual_pipeline={self.parallel.virtual_pipeline}: labelling has no interleaved schedule; "
                "set it to null"
            )
        return faults


@dataclass
class RewardTrainingConfig(ShortAlignmentSchedule):
    """The training of the attribute model within ``minitron steerlm``; all other settings are those of the stage.

    Attributes:
        model: checkpoint to start from; null takes the stage's ``model``.
        path, package: labelled conversations or pairs; the stage's ``data`` without either. Template, lengths and split
            are those of ``data``.
        pairs: as in ``minitron reward``.
    """

    PATHS: ClassVar[tuple[str, ...]] = ("model", "path")

    model: str | None = None
    path: str | None = None
    package: str | None = None
    pairs: bool = False

    def faults(self) -> list[str]:
        """Two origins; the rest is left to the configuration of the stage, which is made of it."""
        if self.path is not None and self.package is not None:
            return ["path: give one of path and package, not both"]
        return []


@dataclass
class SteerlmConfig(AlignConfig):
    """SteerLM (arXiv 2310.05344): attribute model, labels, then fine-tuning on answers given their attributes.

    This stage runs three others, ``reward``, ``label`` and ``sft``, whose outputs are below ``output``.

    Attributes:
        data: conversations to fine-tune on.
        attributes: which attributes there are.
        attribute_model: output of ``minitron reward``; null trains one by ``reward``.
        reward: settings of that training.
    """

    STAGE: ClassVar[str] = "steerlm"
    HELP: ClassVar[str] = "SteerLM: attribute model, labels, fine-tuning on answers given their attributes."
    NEEDS: ClassVar[tuple[str, ...]] = NEEDS_TORCH  # the stages that it starts say theirs
    LEVEL: ClassVar[str] = "torch"
    MAKES_MODEL: ClassVar[bool] = True
    ROLE: ClassVar[str] = "aligned"
    DONE: ClassVar[str] = "steered (SteerLM)"
    RUNS_CHILD_STAGES: ClassVar[bool] = True
    RESUMABLE_CHANGES: ClassVar[tuple[str, ...] | None] = None
    INPUTS: ClassVar[tuple[str, ...]] = (
        "model", "data.path", "data.validation", "attribute_model", "reward.model", "reward.path",
    )  # fmt: skip

    attributes: AttributesConfig = field(default_factory=AttributesConfig)
    attribute_model: str | None = None
    reward: RewardTrainingConfig = field(default_factory=RewardTrainingConfig)

    @property
    def layout(self) -> ParallelLayout:
        """A single process, which starts the stages."""
        return ParallelLayout()

    @property
    def started(self) -> int:
        """Number of processes of each stage that it starts; the stages run one after the other."""
        return self.parallel.world_size

    def reward_stage(self) -> RewardConfig:
        """The training of the attribute model."""
        names = {"pairs", *(field.name for field in dataclasses.fields(ShortAlignmentSchedule))}
        data = self.data
        if self.reward.path or self.reward.package:
            data = dataclasses.replace(data, path=self.reward.path, package=self.reward.package, validation=None)
        base = {field.name: getattr(self, field.name) for field in dataclasses.fields(AlignConfig)}
        base |= {name: getattr(self.reward, name) for name in names}
        base |= {
            "name": "", "output": f"{self.output}/attribute_model", "formats": [], "overwrite": False,
            "model": self.reward.model or self.model, "data": data,
        }  # fmt: skip
        return RewardConfig(**base, attributes=self.attributes)

    def label_stage(self) -> LabelConfig:
        """The labelling of ``data``."""
        return LabelConfig(
            output=f"{self.output}/labels", runtime=self.runtime, data=self.data, parallel=self.parallel,
            reward=self.attribute_model or f"{self.output}/attribute_model",
        )  # fmt: skip

    def sft_stage(self) -> SftConfig:
        """The fine-tuning on the labelled conversations."""
        base = {field.name: getattr(self, field.name) for field in dataclasses.fields(AlignConfig)}
        data = dataclasses.replace(
            self.data, path=f"{self.output}/labels/labelled.jsonl", package=None, validation=None, labelled=True
        )
        return SftConfig(**base | {"name": "", "output": f"{self.output}/sft", "overwrite": False, "data": data})

    def faults(self) -> list[str]:
        """What its stages would refuse."""
        faults = super().faults()
        if self.attribute_model is None:
            known = set(faults)
            faults += [f"reward: {fault}" for fault in self.reward_stage().faults() if fault not in known]
        return faults


@dataclass
class Steerlm2Config(AlignConfig):
    """SteerLM 2 (HelpSteer 2, arXiv 2406.08673, section 5.3): draw a model that follows attributes towards
    ``P(y|a,x) ~ P(a|x,y) P(y|x)``, with NeMo-Aligner's ``GPTSteerLMModel``.

    Attributes:
        model: a model that SteerLM trained; it learns from its own answers.
        base: the model of ``P(y|x)``, which is given no attribute values.
        attribute_model: output of ``minitron reward``: ``P(a|x,y)``.
        data: conversations with the wanted attribute values; their answers are left out.
        samples_per_prompt: answers to each prompt.
        deviation: standard deviation of the attribute model's predictions, on the attributes' scale.
        max_new_tokens: longest answer.
        generation_batch: answers generated at once.
        global_batch_size: prompts of one step; ``micro_batch_size`` is not used (one answer at a time).
    """

    STAGE: ClassVar[str] = "steerlm2"
    HELP: ClassVar[str] = "SteerLM 2: draw such a model towards what the attribute model says of its answers."
    MAKES_MODEL: ClassVar[bool] = True
    ROLE: ClassVar[str] = "aligned"
    DONE: ClassVar[str] = "steered (SteerLM 2)"
    INPUTS: ClassVar[tuple[str, ...]] = ("model", "base", "attribute_model", "data.path", "data.validation")

    base: str = MISSING
    attribute_model: str = MISSING
    lr: float = 1e-6
    min_lr: float = 1e-7
    samples_per_prompt: int = 4
    deviation: float = 0.5
    max_new_tokens: int = 128
    generation_batch: int = 16

    def faults(self) -> list[str]:
        """The base's, no answers to choose from."""
        faults = [*super().faults(), *positive(self, "deviation", "max_new_tokens", "generation_batch")]
        if self.samples_per_prompt < 2:
            faults.append(f"samples_per_prompt={self.samples_per_prompt}: weights need at least 2 answers")
        return faults


@dataclass
class ReinforceConfig(AlignConfig):
    """REINFORCE with leave-one-out baselines (arXiv 2402.14740), as NeMo-Aligner's ``ReinforceTrainer`` runs it.

    Attributes:
        data: conversations whose last answers, if they have any, are left out: the prompts.
        reward: output of ``minitron reward``; its predicted values, weighted, are the reward.
        weights: weight of each attribute in the reward (a missing one is 0); empty takes the mean of all.
        rule: instead of ``reward``: "short" or "long" answers (their words against ``max_new_tokens``), or "ends" (1
            where the answer ends by itself).
        samples_per_prompt: answers to each prompt; the baseline of an answer is the mean reward of the others.
        prompts_per_step: prompts of one step; ``global_batch_size`` must divide their answers.
        validation_prompts: held-out prompts, answered once each at every validation.
        kl_penalty: weight of the divergence from the initial policy in the reward.
        max_new_tokens: longest answer.
        temperature, top_k, top_p: how answers are drawn, as in ``generate``.
        generation_batch: answers generated at once.
    """

    STAGE: ClassVar[str] = "reinforce"
    HELP: ClassVar[str] = "REINFORCE: train a model on answers of its own, by their rewards."
    MAKES_MODEL: ClassVar[bool] = True
    ROLE: ClassVar[str] = "aligned"
    DONE: ClassVar[str] = "trained on rewards (REINFORCE)"
    INPUTS: ClassVar[tuple[str, ...]] = ("model", "data.path", "data.validation", "reward")

    lr: float = 1e-6
    min_lr: float = 1e-7
    reward: str | None = None
    weights: dict[str, float] = field(default_factory=dict)
    rule: str | None = None
    samples_per_prompt: int = 4
    prompts_per_step: int = 8
    validation_prompts: int = 16
    kl_penalty: float = 0.01
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    generation_batch: int = 16

    def faults(self) -> list[str]:
        """The base's, no reward or two, batches that do not divide."""
        faults = [
            *super().faults(),
            *choice(self, "rule", REWARD_RULES),
            *positive(
                self, "prompts_per_step", "validation_prompts", "max_new_tokens", "temperature", "top_k", "top_p",
                "generation_batch",
            ),
            *not_negative(self, "kl_penalty"),
        ]  # fmt: skip
        if (self.reward is None) == (self.rule is None):
            faults.append("reward: give exactly one of reward and rule")
        if self.weights and self.reward is None:
            faults.append("weights: are of the attributes that reward predicts; rule has none")
        if self.samples_per_prompt < 2:
            faults.append(f"samples_per_prompt={self.samples_per_prompt}: the baseline needs at least 2")
        answers = self.prompts_per_step * self.samples_per_prompt
        if self.global_batch_size > 0 and answers % self.global_batch_size:
            faults.append(
                f"global_batch_size={self.global_batch_size}: does not divide the {answers} answers of a step "
                "(prompts_per_step * samples_per_prompt)"
            )
        if self.parallel.data != 1:
            faults.append(
                f"parallel.data={self.parallel.data}: NeMo-Aligner's ReinforceTrainer trains every replica on all "
                "answers of a step; set it to 1"
            )
        if self.micro_batch_size > 0 < self.validation_prompts and self.validation_prompts % self.micro_batch_size:
            faults.append(
                f"validation_prompts={self.validation_prompts}: is not a multiple of "
                f"micro_batch_size={self.micro_batch_size}"
            )
        if self.max_new_tokens >= self.data.max_length > 0:
            faults.append(
                f"max_new_tokens={self.max_new_tokens}: leaves no room for a prompt in "
                f"data.max_length={self.data.max_length}"
            )
        return faults
