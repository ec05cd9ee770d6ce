"""All shapes of a space that fit a budget, counted and listed without visiting the whole product.

Costs never fall when a size grows. So the first sizes of a shape are dropped if the shape is too expensive even with
the smallest other sizes, or too cheap with the largest. Along the last axis, the MLP's width, the candidates that fit
are one run, whose ends are found by bisection.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, overload

from nemo_minitron import axes
from nemo_minitron.errors import ShapeError
from nemo_minitron.planning.counts import LayerCost, layer_cost, outer_counts
from nemo_minitron.shape import ModelShape, require_uniform

__all__ = ["Budget", "Cost", "ParameterCost", "SearchSpace", "ShapeSet", "Sizes", "axis_values", "spread"]


class Sizes(NamedTuple):
    """The searched sizes of a shape, in the order in which the space is walked."""

    hidden_size: int
    num_query_groups: int
    num_attention_heads: int
    num_moe_experts: int | None
    num_layers: int
    ffn_hidden_size: int

    @classmethod
    def of(cls, shape: ModelShape) -> Sizes:
        """The searched sizes of a shape."""
        return cls(*(getattr(shape, name) for name in cls._fields))

    @property
    def name(self) -> str:
        """A short name, usable for a directory: ``l22-h512-f1280-a8-g4``; with ``-e8`` for a mixture of experts."""
        experts = "" if self.num_moe_experts is None else f"-e{self.num_moe_experts}"
        return (
            f"l{self.num_layers}-h{self.hidden_size}-f{self.ffn_hidden_size}"
            f"-a{self.num_attention_heads}-g{self.num_query_groups}{experts}"
        )


Cost = Callable[[Sizes], float]
"""What a shape costs. It must not fall when any size grows while the others stay."""


@dataclass(frozen=True)
class Budget:
    """A range of allowed costs.

    Attributes:
        name: its name in the configuration.
        low, high: least and largest cost, both allowed.
        cost: function from a shape to its cost.
        show: function from a cost to its text.
    """

    name: str
    low: float
    high: float
    cost: Cost = field(repr=False)
    show: Callable[[float], str] = field(default="{:,.0f}".format, repr=False)

    def __str__(self) -> str:
        return f"{self.name} from {self.show(self.low)} to {self.show(self.high)}"


class ParameterCost:
    """Exact number of parameters, as :func:`nemo_minitron.axes.parameter_count`, in about a microsecond.

    For a given width of the residual stream and number of experts, a layer's count is affine in the query heads, the
    groups and the MLP's width, and the model's in the layers. So there is also a count for sizes that fit no model,
    which serve as bounds.

    Args:
        table: of the family.
        shape: of the unpruned model, for what is not searched.
        active: experts that a token is sent to; their parameters alone then count, beside everything outside the
            experts. None counts all experts.
    """

    def __init__(self, table: axes.Family, shape: ModelShape, *, active: int | None = None) -> None:
        self.table, self.shape, self.active = table, shape, active
        self._kept: dict[tuple[int, int | None], tuple[int, LayerCost]] = {}

    def __call__(self, sizes: Sizes) -> int:
        """The count."""
        hidden, experts = sizes.hidden_size, sizes.num_moe_experts
        kept = self._kept.get((hidden, experts))
        if kept is None:
            outside = int(sum(outer_counts(self.table, self.shape, hidden_size=hidden)))
            layer = layer_cost(
                self.table, hidden_size=hidden, head_dim=self.shape.head_dim, experts=experts, active=self.active
            )
            kept = self._kept[hidden, experts] = outside, layer
        outside, layer = kept
        return outside + sizes.num_layers * int(layer.parameters(sizes))


def axis_values(
    name: str,
    own: int,
    *,
    minimum: int | None = None,
    maximum: int | None = None,
    multiple: int = 1,
    values: Sequence[int] | None = None,
) -> list[int]:
    """The candidates of one axis, ascending and each once.

    Args:
        name: of the axis, for messages.
        own: the unpruned model's size, which no candidate may exceed.
        minimum, maximum, multiple: all multiples between both; without ``minimum`` and ``values`` the axis stays as it
            is, without ``maximum`` it reaches to the model's own.
        values: instead, the candidates themselves.

    Raises:
        ShapeError: if nothing is left, or a candidate is larger than the model's own size.
    """
    if values is not None:
        chosen = sorted(set(values))
        if not chosen or chosen[0] < 1 or chosen[-1] > own:
            raise ShapeError(f"space.{name}.values={list(values)}: must be sizes between 1 and the model's own {own}")
        return chosen
    if minimum is None:
        return [own]
    top = own if maximum is None else maximum
    if top > own:
        raise ShapeError(f"space.{name}.max={top}: the model has only {own}; pruning does not grow it")
    sizes = list(range(-(-minimum // multiple) * multiple, top + 1, multiple))
    if not sizes:
        near = sorted({top // multiple * multiple, -(-minimum // multiple) * multiple} - {0})
        raise ShapeError(
            f"space.{name}: there is no multiple of {multiple} from {minimum} to {top}; the nearest are "
            f"{', '.join(map(str, near))}"
        )
    return sizes


class ShapeSet(Sequence[ModelShape]):
    """The shapes that fit, in a fixed order; each is made when it is asked for.

    Attributes:
        base: the unpruned shape.
        runs: ``(sizes, widths)``: these sizes with each of these MLP widths.
    """

    def __init__(self, base: ModelShape, runs: list[tuple[Sizes, Sequence[int]]]) -> None:
        self.base, self.runs = base, runs
        self._ends = list(itertools.accumulate(len(widths) for _, widths in runs))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> ModelShape: ...
    @overload
    def __getitem__(self, index: slice) -> list[ModelShape]: ...
    def __getitem__(self, index: int | slice) -> ModelShape | list[ModelShape]:
        """One shape by its position."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return self.base.replace(**self.sizes(index)._asdict())

    def __iter__(self) -> Iterator[ModelShape]:
        for sizes, widths in self.runs:
            for width in widths:
                yield self.base.replace(**sizes._replace(ffn_hidden_size=width)._asdict())

    def sizes(self, index: int) -> Sizes:
        """The searched sizes of the shape at a position."""
        position = range(len(self))[index]
        run = bisect_right(self._ends, position)
        sizes, widths = self.runs[run]
        return sizes._replace(ffn_hidden_size=widths[position - self._ends[run]])


