"""``minitron distill``: train a pruned student on its teacher, as a NeMo 2 training."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.config import DistillConfig
from nemo_minitron.distillation.layers import layer_maps
from nemo_minitron.errors import CheckpointError, ConfigError
from nemo_minitron.pruning.kept import load_kept
from nemo_minitron.stages.base import PlannedPath, StagePlan, human_bytes, human_count, peek_family, peek_shape
from nemo_minitron.stages.prune import kept_path

if TYPE_CHECKING:
    import torch

    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.distillation.recipe import Schedule
    from nemo_minitron.shape import ModelShape

__all__ = ["plan", "run"]

logger = logging.getLogger(__name__)


def plan(config: DistillConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    from nemo_minitron.data.inputs import data_inputs

    data = data_inputs(config.data)
    layout = config.parallel
    output = Path(config.output)
    found = StagePlan(
        "distill",
        reads=[PlannedPath(config.student, "student"), PlannedPath(config.teacher, "teacher")],
        writes=[
            PlannedPath(str(output / "model"), "distilled model (NeMo 2)"),
            PlannedPath(str(output / "checkpoints"), "training state"),
            PlannedPath(str(output / "metrics.jsonl"), "metrics of each step"),
        ],
        costs={"tokens": f"{human_count(config.tokens)} in {config.steps} steps"},
        notes=data.notes,
        faults=data.faults,
    )
    found.reads += [PlannedPath(path, what) for path, what in data.files]
    shapes = {name: peek_shape(getattr(config, name)) for name in ("student", "teacher")}
    counts = {}
    for name, shape in shapes.items():
        if shape is None:
            continue
        faults = shape.layout_faults(tensor=layout.tensor, pipeline=layout.stages)
        found.faults += [f"{name}: {fault}" for fault in faults]
        counts[name] = axes.parameter_count(peek_family(getattr(config, name)), shape)
    if (ours := shapes["student"]) is not None and (theirs := shapes["teacher"]) is not None:
        _plan_intermediate(config, found, ours, theirs)
    if len(counts) == 2:
        student, teacher = counts["student"], counts["teacher"]
        found.costs["parameters"] = f"student {human_count(student)}, teacher {human_count(teacher)}"
        # Six operations a weight and token to train, two to run.
        found.costs["FLOPs"] = human_count((6 * student + 2 * teacher) * config.tokens)
        bf16 = config.precision.startswith("bf16")
        # Weights and gradients (2 + 4 bytes in bf16 training, 4 + 4 in fp32), Adam's two moments and, in bf16, fp32
        # weights.
        state = (2 + 4 + 12 / layout.data) if bf16 else (4 + 4 + 8 / layout.data)
        rank = (student * state + teacher * (2 if bf16 else 4)) / (layout.tensor * layout.pipeline)
        found.costs["memory of a rank"] = f"about {human_bytes(rank)} and activations"
    return found


def _plan_intermediate(config: DistillConfig, found: StagePlan, student: ModelShape, teacher: ModelShape) -> None:
    """Faults of the intermediate losses with these models, or where each is taken."""
    if not config.intermediate.weights():
        return
    try:
        kept = _kept_layers(config, student, teacher)
        maps = layer_maps(config.intermediate, student, teacher, tensor=config.parallel.tensor, kept_layers=kept)
    except ConfigError as error:
        found.faults += error.faults
        return
    except CheckpointError as error:
        found.faults.append(str(error))
        return
    for name, layers in (("hidden", maps.hidden), ("attention", maps.attention)):
        if layers:
            pairs = ", ".join(f"{ours}-{theirs}" for ours, theirs in sorted(layers.items()))
            found.notes.append(f"{name} loss of the layers (student-teacher) {pairs}")


def _kept_layers(config: DistillConfig, student: ModelShape, teacher: ModelShape) -> tuple[int, ...] | None:
    """The teacher's layers that the student kept, where a record says that it was cut from a model of this shape."""
    path = kept_path(Path(config.student))
    if not path.is_file():
        return None
    kept, source = load_kept(path)
    return kept.layers if (source, kept.target(source)) == (teacher, student) else None


