"""Shapes drawn at random, uniform ones and ones whose layers have sizes of their own."""

from __future__ import annotations

from hypothesis import strategies as st

from nemo_minitron.shape import LayerShape, ModelShape

SHAPE = ModelShape(
    num_layers=3,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=6,
    vocab_size=67,
)
MIXED = SHAPE.replace(layers=(LayerShape(), LayerShape(0, 2), LayerShape(16, 0)))


@st.composite
def uniform_shapes(draw: st.DrawFn) -> ModelShape:
    groups = draw(st.sampled_from([1, 2, 3, 4]))
    return ModelShape(
        num_layers=draw(st.integers(1, 4)),
        hidden_size=draw(st.integers(1, 40)),
        ffn_hidden_size=draw(st.integers(1, 60)),
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_query_groups=groups,
        head_dim=draw(st.integers(1, 8)),
        vocab_size=draw(st.integers(1, 70)),
        tied_embeddings=draw(st.booleans()),
    )


@st.composite
def mixed_shapes(draw: st.DrawFn) -> ModelShape:
    """Layers of any sizes; they may happen to be all alike."""
    shape = draw(uniform_shapes())
    divisors = [n for n in range(1, shape.num_attention_heads + 1) if shape.num_attention_heads % n == 0]
    layer = st.builds(
        LayerShape,
        ffn_hidden_size=st.none() | st.integers(0, 60),
        num_query_groups=st.none() | st.sampled_from([0, *divisors]),
    )
    layers = draw(st.lists(layer, min_size=shape.num_layers, max_size=shape.num_layers))
    # At least one layer has each part.
    layers[draw(st.integers(0, len(layers) - 1))] = LayerShape()
    return shape.replace(layers=tuple(layers))
