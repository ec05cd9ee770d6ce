"""Llama-3.1-Minitron-4B-Width from Llama-3.1-8B.

Shape: arXiv 2408.11796, table 3, and the model card of ``nvidia/Llama-3.1-Minitron-4B-Width-Base`` (embedding 3072,
32 heads, MLP 9216, 32 layers; 4.51 B parameters). Training: the paper's table 4.
"""

from __future__ import annotations

from nemo_minitron.recipes.published import OneShot
from nemo_minitron.recipes.teachers import LLAMA_31_8B

from nemo_minitron.config import ParallelLayout, TargetConfig

STUDENT = OneShot(
    name="llama-31-minitron-4b-width",
    title="Llama-3.1-8B -> Llama-3.1-Minitron-4B-Width (arXiv 2408.11796)",
    source="models/Llama-3.1-8B",
    teacher=LLAMA_31_8B,
    target=TargetConfig(hidden_size=3072, ffn_hidden_size=9216),
    layout=ParallelLayout(tensor=4, data=64, sequence_parallel=True),  # 256 GPUs, 32 DGX nodes
    # a fifth of the 3e-4 that Llama 3.1 8B was trained with (arXiv 2407.21783, table 3)
    correction_lr=6e-5,
    tokens=94e9,
    batch=1152,
    min_lr=1e-5,
    warmup_steps=40,
)
recipe = STUDENT.recipe
