"""Model families, a file each: the axes of the parameters, and the names of things in transformers and NeMo.

Algorithms read the axes through :mod:`nemo_minitron.axes`, formats the names. Nothing here imports torch.
"""

from __future__ import annotations

from nemo_minitron.families.entry import Family
from nemo_minitron.families.llama import LLAMA
from nemo_minitron.families.mixtral import MIXTRAL
from nemo_minitron.families.nemotron import NEMOTRON
from nemo_minitron.families.qwen2 import QWEN2
from nemo_minitron.families.qwen3 import QWEN3

__all__ = ["FAMILIES", "register"]

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, QWEN2, QWEN3, NEMOTRON, MIXTRAL)}
"""By name. A checkpoint is of the first family that fits it."""


def register(family: Family) -> None:
    """Add a family from outside the package, for this process."""
    FAMILIES[family.name] = family