class SearchSpace:
    """Candidates of each axis, as far as layout and family allow them.

    Heads fill their groups equally, and a group has no more heads than the model's own.

    Args:
        base: unpruned shape.
        values: candidates from :func:`axis_values` by the name of the size; a size that is not named stays as it is.
            Where groups are searched and heads are not, each group keeps all its heads.
        tensor, pipeline: parallel layout that every shape must fit; ``pipeline`` times virtual stages.
        experts: least number of experts, the router's top-k.

    Raises:
        ShapeError: if an axis has no candidate left, naming the constraint and what would fit; if the model's layers
            differ in size.
    """

    def __init__(
        self,
        base: ModelShape,
        values: Mapping[str, Sequence[int]],
        *,
        tensor: int = 1,
        pipeline: int = 1,
        experts: int = 1,
    ) -> None:
        require_uniform(base, "a search of uniform shapes")
        self.base = base
        self.whole_groups = "num_query_groups" in values and "num_attention_heads" not in values
        self.values: dict[str, list[int | None]] = {}
        faults = []
        splits = {"num_query_groups": tensor, "num_attention_heads": tensor, "ffn_hidden_size": tensor}
        least = {"num_layers": pipeline, "num_moe_experts": experts}
        for name in Sizes._fields:
            own = getattr(base, name)
            if own is None:
                if name in values:
                    faults.append(f"space.{name}: the model has no experts; leave it out")
                self.values[name] = [None]
                continue
            given = sorted(set(values[name])) if name in values else [own]
            if name == "num_attention_heads" and self.whole_groups:
                given = [groups * base.heads_per_group for groups in sorted(set(values["num_query_groups"]))]
            by, floor = splits.get(name, 1), least.get(name, 1)
            self.values[name] = [size for size in given if size % by == 0 and floor <= size <= own]
            if not self.values[name]:
                why = f"be split over student_layout.tensor={by}" if by > 1 else f"lie between {floor} and {own}"
                faults.append(
                    f"space.{name}: no candidate ({_listed(given)}) can {why}; these would: "
                    f"{_listed([n for n in range(1, own + 1) if n % by == 0 and n >= floor]) or 'none'}"
                )
        if faults:
            raise ShapeError(faults)
        if next(self._prefixes(()), None) is None:
            raise ShapeError(
                f"space.num_attention_heads: no candidate ({_listed(self.values['num_attention_heads'])}) fills "
                f"num_query_groups ({_listed(self.values['num_query_groups'])}) with 1 to {base.heads_per_group} heads "
                "a group; leave num_attention_heads out to keep all heads of each group"
            )

    def fitting(self, budgets: Sequence[Budget] = ()) -> ShapeSet:
        """All shapes within every budget.

        Raises:
            ShapeError: if no shape fits, with the budget that excludes all and the nearest shapes that would fit.
        """
        shapes = ShapeSet(self.base, list(self._runs(budgets)))
        if not len(shapes):
            raise ShapeError(self._reasons(budgets))
        return shapes

    def _widths(self) -> list[int]:
        return self.values["ffn_hidden_size"]  # type: ignore[return-value]

    def _runs(self, budgets: Sequence[Budget]) -> Iterator[tuple[Sizes, Sequence[int]]]:
        widths = self._widths()
        for sizes in self._prefixes(budgets):
            first, end = 0, len(widths)
            for budget in budgets:
                cost = _along(budget.cost, sizes)
                first = max(first, bisect_left(widths, budget.low, key=cost))
                end = min(end, bisect_right(widths, budget.high, key=cost))
            if first < end:
                yield sizes, widths[first:end]

    def _prefixes(self, budgets: Sequence[Budget]) -> Iterator[Sizes]:
        """All other sizes with the smallest MLP width, without those that fit the budget with no width."""
        names = Sizes._fields[:-1]
        least = Sizes._make(self.values[name][0] for name in Sizes._fields)
        most = Sizes._make(self.values[name][-1] for name in Sizes._fields)

        def walk(depth: int, prefix: tuple[int | None, ...]) -> Iterator[Sizes]:
            if depth == len(names):
                yield Sizes._make((*prefix, self._widths()[0]))
                return
            for value in self._allowed(names[depth], prefix):
                here = (*prefix, value)
                low, high = (Sizes._make((*here, *rest[depth + 1 :])) for rest in (least, most))
                if any(budget.cost(low) > budget.high for budget in budgets):
                    break  # the values ascend
                if not any(budget.cost(high) < budget.low for budget in budgets):
                    yield from walk(depth + 1, here)

        yield from walk(0, ())

    def _allowed(self, name: str, prefix: tuple[int | None, ...]) -> Sequence[int | None]:
        if name != "num_attention_heads":
            return self.values[name]
        groups = prefix[Sizes._fields.index("num_query_groups")]
        assert groups is not None, "only experts may be absent"
        if self.whole_groups:
            return [groups * self.base.heads_per_group]
        return [
            heads
            for heads in self.values[name]
            if heads is not None and heads % groups == 0 and heads // groups <= self.base.heads_per_group
        ]

    def _reasons(self, budgets: Sequence[Budget]) -> list[str]:
        """Why nothing is within all budgets."""
        alone = [sum(len(widths) for _, widths in self._runs([budget])) for budget in budgets]
        if all(alone):
            listing = "; ".join(f"{budget}: {count:,}" for budget, count in zip(budgets, alone, strict=True))
            return [f"budget: no shape is within all of them, though each alone has some ({listing}); widen one"]
        return [self._nearest(budget) for budget, count in zip(budgets, alone, strict=True) if not count]

    def _nearest(self, budget: Budget) -> str:
        widths, below, above = self._widths(), [], []
        for sizes in self._prefixes(()):
            cost = _along(budget.cost, sizes)
            place = bisect_left(widths, budget.low, key=cost)
            if place:
                below.append((cost(widths[place - 1]), sizes._replace(ffn_hidden_size=widths[place - 1])))
            if place < len(widths):
                above.append((cost(widths[place]), sizes._replace(ffn_hidden_size=widths[place])))
        sides = [("below", max(below))] if below else []
        sides += [("above", min(above))] if above else []
        near = " and ".join(f"{budget.show(cost)} {side} it ({sizes.name})" for side, (cost, sizes) in sides)
        return f"budget.{budget}: no shape of the space is within it; the nearest: {near}; widen one of them"


