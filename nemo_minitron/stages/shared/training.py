"""Code of the stages that train: their plan, their blocks, the saved model and the figures of their record."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.checkpoints.model_record import peek_family, peek_shape
from nemo_minitron.config import CacheConfig, ParallelLayout
from nemo_minitron.config.stages.distillation import TrainingConfig
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.plans import PlannedPath, StagePlan, human_count
from nemo_minitron.parsing import parse_json
from nemo_minitron.shape import uniform_faults
from nemo_minitron.stages.shared.disk import described, expected, readable_model, training_needs
from nemo_minitron.stages.shared.memory import training_of_rank

if TYPE_CHECKING:
    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.data import Blocks
    from nemo_minitron.distillation.training.outputs import Trained

__all__ = ["is_main", "plan_training", "save_model", "summary", "training_blocks"]


def plan_training(
    config: TrainingConfig,
    models: dict[str, str],
    trained: set[str],
    written: str,
    layouts: dict[str, ParallelLayout] | None = None,
    *,
    apart: bool = False,
) -> StagePlan:
    """What a training would read, write and cost.

    Args:
        config: of the stage.
        models: role -> checkpoint of each model that is read.
        trained: the roles that are trained; the others only run forward.
        written: description of the trained model.
        layouts: role -> layout, for models whose layout differs from the trained model's.
        apart: these have ranks of their own.
    """
    from nemo_minitron.data.inputs import data_inputs

    data = data_inputs(config.data)
    layout = config.parallel
    output = Path(config.output)
    plan = StagePlan(
        config.STAGE,
        reads=[PlannedPath(path, role) for role, path in models.items()],
        writes=[
            PlannedPath(str(output / "model"), f"{written} (NeMo 2)"),
            PlannedPath(str(output / "checkpoints"), "training state"),
            PlannedPath(str(output / "metrics.jsonl"), "metrics of each step"),
        ],
        costs={"tokens": f"{human_count(config.tokens)} in {config.steps} steps"},
        notes=data.notes,
        faults=data.faults,
    )
    plan.reads += [PlannedPath(path, what) for path, what in data.files]
    counts = {}
    for role, path in models.items():
        shape = peek_shape(path)
        if shape is None:
            continue
        own = (layouts or {}).get(role, layout)
        faults = uniform_faults(shape, "training")
        faults += shape.layout_faults(tensor=own.tensor, pipeline=own.pipeline_stages, expert=own.expert)
        plan.faults += [f"{role}: {fault}" for fault in faults]
        counts[role] = axes.parameter_count(peek_family(path), shape)
    known = {role: model for role, path in models.items() if (model := readable_model(path)) is not None}
    (role,) = trained - {"teacher"} or trained
    plan.makes[str(output / "model")] = None if role not in known else expected(known[role], models[role])
    if role in known:
        others_trained = [known[other] for other in sorted(trained - {role}) if other in known]
        plan.costs["shape"] = described(known[role])
        plan.disk += training_needs(config, known[role], others_trained)
    if len(counts) == len(models):
        trained_count = sum(count for role, count in counts.items() if role in trained)
        others = sum(counts.values()) - trained_count
        plan.costs["parameters"] = ", ".join(
            f"{role} {human_count(count)}{_share(role, counts)}" for role, count in counts.items()
        )
        # Six operations a weight and token to train, two to run.
        plan.flops = float((6 * trained_count + 2 * others) * config.tokens)
        plan.costs["FLOPs"] = human_count(plan.flops)
        length = config.data.sequence_length
        plan.costs["memory of a rank"] = training_of_rank(config, known, trained, length, layouts or {}, apart=apart)
    return plan


def _share(role: str, counts: dict[str, int]) -> str:
    """A student's part of its teacher's parameters."""
    if role != "student" or "teacher" not in counts:
        return ""
    return f" ({100 * counts[role] / counts['teacher']:.1f} % of the teacher)"


def training_blocks(config: TrainingConfig | CacheConfig, reader: Checkpoint) -> tuple[Blocks, Blocks]:
    """Training and validation blocks; one rank prepares them, the others read them from the cache.

    Args:
        config: of the stage.
        reader: the model whose tokenizer and vocabulary are used.
    """
    from nemo_minitron.data import build_blocks

    wanted = {
        "train": config.steps * config.global_batch_size,
        "held_out": config.validation_batches * config.global_batch_size,
    }
    train, validation = (
        build_blocks(config.data, reader.tokenizer, split, blocks=blocks, vocab_size=reader.shape.vocab_size)
        for split, blocks in wanted.items()
    )
    return train, validation


def is_main() -> bool:
    """Whether this rank writes; also if there was nothing left to train, so that no group was made."""
    return os.environ.get("RANK", "0") == "0"


def save_model(config: TrainingConfig, initial: Checkpoint, trained: Trained, lineage: dict[str, Any]) -> None:
    """Convert NeMo's training checkpoint to a plain checkpoint: only weights, with tokenizer and lineage.

    Args:
        config: of the stage; the model is written to ``model`` in its output.
        initial: the checkpoint that the training started from.
        trained: the training's checkpoints; ``config.result`` chooses one.
        lineage: of this training, added to that of ``initial``.
    """
    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
    from nemo_minitron.checkpoints.model_record import write_model_record

    chosen = trained.best if config.result == "best" else trained.last
    if chosen is None:
        raise MinitronError(
            "result=best: no validation took place, so there is no best checkpoint; lower validate_every, or set "
            "result=last"
        )
    dtype = "bfloat16" if config.precision.startswith("bf16") else "float32"
    write_model_record(initial, chosen, dtype=dtype, form="nemo2")
    model = dataclasses.replace(
        open_checkpoint(chosen), tokenizer=initial.tokenizer, lineage={**initial.lineage, **lineage}
    )
    write_checkpoint(model, Path(config.output) / "model", "nemo2", dtype=initial.architecture.dtype, overwrite=True)


def summary(metrics: Path) -> dict[str, Any]:
    """The figures of a training: ``steps, tokens, tokens_per_second`` (median), and, if measured, ``first_`` and
    ``last_`` of ``kl``, ``lm_loss``, ``validation_kl`` and ``validation_lm_loss``.
    """
    lines = [parse_json(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if "split" not in line]
    validations = [line for line in lines if line.get("split") == "validation"]
    figures: dict[str, Any] = {
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "tokens_per_second": sorted(line["tokens_per_second"] for line in steps)[len(steps) // 2],
    }
    for prefix, measured in (("", steps), ("validation_", validations)):
        for which, line in zip(("first", "last"), (measured[0], measured[-1]) if measured else (), strict=False):
            figures |= {f"{which}_{prefix}{key}": line[key] for key in ("kl", "lm_loss") if key in line}
    return figures
