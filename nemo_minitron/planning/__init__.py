"""The costs of a training before it runs (memory, traffic, arithmetic), and the best layout of a cluster.

:mod:`~nemo_minitron.planning.recipe` loads the shipped recipes, :mod:`~nemo_minitron.planning.layouts` compares
layouts on a cluster. Importing it imports no torch.
"""

from nemo_minitron.planning.cluster import Accelerator, accelerator
from nemo_minitron.planning.layouts import LayoutCost, best_layout, layout_cost, layout_costs, layout_faults
from nemo_minitron.planning.memory import RECOMPUTE, MemoryCost, MemoryUse, Workload
from nemo_minitron.planning.model import Model, pipeline_stage_parameters
from nemo_minitron.planning.recipe import Recipe, load_recipe, recipe_names
from nemo_minitron.planning.reconstruction import HOST_FLOAT64, ReconstructionFlops
from nemo_minitron.planning.training import ForwardFlops, Training

__all__ = [
    "HOST_FLOAT64",
    "RECOMPUTE",
    "Accelerator",
    "ForwardFlops",
    "LayoutCost",
    "MemoryCost",
    "MemoryUse",
    "Model",
    "Recipe",
    "ReconstructionFlops",
    "Training",
    "Workload",
    "accelerator",
    "best_layout",
    "layout_cost",
    "layout_costs",
    "layout_faults",
    "load_recipe",
    "recipe_names",
    "pipeline_stage_parameters",
]
