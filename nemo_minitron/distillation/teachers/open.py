"""From a placement to the teacher of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nemo_minitron.config import LossConfig
from nemo_minitron.distillation.losses.common import CommonTokens
from nemo_minitron.distillation.teachers.cached import CachedTeacher, cached_loss
from nemo_minitron.distillation.teachers.frozen import Teacher, TeacherSource
from nemo_minitron.distillation.teachers.logit_cache import LogitCache, Manifest
from nemo_minitron.distillation.teachers.placement import TeacherPlacement
from nemo_minitron.errors import DataError
from nemo_minitron.runtime.groups import Groups

if TYPE_CHECKING:
    from nemo_minitron.checkpoints.base import Checkpoint

__all__ = ["loss_of", "open_teacher"]


def loss_of(placement: TeacherPlacement, loss: LossConfig) -> LossConfig:
    """The loss to compute: with a cache :func:`cached_loss`, with a model the configured loss.

    Raises:
        ConfigError: if the loss cannot be computed from the cache.
        DataError: if there is no cache.
    """
    if placement.cache is None:
        return loss
    manifest = Manifest.read(placement.cache)
    if manifest is None:
        raise DataError(f"{placement.cache}: is no logit cache; write one with `minitron cache`")
    return cached_loss(loss, manifest)


def open_teacher(
    placement: TeacherPlacement,
    checkpoint: Checkpoint | None,
    groups: Groups,
    *,
    dtype: torch.dtype,
    loss: LossConfig,
    student_rows: int,
    common: CommonTokens | None = None,
) -> TeacherSource:
    """The teacher as this rank of the student sees it. Every rank of the student calls it.

    Args:
        placement: where it is.
        checkpoint: the teacher; None with a cache.
        groups: the student's.
        dtype: of a model's weights and activations.
        loss: as :func:`loss_of` gave it.
        student_rows: the student's vocabulary.
        common: the tokens that the loss is over, where they are not the student's whole vocabulary.
    """
    if placement.cache is not None:
        return CachedTeacher(LogitCache(placement.cache), groups, loss, student_rows=student_rows, common=common)
    assert checkpoint is not None, "the configuration was checked"
    if placement.kind == "shared":
        return Teacher.load(checkpoint, groups, dtype=dtype)
    assert placement.layout is not None, "the configuration was checked"
    if placement.kind == "own_layout":
        from nemo_minitron.distillation.teachers.own_layout import OwnLayoutTeacher

        return OwnLayoutTeacher(checkpoint, groups, placement.layout, dtype, student_rows=student_rows)
    from nemo_minitron.distillation.teachers.own_ranks import RemoteTeacher

    return RemoteTeacher(
        checkpoint,
        groups,
        placement.layout,
        dtype,
        timeout_minutes=placement.timeout_minutes,
        student_rows=student_rows,
    )
