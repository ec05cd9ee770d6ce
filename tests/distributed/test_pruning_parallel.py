"""Pruning under every layout against one process: same kept units, same bits; and what it takes to move them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support.distributed import run_distributed
from support.memory import StorageWatch
from support.pruning import ARCHITECTURE, SHAPE, live, logits, one_process, random_checkpoint, random_kept, tokens
from support.text import write_tokenizer

from nemo_minitron import axes
from nemo_minitron.axes import KeptUnits
from nemo_minitron.shape import ModelShape

# 8 layers, so that there are two for each of 2 x 2 virtual stages; sizes that TP 2 divides before and after pruning.
WIDE = SHAPE.replace(num_layers=8, vocab_size=401)
TARGET = WIDE.replace(hidden_size=14, ffn_hidden_size=22, num_query_groups=2, num_attention_heads=2)
# Of this one, 3 ranks hold a group or two each.
THIRDS = WIDE.replace(num_attention_heads=12, num_query_groups=6, ffn_hidden_size=42)
THIRDS_TARGET = THIRDS.replace(hidden_size=14, ffn_hidden_size=21, num_query_groups=3, num_attention_heads=3)

#: By the number of processes: layouts share a launch.
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "tp2": {"tensor": 2},
        "tp2-sp": {"tensor": 2, "sequence_parallel": True},
        "pp2": {"pipeline": 2},
        "pp2-vp2": {"pipeline": 2, "virtual_pipeline": 2},
        "dp2": {"data": 2},
    },
    3: {"tp3": {"tensor": 3}, "pp3": {"pipeline": 3}},
    4: {
        "tp2-pp2": {"tensor": 2, "pipeline": 2},
        "tp2-pp2-vp2-sp": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence_parallel": True},
        "pp4": {"pipeline": 4},
    },
}
#: Layers of the unpruned model (7 are uneven under every pipeline), and those that stay.
DEPTHS: list[tuple[int, tuple[int, ...]]] = [
    (8, (0, 3, 4, 6)),
    (8, (3, 4, 5, 6, 7)),  # the first stage loses nearly all it has
    (7, (0, 1, 2, 3, 5)),
    (7, (2, 3, 5, 6)),
]
#: Biases and norms of heads; a mixture of experts. Constants, and sizes before and after.
OTHERS: list[tuple[dict[str, Any], dict[str, int], dict[str, int]]] = [
    ({"family": "qwen2"}, {}, {}),
    ({"family": "qwen3"}, {}, {}),
    ({"family": "nemotron", "rotary_percent": 0.5}, {}, {}),
    ({"family": "mixtral", "moe_router_topk": 2}, {"num_moe_experts": 4}, {"num_moe_experts": 3}),
]


def initialize(layout: dict[str, Any]) -> Any:
    from nemo_minitron.runtime.groups import ParallelLayout
    from nemo_minitron.runtime.groups import initialize as start

    return start(ParallelLayout(**layout))


def units(shape: ModelShape, target: ModelShape, layers: tuple[int, ...]) -> KeptUnits:
    gone = [layer for layer in range(shape.num_layers) if layer not in layers]
    return random_kept(shape, target.replace(num_layers=len(layers)), layers_to_drop=gone)


# -------------------------------------------------------------------------------------------------------------- pruning


def prune_case(layouts: dict[str, dict[str, Any]], shape: Any, target: Any) -> dict[str, list[dict[str, Any]]]:
    """Every depth, with untied and with tied embeddings; then the other kinds of parameters."""
    found = {}
    for name, layout in layouts.items():
        groups = initialize(layout)
        found[name] = [
            compare_paths(groups, shape.replace(num_layers=depth, tied_embeddings=tied), target, layers)
            for depth, layers in (DEPTHS if layout.get("pipeline", 1) > 1 else DEPTHS[:1])
            for tied in (False, True)
        ]
        found[name] += [
            compare_paths(
                groups, shape.replace(num_layers=8, **more), target.replace(**fewer), (1, 2, 5, 6, 7), **constants
            )
            for constants, more, fewer in OTHERS
        ]
    return found


def compare_paths(
    groups: Any, shape: ModelShape, target: ModelShape, layers: tuple[int, ...], **constants: Any
) -> dict[str, Any]:
    """The pruned live model of this rank against the offline path loaded under the same layout."""
    from torch import nn

    from nemo_minitron.checkpoints.live import canonical_parameters
    from nemo_minitron.pruning import DepthPrune, WidthPrune, prune_weights

    checkpoint = random_checkpoint(shape, architecture=dataclasses.replace(ARCHITECTURE, **constants))
    kept = units(shape, target.replace(tied_embeddings=shape.tied_embeddings), layers)
    if shape.tied_embeddings:
        kept = dataclasses.replace(kept, vocab=tuple(range(0, shape.vocab_size, 3)))
    # Only then has Megatron set all its marks on the parameters.
    ours = live(checkpoint, groups, initialize=True)
    module = nn.ModuleList(ours)
    WidthPrune(kept)(DepthPrune(kept, groups=groups)(module))
    theirs = live(prune_weights(checkpoint, kept), groups, initialize=True)

    differences = []
    shapes = {}
    for mine, built in zip(ours, theirs, strict=True):
        one, other = dict(canonical_parameters(mine)), dict(canonical_parameters(built))
        if list(one) != list(other):
            differences.append(f"{list(one)} != {list(other)}")
        for name in one.keys() & other.keys():
            shapes[name] = tuple(one[name].shape)
            if not torch.equal(one[name], other[name]) or vars(one[name]) != vars(other[name]):
                differences.append(name)
        for (name, part), (like_name, like) in zip(mine.named_modules(), built.named_modules(), strict=True):
            if name != like_name:
                differences.append(f"{name} != {like_name}")
            for key, value in vars(like).items():
                if isinstance(value, int | float | tuple | str) and getattr(part, key) != value:
                    differences.append(f"{name}.{key}: {getattr(part, key)} != {value}")
        if fields(mine.config) != fields(built.config):
            differences.append(f"{fields(mine.config)} != {fields(built.config)}")
        if len(mine.decoder.submodules.layer_specs) != len(built.decoder.submodules.layer_specs):
            differences.append("layer_specs")
    return {"differences": differences, "shapes": shapes}


def fields(config: Any) -> dict[str, Any]:
    """Values of a configuration; a pipeline layout, which knows no equality, by what it was made from."""
    return {name: getattr(value, "input_data", value) for name, value in vars(config).items() if not callable(value)}


@pytest.mark.slow
@pytest.mark.parametrize("world", sorted(LAYOUTS))
def test_live_pruning_equals_the_offline_path(tmp_path, world):
    shape, target = (THIRDS, THIRDS_TARGET) if world == 3 else (WIDE, TARGET)
    ranks = run_distributed(prune_case, world, tmp_path, layouts=LAYOUTS[world], shape=shape, target=target)
    for layout in LAYOUTS[world]:
        for results in zip(*(rank[layout] for rank in ranks), strict=True):
            assert [result["differences"] for result in results] == [[]] * len(results), layout
    # Everything of the pruned model is there.
    depths = [(layers, tied) for _, layers in DEPTHS for tied in (False, True)]
    for layout, parallel in LAYOUTS[world].items():
        count = len(depths) if "pipeline" in parallel else 2
        for (layers, tied), *results in zip(depths[:count], *(rank[layout][:count] for rank in ranks), strict=True):
            names = {name for result in results for name in result["shapes"]}
            pruned = target.replace(num_layers=len(layers), tied_embeddings=tied)
            table = {entry.name for entry in axes.parameters(axes.LLAMA, pruned)}
            assert names >= table
            assert names - table <= {"output_layer.weight"}


# -------------------------------------------------------------------------------------------------------- uneven stages


def uneven_case(layouts: list[dict[str, Any]], tokenizer: str) -> list[dict[str, Any]]:
    return [measure(initialize(layout), tokenizer) for layout in layouts]


def measure(groups: Any, tokenizer: str) -> dict[str, Any]:
    """What the other parts of the suite make of 5 layers."""
    from nemo_minitron.data import load_tokenizer
    from nemo_minitron.evaluation import generate_megatron, held_out_loss
    from nemo_minitron.importance import score_model

    vocab = 123  # the tokenizer's
    checkpoint = random_checkpoint(SHAPE.replace(num_layers=5, vocab_size=vocab))
    chunks = live(checkpoint, groups)
    scores = score_model(chunks, tokens(5, 13), groups, shape=checkpoint.shape, micro_batch_size=2)
    loss = held_out_loss(chunks, groups, tokens(5, 13), 2, vocab_size=vocab)
    (answer,) = generate_megatron(
        chunks, groups, load_tokenizer(tokenizer), ["w3 w4 w5"], max_new_tokens=4, vocab_size=vocab
    )
    return {
        "layers": [layer.layer_number for chunk in chunks for layer in chunk.decoder.layers],
        "scores": [scores.ffn, scores.layers, scores.hidden],
        "loss": loss.overall.loss,
        "answer": answer.to_dict(),
    }


@pytest.mark.slow
def test_uneven_stages_score_evaluate_and_generate_as_one_process(tmp_path):
    layouts = [{"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}]
    tokenizer = str(write_tokenizer(tmp_path / "tokenizer"))
    first, second = run_distributed(uneven_case, 2, tmp_path, layouts=layouts, tokenizer=tokenizer)
    assert [found["layers"] for found in first] == [[1, 2, 3], [1, 2, 4]]
    assert [found["layers"] for found in second] == [[4, 5], [3, 5]]
    with one_process() as groups:
        expected = measure(groups, tokenizer)
    for found in (*first, *second):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert found["answer"] == expected["answer"]
        for one, other in zip(found["scores"], expected["scores"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


# ----------------------------------------------------------------------------------------------------------- what moves


def received(operations: list[Any]) -> list[int]:
    return [one.tensor.nbytes for one in operations if one.op is torch.distributed.irecv]


def move_case(kept: Any) -> dict[str, Any]:
    """All neurons, heads and groups that stay are on rank 0; both ranks end with half of them."""
    from nemo_minitron.pruning import WidthPrune, row_moves

    groups = initialize({"tensor": 2})
    chunks = live(random_checkpoint(SHAPE), groups)
    sizes: list[int] = []
    exchange = torch.distributed.batch_isend_irecv

    def counted(operations: list[Any]) -> Any:
        sizes.extend(received(operations))
        return exchange(operations)

    torch.distributed.batch_isend_irecv = counted  # this process has nothing else to do
    row_moves.MESSAGE_BYTES = 500
    WidthPrune(kept, groups=groups)(chunks[0])
    found = {name: tuple(parameter.shape) for name, parameter in chunks[0].named_parameters()}
    return {"shapes": found, "logits": logits(chunks, tokens(2, 9)), "received": sizes}


@pytest.mark.slow
def test_rows_move_so_that_ranks_hold_equal_shares(tmp_path):
    from nemo_minitron.pruning import prune_weights

    n, hidden = SHAPE.num_layers, SHAPE.hidden_size
    kept = KeptUnits(
        layers=tuple(range(n)),
        hidden=tuple(range(hidden)),
        ffn=(tuple(range(10)),) * n,
        groups=((0, 1),) * n,
        heads=(((0, 1), (2, 3)),) * n,
    )
    one, two = run_distributed(move_case, 2, tmp_path, kept=kept)
    assert one["shapes"] == two["shapes"]
    assert one["shapes"]["decoder.layers.0.mlp.linear_fc1.weight"] == (10, 24)
    assert one["shapes"]["decoder.layers.0.self_attention.linear_qkv.weight"] == ((2 + 2) * 6, 24)
    with one_process() as groups:
        expected = logits(live(prune_weights(random_checkpoint(SHAPE), kept), groups), tokens(2, 9))
    found = torch.cat([one["logits"], two["logits"]], -1)[..., : SHAPE.vocab_size]
    torch.testing.assert_close(found, expected[..., : SHAPE.vocab_size], rtol=1e-5, atol=1e-4)
    # What crosses: 5 neurons (gate, up, down) and a group (2 queries, key, value, 2 columns of heads) of each layer.
    rows = 3 * 5 + (4 + 2) * SHAPE.head_dim
    assert one["received"] == []
    assert sum(two["received"]) == n * rows * hidden * 4
    assert max(two["received"]) <= 500


#: A layer of this is large against everything else that pruning holds, and rows of each kind change their rank.
HEAVY = SHAPE.replace(num_layers=8, hidden_size=128, ffn_hidden_size=512, head_dim=16)
HEAVY_TARGET = HEAVY.replace(
    num_layers=7, hidden_size=96, ffn_hidden_size=256, num_query_groups=2, num_attention_heads=4
)


def limits_case(width: Any, depth: Any, heavy: Any) -> dict[str, Any]:
    groups = initialize({"tensor": 2, "pipeline": 2})
    messages = refuse(groups, width, depth)
    return {"messages": messages, **memory(initialize({"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}), heavy)}


def refuse(groups: Any, width: Any, depth: Any) -> list[str]:
    from nemo_minitron.errors import ShapeError
    from nemo_minitron.pruning import DepthPrune, WidthPrune

    (chunk,) = live(random_checkpoint(SHAPE), groups)
    before = {name: tuple(parameter.shape) for name, parameter in chunk.named_parameters()}
    differing = KeptUnits.everything(SHAPE) if groups.tp_rank else random_kept(SHAPE, SHAPE.replace(ffn_hidden_size=20))
    messages = []
    for transform in (WidthPrune(width), DepthPrune(depth), WidthPrune(differing)):
        try:
            transform(chunk)
        except ShapeError as error:
            messages.append(str(error))
    assert before == {name: tuple(parameter.shape) for name, parameter in chunk.named_parameters()}
    assert chunk.config.num_layers == SHAPE.num_layers
    return messages


def memory(groups: Any, kept: Any) -> dict[str, Any]:
    """Bytes of tensors alive at most, beyond the model as it was before each of the two prunings."""
    from torch import nn

    from nemo_minitron.pruning import DepthPrune, WidthPrune

    module = nn.ModuleList(live(random_checkpoint(HEAVY), groups))
    layer = sum(parameter.nbytes for parameter in module[0].decoder.layers[0].parameters())
    found = {"layer": layer, "embedding": module[0].vocab_size // 2 * HEAVY.hidden_size * 4}
    for transform in (DepthPrune(kept), WidthPrune(kept)):
        with StorageWatch(module.parameters()) as watch:
            transform(module)
        found[type(transform).__name__] = (watch.start, watch.peak, watch.alive())
        assert watch.alive() >= sum(parameter.nbytes for parameter in module.parameters())
    return found


@pytest.mark.slow
def test_what_does_not_fit_is_refused_and_memory_is_bounded(tmp_path):
    width = random_kept(SHAPE, SHAPE.replace(ffn_hidden_size=21, num_query_groups=3, num_attention_heads=3))
    depth = random_kept(SHAPE, SHAPE.replace(num_layers=1))
    heavy = random_kept(HEAVY, HEAVY_TARGET, layers_to_drop=[0])  # three layers then change their rank, both ways
    found = run_distributed(limits_case, 4, tmp_path, width=width, depth=depth, heavy=heavy)
    assert all(rank["messages"] == found[0]["messages"] for rank in found)
    over_width, over_depth, differing = found[0]["messages"]
    assert "3 faults" in over_width
    assert (
        "ffn_hidden_size=21 cannot be split over parallel.tensor=2; it fits parallel.tensor in [1, 3, 7, 21]"
        in over_width
    )
    assert "num_layers=1 cannot fill 2 stages" in over_depth
    assert "the ranks were given different kept units" in differing
    for rank in found:
        layer, slack = rank["layer"], 0.1 * rank["layer"]  # index tensors, and the names of all layers
        start, peak, after = rank["DepthPrune"]
        assert 0 < peak - start <= layer + slack
        assert after <= start + slack
        start, peak, after = rank["WidthPrune"]
        assert 0 < peak - start <= layer + slack
        assert after < 0.75 * start
