"""Shapes whose layers have sizes of their own, beside uniform ones, which stay what they were."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shapes import MIXED, SHAPE, mixed_shapes, uniform_shapes

from nemo_minitron import axes
from nemo_minitron.errors import ShapeError
from nemo_minitron.shape import LAYER_SIZES, LayerShape, ModelShape, require_uniform

DENSE = [name for name, table in axes.FAMILIES.items() if not table.expert]


@given(uniform_shapes())
@settings(max_examples=100, deadline=None)
def test_a_uniform_shape_is_what_it_was(shape):
    """Records, messages and parameters as before layers could have sizes of their own."""
    fields = [
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "head_dim",
        "vocab_size",
        "tied_embeddings",
        "num_moe_experts",
    ]
    assert json.dumps(shape.to_dict()) == json.dumps({name: getattr(shape, name) for name in fields})
    assert repr(shape) == f"ModelShape({', '.join(f'{name}={getattr(shape, name)!r}' for name in fields)})"
    assert ModelShape.from_dict(shape.to_dict()) == shape == ModelShape(**shape.to_dict())
    assert shape.uniform
    assert all(shape.at(layer) is shape for layer in (None, *range(shape.num_layers)))
    h, f, v = shape.hidden_size, shape.ffn_hidden_size, shape.vocab_size
    q, kv = (count * shape.head_dim for count in (shape.num_attention_heads, shape.num_query_groups))
    layer = {
        "self_attention.linear_qkv.layer_norm_weight": (h,),
        "self_attention.linear_qkv.weight": (q + 2 * kv, h),
        "self_attention.linear_proj.weight": (h, q),
        "mlp.linear_fc1.layer_norm_weight": (h,),
        "mlp.linear_fc1.weight": (2 * f, h),
        "mlp.linear_fc2.weight": (h, f),
    }
    expected = {
        "embedding.word_embeddings.weight": (v, h),
        **{f"decoder.layers.{n}.{name}": size for n in range(shape.num_layers) for name, size in layer.items()},
        "decoder.final_layernorm.weight": (h,),
        **({} if shape.tied_embeddings else {"output_layer.weight": (v, h)}),
    }
    found = {entry.name: entry.shape for entry in axes.parameters(axes.LLAMA, shape)}
    assert list(found.items()) == list(expected.items())
    assert axes.parameter_count(axes.LLAMA, shape) == sum(map(math.prod, expected.values()))


@given(uniform_shapes(), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_layers_that_are_all_alike_are_the_uniform_shape(shape, spelling):
    """Whichever sizes are spelled out, and whatever the model's own were."""
    own = LayerShape(shape.ffn_hidden_size if spelling & 1 else None, shape.num_query_groups if spelling & 2 else None)
    other = shape.replace(ffn_hidden_size=shape.ffn_hidden_size + 1) if spelling & 1 else shape
    alike = other.replace(layers=(own,) * shape.num_layers)
    assert alike == shape
    assert hash(alike) == hash(shape)
    assert alike.layers is None
    assert alike.ffn_hidden_size == shape.ffn_hidden_size


@given(mixed_shapes(), st.sampled_from(DENSE))
@settings(max_examples=100, deadline=None)
def test_parameters_are_those_of_each_layer(shape, family):
    """A layer has what a model of its sizes has, and of a part of size 0 nothing, not even the norm."""
    table = axes.family(family)
    entries = list(axes.parameters(table, shape))
    outside = sum(entry.count for entry in entries if entry.layer is None)
    assert axes.parameter_count(table, shape) == outside + sum(
        axes.layer_count(table, shape.at(layer)) for layer in range(shape.num_layers)
    )
    for layer in range(shape.num_layers):
        sizes = shape.at(layer)
        found = {entry.name.split(".", 3)[3]: entry.shape for entry in entries if entry.layer == layer}
        whole = shape.replace(
            ffn_hidden_size=sizes.ffn_hidden_size or 1, num_query_groups=sizes.num_query_groups or 1, layers=None
        )
        expected = {
            entry.name.split(".", 3)[3]: entry.shape for entry in axes.parameters(table, whole) if entry.layer == layer
        }
        if not sizes.num_query_groups:
            expected = {name: size for name, size in expected.items() if not name.startswith("self_attention.")}
        if not sizes.ffn_hidden_size:
            expected = {name: size for name, size in expected.items() if not name.startswith("mlp.")}
        assert found == expected
    for entry in entries:
        assert axes.entry(table, shape, entry.name) == entry


@given(mixed_shapes())
@settings(max_examples=100, deadline=None)
def test_shapes_come_back(shape):
    """From records, pickles and copies; equal shapes have equal hashes."""
    for other in (
        ModelShape.from_dict(json.loads(json.dumps(shape.to_dict()))),
        pickle.loads(pickle.dumps(shape)),
        copy.deepcopy(shape),
        shape.replace(),
    ):
        assert other == shape
        assert hash(other) == hash(shape)
        assert other.each() == shape.each()
    assert shape.replace(hidden_size=shape.hidden_size + 1) != shape


