"""Architecture search: which shapes fit a budget, what they cost, and which of them lose least.

:mod:`~nemo_minitron.search.space` enumerates shapes, :mod:`~nemo_minitron.planning.memory` and
:mod:`~nemo_minitron.search.latency` say what a shape costs, :mod:`~nemo_minitron.search.results` keeps the results and
compares them. Importing them imports no torch.
"""

from nemo_minitron.planning import MemoryCost, MemoryUse, Workload
from nemo_minitron.search.latency import Latency, LatencyCost, Timer
from nemo_minitron.search.results import (
    Result,
    by_candidate,
    candidate_journal,
    kendall_tau,
    pareto_front,
    read_search,
    search_journal,
)
from nemo_minitron.search.space import Budget, ParameterCost, SearchSpace, ShapeSet, Sizes, axis_values, spread

__all__ = [
    "Budget",
    "Latency",
    "LatencyCost",
    "MemoryCost",
    "MemoryUse",
    "ParameterCost",
    "Result",
    "SearchSpace",
    "ShapeSet",
    "Sizes",
    "Timer",
    "Workload",
    "axis_values",
    "by_candidate",
    "candidate_journal",
    "kendall_tau",
    "pareto_front",
    "read_search",
    "search_journal",
    "spread",
]
