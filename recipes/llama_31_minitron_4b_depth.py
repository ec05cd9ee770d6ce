"""Llama-3.1-Minitron-4B-Depth from Llama-3.1-8B.

Which layers: arXiv 2408.11796, section 4: a run of 16 neighbours, layers 16 to 31 counted from 1, whose absence costs
Winogrande least. Training: the paper's table 4.
"""

from __future__ import annotations

from nemo_minitron.recipes import published
from nemo_minitron.recipes.teachers import LLAMA_31_8B

from nemo_minitron.config import DataConfig, ParallelLayout
from nemo_minitron.planning import Recipe

NAME = "llama-31-minitron-4b-depth"
#: Counted from 0.
DROPPED = range(15, 31)
#: 256 GPUs, 32 DGX nodes.
LAYOUT = ParallelLayout(tensor=4, data=64, sequence_parallel=True)


def recipe(
    source: str = "models/Llama-3.1-8B", data: DataConfig | None = None, layout: ParallelLayout = LAYOUT
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
        "Llama-3.1-8B -> Llama-3.1-Minitron-4B-Depth (arXiv 2408.11796)",
        [
            published.imported(source, output),
            # a fifth of the 3e-4 that Llama 3.1 8B was trained with (arXiv 2407.21783, table 3)
            published.corrected(output, data, layout, batch=1152, lr=6e-5),
            published.pruned(output, teacher, layout, layers_to_drop=DROPPED),
            published.distilled(
                output, data, layout, teacher=teacher, tokens=94e9, batch=1152, lr=1e-4, min_lr=1e-5, warmup_steps=40
            ),
            published.exported(output),
        ],
        {source: LLAMA_31_8B},
    )
