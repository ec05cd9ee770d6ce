"""How layers are laid over stages, and in which order they go from one rank to another."""

from __future__ import annotations

import random

import pytest
from support.pruning import SHAPE

from nemo_minitron.errors import ShapeError
from nemo_minitron.pruning.layer_moves import order_moves
from nemo_minitron.runtime.groups import ParallelLayout
from nemo_minitron.runtime.model import pipeline_layer_layout


@pytest.mark.parametrize(
    ("layers", "stages", "sizes"),
    [(8, 1, [8]), (8, 4, [2, 2, 2, 2]), (7, 2, [4, 3]), (7, 4, [2, 2, 2, 1]), (5, 5, [1] * 5), (9, 4, [3, 2, 2, 2])],
)
def test_stages_are_as_equal_as_can_be(layers: int, stages: int, sizes: list[int]) -> None:
    assert SHAPE.replace(num_layers=layers).pipeline_stage_sizes(stages) == sizes


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"num_layers=4 cannot fill 5 stages .*; use at most 4"):
        SHAPE.pipeline_stage_sizes(5)


def test_only_uneven_stages_need_a_layout() -> None:
    assert pipeline_layer_layout(SHAPE, ParallelLayout(pipeline=2)) is None
    assert pipeline_layer_layout(SHAPE, ParallelLayout()) is None
    assert pipeline_layer_layout(SHAPE.replace(num_layers=5), ParallelLayout(pipeline=2, virtual_pipeline=2)) == [
        ["embedding", "decoder", "decoder"],
        ["decoder"],
        ["decoder"],
        ["decoder", "loss"],
    ]


def test_no_rank_holds_more_than_one_layer_too_many() -> None:
    """Random prunings of random pipelines; and a ring, in which every rank is full."""
    generator = random.Random(0)
    cases = [([0, 1, 2], [1, 2, 0], [1, 1, 1])]
    for _ in range(2000):
        ranks = generator.randint(1, 6)
        layers = generator.randint(ranks, 30)
        chunks = generator.randint(1, layers // ranks)
        shape = SHAPE.replace(num_layers=layers)

        def owners(count: int, ranks: int = ranks, chunks: int = chunks) -> list[int]:
            sizes = SHAPE.replace(num_layers=count).pipeline_stage_sizes(ranks * chunks)
            return [stage % ranks for stage, size in enumerate(sizes) for _ in range(size)]

        kept = sorted(generator.sample(range(layers), generator.randint(ranks * chunks, layers)))
        whole = owners(shape.num_layers)
        cases.append(
            ([whole[layer] for layer in kept], owners(len(kept)), [whole.count(rank) for rank in range(ranks)])
        )
    moved = 0
    for holders, targets, before in cases:
        held = [holders.count(rank) for rank in range(len(before))]
        most = [max(count, targets.count(rank)) for rank, count in enumerate(before)]
        place = list(holders)
        for move in order_moves(holders, targets, before):
            assert place[move.layer] == move.source != move.target
            place[move.layer] = move.target
            held[move.source] -= 1
            held[move.target] += 1
            assert held[move.target] <= most[move.target] + 1
            assert sum(max(0, count - top) for count, top in zip(held, most, strict=True)) <= 1
            moved += 1
        assert place == targets
    assert moved > 1000
