"""What holds of any reconstruction: more calibration text does no harm, and text of another kind gains too."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pruning import DictWeights, live, logits, one_process, random_checkpoint
from support.shapes import SHAPE

from nemo_minitron.axes import KeptUnits
from nemo_minitron.pruning import prune_weights
from nemo_minitron.reconstruction import reconstruct
from nemo_minitron.streamed import StreamedModel

SMALL = SHAPE.replace(num_layers=2)
LENGTH = 13


@pytest.fixture(scope="module")
def groups():
    with one_process() as given:
        yield given


def text(rows: int, seed: int, *, kind: int = 0) -> torch.Tensor:
    """``[rows, LENGTH]`` ids, frequent and rare ones as in a language; each kind has other frequent ones."""
    generator = torch.Generator().manual_seed(1000 * kind + seed)
    order = torch.randperm(SMALL.vocab_size, generator=torch.Generator().manual_seed(77 + kind))
    weights = 1.0 / (1 + torch.arange(SMALL.vocab_size, dtype=torch.float64))
    return order[torch.multinomial(weights.repeat(rows, 1), LENGTH, replacement=True, generator=generator)]


def a_teacher(seed: int):
    """Neighbouring neurons and channels are alike in part, as units of a trained model are."""

    def edit(tensors):
        for name, tensor in tensors.items():
            if name.endswith("linear_fc1.weight"):
                width = len(tensor) // 2
                tensor[:width:2] = tensor[1:width:2] + 0.3 * tensor[:width:2]
                tensor[width::2] = tensor[width + 1 :: 2] + 0.3 * tensor[width::2]

    return random_checkpoint(SMALL, seed=seed, change=edit)


def units(share: float, hidden: int, seed: int) -> KeptUnits:
    generator = torch.Generator().manual_seed(seed)
    every = KeptUnits.everything(SMALL)
    count = max(4, int(share * SMALL.ffn_hidden_size))
    ffn = tuple(
        tuple(sorted(torch.randperm(SMALL.ffn_hidden_size, generator=generator)[:count].tolist()))
        for _ in range(SMALL.num_layers)
    )
    return dataclasses.replace(every, ffn=ffn, hidden=tuple(range(hidden)))


def refitted(teacher, kept, groups, blocks):
    pruned = prune_weights(teacher, kept)
    tensors = {name: pruned.weights.tensor(name) for name in pruned.weights.names()}
    reconstruct(
        StreamedModel(teacher, groups),
        StreamedModel(pruned, groups),
        kept,
        blocks,
        sink=lambda number, changed, report: tensors.update(changed),
        micro_batch_size=8,
    )
    return dataclasses.replace(pruned, weights=DictWeights(tensors))


def divergence(teacher, student, groups, ids) -> float:
    """Mean KL of the student to the teacher, in nats."""
    theirs, ours = (
        logits(live(model, groups, dtype=torch.float32), ids)[..., : SMALL.vocab_size].double().log_softmax(-1)
        for model in (teacher, student)
    )
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@settings(deadline=None, max_examples=6)
@given(
    seed=st.integers(0, 100),
    few=st.sampled_from([5, 10, 20]),
    times=st.sampled_from([2, 4, 8]),
    share=st.floats(0.3, 0.8),
    hidden=st.sampled_from([SMALL.hidden_size, SMALL.hidden_size - 4]),
)
def test_more_calibration_tokens_never_hurt(groups, seed, few, times, share, hidden):
    """On text that neither saw, beyond noise: a tenth of what pruning costs."""
    teacher, kept, unseen = a_teacher(seed), units(share, hidden, seed), text(24, seed + 9000)
    blocks = text(few * times, seed)
    pruned = divergence(teacher, prune_weights(teacher, kept), groups, unseen)
    little, more = (
        divergence(teacher, refitted(teacher, kept, groups, part), groups, unseen) for part in (blocks[:few], blocks)
    )
    assert more <= little + 0.1 * pruned
    assert more <= pruned


@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 100), samples=st.sampled_from([5, 20, 60]), share=st.floats(0.3, 0.8))
def test_text_of_another_kind_gains_too(groups, seed, samples, share):
    """At the default settings, however little text is calibrated on."""
    teacher, kept = a_teacher(seed), units(share, SMALL.hidden_size, seed)
    other = text(24, seed, kind=1)
    pruned = divergence(teacher, prune_weights(teacher, kept), groups, other)
    assert divergence(teacher, refitted(teacher, kept, groups, text(samples, seed)), groups, other) <= pruned
