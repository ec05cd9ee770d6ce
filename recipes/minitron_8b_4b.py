"""Minitron-8B and Minitron-4B, one after the other, from Nemotron-4 15B.

Shapes: arXiv 2407.14679, table 10 (8.27 B and 4.19 B parameters). The 4B's model card speaks of 32 heads; the paper's
table and NeMo's ``Nemotron3Config4B`` have 24, which alone give its number of parameters. The 4B is cut from the 8B and
taught by the 15B (best practice 8 and section 4.3).

Training: cosine from 2e-4 to 4.5e-7 (section 4), 94 B tokens each, 1,152 sequences of 4,096 tokens (footnote 5; 400
steps are 1.8 B tokens). The teacher's own text is at hand, so it is not corrected. The warm-up is not published.

Beyond the paper, each pruned model is reconstructed on 1,048,576 tokens before it is distilled.
"""

from __future__ import annotations

from nemo_minitron.recipes import published
from nemo_minitron.recipes.teachers import NEMOTRON_4_15B

from nemo_minitron.config import DataConfig, ParallelLayout, StageConfig, TargetConfig
from nemo_minitron.planning import Recipe

NAME = "minitron-8b-4b"
TITLE = "Nemotron-4 15B -> Minitron-8B -> Minitron-4B (arXiv 2407.14679)"
TARGET_8B = TargetConfig(hidden_size=4096, ffn_hidden_size=16384)
TARGET_4B = TargetConfig(hidden_size=3072, ffn_hidden_size=9216, num_attention_heads=24)
#: 256 GPUs, 32 DGX nodes.
LAYOUT = ParallelLayout(tensor=8, data=32, sequence_parallel=True)


def recipe(
    source: str = "models/nemotron-4-15b",
    data: DataConfig | None = None,
    layout: ParallelLayout = LAYOUT,
    *,
    reconstruct: bool = True,
) -> Recipe:
    """The pipeline.

    Args:
        source: HF directory or ``.nemo`` file of the teacher.
        data: text to distil on; its blocks are 4,096 tokens.
        layout: of teacher and students.
        reconstruct: refit each pruned model before its distillation.
    """
    output, data = f"runs/{NAME}", data or published.text(4096)
    teacher, first = f"{output}/teacher", f"{output}/minitron-8b/model"
    schedule = {"tokens": 94e9, "batch": 1152, "lr": 2e-4, "min_lr": 4.5e-7, "warmup_steps": 40}
    made = "reconstructed" if reconstruct else "pruned"

    def refitted(size: str, parent: str) -> list[StageConfig]:
        name, model = f"reconstructed-{size}", f"pruned-{size}"
        return [published.reconstructed(output, data, teacher=parent, model=model, name=name)] if reconstruct else []

    return Recipe(
        NAME,
        TITLE,
        [
            published.imported(source, output),
            published.scored(output, teacher, data, layout, name="scores-15b"),
            published.pruned(
                output, teacher, layout, target=TARGET_8B, scores=f"{output}/scores-15b", name="pruned-8b"
            ),
            *refitted("8b", teacher),
            published.distilled(
                output, data, layout, teacher=teacher, student=f"{made}-8b", name="minitron-8b", **schedule
            ),
            published.scored(output, first, data, layout, name="scores-8b"),
            published.pruned(output, first, layout, target=TARGET_4B, scores=f"{output}/scores-8b", name="pruned-4b"),
            *refitted("4b", first),
            published.distilled(
                output, data, layout, teacher=teacher, student=f"{made}-4b", name="minitron-4b", **schedule
            ),
            published.evaluated(
                output,
                {"teacher": "teacher", "minitron-8b": "minitron-8b/model", "minitron-4b": "minitron-4b/model"},
                data,
                layout,
            ),
            published.exported(output, "minitron-4b"),
            published.reported(output, TITLE),
        ],
        {source: NEMOTRON_4_15B},
    )