def test_each_layer_has_sizes_of_its_own():
    assert not MIXED.uniform
    assert MIXED.at(0) == SHAPE
    assert [MIXED.at(layer).ffn_hidden_size for layer in range(3)] == [40, 0, 16]
    assert [MIXED.at(layer).num_query_groups for layer in range(3)] == [4, 2, 0]
    assert [MIXED.at(layer).heads_per_group for layer in range(3)] == [2, 4, 0]
    assert MIXED.at(None) is MIXED
    assert MIXED.replace(ffn_hidden_size=8) == SHAPE.replace(layers=(LayerShape(8), LayerShape(8, 2), LayerShape(8, 0)))
    assert MIXED.to_dict()["layers"][1] == {"ffn_hidden_size": 0, "num_query_groups": 2}


@pytest.mark.parametrize("name", [*LAYER_SIZES, "heads_per_group"])
def test_a_size_that_is_no_longer_the_models_is_not_read(name):
    with pytest.raises(ShapeError, match=r"sizes of their own; ask shape.at\(layer\)"):
        getattr(MIXED, name)
    with pytest.raises(AttributeError, match="no attribute 'width'"):
        _ = MIXED.width


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([LayerShape()] * 2, "layers: 2 entries for num_layers=3; each layer needs one"),
        ([LayerShape(), LayerShape(-1), LayerShape()], "layer 1: ffn_hidden_size=-1: must be a whole number, 0 for"),
        ([LayerShape(), LayerShape(True), LayerShape()], "layer 1: ffn_hidden_size=True: must be a whole number"),
        ([LayerShape(), LayerShape(), LayerShape(8, 2.0)], "layer 2: num_query_groups=2.0: must be a whole number"),
        ([LayerShape(), LayerShape(8, 3), LayerShape()], "layer 1: num_attention_heads=8 is not a multiple of num_que"),
        ([LayerShape(0), LayerShape(0, 2), LayerShape(0)], "layers: ffn_hidden_size=0 in all of them; at least one"),
        ([LayerShape(8, 0)] * 3, "layers: num_query_groups=0 in all of them; at least one needs attention"),
    ],
)
def test_impossible_layers(layers, message):
    with pytest.raises(ShapeError, match=message):
        SHAPE.replace(layers=tuple(layers))


def test_all_impossible_layers_are_named():
    with pytest.raises(ShapeError) as error:
        SHAPE.replace(layers=(LayerShape(-1), LayerShape(8, -2), LayerShape()))
    assert len(error.value.faults) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layers": [{"ffn_hidden_size": 8, "width": 3}] * 3}, "width"),
        ({"layers": [{"ffn_hidden_size": 8}] * 2}, "layers: 2 entries"),
    ],
)
def test_damaged_records(content, message):
    with pytest.raises((ShapeError, TypeError), match=message):
        ModelShape.from_dict({**SHAPE.to_dict(), **content})


def test_what_pruning_cannot_reach_is_named_by_layer():
    grown = SHAPE.replace(layers=(LayerShape(), LayerShape(4), LayerShape(41)))
    assert SHAPE.prune_faults(grown) == ["layer 2: ffn_hidden_size=41: the model has only 40"]
    assert MIXED.prune_faults(SHAPE) == [
        "layer 1: ffn_hidden_size=40: the model has only 0",
        "layer 1: num_query_groups=4: the model has only 2",
        "layer 2: ffn_hidden_size=40: the model has only 16",
        "layer 2: num_query_groups=4: the model has only 0",
    ]
    # Eight heads in two groups: four a group, where the model's groups have two.
    fewer = SHAPE.replace(layers=(LayerShape(), LayerShape(40, 2), LayerShape()))
    assert SHAPE.prune_faults(fewer) == [
        "layer 1: num_attention_heads=8 in num_query_groups=2 needs 4 heads a group; the model's groups have 2"
    ]
    assert SHAPE.prune_faults(fewer.replace(num_attention_heads=4)) == []
    assert MIXED.prune_faults(MIXED.of_layers([0, 2])) == [
        "num_layers=2: the model's layers differ in size; name those to drop"
    ]
    assert MIXED.prune_faults(MIXED.of_layers([0, 2]), layers=[0, 2]) == []


def test_a_layout_must_fit_every_layer():
    assert MIXED.layout_faults(tensor=2, pipeline=3) == []
    assert MIXED.layout_faults(tensor=4) == [
        "layer 1: num_query_groups=2 cannot be split over parallel.tensor=4; it fits parallel.tensor in [1, 2]"
    ]


def test_who_cannot_take_them_says_so():
    require_uniform(SHAPE, "distillation")
    with pytest.raises(ShapeError, match=r"distillation: takes no model whose layers differ in size \(layer 0 has ffn"):
        require_uniform(MIXED, "distillation")


def test_shapes_stay_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MIXED.hidden_size = 3
