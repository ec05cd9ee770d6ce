"""Merging pruned heads into kept ones, against the paper's formula written head by head."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.pruning import SHAPE, DictWeights, live, one_process, random_checkpoint

from nemo_minitron import axes
from nemo_minitron.axes import KeptUnits
from nemo_minitron.errors import NonFiniteError, ShapeError
from nemo_minitron.pruning import WidthPrune, merge_pruned_heads, prune_weights
from nemo_minitron.pruning.merging import head_pairs

QKV = "decoder.layers.{}.self_attention.linear_qkv.{}"


def units(shape, heads):
    """Everything, but of each layer only ``heads`` (one tuple for each kept group)."""
    groups = tuple(row[0] // shape.heads_per_group for row in heads)
    n = shape.num_layers
    return dataclasses.replace(KeptUnits.everything(shape), groups=(groups,) * n, heads=(heads,) * n)


def split(tensor, shape):
    """``[rows, ...]`` in Megatron's order -> queries ``[A, d, ...]``, keys and values ``[G, d, ...]``."""
    q, g, d = shape.heads_per_group, shape.num_query_groups, shape.head_dim
    parts = tensor.reshape(g, q + 2, d, *tensor.shape[1:])
    return parts[:, :q].reshape(g * q, d, *tensor.shape[1:]), parts[:, q], parts[:, q + 1]


def written_out(heads, order, count):
    """Section 2.3: head_i + (head_i - head_(2K - i + 1)), i from 1 in the order of importance."""
    new = {}
    for i in range(1, count + 1):
        partner = 2 * count - i + 1
        head = heads[order[i - 1]]
        new[order[i - 1]] = head + (head - heads[order[partner - 1]]) if partner <= len(order) else head
    return new


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_query_heads_are_merged_within_their_group_as_the_paper_writes_it(count):
    shape = SHAPE.replace(num_layers=2, num_query_groups=2)  # 8 heads in groups of 4
    checkpoint = random_checkpoint(shape)
    importance = torch.rand(2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ranked = [
        [sorted(range(4 * g, 4 * g + 4), key=lambda h: -importance[layer, h]) for g in (0, 1)] for layer in (0, 1)
    ]
    kept = dataclasses.replace(
        KeptUnits.everything(shape),
        heads=tuple(tuple(tuple(sorted(order[:count])) for order in layer) for layer in ranked),
    )
    pruned = prune_weights(merge_pruned_heads(checkpoint, kept, importance), kept)
    plain = prune_weights(checkpoint, kept)
    for layer in (0, 1):
        name = QKV.format(layer, "weight")
        queries, keys, values = split(checkpoint.weights.tensor(name), shape)
        merged = {}
        for order in ranked[layer]:
            merged |= written_out(queries, order, count)
        ours, our_keys, our_values = split(pruned.weights.tensor(name), pruned.shape)
        expected = torch.stack([merged[head] for group in kept.heads[layer] for head in group])
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(our_keys, keys) and torch.equal(our_values, values)
    others = [name for name in pruned.weights.names() if "linear_qkv.weight" not in name]
    assert all(torch.equal(pruned.weights.tensor(name), plain.weights.tensor(name)) for name in others)
    if count == 4:
        assert torch.equal(
            pruned.weights.tensor(QKV.format(0, "weight")), plain.weights.tensor(QKV.format(0, "weight"))
        )


def test_heads_of_multi_head_attention_are_merged_with_their_keys_and_values():
    shape = SHAPE.replace(num_layers=1, num_query_groups=8)
    checkpoint = random_checkpoint(shape)
    importance = torch.tensor([[3.0, 8.0, 1.0, 7.0, 2.0, 6.0, 5.0, 4.0]])
    order = [1, 3, 5, 6, 7, 0, 4, 2]
    kept = units(shape, tuple((head,) for head in sorted(order[:5])))
    pruned = prune_weights(merge_pruned_heads(checkpoint, kept, importance), kept)
    name = QKV.format(0, "weight")
    before, after = split(checkpoint.weights.tensor(name), shape), split(pruned.weights.tensor(name), pruned.shape)
    for heads, ours in zip(before, after, strict=True):
        merged = written_out(heads, order, 5)
        torch.testing.assert_close(ours, torch.stack([merged[head] for head in sorted(merged)]), rtol=1e-6, atol=1e-6)


def test_a_group_that_goes_is_not_merged_and_layers_keep_their_own_pairs():
    importance = torch.arange(32.0).reshape(4, 8) % 5
    kept = dataclasses.replace(units(SHAPE, ((2, 3), (6, 7))), layers=(1, 3), ffn=((0,),) * 2)
    kept = dataclasses.replace(kept, groups=kept.groups[:2], heads=kept.heads[:2])
    assert head_pairs(SHAPE, kept, importance) == {1: (), 3: ()}
    one = dataclasses.replace(kept, heads=(((3,), (6,)),) * 2)
    # layer 1: scores 3 4 0 1 2 3 4 0; layer 3: 4 0 1 2 3 4 0 1
    assert head_pairs(SHAPE, one, importance) == {1: ((3, 2), (6, 7)), 3: ((3, 2), (6, 7))}


def test_biases_are_merged_too_and_the_dtype_stays():
    shape = SHAPE.replace(num_layers=1)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        entry.name: torch.randn(entry.shape, generator=generator).bfloat16()
        for entry in axes.parameters(axes.QWEN2, shape)
    }
    llama = random_checkpoint(shape)
    architecture = dataclasses.replace(llama.architecture, family="qwen2")
    checkpoint = dataclasses.replace(llama, architecture=architecture, weights=DictWeights(tensors))
    kept = units(shape, ((0,), (2,), (4,), (6,)))
    merged = merge_pruned_heads(checkpoint, kept, torch.arange(8.0, 0.0, -1.0)[None])
    name = QKV.format(0, "bias")
    before, after = (split(one.weights.tensor(name).float(), shape)[0] for one in (checkpoint, merged))
    assert merged.weights.tensor(name).dtype is torch.bfloat16
    torch.testing.assert_close(after[::2], 2 * before[::2] - before[1::2], rtol=1e-2, atol=1e-2)
    assert torch.equal(after[1::2], before[1::2])


def test_a_live_model_of_merged_heads_is_pruned_like_any_other():
    checkpoint, importance = random_checkpoint(), torch.arange(32.0).reshape(4, 8) % 5
    kept = units(SHAPE, ((1,), (2,), (4,), (7,)))
    merged = merge_pruned_heads(checkpoint, kept, importance)
    with one_process() as groups:
        pruned, offline = live(merged, groups), live(prune_weights(merged, kept), groups)
        WidthPrune(kept)(pruned[0])
        for ours, theirs in zip(pruned[0].parameters(), offline[0].parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_scores_that_do_not_fit_are_refused():
    kept = units(SHAPE, ((0,), (2,), (4,), (6,)))
    with pytest.raises(ShapeError, match="4 layers of 8 heads; score this model first"):
        merge_pruned_heads(random_checkpoint(), kept, torch.ones(4, 7))
    scores = torch.ones(4, 8)
    scores[2, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="layer 2 heads"):
        merge_pruned_heads(random_checkpoint(), kept, scores)
    with pytest.raises(ShapeError, match="layers"):
        merge_pruned_heads(random_checkpoint(), dataclasses.replace(kept, layers=(9,)), torch.ones(4, 8))