def run(config: DistillConfig) -> dict[str, Any]:
    """Distil. Every rank runs this; rank 0 writes the distilled model.

    Returns:
        ``steps, tokens, tokens_per_second (median), first_kl, last_kl``, and of the first and last validation
        ``kl`` and ``lm_loss``.

    Raises:
        MinitronError: for models, data or a layout that do not fit each other, or a loss that is not finite.
    """
    import torch

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.distillation.pair import check_pair
    from nemo_minitron.runtime.groups import ParallelLayout

    student, teacher = open_checkpoint(config.student), open_checkpoint(config.teacher)
    layout = ParallelLayout(**vars(config.parallel))
    check_pair(student, teacher, layout, config.data.sequence_length)
    kept = _kept_layers(config, student.shape, teacher.shape)
    layer_maps(config.intermediate, student.shape, teacher.shape, tensor=layout.tensor, kept_layers=kept)
    train, validation = _blocks(config, teacher)

    from nemo_minitron.distillation.recipe import distill

    last = distill(
        student,
        teacher,
        train,
        validation,
        layout=layout,
        schedule=_schedule(config),
        directory=Path(config.output),
        resume=config.resume,
        kept_layers=kept,
    )
    if torch.distributed.get_rank() != 0:
        return {}
    _save_model(config, student, last)
    return _summary(Path(config.output) / "metrics.jsonl")


def _schedule(config: DistillConfig) -> Schedule:
    from nemo_minitron.distillation.recipe import Schedule

    names = [field.name for field in dataclasses.fields(Schedule) if field.name != "seed"]
    return Schedule(**{name: getattr(config, name) for name in names}, seed=config.runtime.seed)


def _blocks(config: DistillConfig, teacher: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation blocks; one rank of a machine prepares them, the others find them in the cache."""
    from filelock import FileLock

    from nemo_minitron.data import build_blocks

    wanted = {
        "train": config.steps * config.global_batch_size,
        "held_out": config.validation_batches * config.global_batch_size,
    }
    cache = Path(config.data.cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".distill.lock"):
        train, validation = (
            build_blocks(config.data, teacher.tokenizer, split, blocks=blocks, vocab_size=teacher.shape.vocab_size)
            for split, blocks in wanted.items()
        )
    return train, validation


def _save_model(config: DistillConfig, student: Checkpoint, last: Path) -> None:
    """From NeMo's training checkpoint to a plain one: weights alone, tokenizer and lineage beside them."""
    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
    from nemo_minitron.checkpoints.record import write_record

    write_record(student, last, dtype="float32", form="nemo2")
    trained = dataclasses.replace(
        open_checkpoint(last),
        tokenizer=student.tokenizer,
        lineage={
            **student.lineage,
            "distilled": {
                "student": config.student,
                "teacher": config.teacher,
                "tokens": config.tokens,
                "steps": config.steps,
                "loss": dataclasses.asdict(config.loss),
                "intermediate": dataclasses.asdict(config.intermediate),
            },
        },
    )
    write_checkpoint(trained, Path(config.output) / "model", "nemo2", dtype=student.architecture.dtype, overwrite=True)


def _summary(metrics: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if "split" not in line]
    validations = [line for line in lines if line.get("split") == "validation"]
    found: dict[str, Any] = {
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "tokens_per_second": sorted(line["tokens_per_second"] for line in steps)[len(steps) // 2],
        "first_kl": steps[0]["kl"],
        "last_kl": steps[-1]["kl"],
    }
    for name, line in (("first", validations[:1]), ("last", validations[-1:])):
        for value in line:
            found |= {f"{name}_validation_kl": value["kl"], f"{name}_validation_lm_loss": value["lm_loss"]}
    return found
