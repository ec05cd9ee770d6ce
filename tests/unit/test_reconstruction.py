"""Reconstruction recovers what can be recovered, changes nothing where nothing was pruned, and lowers the loss."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.families import CLASSES, family_model
from support.pruning import DictWeights, one_process, tokens

from nemo_minitron.axes import KeptUnits
from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.pruning import prune_weights
from nemo_minitron.reconstruction import reconstruct
from nemo_minitron.streamed import StreamedModel

DENSE = sorted(name for name in CLASSES if "mo" not in name[-3:] and name != "mixtral")


@pytest.fixture(scope="module")
def groups():
    with one_process() as given:
        yield given


def refit(teacher, kept, groups, blocks, **options):
    """The pruned and the reconstructed checkpoint, and the reports."""
    pruned = prune_weights(teacher, kept)
    changed: dict[str, torch.Tensor] = {}
    reports = reconstruct(
        StreamedModel(teacher, groups), StreamedModel(pruned, groups), kept, blocks, sink=changed.update, **options
    )
    tensors = {name: changed.get(name, pruned.weights.tensor(name)) for name in pruned.weights.names()}
    return pruned, dataclasses.replace(pruned, weights=DictWeights(tensors)), reports, changed


@pytest.mark.parametrize("family", DENSE)
def test_keeping_everything_changes_nothing(groups, tmp_path, family):
    teacher = open_checkpoint(family_model(family, tmp_path / "m"))
    _, _, reports, changed = refit(teacher, KeptUnits.everything(teacher.shape), groups, tokens(10, 13))
    assert all(matrix.after <= matrix.before < 1e-10 for report in reports for matrix in report.matrices)
    for name, tensor in changed.items():
        torch.testing.assert_close(tensor, teacher.weights.tensor(name), rtol=1e-4, atol=1e-5)
