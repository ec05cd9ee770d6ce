"""The inner order of QKV matrices and of gated MLPs, against its description spelled out head by head."""

from __future__ import annotations

import pytest
import torch

from nemo_minitron.axes import (
    Axis,
    axis_parts,
    axis_size,
    head_blocks,
    join_gate,
    join_qkv,
    split_gate,
    split_qkv,
)
from nemo_minitron.shape import ModelShape

SIZES = {"num_layers": 1, "hidden_size": 5, "ffn_hidden_size": 7, "head_dim": 3, "vocab_size": 11}
SHAPES = [
    ModelShape(**SIZES, num_attention_heads=6, num_query_groups=2),
    ModelShape(**SIZES, num_attention_heads=4, num_query_groups=4),
    ModelShape(**SIZES, num_attention_heads=4, num_query_groups=1),
]


def kinds(shape: ModelShape) -> list[str]:
    """What each row of a QKV matrix belongs to, in the order of Megatron's ``linear_qkv``."""
    rows = []
    for group in range(shape.num_query_groups):
        for head in range(group * shape.heads_per_group, (group + 1) * shape.heads_per_group):
            rows += [f"q{head}"] * shape.head_dim
        rows += [f"k{group}"] * shape.head_dim + [f"v{group}"] * shape.head_dim
    return rows


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.num_attention_heads}/{shape.num_query_groups}")
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_queries_keys_values(shape, dim):
    rows = kinds(shape)
    assert len(rows) == axis_size(Axis.QKV, shape)
    whole = torch.randn(2, len(rows)).bfloat16()
    whole = whole.t() if dim == 0 else whole
    parts = split_qkv(whole, shape, dim=dim)
    for kind, part, size in zip("qkv", parts, axis_parts(Axis.QKV, shape), strict=True):
        own = torch.tensor([index for index, row in enumerate(rows) if row.startswith(kind)])
        assert len(own) == size
        assert torch.equal(part, whole.index_select(dim, own))
    if dim == 0:
        assert torch.equal(join_qkv(*parts, shape), whole)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.num_attention_heads}/{shape.num_query_groups}")
def test_blocks_of_heads(shape):
    blocks, q = kinds(shape)[:: shape.head_dim], shape.heads_per_group
    heads = [shape.num_attention_heads - 1, 0]
    assert [blocks[block] for block in head_blocks(heads, q)] == [f"q{head}" for head in heads]
    whole = [blocks[block] for block in head_blocks(heads, q, keys_values=True)]
    assert whole == [name for head in heads for name in (f"q{head}", f"k{head // q}", f"v{head // q}")]


def test_gate_and_up_projection():
    shape = SHAPES[0]
    whole = torch.randn(axis_size(Axis.GATED_FFN, shape), shape.hidden_size)
    gate, up = split_gate(whole)
    assert torch.equal(gate, whole[: shape.ffn_hidden_size])
    assert torch.equal(up, whole[shape.ffn_hidden_size :])
    assert torch.equal(join_gate(gate, up), whole)
    assert axis_parts(Axis.GATED_FFN, shape) == (len(gate), len(up))
    assert axis_parts(Axis.HIDDEN, shape) == (shape.hidden_size,)
