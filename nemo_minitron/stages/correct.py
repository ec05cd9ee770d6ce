"""``minitron correct``: train a model on text by the language-model loss, with NeMo 2.

The correction adapts a teacher to the distribution of the distillation data before it teaches on them
(arXiv 2408.11796, section 2). The output is that of ``minitron distill``; ``model/`` is the corrected model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron.config import CorrectConfig
from nemo_minitron.distillation.training.outputs import finished
from nemo_minitron.jobs.plans import StagePlan
from nemo_minitron.stages.shared.training import (
    is_main,
    plan_training,
    save_model,
    summary,
    training_blocks,
)

__all__ = ["plan", "run"]


def plan(config: CorrectConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    return plan_training(config, config.inputs(), {"model"}, "corrected model")


def run(config: CorrectConfig) -> dict[str, Any]:
    """Train. Every rank runs this; rank 0 writes the corrected model.

    Returns:
        See :func:`~nemo_minitron.stages.shared.training.summary`.

    Raises:
        MinitronError: for a model, data or a layout that do not fit each other, or a loss that is not finite.
    """
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.distillation.compatibility import check_model

    model = open_checkpoint(config.model)
    layout = config.parallel
    check_model(model, layout, config.data.sequence_length)
    output = Path(config.output)
    trained = finished(output, config.steps) if config.resume else None
    if trained is None:
        train, validation = training_blocks(config, model)

        from nemo_minitron.distillation.recipe import correct

        trained = correct(
            model,
            train,
            validation,
            layout=layout,
            schedule=config,
            seed=config.runtime.seed,
            directory=output,
            resume=config.resume,
        )
    if not is_main():
        return {}
    lineage = {"corrected": {"model": config.model, "tokens": config.tokens, "steps": config.steps}}
    save_model(config, model, trained, lineage)
    return summary(output / "metrics.jsonl")
