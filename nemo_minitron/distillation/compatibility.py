"""Checks whether a model can be trained, and whether two models can be teacher and student.

They run before NeMo is imported, which takes ten seconds.
"""

from __future__ import annotations

from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.tokenizer.files import check_same_tokenizer
from nemo_minitron.config import ParallelLayout
from nemo_minitron.errors import CheckpointError, ConfigError, DataError, ShapeError
from nemo_minitron.shape import uniform_faults

__all__ = ["check_context", "check_model", "check_pair"]


def check_pair(
    student: Checkpoint,
    teacher: Checkpoint,
    layout: ParallelLayout,
    sequence_length: int,
    *,
    teacher_layout: ParallelLayout | None = None,
) -> None:
    """Check that the student can learn from the teacher under this layout.

    ``teacher_layout`` is given where the teacher has a layout of its own.

    Raises:
        CheckpointError: if their vocabularies or tokenizers differ.
        DataError: if the sequences are longer than either model's context.
        ShapeError: if the layout cannot split either, or layers of either differ in size.
    """
    if student.shape.vocab_size != teacher.shape.vocab_size:
        raise CheckpointError(
            f"student {student.path} has a vocabulary of {student.shape.vocab_size} and teacher {teacher.path} of "
            f"{teacher.shape.vocab_size}: logits of different vocabularies cannot be compared; use models with one "
            "tokenizer"
        )
    check_same_tokenizer({"student": student.tokenizer, "teacher": teacher.tokenizer})
    _check({"student": (student, layout), "teacher": (teacher, teacher_layout or layout)}, sequence_length)


def check_model(model: Checkpoint, layout: ParallelLayout, sequence_length: int) -> None:
    """Check that a model can be trained without a teacher under this layout.

    Raises:
        DataError: if the sequences are longer than its context.
        ShapeError: if the layout cannot split it, or its layers differ in size.
    """
    _check({"model": (model, layout)}, sequence_length)


def check_context(
    layout: ParallelLayout,
    *,
    documents: bool = False,
    placement: str = "shared",
) -> None:
    """Check that a training can share out its sequences, or its experts, over ranks, if its layout does.

    Args:
        layout: of the trained model.
        documents: the blocks hold several documents, and attention is masked between them.
        placement: of the teacher (:class:`~nemo_minitron.distillation.teachers.placement.TeacherPlacement`).

    Raises:
        ConfigError: if not.
    """
    if layout.expert > 1 and placement != "shared":
        raise ConfigError(f"parallel.expert={layout.expert}: is not offered with a teacher on {placement}; set it to 1")
    if layout.context == 1:
        return
    needs = {
        "blocks of several documents (Transformer Engine's attention takes no masks there)": documents,
        f"a teacher on {placement}": placement != "shared",
    }
    if faults := [what for what, there in needs.items() if there]:
        raise ConfigError(f"parallel.context={layout.context}: is not offered with {', '.join(faults)}; set it to 1")


def _check(models: dict[str, tuple[Checkpoint, ParallelLayout]], sequence_length: int) -> None:
    """Faults of each model; for the first, which is trained, also those of training."""
    faults = []
    for name, (checkpoint, layout) in models.items():
        longest = checkpoint.architecture.max_position_embeddings
        if sequence_length > longest:
            raise DataError(f"data.sequence_length={sequence_length}: the {name} reads {longest} tokens at most")
        shape = checkpoint.shape
        faults += [f"{name}: {fault}" for fault in uniform_faults(shape, "distillation")]
        layout_faults = shape.layout_faults(tensor=layout.tensor, pipeline=layout.pipeline_stages, expert=layout.expert)
        faults += [f"{name}: {fault}" for fault in layout_faults]
    trained, (checkpoint, layout) = next(iter(models.items()))
    if checkpoint.shape.num_moe_experts is not None and layout.tensor > 1 and not layout.sequence_parallel:
        # megatron.core.transformer.moe.moe_layer raises so, in training alone
        faults.append(
            f"{trained}: Megatron trains a mixture of experts under tensor parallelism only with sequence "
            "parallelism; set parallel.sequence_parallel=true, or parallel.tensor=1"
        )
    if checkpoint.shape.num_moe_experts is None and layout.expert > 1:
        faults.append(f"{trained}: parallel.expert={layout.expert}: the model has no experts to share out; set it to 1")
    faults += layout.sequence_faults(sequence_length) + checkpoint.architecture.context_faults(layout.context)
    if checkpoint.shape.num_moe_experts is not None and layout.context > 1:
        faults.append(
            f"{trained}: parallel.context={layout.context}: the loss that balances the experts of a mixture is of "
            "whole sequences; set parallel.context=1"
        )
    if faults:
        raise ShapeError(faults)
