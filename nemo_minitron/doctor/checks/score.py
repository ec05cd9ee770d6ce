"""The scores of all units by activations."""

from __future__ import annotations

import torch

from nemo_minitron.doctor.checks import Context
from nemo_minitron.importance import score_model

__all__ = ["run"]


def run(context: Context) -> dict[str, torch.Tensor]:
    """``ffn``, ``heads``, ``groups``, ``hidden`` and ``layers``, as :class:`~nemo_minitron.importance.Scores`."""
    groups, teacher = context.groups(), context.material.teacher
    chunks = context.model(teacher, groups)
    blocks = context.material.blocks(2 * context.material.global_batch_size, seed=3)
    scores = score_model(chunks, blocks, groups, shape=teacher.shape)
    if not groups.is_main:
        return {}
    return {name: getattr(scores, name) for name in ("ffn", "heads", "groups", "hidden", "layers")}
