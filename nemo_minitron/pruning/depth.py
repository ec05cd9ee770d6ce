"""Choose the layers that stay from the costs of leaving layers out. Imports no torch, so that plans can use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nemo_minitron.errors import ConfigError, ShapeError

__all__ = ["FORMS", "choose_layers", "influence_costs"]

FORMS = ("lowest", "contiguous", "greedy")

#: By the layers left out (ascending), what that costs; tuples compare from the left, lower is better.
Costs = Mapping[tuple[int, ...], tuple[float, ...]]


def choose_layers(costs: Costs, num_layers: int, count: int, form: str) -> tuple[int, ...]:
    """The layers that stay when ``count`` of them go.

    Where costs are equal, the lower layers stay, as units of equal scores do.

    Args:
        costs: ``DepthScores.costs(criterion)``, or :func:`influence_costs`.
        num_layers: of the model.
        count: number of layers to remove.
        form: "lowest" removes the layers that cost least alone; "contiguous" the run of neighbouring layers that costs
            least together (arXiv 2408.11796, section 4); "greedy" the cheapest layer, then the cheapest of the
            remaining model, and so on.

    Returns:
        Kept layers, ascending.

    Raises:
        ConfigError: for an unknown form, or costs that were not measured, saying how to measure them.
        ShapeError: if no layer would stay.
    """
    if form not in FORMS:
        raise ConfigError(f"depth.form={form!r}: must be one of {', '.join(FORMS)}")
    if not 0 <= count < num_layers:
        raise ShapeError(f"{count} of {num_layers} layers cannot be dropped; leave at least one")

    def cost(layers: tuple[int, ...]) -> tuple[tuple[float, ...], tuple[int, ...]]:
        return costs[layers], tuple(-layer for layer in layers)

    dropped: tuple[int, ...] = ()
    if form == "contiguous" and count:
        wanted = [tuple(range(first, first + count)) for first in range(num_layers - count + 1)]
        _need(costs, wanted, f"block_lengths=[{count}]")
        dropped = min(wanted, key=cost)
    elif form == "lowest":
        wanted = [(layer,) for layer in range(num_layers)]
        _need(costs, wanted, "single=true")
        dropped = tuple(layer for (layer,) in sorted(wanted, key=cost)[:count])
    elif form == "greedy":
        for _ in range(count):
            wanted = [tuple(sorted((*dropped, layer))) for layer in range(num_layers) if layer not in dropped]
            _need(costs, wanted, f"greedy={count}, by this criterion")
            dropped = min(wanted, key=cost)
    return tuple(layer for layer in range(num_layers) if layer not in dropped)


def influence_costs(influence: Sequence[float]) -> dict[tuple[int, ...], tuple[float, ...]]:
    """Block influence, ``[L]``, as the costs of leaving out each run of neighbouring layers.

    The cost of a run is the sum over its layers, since a single pass gives no better. Runs of every length are
    included, as "lowest" and "contiguous" need.
    """
    count = len(influence)
    return {
        tuple(range(first, end)): (sum(influence[first:end]),)
        for first in range(count)
        for end in range(first + 1, count + 1)
    }


def _need(costs: Costs, wanted: Sequence[tuple[int, ...]], setting: str) -> None:
    if missing := [layers for layers in wanted if layers not in costs]:
        raise ConfigError(
            f"depth scores: {len(missing)} of {len(wanted)} candidates were not measured, such as the model without "
            f"layers {list(missing[0])}; run `minitron depth` with {setting}"
        )
