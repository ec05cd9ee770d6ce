"""Choosing layers by what their absence costs, against brute force."""

from __future__ import annotations

import itertools
import random

import pytest

from nemo_minitron.errors import ConfigError, ShapeError
from nemo_minitron.pruning.depth import choose_layers, influence_costs

LAYERS = 7


@pytest.fixture
def costs():
    """Of every set of layers, drawn at random: what a set costs says nothing of its parts."""
    draw = random.Random(3)
    sets = itertools.chain.from_iterable(itertools.combinations(range(LAYERS), n) for n in range(1, LAYERS))
    return {layers: (draw.random(),) for layers in sets}


def test_contiguous_is_the_best_of_all_runs(costs):
    for count in range(1, LAYERS):
        runs = [layers for layers in costs if len(layers) == count and layers[-1] - layers[0] == count - 1]
        kept = choose_layers(costs, LAYERS, count, "contiguous")
        dropped = tuple(sorted(set(range(LAYERS)) - set(kept)))
        assert dropped in runs
        assert all(costs[dropped] <= costs[other] for other in runs)


def test_lowest_are_the_cheapest_alone(costs):
    for count in range(LAYERS):
        kept = choose_layers(costs, LAYERS, count, "lowest")
        dropped = set(range(LAYERS)) - set(kept)
        assert len(kept) == LAYERS - count
        assert all(costs[(one,)] <= costs[(other,)] for one in dropped for other in kept)


def test_greedy_extends_the_best_so_far(costs):
    before: set[int] = set()
    for count in range(1, LAYERS):
        dropped = set(range(LAYERS)) - set(choose_layers(costs, LAYERS, count, "greedy"))
        assert before < dropped
        others = [tuple(sorted(before | {layer})) for layer in range(LAYERS) if layer not in before]
        assert costs[tuple(sorted(dropped))] == min(costs[other] for other in others)
        before = dropped


def test_equal_costs_leave_the_lower_layers_and_further_numbers_decide():
    even = dict.fromkeys([*((n,) for n in range(4)), (0, 1), (1, 2), (2, 3)], (1.0,))
    assert choose_layers(even, 4, 2, "lowest") == choose_layers(even, 4, 2, "contiguous") == (0, 1)
    assert choose_layers({**even, (1,): (1.0, -0.5), (0,): (1.0, 0.5)}, 2, 1, "lowest") == (0,)


def test_influence_adds_up_over_a_run():
    costs = influence_costs([3.0, 1.0, 4.0, 1.5, 0.5])
    assert costs[(1, 2, 3)] == (6.5,)
    assert choose_layers(costs, 5, 2, "lowest") == (0, 2, 3)
    assert choose_layers(costs, 5, 2, "contiguous") == (0, 1, 2)


@pytest.mark.parametrize(
    ("form", "count", "error", "message"),
    [
        ("tallest", 1, ConfigError, "must be one of lowest, contiguous, greedy"),
        ("lowest", 3, ShapeError, "3 of 3 layers cannot be dropped"),
        ("lowest", -1, ShapeError, "-1 of 3"),
        ("contiguous", 2, ConfigError, r"without layers \[0, 1\]; run `minitron depth` with block_lengths=\[2\]"),
        ("greedy", 2, ConfigError, r"2 of 2 candidates were not measured.* with greedy=2"),
    ],
)
def test_what_was_not_measured(form, count, error, message):
    with pytest.raises(error, match=message):
        choose_layers({(0,): (1.0,), (1,): (2.0,), (2,): (3.0,)}, 3, count, form)
