"""Vocabularies of the models of a stage, compared before anything is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nemo_minitron.checkpoints.peek import peek_vocabulary
from nemo_minitron.checkpoints.tokenizer.comparison import CommonVocabulary, compare, warnings_of
from nemo_minitron.distillation.compatibility import common_with_cache, consequences
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.plans import StagePlan

__all__ = ["plan_cached_vocabulary", "plan_pair_vocabulary", "plan_vocabularies"]


def plan_pair_vocabulary(plan: StagePlan, student: str, teacher: str, *, name: str = "teacher") -> None:
    """Add to a plan what the vocabularies of student and teacher say: a fault, or a note of what they do not share.

    ``name`` is the teacher's in messages, where it is one of several.
    """
    _add(plan, lambda: _compared(("student", student), (name, teacher)), consequences)


def plan_cached_vocabulary(plan: StagePlan, student: str, cache: str) -> None:
    """The same of a student and a logit cache, if the cache is there already."""

    def compared() -> CommonVocabulary | None:
        own = peek_vocabulary("student", student)
        return None if own is None or not Path(cache).exists() else common_with_cache(own, Path(cache))

    _add(plan, compared, consequences)


def plan_vocabularies(plan: StagePlan, first: tuple[str, str], *others: tuple[str, str]) -> None:
    """The same of models that read the same tokens: name and path of each, first the model whose tokenizer is used."""
    commons = []
    for other in others:
        try:
            commons.append(_compared(first, other))
        except MinitronError as error:
            plan.faults.append(str(error))
    plan.notes += warnings_of(common for common in commons if common is not None)


def _compared(first: tuple[str, str], second: tuple[str, str]) -> CommonVocabulary | None:
    """None where a checkpoint is not there yet, or must be opened to tell."""
    ours, theirs = peek_vocabulary(*first), peek_vocabulary(*second)
    return None if ours is None or theirs is None else compare(ours, theirs)


def _add(
    plan: StagePlan,
    compared: Callable[[], CommonVocabulary | None],
    described: Callable[[CommonVocabulary], str | None],
) -> None:
    try:
        common = compared()
    except MinitronError as error:
        plan.faults.append(str(error))
        return
    if common is not None and (text := described(common)) is not None:
        plan.notes.append(text)
