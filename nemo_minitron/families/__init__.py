"""Model families, a file each: the axes of the parameters, and the names of things in transformers and NeMo.

Algorithms read the axes through :mod:`nemo_minitron.axes`, formats the names. Nothing here imports torch.
"""

from __future__ import annotations

from nemo_minitron.config import tables
from nemo_minitron.config.tables import Table
from nemo_minitron.families.entry import Family
from nemo_minitron.families.gemma3 import GEMMA3
from nemo_minitron.families.llama import LLAMA
from nemo_minitron.families.mixtral import MIXTRAL
from nemo_minitron.families.nemotron import NEMOTRON
from nemo_minitron.families.qwen2 import QWEN2
from nemo_minitron.families.qwen3 import QWEN3
from nemo_minitron.families.qwen3_moe import QWEN3_MOE

__all__ = ["FAMILIES"]

OWN_FAMILIES = (LLAMA, QWEN2, QWEN3, NEMOTRON, MIXTRAL, QWEN3_MOE, GEMMA3)

FAMILIES: Table[Family] = tables.FAMILIES
"""By name. A model is of the first family that fits it. ``FAMILIES.register(Family(...))`` adds one in this process,
and the entry points ``nemo_minitron.families`` of an installed package do so in every process."""
