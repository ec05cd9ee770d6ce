"""Checks whether a model can be trained, and whether two models can be teacher and student.

They run before NeMo is imported, which takes ten seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.accounting import warn_once
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.tokenizer.comparison import CommonVocabulary, Vocabulary, compare
from nemo_minitron.config import ParallelLayout
from nemo_minitron.distillation.teachers.manifest import Manifest, cached_tokenizer
from nemo_minitron.errors import ConfigError, DataError, ShapeError
from nemo_minitron.shape import uniform_faults

if TYPE_CHECKING:
    from nemo_minitron.data.blocks import Blocks

__all__ = [
    "announce",
    "check_context",
    "check_model",
    "check_pair",
    "check_text",
    "common_with_cache",
    "consequences",
]


def check_pair(
    student: Checkpoint,
    teacher: Checkpoint,
    layout: ParallelLayout,
    sequence_length: int,
    *,
    teacher_layout: ParallelLayout | None = None,
    name: str = "teacher",
) -> CommonVocabulary:
    """Check that the student can learn from the teacher under this layout.

    ``teacher_layout`` is given where the teacher has a layout of its own, ``name`` where it is one of several.

    Returns:
        The token ids that they share. Where those are not all, a warning says so, once.

    Raises:
        CheckpointError: if their tokenizers turn ordinary text into other ids (see
            :func:`~nemo_minitron.checkpoints.tokenizer.comparison.compare`).
        DataError: if the sequences are longer than either model's context.
        ShapeError: if the layout cannot split either, or layers of either differ in size.
    """
    common = compare(Vocabulary.of("student", student), Vocabulary.of(name, teacher))
    announce(common, student.path)
    _check({"student": (student, layout), name: (teacher, teacher_layout or layout)}, sequence_length)
    return common


def check_text(blocks: Mapping[str, Blocks], common: CommonVocabulary) -> None:
    """Check that student and teacher know all tokens of the blocks, by what these are for.

    Raises:
        DataError: for a token that one of them does not know.
    """
    if not common.whole:
        for name, part in blocks.items():
            part.check_common(common.size, common.unlike, what=f"the {name} blocks", names=common.names)


def common_with_cache(student: Vocabulary, cache: Path) -> CommonVocabulary:
    """The token ids that a student and the teacher in a cache share.

    Raises:
        CheckpointError: if their tokenizers turn ordinary text into other ids.
        DataError: if there is no cache; or, of a cache without the teacher's tokenizer, if the student's is not the
            same in every token.
    """
    from nemo_minitron.checkpoints.tokenizer.trimming import tokenizer_fingerprint

    manifest = Manifest.read(cache)
    if manifest is None:
        raise DataError(f"{cache}: is no logit cache; write one with `minitron cache`")
    theirs = Vocabulary("cached teacher", cache, manifest.vocab_size, cached_tokenizer(cache))
    if student.tokenizer is not None and theirs.tokenizer is None:
        own = tokenizer_fingerprint(student.tokenizer)
        if manifest.tokenizer != own:
            raise DataError(
                f"{cache}: is a cache of something else\n  - its vocab_size is {manifest.vocab_size}, the student's "
                f"vocabulary is {student.rows}\n  - its tokenizer is {manifest.tokenizer}, the fingerprint of the "
                f"student's is {own}\nwrite one for this training with `minitron cache`, which keeps the tokenizer "
                "too, so that the two can be compared"
            )
        theirs = dataclasses.replace(theirs, tokenizer=student.tokenizer)  # as good as its own
    return compare(student, theirs)


def consequences(common: CommonVocabulary) -> str | None:
    """The differences of two vocabularies, and what a distillation does about them; None where there are none."""
    if common.warning is None:
        return None
    parts, count = [], len(common.left_out)
    if not common.whole:
        but = f" without {count} of them" if count else ""
        parts.append(f"losses of the logits are over the first {common.size} ids{but}")
    if not common.cuts_alike:
        parts.append(f"text is cut with the {common.names[0]}'s tokenizer")
    return f"{common.warning}: {'; '.join(parts) or 'nothing of this changes the training'}"


def announce(common: CommonVocabulary, where: Path) -> None:
    """Warn of what two vocabularies do not share, once."""
    if (text := consequences(common)) is not None:
        warn_once(where, text)


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