def spread(shapes: ShapeSet, count: int) -> list[int]:
    """Positions of ``count`` shapes that are spread over all of them, ascending; all positions if there are no more.

    Lloyd's k-means over the logarithms of the sizes, begun at farthest points, each centre then taking the shape
    nearest to it. There are no random numbers, so a repeated search chooses the same shapes. Of very many shapes, only
    every n-th is considered.
    """
    import numpy as np

    total = len(shapes)
    if total <= count:
        return list(range(total))
    seen = np.unique(np.linspace(0, total - 1, min(total, max(4096, 4 * count))).astype(int))
    points = np.log([[size or 1 for size in shapes.sizes(int(position))] for position in seen])
    width = points.max(axis=0) - points.min(axis=0)
    points = (points - points.min(axis=0)) / np.where(width > 0, width, 1.0)
    chosen = [int(((points - points.mean(axis=0)) ** 2).sum(axis=1).argmin())]
    nearest = ((points - points[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
    centres = points[chosen]
    for _ in range(20):
        owner = np.stack([((points - centre) ** 2).sum(axis=1) for centre in centres]).argmin(axis=0)
        centres = np.stack(
            [
                points[owner == cluster].mean(axis=0) if (owner == cluster).any() else centres[cluster]
                for cluster in range(count)
            ]
        )
    taken: list[int] = []
    for centre in centres:
        order = ((points - centre) ** 2).sum(axis=1)
        order[taken] = np.inf
        taken.append(int(order.argmin()))
    return sorted(int(seen[cluster]) for cluster in taken)


def _along(cost: Cost, sizes: Sizes) -> Callable[[int], float]:
    """The cost as a function of the MLP's width."""
    return lambda width: cost(Sizes(*sizes[:-1], width))


def _listed(sizes: Sequence[int | None], most: int = 8) -> str:
    """``4, 8, 12, ..., 64``."""
    if len(sizes) <= most:
        return ", ".join(map(str, sizes))
    return f"{', '.join(map(str, sizes[: most - 1]))}, ..., {sizes[-1]}"
