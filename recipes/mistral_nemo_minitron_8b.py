"""Mistral-NeMo-Minitron-8B from Mistral-NeMo-12B.

Shape: arXiv 2408.11796, table 3, and the model card of ``nvidia/Mistral-NeMo-Minitron-8B-Base`` (embedding 4096,
32 heads, MLP 11520, 40 layers; 8.4 B parameters). Training: the paper's table 4.
"""

from __future__ import annotations

from nemo_minitron.recipes import published
from nemo_minitron.recipes.teachers import MISTRAL_NEMO_12B

from nemo_minitron.config import DataConfig, ParallelLayout, TargetConfig
from nemo_minitron.planning import Recipe

NAME = "mistral-nemo-minitron-8b"
TARGET = TargetConfig(hidden_size=4096, ffn_hidden_size=11520)
#: 256 GPUs, 32 DGX nodes.
LAYOUT = ParallelLayout(tensor=8, data=32, sequence_parallel=True)


def recipe(
    source: str = "models/Mistral-Nemo-Base-2407", data: DataConfig | None = None, layout: ParallelLayout = LAYOUT
) -> Recipe:
    """The pipeline.

    Args:
        source: HF directory of the teacher.
        data: text to distil on; its blocks are 8,192 tokens.
        layout: of teacher and student.
    """
    output, data = f"runs/{NAME}", data or published.text(8192)
    teacher = f"{output}/corrected/model"
    return Recipe(
        NAME,
        "Mistral-NeMo-12B -> Mistral-NeMo-Minitron-8B (arXiv 2408.11796)",
        [
            published.imported(source, output),
            # The teacher's own learning rate is not published: that of Llama-3.1-8B's correction.
            published.corrected(output, data, layout, batch=768, lr=6e-5),
            published.scored(output, teacher, data, layout),
            published.pruned(output, teacher, layout, target=TARGET, scores=f"{output}/scores"),
            published.distilled(
                output, data, layout, teacher=teacher, tokens=380e9, batch=768, lr=1e-4, min_lr=4.5e-7, warmup_steps=60
            ),
            published.exported(output),
        ],
        {source: MISTRAL_NEMO_12B},
    )
