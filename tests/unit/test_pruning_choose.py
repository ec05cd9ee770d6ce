"""Choosing units, their record on disk, and the offline path: no Megatron."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pruning import SHAPE, DictWeights, random_checkpoint, random_kept

from nemo_minitron import axes
from nemo_minitron.axes import KeptUnits
from nemo_minitron.errors import CheckpointError, ConfigError, NonFiniteError, ShapeError
from nemo_minitron.pruning import choose_units, load_kept, prune_weights, save_kept, target_shape
from nemo_minitron.shape import ModelShape


def random_scores(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.rand(size, generator=generator, dtype=torch.float64)

    n = shape.num_layers
    return SimpleNamespace(
        ffn=draw(n, shape.ffn_hidden_size),
        heads=draw(n, shape.num_attention_heads),
        groups=draw(n, shape.num_query_groups),
        hidden=draw(shape.hidden_size),
        layers=draw(n),
        experts=None,
        shape=shape,
    )


@st.composite
def shapes_and_targets(draw):
    def pair(most):
        size = draw(st.integers(1, most))
        return size, draw(st.integers(1, size))

    (layers, l2), (hidden, h2), (ffn, f2), (groups, g2), (q, q2) = (pair(m) for m in (4, 9, 9, 4, 3))
    shape = ModelShape(layers, hidden, ffn, groups * q, groups, draw(st.integers(1, 3)), 11, draw(st.booleans()))
    target = shape.replace(
        num_layers=l2, hidden_size=h2, ffn_hidden_size=f2, num_query_groups=g2, num_attention_heads=g2 * q2
    )
    return shape, target


@settings(max_examples=60, deadline=None)
@given(shapes_and_targets(), st.sampled_from(["activation", "random"]), st.integers(0, 99))
def test_any_reachable_target_is_reached(pair, method, seed):
    shape, target = pair
    kept = choose_units(random_scores(shape, seed), shape, target, method=method, seed=seed)
    assert kept.faults(shape) == []
    assert kept.target(shape) == target
    for indices in (kept.layers, kept.hidden, *kept.ffn, *kept.groups, *(h for layer in kept.heads for h in layer)):
        assert list(indices) == sorted(indices)
    pruned = prune_weights(random_checkpoint(shape, seed=seed), kept)
    expected = {entry.name: entry.shape for entry in axes.parameters(axes.LLAMA, target)}
    assert {name: tuple(pruned.weights.tensor(name).shape) for name in pruned.weights.names()} == expected


@settings(max_examples=30, deadline=None)
@given(shapes_and_targets(), st.sampled_from(["activation", "random"]))
def test_keeping_everything_is_the_identity(pair, method):
    shape, _ = pair
    kept = choose_units(random_scores(shape), shape, shape, method=method)
    assert kept == KeptUnits.everything(shape)
    checkpoint = random_checkpoint(shape)
    pruned = prune_weights(checkpoint, kept)
    assert list(pruned.weights.names()) == list(checkpoint.weights.names())
    for name in pruned.weights.names():
        assert torch.equal(pruned.weights.tensor(name), checkpoint.weights.tensor(name))


@settings(max_examples=30, deadline=None)
@given(shapes_and_targets(), st.integers(0, 99))
def test_the_highest_scores_stay(pair, seed):
    shape, target = pair
    scores = random_scores(shape, seed)
    kept = choose_units(scores, shape, target)

    def best(values, stay):
        gone = [i for i in range(len(values)) if i not in stay]
        return not gone or values[list(stay)].min() >= values[gone].max()

    assert best(scores.layers, kept.layers)
    assert best(scores.hidden, kept.hidden)
    q = shape.heads_per_group
    for position, layer in enumerate(kept.layers):
        assert best(scores.ffn[layer], kept.ffn[position])
        assert best(scores.groups[layer], kept.groups[position])
        for group, heads in zip(kept.groups[position], kept.heads[position], strict=True):
            within = scores.heads[layer, group * q : (group + 1) * q]
            assert best(within, [head - group * q for head in heads])


def test_experts_and_in_each_its_neurons_by_score():
    shape = SHAPE.replace(num_moe_experts=5, ffn_hidden_size=6, num_layers=2)
    scores = random_scores(shape)
    generator = torch.Generator().manual_seed(2)
    scores.ffn, scores.experts = torch.rand(2, 5, 6, generator=generator), torch.rand(2, 5, generator=generator)
    target = shape.replace(num_moe_experts=3, ffn_hidden_size=2)
    kept = choose_units(scores, shape, target)
    assert (kept.faults(shape), kept.target(shape), kept.ffn) == ([], target, ((), ()))
    for layer in (0, 1):
        assert kept.experts[layer] == tuple(sorted(scores.experts[layer].topk(3).indices.tolist()))
        for expert, neurons in zip(kept.experts[layer], kept.expert_ffn[layer], strict=True):
            assert neurons == tuple(sorted(scores.ffn[layer, expert].topk(2).indices.tolist()))
    assert choose_units(None, shape, target, method="random", seed=1).target(shape) == target
    scores.ffn[1, 4, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="layer 1 expert 4 ffn: the score of unit 3 is nan"):
        choose_units(scores, shape, shape.replace(ffn_hidden_size=2))
    with pytest.raises(ShapeError, match="num_moe_experts=6: the model has only 5"):
        choose_units(scores, shape, shape.replace(num_moe_experts=6))


def test_equal_scores_keep_the_lower_index():
    scores = random_scores(SHAPE)
    scores.hidden = torch.ones(SHAPE.hidden_size)
    kept = choose_units(scores, SHAPE, SHAPE.replace(hidden_size=5))
    assert kept.hidden == (0, 1, 2, 3, 4)


def test_random_depends_on_the_seed_only():
    target = SHAPE.replace(ffn_hidden_size=20, hidden_size=12)
    one, other = (random_kept(SHAPE, target, seed=seed) for seed in (1, 2))
    assert one == random_kept(SHAPE, target, seed=1)
    assert one.ffn[0] != other.ffn[0]
    assert one.ffn[0] != one.ffn[1]
    # another axis pruned besides does not change the neurons
    assert random_kept(SHAPE, target.replace(num_query_groups=2, num_attention_heads=4), seed=1).ffn == one.ffn


def test_dropping_a_users_layers():
    kept = choose_units(random_scores(SHAPE), SHAPE, SHAPE.replace(num_layers=2), layers_to_drop=[2, 0])
    assert kept.layers == (1, 3)
    assert target_shape(SHAPE, {"ffn_hidden_size": 8}, layers_to_drop=[2, 0]).num_layers == 2


def test_fewer_groups_keep_their_heads():
    target = target_shape(SHAPE, {"num_query_groups": 3})
    assert (target.num_query_groups, target.num_attention_heads) == (3, 6)


# ------------------------------------------------------------------------------------------------------- impossible


@pytest.mark.parametrize(
    ("sizes", "messages"),
    [
        ({"num_layers": 5}, ["num_layers=5: the model has only 4"]),
        ({"hidden_size": 0}, ["hidden_size=0: must be a whole number of at least 1"]),
        ({"num_attention_heads": 6}, ["num_attention_heads=6 is not a multiple of num_query_groups=4"]),
        ({"num_query_groups": 2, "num_attention_heads": 8}, ["needs 4 heads a group; the model's groups have 2"]),
        (
            {"num_layers": 9, "hidden_size": 99, "ffn_hidden_size": 999},
            ["num_layers=9", "hidden_size=99", "ffn_hidden_size=999"],
        ),
    ],
)
def test_impossible_targets(sizes, messages):
    with pytest.raises(ShapeError) as caught:
        target_shape(SHAPE, sizes)
    assert len(caught.value.faults) == len(messages)
    for message in messages:
        assert message in str(caught.value)


def test_choose_reports_every_fault():
    with pytest.raises(ShapeError) as caught:
        choose_units(random_scores(SHAPE), SHAPE, SHAPE.replace(hidden_size=99, num_layers=3), layers_to_drop=[0, 7, 7])
    assert [f.split(":")[0].split("=")[0] for f in caught.value.faults] == [
        "hidden_size", "layers_to_drop", "layers_to_drop", "layers_to_drop", "num_layers",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("drop", "sizes", "message"),
    [
        ([4], {}, "4 is not a layer"),
        ([-1], {}, "-1 is not a layer"),
        ([1, 1], {}, "named twice"),
        ([0, 1, 2, 3], {}, "leave at least one"),
        ([0], {"num_layers": 2}, "leaves 3"),
    ],
)
def test_impossible_drops(drop, sizes, message):
    with pytest.raises(ShapeError, match=message):
        target_shape(SHAPE, sizes, layers_to_drop=drop)


def test_scores_of_another_model():
    with pytest.raises(ShapeError, match="score this model first"):
        choose_units(random_scores(SHAPE.replace(num_layers=3)), SHAPE, SHAPE.replace(num_layers=2))


def test_no_scores_and_unknown_method():
    with pytest.raises(ConfigError, match="needs the scores"):
        choose_units(None, SHAPE, SHAPE.replace(hidden_size=8))
    with pytest.raises(ConfigError, match="method='magic'"):
        choose_units(None, SHAPE, SHAPE, method="magic")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_scores(value):
    scores = random_scores(SHAPE)
    scores.ffn[2, 7] = value
    with pytest.raises(NonFiniteError, match="layer 2 ffn: the score of unit 7"):
        choose_units(scores, SHAPE, SHAPE.replace(ffn_hidden_size=8))


# ------------------------------------------------------------------------------------------------------------ kept.json


def test_kept_round_trip(tmp_path):
    kept = random_kept(SHAPE, SHAPE.replace(num_layers=2, ffn_hidden_size=7, num_attention_heads=4))
    save_kept(kept, SHAPE, tmp_path / "kept.json")
    assert load_kept(tmp_path / "kept.json") == (kept, SHAPE)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]


def test_kept_bad_files(tmp_path):
    file = tmp_path / "kept.json"
    with pytest.raises(CheckpointError, match="no readable record"):
        load_kept(file)
    save_kept(random_kept(SHAPE, SHAPE.replace(hidden_size=7)), SHAPE, file)
    content = json.loads(file.read_text())
    for change, message in (
        ({"format_version": 3}, "version 3, this release reads 2; prune again"),
        ({"kept": {}}, "no readable record"),
        ({"kept": {**content["kept"], "hidden": [1, 1]}}, "repeated"),
        ({"kept": {**content["kept"], "hidden": [99]}}, "outside"),
        ({"kept": {**content["kept"], "ffn": 3}}, "no readable record"),
        ({"shape": {}}, "no readable record"),
    ):
        file.write_text(json.dumps({**content, **change}))
        with pytest.raises(CheckpointError, match=message):
            load_kept(file)
    file.write_text("{")
    with pytest.raises(CheckpointError):
        load_kept(file)


# --------------------------------------------------------------------------------------------------------- offline path


def test_lineage_names_the_parent():
    checkpoint = random_checkpoint()
    pruned = prune_weights(checkpoint, random_kept(SHAPE, SHAPE.replace(num_layers=2)), lineage={"method": "random"})
    assert pruned.shape.num_layers == 2
    assert pruned.lineage["method"] == "random"
    assert pruned.lineage["parents"]["model"]["shape"] == SHAPE.to_dict()
    json.dumps(pruned.lineage)


def test_units_that_do_not_fit_the_checkpoint():
    kept = random_kept(SHAPE.replace(hidden_size=99), SHAPE.replace(hidden_size=90))
    with pytest.raises(ShapeError, match="hidden"):
        prune_weights(random_checkpoint(), kept)


def test_one_source_tensor_at_a_time():
    """Nothing is read before it is asked for, and each pruned tensor reads exactly one source tensor."""
    checkpoint = random_checkpoint()
    read = []

    class Counting(DictWeights):
        def tensor(self, name):
            read.append(name)
            return super().tensor(name)

    object.__setattr__(checkpoint, "weights", Counting(checkpoint.weights.tensors))
    pruned = prune_weights(checkpoint, random_kept(SHAPE, SHAPE.replace(num_layers=2, hidden_size=7)))
    assert read == []
    names = pruned.weights.names()
    for name in names:
        pruned.weights.tensor(name)
    assert len(read) == len(names) == len(set(read))
