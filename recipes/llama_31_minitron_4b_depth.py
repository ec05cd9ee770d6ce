"""Llama-3.1-Minitron-4B-Depth from Llama-3.1-8B.

Which layers: arXiv 2408.11796, section 4: a run of 16 neighbours, layers 16 to 31 counted from 1, whose absence costs
Winogrande least. Training: the paper's table 4.
"""

from __future__ import annotations

from nemo_minitron.recipes.published import OneShot
from nemo_minitron.recipes.teachers import LLAMA_31_8B

from nemo_minitron.config import ParallelLayout

STUDENT = OneShot(
    name="llama-31-minitron-4b-depth",
    title="Llama-3.1-8B -> Llama-3.1-Minitron-4B-Depth (arXiv 2408.11796)",
    source="models/Llama-3.1-8B",
    teacher=LLAMA_31_8B,
    layers_to_drop=range(15, 31),
    layout=ParallelLayout(tensor=4, data=64, sequence_parallel=True),  # 256 GPUs, 32 DGX nodes
    # a fifth of the 3e-4 that Llama 3.1 8B was trained with (arXiv 2407.21783, table 3)
    correction_lr=6e-5,
    tokens=94e9,
    batch=1152,
    min_lr=1e-5,
    warmup_steps=40,
)
recipe = STUDENT.recipe
