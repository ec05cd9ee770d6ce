"""``minitron steerlm``: the method in one stage, as its paper runs it (arXiv 2310.05344).

One process leads: attribute model (``reward``), labels (``label``), fine-tuning on answers given their attributes
(``sft``). Each is a separate stage below the output, with its own record; finished stages are not repeated.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nemo_minitron.config import SteerlmConfig
from nemo_minitron.data.chat.conversations import CHAT_PACKAGES
from nemo_minitron.jobs.output import claim_output
from nemo_minitron.jobs.plans import PlannedPath, StagePlan
from nemo_minitron.stages.shared.chats import align_plan

__all__ = ["plan", "run"]


def plan(config: SteerlmConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    from nemo_minitron.jobs.modules import stage_module

    plan = align_plan(config, CHAT_PACKAGES)
    output = Path(config.output)
    plan.makes = {str(output / "sft" / "model"): plan.makes[str(output / "model")]}
    plan.disk = [dataclasses.replace(need, least=0.0) for need in plan.disk]  # each of the three looks for itself
    plan.writes = [
        PlannedPath(str(output / "attribute_model"), "attribute model"),
        PlannedPath(str(output / "labels" / "labelled.jsonl"), "labelled conversations"),
        PlannedPath(str(output / "sft" / "model"), "model that follows attributes (NeMo 2)"),
    ]
    if config.attribute_model is not None:
        plan.writes.pop(0)
        plan.reads.append(PlannedPath(config.attribute_model, "attribute model"))
        return plan
    of_reward: StagePlan = stage_module("reward").plan(config.reward_stage())
    plan.reads += [item for item in of_reward.reads if item not in plan.reads]
    plan.faults += [f"reward: {fault}" for fault in of_reward.faults if fault not in plan.faults]
    plan.notes += [note for note in of_reward.notes if note not in plan.notes]
    return plan


def run(config: SteerlmConfig) -> dict[str, Any]:
    """Lead the three stages.

    Returns:
        ``reward`` (null where the attribute model was given), ``labels`` and ``sft``: the metrics of each.

    Raises:
        MinitronError: an error of one of them.
    """
    from nemo_minitron.jobs.nested import run_child

    claim_output(config)
    reward = None if config.attribute_model else run_child(config.reward_stage())["metrics"]
    labels = run_child(config.label_stage())["metrics"]
    sft = run_child(config.sft_stage())["metrics"]
    return {"reward": reward, "labels": labels, "sft": sft}
