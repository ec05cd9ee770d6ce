"""Enumeration under budgets against brute force, and what an empty space says."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron import axes
from nemo_minitron.errors import ShapeError
from nemo_minitron.search import Budget, MemoryCost, ParameterCost, SearchSpace, Sizes, Workload, axis_values, spread
from nemo_minitron.shape import SIZES, ModelShape

BASE = ModelShape(4, 32, 48, 8, 4, 8, 100, tied_embeddings=True)
TABLE = axes.family("llama")


def test_a_search_walks_all_sizes() -> None:
    assert set(Sizes._fields) == set(SIZES)


def brute_force(values: dict[str, list[int]], tensor: int, pipeline: int) -> set[Sizes]:
    """Every combination that is a model and fits the layout."""
    own = Sizes.of(BASE)._asdict()
    names = [name for name in Sizes._fields if own[name] is not None]
    found = set()
    for chosen in itertools.product(*(values.get(name, [own[name]]) for name in names)):
        sizes = {**own, **dict(zip(names, chosen, strict=True))}
        if "num_query_groups" in values and "num_attention_heads" not in values:
            sizes["num_attention_heads"] = sizes["num_query_groups"] * BASE.heads_per_group
        try:
            shape = BASE.replace(**sizes)
        except ShapeError:
            continue
        if not BASE.prune_faults(shape) and not shape.layout_faults(tensor=tensor, pipeline=pipeline):
            found.add(Sizes.of(shape))
    return found


candidates = st.fixed_dictionaries(
    {},
    optional={
        "num_layers": st.lists(st.integers(1, 4), min_size=1, max_size=4),
        "hidden_size": st.lists(st.integers(1, 32), min_size=1, max_size=4),
        "ffn_hidden_size": st.lists(st.integers(1, 48), min_size=1, max_size=6),
        "num_query_groups": st.lists(st.integers(1, 4), min_size=1, max_size=3),
        "num_attention_heads": st.lists(st.integers(1, 8), min_size=1, max_size=4),
    },
)


@settings(max_examples=150, deadline=None)
@given(
    values=candidates,
    tensor=st.sampled_from([1, 2]),
    pipeline=st.sampled_from([1, 2]),
    low=st.floats(0, 1),
    width=st.floats(0, 1),
    by_memory=st.booleans(),
)
def test_shapes_within_a_budget_are_all_of_them(
    values: dict[str, list[int]], tensor: int, pipeline: int, low: float, width: float, by_memory: bool
) -> None:
    expected = brute_force(values, tensor, pipeline)
    parameters = ParameterCost(TABLE, BASE)
    memory = MemoryCost(TABLE, BASE, Workload(tensor=tensor, pipeline=pipeline))
    cost = memory if by_memory else parameters
    top = cost(Sizes.of(BASE))
    budget = Budget("budget", low * top, (low + width) * top, cost)
    expected = {sizes for sizes in expected if budget.low <= cost(sizes) <= budget.high}
    if not expected:
        with pytest.raises(ShapeError):
            SearchSpace(BASE, values, tensor=tensor, pipeline=pipeline).fitting([budget])
        return
    found = SearchSpace(BASE, values, tensor=tensor, pipeline=pipeline).fitting([budget])
    listed = [Sizes.of(shape) for shape in found]
    assert set(listed) == expected
    assert len(listed) == len(set(listed)) == len(found)
    assert [found.sizes(position) for position in range(len(found))] == listed
    for sizes in listed:
        assert parameters(sizes) == axes.parameter_count(TABLE, BASE.replace(**sizes._asdict()))


@given(count=st.integers(1, 12))
def test_a_spread_takes_what_was_asked_for_and_both_ends(count: int) -> None:
    shapes = SearchSpace(BASE, {"ffn_hidden_size": list(range(1, 49)), "num_layers": [2, 3, 4]}).fitting()
    positions = spread(shapes, count)
    assert len(positions) == len(set(positions)) == min(count, len(shapes))
    assert positions == sorted(positions)


@pytest.mark.parametrize(
    ("given_axis", "message"),
    [
        ({"minimum": 40, "maximum": 60}, "max=60: the model has only 48"),
        ({"minimum": 33, "maximum": 39, "multiple": 20}, "no multiple of 20 from 33 to 39"),
        ({"values": [0, 4]}, r"must be sizes between 1 and the model's own 48"),
    ],
)
def test_impossible_axes(given_axis: dict, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        axis_values("ffn_hidden_size", 48, **given_axis)


def test_an_empty_space_says_what_excludes_it_and_what_would_fit() -> None:
    with pytest.raises(ShapeError, match=r"ffn_hidden_size.*student_layout\.tensor=2.*these would"):
        SearchSpace(BASE, {"ffn_hidden_size": [47]}, tensor=2)
    space = SearchSpace(BASE, {"ffn_hidden_size": [16, 32, 48]})
    cost = ParameterCost(TABLE, BASE)
    with pytest.raises(ShapeError, match="parameters from 1 to 10"):
        space.fitting([Budget("parameters", 1, 10, cost)])


def test_a_giant_space_answers_at_once() -> None:
    """Over a hundred million shapes; the clock would show a walk over them."""
    base = ModelShape(32, 4096, 14336, 32, 8, 128, 128256)
    values = {
        "num_layers": list(range(8, 33)),
        "hidden_size": list(range(1024, 4097, 32)),
        "ffn_hidden_size": list(range(2048, 14337, 32)),
        "num_query_groups": [2, 4, 8],
        "num_attention_heads": list(range(8, 33, 2)),
    }
    cost = ParameterCost(TABLE, base)
    target = 4.5e9
    shapes = SearchSpace(base, values, tensor=2).fitting([Budget("parameters", 0.999 * target, 1.001 * target, cost)])
    assert len(shapes) > 1000
    for position in (0, len(shapes) // 2, len(shapes) - 1):
        assert abs(cost(shapes.sizes(position)) / target - 1) <= 0.001


def test_active_parameters_are_those_that_a_token_uses() -> None:
    """Summed over the parameters of the model, with two of each layer's experts."""
    table = axes.family("mixtral")
    base = BASE.replace(num_moe_experts=6)
    cost, active = ParameterCost(table, base), ParameterCost(table, base, active=2)
    space = {"num_moe_experts": [2, 3, 6], "ffn_hidden_size": [16, 32, 48], "hidden_size": [16, 32]}
    for shape in SearchSpace(base, space, experts=2).fitting():
        used = sum(
            math.prod(entry.shape)
            for entry in axes.parameters(table, shape)
            if entry.row.expert is None or entry.row.expert < 2
        )
        assert active(Sizes.of(shape)) == used
        assert (active(Sizes.of(shape)) == cost(Sizes.of(shape))) == (shape.num_moe_experts == 2)


