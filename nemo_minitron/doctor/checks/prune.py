"""Depth and width pruned out of the live model; the reference prunes the checkpoint."""

from __future__ import annotations

import torch

from nemo_minitron.axes import KeptUnits
from nemo_minitron.doctor.checks import Context
from nemo_minitron.doctor.checks.forward import logits_of
from nemo_minitron.pruning import DepthPrune, WidthPrune, choose_units, prune_weights

__all__ = ["reference", "run"]


def run(context: Context) -> dict[str, torch.Tensor]:
    """``logits`` of the teacher after units and layers were removed from it."""
    groups, kept = context.groups(), _kept(context)
    chunks = context.model(context.material.teacher, groups)
    module = torch.nn.ModuleList(chunks)
    WidthPrune(kept, groups=groups)(DepthPrune(kept, groups=groups)(module))
    return {"logits": logits} if (logits := logits_of(chunks, groups, context)) is not None else {}


def reference(context: Context) -> dict[str, torch.Tensor]:
    """The same units, removed from the weights on disk before the model is built."""
    groups = context.groups()
    pruned = prune_weights(context.material.teacher, _kept(context))
    logits = logits_of(context.model(pruned, groups), groups, context)
    assert logits is not None
    return {"logits": logits}


def _kept(context: Context) -> KeptUnits:
    """Units drawn at random, the same everywhere."""
    return choose_units(None, context.material.teacher.shape, context.material.pruned, method="random")
