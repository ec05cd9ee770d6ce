"""Architecture search: which shapes fit a budget, what they cost, and which of them lose least.

:mod:`~nemo_minitron.search.space` enumerates, :mod:`~nemo_minitron.search.rank` keeps and orders results; neither
imports torch.
"""

from nemo_minitron.search.rank import Journal, Result, kendall_tau, pareto_front
from nemo_minitron.search.space import Budget, ParameterCost, SearchSpace, ShapeSet, Sizes, axis_values, spread

__all__ = [
    "Budget",
    "Journal",
    "ParameterCost",
    "Result",
    "SearchSpace",
    "ShapeSet",
    "Sizes",
    "axis_values",
    "kendall_tau",
    "pareto_front",
    "spread",
]