def test_a_budget_of_active_parameters() -> None:
    """Experts are free but for the router's rows; the width of all is what costs."""
    from nemo_minitron.config import BudgetConfig, SearchConfig, SpaceConfig
    from nemo_minitron.config.parts.search import AxisConfig
    from nemo_minitron.stages.search import Costs

    base = BASE.replace(num_moe_experts=6)
    config = SearchConfig(
        output="o", model="m", scores="s",
        space=SpaceConfig(num_moe_experts=AxisConfig(min=2), ffn_hidden_size=AxisConfig(min=8, multiple=8)),
        budget=BudgetConfig(active_share=0.8, tolerance=0.03),
    )  # fmt: skip
    costs = Costs(config, base, axes.family("mixtral"), topk=2)
    assert costs.active is not None
    wanted = 0.8 * costs.active(Sizes.of(base))
    shapes = list(costs.space().fitting(costs.budgets()))
    assert {shape.num_moe_experts for shape in shapes} == {2, 3, 4, 5, 6}
    assert all(abs(costs.active(Sizes.of(shape)) / wanted - 1) <= 0.03 for shape in shapes)
    dense = Costs(config, BASE, TABLE)
    with pytest.raises(ShapeError, match=r"budget\.active_share: the model has no experts.*give parameters or share"):
        dense.budgets()
    assert BudgetConfig(active_share=1.5).faults() == [
        "active_share=1.5: pruning does not grow a model; give at most 1"
    ]
    (fault,) = BudgetConfig(active_share=0.5, active_parameters=10).faults()
    assert fault == "active_parameters: give one of active_parameters and active_share, not both"
