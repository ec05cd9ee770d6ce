"""Rounds: pruning twice is pruning once with the composed units, and the shapes in between."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import some_units
from support.pruning import SHAPE, DictWeights, random_checkpoint, random_kept

from nemo_minitron import axes
from nemo_minitron.axes import KeptUnits
from nemo_minitron.errors import ShapeError
from nemo_minitron.pruning import load_kept, prune_weights, save_kept
from nemo_minitron.pruning.rounds import SPACINGS, intermediate_shapes
from nemo_minitron.shape import ModelShape


@st.composite
def shapes(draw, rounds: int):
    """A shape and ``rounds`` smaller ones, each to be pruned from the one before, experts and vocabulary too."""
    experts = draw(st.booleans())
    sizes = {name: draw(st.integers(1, most)) for name, most in
             (("num_layers", 4), ("hidden_size", 8), ("ffn_hidden_size", 8), ("num_query_groups", 3),
              ("q", 3), ("vocab_size", 12), ("num_moe_experts", 4))}  # fmt: skip
    found = []
    for _ in range(rounds + 1):
        one = {name: size for name, size in sizes.items() if name != "q"}
        one |= {"num_attention_heads": sizes["q"] * sizes["num_query_groups"], "head_dim": 2}
        found.append(ModelShape(**one | ({} if experts else {"num_moe_experts": None})))
        sizes = {name: draw(st.integers(1, size)) for name, size in sizes.items()}
    return found


def checkpoint_of(shape: ModelShape):
    """A random checkpoint with an MLP or experts."""
    if shape.num_moe_experts is None:
        return random_checkpoint(shape)
    checkpoint = random_checkpoint(shape.replace(num_moe_experts=None))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        entry.name: torch.randn(entry.shape, generator=generator) for entry in axes.parameters(axes.MIXTRAL, shape)
    }
    architecture = dataclasses.replace(checkpoint.architecture, family="mixtral", moe_router_topk=1)
    return dataclasses.replace(checkpoint, shape=shape, architecture=architecture, weights=DictWeights(tensors))


def units(shape: ModelShape, target: ModelShape, seed: int) -> KeptUnits:
    vocab = torch.randperm(shape.vocab_size, generator=torch.Generator().manual_seed(seed))[: target.vocab_size]
    kept = sorted(vocab.tolist()) if target.vocab_size < shape.vocab_size else None
    return random_kept(shape, target, seed=seed, vocab=kept)


@settings(max_examples=25, deadline=None)
@given(shapes(rounds=3))
def test_pruning_in_rounds_is_pruning_once_with_the_composed_units(found):
    checkpoint = now = checkpoint_of(found[0])
    together = KeptUnits.everything(found[0])
    for seed, target in enumerate(found[1:]):
        kept = units(now.shape, target, seed)
        now, together = prune_weights(now, kept), together.compose(kept)
        assert together.faults(found[0]) == []
        assert together.target(found[0]) == target
    once = prune_weights(checkpoint, together)
    assert list(once.weights.names()) == list(now.weights.names())
    for name in once.weights.names():
        assert torch.equal(once.weights.tensor(name), now.weights.tensor(name)), name
    assert together.compose(KeptUnits.everything(found[-1])) == together


def test_experts_and_tokens_are_recorded(tmp_path):
    shape = SHAPE.replace(num_moe_experts=4, num_layers=3)
    kept = dataclasses.replace(some_units(shape), vocab=(1, 5, 66))
    save_kept(kept, shape, tmp_path / "kept.json")
    assert load_kept(tmp_path / "kept.json") == (kept, shape)


def test_a_record_of_version_1_is_read(tmp_path):
    kept = random_kept(SHAPE, SHAPE.replace(num_layers=2))
    file = tmp_path / "kept.json"
    save_kept(kept, SHAPE, file)
    content = json.loads(file.read_text())
    for name in ("experts", "expert_ffn", "vocab"):
        del content["kept"][name]
    file.write_text(json.dumps({**content, "format_version": 1}))
    assert load_kept(file) == (kept, SHAPE)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.sampled_from(SPACINGS),
    st.sampled_from([1, 2, 3]),
    st.integers(1, 2),
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=6, max_size=6),
    st.booleans(),
)
def test_the_shapes_in_between_shrink_and_fit_the_layout(rounds, spacing, tensor, pipeline, pairs, experts):
    ends = []
    for take in (max, min):
        layers, hidden, ffn, groups, q, mixture = (take(pair) for pair in pairs)
        ends.append(
            ModelShape(
                num_layers=layers + 1,
                hidden_size=hidden,
                ffn_hidden_size=ffn * tensor,
                num_query_groups=groups * tensor,
                num_attention_heads=groups * tensor * q,
                head_dim=2,
                vocab_size=11,
                num_moe_experts=mixture if experts else None,
            )
        )
    found = intermediate_shapes(*ends, rounds, spacing=spacing, tensor=tensor, pipeline=pipeline)
    assert found[-1] == ends[1]
    assert len(found) <= rounds
    before = ends[0]
    for one in found:
        assert before.prune_faults(one) == []
        assert one.layout_faults(tensor=tensor, pipeline=pipeline) == []
        assert one != before or ends[0] == ends[1]
        before = one


def test_spacings():
    start, end = SHAPE.replace(ffn_hidden_size=1600), SHAPE.replace(ffn_hidden_size=100)
    assert [one.ffn_hidden_size for one in intermediate_shapes(start, end, 4)] == [800, 400, 200, 100]
    linear = intermediate_shapes(start, end, 3, spacing="linear")
    assert [one.ffn_hidden_size for one in linear] == [1100, 600, 100]
    assert intermediate_shapes(start, end, 1) == [end]


def test_ends_that_the_layout_cannot_hold():
    with pytest.raises(ShapeError, match=r"target: ffn_hidden_size=39 .* parallel.tensor in \[1, 3, 13, 39\]"):
        intermediate_shapes(SHAPE, SHAPE.replace(ffn_hidden_size=39), 2, tensor=2)
    with pytest.raises(ShapeError, match="the model has only 40"):
        intermediate_shapes(SHAPE, SHAPE.replace(ffn_hidden_size=41), 2)
