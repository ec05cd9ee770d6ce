"""A student's shape for a budget: which sizes are cut, and in which proportion to each other.

All sizes that are cut follow one number ``t``: a size becomes ``t ** a`` of the model's own, by the exponent ``a`` of
its axis. ``t`` is what the budget leaves; then the nearest shape on a grid that hardware likes is taken, within the
budget.

- Long trainings (:data:`LONG`) have the papers' proportions. Their width-pruned models keep layers and heads, and cut
  hidden size and MLP: 4096 to 3072 with 14336 to 9216 (Llama-3.1-Minitron-4B), 5120 to 4096 with 14336 to 11520
  (Mistral-NeMo-Minitron-8B; arXiv 2408.11796, table 3), 6144 to 4096 with 24576 to 16384 and 4096 to 3072 with 16384 to
  9216 (Minitron-8B and -4B; arXiv 2407.14679, table 10). That is ``ffn ~ hidden ** 1.3`` on (geometric) average. Width
  beats depth after distillation (arXiv 2407.14679, section 4; arXiv 2408.11796, table 1).
- Short trainings (:data:`SHORT`) do not win back a cut residual stream: after 10,240 tokens every narrow shape is
  behind every wide one (docs/results.md, search). So the MLPs are cut, and a few layers, as in ``configs/demo.yaml``.
- What neither reaches (:data:`DEEP`) cuts every size. The papers never remove more than half of a model at once.

A mixture of experts loses experts in the place of MLP width; this is not from the papers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_minitron.errors import ConfigError, ShapeError
from nemo_minitron.planning import MemoryCost, Model, Workload
from nemo_minitron.pruning.choose import target_shape
from nemo_minitron.search.space import Budget, ParameterCost, SearchSpace, Sizes
from nemo_minitron.shape import ModelShape, require_uniform

__all__ = ["DEEP", "LONG", "SHORT", "Proportions", "ShapeBudget", "ask_budget", "grid", "propose_shape"]


@dataclass(frozen=True)
class Proportions:
    """How sizes shrink together.

    Attributes:
        name: for messages.
        exponents: by axis; an axis that is not named is not cut.
        least: the smallest ``t``.
        why: the reason for it, for the pipeline's comment.
    """

    name: str
    exponents: Mapping[str, float]
    least: float
    why: str

    def sizes(self, own: Sizes, heads_per_group: int, t: float, topk: int = 1) -> Sizes:
        """The sizes at ``t``, not yet on a grid. Heads follow their groups; experts stay enough for the router."""
        cut = own._asdict()
        for name, exponent in self.exponents.items():
            if cut[name] is not None:
                least = topk if name == "num_moe_experts" else 1
                cut[name] = max(least, round(cut[name] * t**exponent))
        if "num_query_groups" in self.exponents:
            cut["num_attention_heads"] = cut["num_query_groups"] * heads_per_group
        return Sizes(**cut)


LONG = Proportions(
    "long",
    {"hidden_size": 1.0, "ffn_hidden_size": 1.3},
    least=0.5,
    why="hidden size and MLP width, in the proportion of the Minitron papers' models; layers and heads stay, since "
    "width pruning beats depth pruning after distillation",
)
SHORT = Proportions(
    "short",
    {"ffn_hidden_size": 1.0, "num_layers": 0.25},
    least=0.3,
    why="MLP width and a few layers: a training this short does not win back a narrower residual stream",
)
SHORT_MIXTURE = Proportions(
    "short",
    {"num_moe_experts": 1.0, "num_layers": 0.25},
    least=0.3,
    why="experts and a few layers: a training this short does not win back a narrower residual stream",
)
DEEP = Proportions(
    "deep",
    {"hidden_size": 1.0, "ffn_hidden_size": 1.2, "num_layers": 0.5, "num_query_groups": 0.4, "num_moe_experts": 0.5},
    least=0.125,
    why="every size: the budget is far below the model; the papers remove at most half of a model at once, so consider "
    "two runs, the second from the first one's student",
)

_PARTS = {"hidden_size": 16, "ffn_hidden_size": 32}


@dataclass(frozen=True)
class ShapeBudget:
    """What the student may cost.

    Attributes:
        option: as it was asked for, for messages: ``--share 0.6``.
        cost: what it is of, by sizes.
        most: the largest cost.
        own: the unpruned model's cost.
        show: a cost as text.
        search: the same as settings of ``search.budget``.
    """

    option: str
    cost: ParameterCost | MemoryCost
    most: float
    own: float
    unit: str
    search: Mapping[str, float | str]

    def show(self, cost: float) -> str:
        """A cost as text."""
        return f"{cost / 2**30:.3g} GiB" if self.unit == "bytes" else _count(cost)


def ask_budget(
    model: Model,
    *,
    share: float | None = None,
    parameters: float | None = None,
    memory: float | None = None,
    sequence_length: int = 4096,
) -> ShapeBudget:
    """The budget that one of the options asks for; without any, 0.6 of the parameters, about the papers' mean.

    Args:
        model: unpruned.
        share: of the model's parameters.
        parameters: their number.
        memory: bytes of weights in bfloat16, and of keys and values of one sequence.
        sequence_length: of that sequence.

    Raises:
        ConfigError: for more than one, one out of range, or one that the model meets unpruned.
    """
    given = {"--share": share, "--params": parameters, "--memory": memory}
    asked = [name for name, value in given.items() if value is not None]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)}: give one budget, not {len(asked)}")
    count = model.parameters
    if memory is not None:
        work = Workload(batch_size=1, sequence_length=sequence_length)
        cost = MemoryCost.of(model, work)
        own = cost(Sizes.of(model.shape))
        budget = ShapeBudget(
            f"--memory {memory / 2**30:.4g}GiB", cost, memory, own, "bytes",
            {"memory_gib": round(memory / 2**30, 4), "sequence_length": sequence_length},
        )  # fmt: skip
    elif parameters is not None:
        option = f"--params {_count(parameters)}"
        budget = ShapeBudget(option, _parameters(model), parameters, count, "", {"parameters": round(parameters)})
    else:
        share = 0.6 if share is None else share
        if not 0 < share < 1:
            raise ConfigError(f"--share {share:g}: is a share of the model's parameters; give a number between 0 and 1")
        budget = ShapeBudget(f"--share {share:g}", _parameters(model), share * count, count, "", {"share": share})
    if budget.most <= 0:
        raise ConfigError(f"{budget.option}: must be above 0")
    if budget.most >= budget.own:
        raise ConfigError(
            f"{budget.option}: the model has {budget.show(budget.own)}, and pruning does not grow it; ask for less"
        )
    return budget


def propose_shape(model: Model, budget: ShapeBudget, *, long: bool) -> tuple[ModelShape, Proportions]:
    """The shape within a budget, and the proportions it was cut in.

    Args:
        model: unpruned; all its layers alike.
        budget: of the student.
        long: the training is long enough for the papers' proportions.

    Raises:
        ConfigError: if even the smallest shape is above the budget.
        ShapeError: for a model whose layers differ in size.
    """
    require_uniform(model.shape, "minitron init")
    topk = model.architecture.moe_router_topk or 1
    short = SHORT if model.shape.num_moe_experts is None else SHORT_MIXTURE
    own, per_group = Sizes.of(model.shape), model.shape.heads_per_group
    for proportions in (LONG, DEEP) if long else (short, LONG, DEEP):
        ideal = _solve(proportions, own, per_group, topk, budget)
        if ideal is None:
            continue
        shape = _nearest(model, budget, proportions, ideal, topk)
        if shape is not None:
            return shape, proportions
    least = DEEP.sizes(own, per_group, DEEP.least, topk)
    raise ConfigError(
        f"{budget.option}: is too small for any shape of this model; the smallest that is proposed has about "
        f"{budget.show(budget.cost(least))} of {budget.show(budget.own)}"
    )


def grid(size: int, parts: int = 16) -> int:
    """What a cut size is a multiple of: the largest power of two up to a part of the size, at most 256.

    Tensor cores want multiples of 8, tensor parallelism wants sizes that it divides; the papers' are multiples of 256.

    Args:
        size: of the unpruned model.
        parts: 16 for hidden sizes; MLP widths have finer steps, of at most a 32nd.
    """
    return 2 ** min(8, max(3 if size >= 64 else 0, int(math.log2(max(1, size // parts)))))


def _solve(proportions: Proportions, own: Sizes, per_group: int, topk: int, budget: ShapeBudget) -> Sizes | None:
    """The largest sizes of the proportions within the budget; None if even the smallest are above it."""
    low, high = proportions.least, 1.0
    if budget.cost(proportions.sizes(own, per_group, low, topk)) > budget.most:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        fits = budget.cost(proportions.sizes(own, per_group, middle, topk)) <= budget.most
        low, high = (middle, high) if fits else (low, middle)
    return proportions.sizes(own, per_group, low, topk)


def _nearest(model: Model, budget: ShapeBudget, proportions: Proportions, ideal: Sizes, topk: int) -> ModelShape | None:
    """The shape on the grid that is nearest to ideal sizes, and uses nearly all of the budget; None if none fits."""
    values: dict[str, list[int]] = {}
    own = Sizes.of(model.shape)
    for name in proportions.exponents:
        size, wanted = getattr(own, name), getattr(ideal, name)
        if size is None:
            continue
        step = grid(size, _PARTS[name]) if name in _PARTS else 1
        reach = size if name == "ffn_hidden_size" else 2 * step
        least = topk if name == "num_moe_experts" else 1
        near = [n for n in (*range(step, size, step), size) if abs(n - wanted) <= reach and n >= least]
        values[name] = near or [size]
    try:
        space = SearchSpace(model.shape, values, experts=topk)
    except ShapeError:
        return None
    for floor in (0.96, 0.9, 0.75, 0.0):
        try:
            shapes = space.fitting([Budget("budget", floor * budget.most, budget.most, budget.cost)])
        except ShapeError:
            continue
        # The MLP's width, which has the finest steps, takes what the other sizes leave of the budget.
        widest = [sizes._replace(ffn_hidden_size=widths[-1]) for sizes, widths in shapes.runs]
        chosen = min(widest, key=lambda sizes: (_distance(sizes, ideal), -budget.cost(sizes)))
        cut = {name: size for name, size in chosen._asdict().items() if size != getattr(own, name)}
        if cut:
            return target_shape(model.shape, cut)
    return None


def _distance(sizes: Sizes, ideal: Sizes) -> float:
    """Sum of squared log-ratios."""
    pairs = zip(sizes, ideal, strict=True)
    return sum(math.log(size / wanted) ** 2 for size, wanted in pairs if size is not None and wanted is not None)


def _parameters(model: Model) -> ParameterCost:
    return ParameterCost(model.table, model.shape)


def _count(number: float) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.4g}{letter}"
    return f"{number:.0f}"
