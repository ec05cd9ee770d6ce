"""Pruning under every layout against one process: same kept units, same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.distributed import run_distributed
from support.pruning import SHAPE, live, logits, one_process, random_checkpoint, random_kept, tokens

from nemo_minitron import axes

# 8 layers, so that there are two for each of 2 x 2 virtual stages; sizes that TP 2 divides before and after pruning.
WIDE = SHAPE.replace(num_layers=8)
TARGET = WIDE.replace(hidden_size=14, ffn_hidden_size=22, num_query_groups=2, num_attention_heads=2)

LAYOUTS = {
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "dp2": {"data": 2},
    "tp2-pp2": {"tensor": 2, "pipeline": 2},
    "pp2-vp2": {"pipeline": 2, "virtual_pipeline": 2},
}


def world(layout: dict[str, int]) -> int:
    return layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("data", 1)


def initialize(layout: dict[str, int]) -> Any:
    from nemo_minitron.runtime.groups import ParallelLayout
    from nemo_minitron.runtime.groups import initialize as start

    return start(ParallelLayout(**layout))


# -------------------------------------------------------------------------------------------------------------- pruning


def prune_case(layout: dict[str, int], kept: Any) -> list[dict[str, Any]]:
    """With untied and with tied embeddings."""
    groups = initialize(layout)
    return [compare_paths(groups, kept, tied) for tied in (False, True)]


def compare_paths(groups: Any, kept: Any, tied: bool) -> dict[str, Any]:
    """The pruned live model of this rank against the offline path loaded under the same layout."""
    from torch import nn

    from nemo_minitron.checkpoints.live import canonical_parameters
    from nemo_minitron.pruning import DepthPrune, WidthPrune, prune_weights

    checkpoint = random_checkpoint(WIDE.replace(tied_embeddings=tied))
    ours = live(checkpoint, groups)
    module = nn.ModuleList(ours)
    WidthPrune(kept)(DepthPrune(kept, groups=groups)(module))
    theirs = live(prune_weights(checkpoint, kept), groups)

    differences = []
    shapes = {}
    for mine, built in zip(ours, theirs, strict=True):
        one, other = dict(canonical_parameters(mine)), dict(canonical_parameters(built))
        if one.keys() != other.keys():
            differences.append(f"{sorted(one)} != {sorted(other)}")
        for name in one.keys() & other.keys():
            shapes[name] = tuple(one[name].shape)
            if not torch.equal(one[name], other[name]) or vars(one[name]) != vars(other[name]):
                differences.append(name)
        for (name, part), like in zip(mine.named_modules(), built.modules(), strict=True):
            for key, value in vars(like).items():
                if isinstance(value, int | float | tuple | str) and getattr(part, key) != value:
                    differences.append(f"{name}.{key}: {getattr(part, key)} != {value}")
    return {"differences": differences, "shapes": shapes}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_live_pruning_equals_the_offline_path(tmp_path, name):
    layout = LAYOUTS[name]
    # One layer of each pair goes, so that all stages stay equally long.
    kept = random_kept(WIDE, TARGET.replace(num_layers=4), layers_to_drop=[1, 2, 5, 7])
    by_rank = run_distributed(prune_case, world(layout), tmp_path, layout=layout, kept=kept)
    for tied, results in zip((False, True), zip(*by_rank, strict=True), strict=True):
        assert [result["differences"] for result in results] == [[]] * len(results)
        # Everything of the pruned model is there.
        names = {name for result in results for name in result["shapes"]}
        pruned = kept.target(WIDE.replace(tied_embeddings=tied))
        table = {name for name, _, _ in axes.parameters(axes.LLAMA, pruned)}
        assert names >= table
        assert names - table <= {"output_layer.weight"}


def move_case(layout: dict[str, int], kept: Any) -> dict[str, Any]:
    """All neurons, heads and groups that stay are on rank 0; both ranks end with half of them."""
    from nemo_minitron.pruning import WidthPrune

    groups = initialize(layout)
    chunks = live(random_checkpoint(SHAPE), groups)
    WidthPrune(kept, groups=groups)(chunks[0])
    found = {name: tuple(parameter.shape) for name, parameter in chunks[0].named_parameters()}
    return {"shapes": found, "logits": logits(chunks, tokens(2, 9))}


@pytest.mark.slow
def test_rows_move_so_that_ranks_hold_equal_shares(tmp_path):
    from nemo_minitron.axes import KeptUnits
    from nemo_minitron.pruning import prune_weights

    n = SHAPE.num_layers
    kept = KeptUnits(
        layers=tuple(range(n)),
        hidden=tuple(range(SHAPE.hidden_size)),
        ffn=(tuple(range(10)),) * n,
        groups=((0, 1),) * n,
        heads=(((0, 1), (2, 3)),) * n,
    )
    one, two = run_distributed(move_case, 2, tmp_path, layout={"tensor": 2}, kept=kept)
    assert one["shapes"] == two["shapes"]
    assert one["shapes"]["decoder.layers.0.mlp.linear_fc1.weight"] == (10, 24)
    assert one["shapes"]["decoder.layers.0.self_attention.linear_qkv.weight"] == ((2 + 2) * 6, 24)
    with one_process() as groups:
        expected = logits(live(prune_weights(random_checkpoint(SHAPE), kept), groups), tokens(2, 9))
    found = torch.cat([one["logits"], two["logits"]], -1)[..., : SHAPE.vocab_size]
    torch.testing.assert_close(found, expected[..., : SHAPE.vocab_size], rtol=1e-5, atol=1e-4)


def refuse_case(layout: dict[str, int], width: Any, depth: Any) -> list[str]:
    from nemo_minitron.errors import ShapeError
    from nemo_minitron.pruning import DepthPrune, WidthPrune

    groups = initialize(layout)
    (chunk,) = live(random_checkpoint(SHAPE), groups)
    before = {name: tuple(parameter.shape) for name, parameter in chunk.named_parameters()}
    messages = []
    for transform in (WidthPrune(width), DepthPrune(depth)):
        try:
            transform(chunk)
        except ShapeError as error:
            messages.append(str(error))
    assert before == {name: tuple(parameter.shape) for name, parameter in chunk.named_parameters()}
    assert chunk.config.num_layers == SHAPE.num_layers
    return messages


@pytest.mark.slow
def test_targets_that_do_not_fit_the_layout_are_refused(tmp_path):
    width = random_kept(SHAPE, SHAPE.replace(ffn_hidden_size=21, num_query_groups=3, num_attention_heads=3))
    depth = random_kept(SHAPE, SHAPE.replace(num_layers=3), layers_to_drop=[3])
    layout = {"tensor": 2, "pipeline": 2}
    found = run_distributed(refuse_case, 4, tmp_path, layout=layout, width=width, depth=depth)
    assert all(messages == found[0] for messages in found)
    over_width, over_depth = found[0]
    assert "3 faults" in over_width
    assert (
        "ffn_hidden_size=21 cannot be split over parallel.tensor=2; it fits parallel.tensor in [1, 3, 7, 21]"
        in over_width
    )
    assert "leave the 2 pipeline stages with [2, 1] layers each" in over_depth
