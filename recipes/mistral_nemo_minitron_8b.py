"""Mistral-NeMo-Minitron-8B from Mistral-NeMo-12B.

Shape: arXiv 2408.11796, table 3, and the model card of ``nvidia/Mistral-NeMo-Minitron-8B-Base`` (embedding 4096,
32 heads, MLP 11520, 40 layers; 8.4 B parameters). Training: the paper's table 4.
"""

from __future__ import annotations

from nemo_minitron.recipes.published import OneShot
from nemo_minitron.recipes.teachers import MISTRAL_NEMO_12B

from nemo_minitron.config import ParallelLayout, TargetConfig

STUDENT = OneShot(
    name="mistral-nemo-minitron-8b",
    title="Mistral-NeMo-12B -> Mistral-NeMo-Minitron-8B (arXiv 2408.11796)",
    source="models/Mistral-Nemo-Base-2407",
    teacher=MISTRAL_NEMO_12B,
    target=TargetConfig(hidden_size=4096, ffn_hidden_size=11520),
    layout=ParallelLayout(tensor=8, data=32, sequence_parallel=True),  # 256 GPUs, 32 DGX nodes
    # The teacher's own learning rate is not published: that of Llama-3.1-8B's correction.
    correction_lr=6e-5,
    tokens=380e9,
    batch=768,
    min_lr=4.5e-7,
    warmup_steps=60,
)
recipe = STUDENT.recipe
