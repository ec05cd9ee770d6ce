"""Reconstruction recovers what can be recovered, changes nothing where nothing was pruned, and lowers the loss."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.families import CLASSES, family_model
from support.mixture import random_mixture
from support.pruning import DictWeights, live, logits, one_process, random_checkpoint, tokens
from support.shapes import SHAPE

from nemo_minitron.axes import KeptUnits
from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.pruning import prune_weights
from nemo_minitron.reconstruction import reconstruct
from nemo_minitron.streamed import StreamedModel


@pytest.fixture(scope="module")
def groups():
    with one_process() as given:
        yield given


def refit(teacher, kept, groups, blocks, **options):
    """The pruned and the reconstructed checkpoint, and the reports."""
    pruned = prune_weights(teacher, kept)
    changed: dict[str, torch.Tensor] = {}
    reports = reconstruct(
        StreamedModel(teacher, groups),
        StreamedModel(pruned, groups),
        kept,
        blocks,
        sink=lambda number, tensors, report: changed.update(tensors),
        **options,
    )
    tensors = {name: changed.get(name, pruned.weights.tensor(name)) for name in pruned.weights.names()}
    return pruned, dataclasses.replace(pruned, weights=DictWeights(tensors)), reports, changed


@pytest.mark.parametrize("family", sorted(CLASSES))
def test_keeping_everything_changes_nothing(groups, tmp_path, family):
    teacher = open_checkpoint(family_model(family, tmp_path / "m"))
    _, _, reports, changed = refit(teacher, KeptUnits.everything(teacher.shape), groups, tokens(10, 13))
    assert all(matrix.after <= matrix.before < 1e-10 for report in reports for matrix in report.matrices)
    for name, tensor in changed.items():
        torch.testing.assert_close(tensor, teacher.weights.tensor(name), rtol=1e-4, atol=1e-5)


def difference(teacher, student, groups):
    """Largest difference of the logits on tokens that the calibration did not see, relative to the largest."""
    ids = tokens(4, 13, seed=9)[:, :-1]
    expected, ours = (
        logits(live(checkpoint, groups, dtype=torch.float32), ids)[..., : SHAPE.vocab_size].float()
        for checkpoint in (teacher, student)
    )
    expected, ours = (part - part.mean(-1, keepdim=True) for part in (expected, ours))  # a constant does not count
    return float((expected - ours).abs().max() / expected.abs().max())


def repeated_neurons(tensors):
    """Neurons 20 to 39 have the gates of 0 to 19; their up-projections are sums of those of two of them."""
    for name, tensor in tensors.items():
        if name.endswith("linear_fc1.weight"):
            gate, up = tensor[:40], tensor[40:]
            gate[10:20] = gate[:10]
            gate[20:30] = gate[30:40] = gate[:10]
            up[20:30] = 0.5 * up[:10] - 2 * up[10:20]
            up[30:40] = up[:10] + up[10:20]


def repeated_heads(tensors):
    """In each group the second query head is the first again; the projection treats them differently."""
    for name, tensor in tensors.items():
        if name.endswith("linear_qkv.weight"):
            for group in tensor.view(4, 4, 6, 24):
                group[1] = group[0]


def repeated_channels(tensors):
    """Channels 12 to 23 of the residual stream are 0 to 11 again; what reads them treats them differently."""
    for name, tensor in tensors.items():
        if name.endswith(("word_embeddings.weight", "norm.weight", "norm_weight")):
            tensor[..., 12:] = tensor[..., :12]
        elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            tensor[12:] = tensor[:12]


def idle_layer(tensors):
    """The middle layer adds nothing."""
    for name in ("self_attention.linear_proj", "mlp.linear_fc2"):
        tensors[f"decoder.layers.1.{name}.weight"].zero_()


ALL = KeptUnits.everything(SHAPE)
NEURONS = dataclasses.replace(ALL, ffn=(tuple(range(20)),) * 3)
HEADS = dataclasses.replace(ALL, heads=(tuple((2 * group,) for group in range(4)),) * 3)
CHANNELS = dataclasses.replace(ALL, hidden=tuple(range(12)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ([repeated_neurons], NEURONS),
        ([repeated_heads], HEADS),
        ([repeated_channels], CHANNELS),
        (
            [repeated_neurons, repeated_heads, repeated_channels],
            dataclasses.replace(ALL, ffn=NEURONS.ffn, heads=HEADS.heads, hidden=CHANNELS.hidden),
        ),
    ],
    ids=["ffn", "heads", "hidden", "all"],
)
def test_units_that_others_replace_are_made_up_for(groups, change, kept, tied):
    def edit(tensors):
        for each in change:
            each(tensors)

    teacher = random_checkpoint(SHAPE.replace(tied_embeddings=tied), change=edit)
    pruned, refitted, _, _ = refit(teacher, kept, groups, tokens(40, 13))
    assert difference(teacher, pruned, groups) > 0.1
    assert difference(teacher, refitted, groups) < 1e-4


def test_neurons_of_experts_are_made_up_for(groups):
    def edit(tensors):
        for name, tensor in tensors.items():
            if name.endswith("linear_fc1.weight"):
                width = len(tensor) // 2
                gate, up = tensor[:width], tensor[width:]
                gate[width // 2 :] = gate[: width // 2]
                up[width // 2 :] = -0.5 * up[: width // 2]

    teacher = random_mixture(change=edit)
    whole = KeptUnits.everything(teacher.shape)
    half = tuple(range(teacher.shape.ffn_hidden_size // 2))
    kept = dataclasses.replace(whole, expert_ffn=tuple(tuple(half for _ in layer) for layer in whole.experts))
    pruned, refitted, _, _ = refit(teacher, kept, groups, tokens(60, 13))
    assert difference(teacher, pruned, groups) > 0.02
    assert difference(teacher, refitted, groups) < 1e-4


def test_an_expert_that_goes_is_made_up_for_in_part(groups):
    teacher = random_mixture()
    whole = KeptUnits.everything(teacher.shape)
    kept = dataclasses.replace(
        whole,
        experts=((0, 1, 3),) * teacher.shape.num_layers,
        expert_ffn=tuple(layer[:3] for layer in whole.expert_ffn),
    )
    pruned, refitted, reports, _ = refit(teacher, kept, groups, tokens(80, 13))
    assert difference(teacher, refitted, groups) < difference(teacher, pruned, groups)
    assert {matrix.name for matrix in reports[0].matrices} >= {"mlp.router.weight"}
