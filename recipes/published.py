"""What the published models have in common: correct the teacher, score, prune, distil on its logits, export.

Beyond the papers, students that are cut in width are reconstructed before they are distilled; ``reconstruct=`` says
otherwise.

The papers name neither their text, which is NVIDIA's own, nor their parallel layouts: ``data`` and ``layout`` are
settings here, with defaults that ``minitron plan`` finds to fit DGX H100 nodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import (
    CorrectConfig,
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    ImportConfig,
    ParallelLayout,
    PruneConfig,
    ReconstructConfig,
    ReportConfig,
    RuntimeConfig,
    Schedule,
    ScoreConfig,
    SourceConfig,
    TargetConfig,
)
from nemo_minitron.planning import Model, Recipe

if TYPE_CHECKING:
    import nemo_run as run

#: arXiv 2407.14679, section 4: samples for the importance of units.
CALIBRATION_SAMPLES = 1024
#: Blocks of calibration text that a pruned model is reconstructed on. Of 8,192 tokens each they are 2,097,152 tokens,
#: some 200 for each column of the widest matrix. Not from the papers.
RECONSTRUCTION_SAMPLES = 256
#: Processes that share these blocks, the GPUs of one node; each holds the states of its own.
RECONSTRUCTION_LAYOUT = ParallelLayout(data=8)
#: No stage is stopped for its time: Slurm does that.
RUNTIME = RuntimeConfig(dtype="bfloat16", collective_timeout_minutes=30.0)


def steps_for(tokens: float, batch: int, sequence_length: int) -> int:
    """Optimizer steps that see a number of tokens."""
    return round(tokens / (batch * sequence_length))


def text(sequence_length: int, path: str = "data/*.jsonl") -> DataConfig:
    """The corpus to distil on: JSONL with a ``text`` key."""
    return DataConfig(
        sources=[SourceConfig("corpus", path=path)], sequence_length=sequence_length, held_out_fraction=0.01
    )


def imported(source: str, output: str) -> ImportConfig:
    """Take a Hugging Face directory, or a ``.nemo`` file, over."""
    return ImportConfig(name="teacher", output=f"{output}/teacher", source=source, dtype="bfloat16", runtime=RUNTIME)


def corrected(output: str, data: DataConfig, layout: ParallelLayout, *, batch: int, lr: float) -> CorrectConfig:
    """Teacher correction, arXiv 2408.11796, section 2: about 100 B tokens, 120 steps of warm-up, a fifth of the peak
    learning rate of the teacher's own training. Batch and smallest learning rate were the teacher's too, which are not
    published for all: these are the distillation's batch and a tenth of ``lr``.
    """
    return CorrectConfig(
        name="corrected",
        output=f"{output}/corrected",
        model=f"{output}/teacher",
        data=data,
        steps=steps_for(100e9, batch, data.sequence_length),
        global_batch_size=batch,
        lr=lr,
        min_lr=lr / 10,
        warmup_steps=120,
        validate_every=1000,
        save_every=1000,
        precision="bf16-mixed",
        parallel=layout,
        runtime=RUNTIME,
    )


def scored(output: str, model: str, data: DataConfig, layout: ParallelLayout, name: str = "scores") -> ScoreConfig:
    """Importance by forward passes: mean over the sequence, L2 over the samples."""
    return ScoreConfig(
        name=name,
        output=f"{output}/{name}",
        model=model,
        data=data,
        samples=CALIBRATION_SAMPLES,
        parallel=layout,
        runtime=RUNTIME,
    )


def pruned(
    output: str,
    model: str,
    layout: ParallelLayout,
    *,
    target: TargetConfig | None = None,
    layers_to_drop: Sequence[int] | None = None,
    scores: str | None = None,
    name: str = "pruned",
) -> PruneConfig:
    """One shot to the published shape."""
    return PruneConfig(
        name=name,
        output=f"{output}/{name}",
        model=model,
        scores=scores,
        target=target or TargetConfig(),
        layers_to_drop=None if layers_to_drop is None else list(layers_to_drop),
        student_layout=layout,
        runtime=RUNTIME,
    )


def reconstructed(
    output: str, data: DataConfig, *, teacher: str, model: str = "pruned", name: str = "reconstructed"
) -> ReconstructConfig:
    """The pruned model refitted to its teacher, layer by layer; see :data:`RECONSTRUCTION_SAMPLES`."""
    return ReconstructConfig(
        name=name,
        output=f"{output}/{name}",
        model=f"{output}/{model}",
        teacher=teacher,
        data=data,
        samples=RECONSTRUCTION_SAMPLES,
        parallel=RECONSTRUCTION_LAYOUT,
        runtime=RUNTIME,
    )


def distilled(
    output: str,
    data: DataConfig,
    layout: ParallelLayout,
    *,
    teacher: str,
    tokens: float,
    batch: int,
    lr: float,
    min_lr: float,
    warmup_steps: int,
    student: str = "pruned",
    name: str = "distilled",
) -> DistillConfig:
    """Forward KL on the logits alone, at temperature 1."""
    return DistillConfig(
        name=name,
        output=f"{output}/{name}",
        student=f"{output}/{student}",
        teacher=teacher,
        data=data,
        steps=steps_for(tokens, batch, data.sequence_length),
        global_batch_size=batch,
        lr=lr,
        min_lr=min_lr,
        warmup_steps=warmup_steps,
        validate_every=1000,
        save_every=1000,
        precision="bf16-mixed",
        parallel=layout,
        runtime=RUNTIME,
    )


def evaluated(output: str, models: dict[str, str], data: DataConfig, layout: ParallelLayout) -> EvaluateConfig:
    """Held-out losses of models below ``output``, the first being the baseline; one replica each."""
    return EvaluateConfig(
        name="evaluation",
        output=f"{output}/evaluation",
        models={name: f"{output}/{path}" for name, path in models.items()},
        data=data,
        parallel=dataclasses.replace(layout, data=1, context=1, expert=1, virtual_pipeline=None),
        runtime=RUNTIME,
    )


def reported(output: str, title: str) -> ReportConfig:
    """The page about all that ran."""
    return ReportConfig(name="report", output=f"{output}/report", run=output, title=title)


def exported(output: str, model: str = "distilled") -> ExportConfig:
    """The student for transformers and for NeMo 2."""
    return ExportConfig(
        name="export", output=f"{output}/export", model=f"{output}/{model}/model", formats=["hf", "nemo2"],
        runtime=RUNTIME,
    )  # fmt: skip


@dataclass(frozen=True)
class OneShot:
    """A student that is cut from its corrected teacher at once, as those of arXiv 2408.11796 are.

    Attributes:
        name: of the recipe.
        title: what it makes of what, and where that is published.
        source: HF directory of the teacher, unless another is given.
        teacher: its sizes.
        layout: of teacher and student, unless another is given.
        correction_lr: peak learning rate of the teacher's correction.
        tokens: of the distillation, in blocks of 8,192.
        batch: blocks of a step, of the correction too.
        min_lr, warmup_steps: of the distillation, whose peak learning rate is 1e-4.
        target: sizes of the student, whose units are chosen by scores.
        layers_to_drop: counted from 0, of a student that only has fewer layers; needs no scores.
    """

    name: str
    title: str
    source: str
    teacher: Model
    layout: ParallelLayout
    correction_lr: float
    tokens: float
    batch: int
    min_lr: float
    warmup_steps: int
    target: TargetConfig | None = None
    layers_to_drop: Sequence[int] | None = None

    def recipe(
        self,
        source: str | None = None,
        data: DataConfig | None = None,
        layout: ParallelLayout | None = None,
        *,
        reconstruct: bool | None = None,
    ) -> Recipe:
        """The pipeline.

        Args:
            source: HF directory of the teacher.
            data: text to distil on; its blocks are 8,192 tokens.
            layout: of teacher and student.
            reconstruct: refit the pruned model before its distillation; None does it for a student that is cut in
                width.
        """
        reconstruct = self.target is not None if reconstruct is None else reconstruct
        student = "reconstructed" if reconstruct else "pruned"
        source, layout, data = source or self.source, layout or self.layout, data or text(8192)
        output = f"runs/{self.name}"
        teacher, scores = f"{output}/corrected/model", None if self.target is None else f"{output}/scores"
        cut = pruned(output, teacher, layout, target=self.target, layers_to_drop=self.layers_to_drop, scores=scores)
        return Recipe(
            self.name,
            self.title,
            [
                imported(source, output),
                corrected(output, data, layout, batch=self.batch, lr=self.correction_lr),
                *([] if scores is None else [scored(output, teacher, data, layout)]),
                cut,
                *([reconstructed(output, data, teacher=teacher)] if reconstruct else []),
                distilled(
                    output, data, layout, teacher=teacher, tokens=self.tokens, batch=self.batch, lr=1e-4,
                    min_lr=self.min_lr, warmup_steps=self.warmup_steps, student=student,
                ),
                evaluated(
                    output,
                    {
                        "teacher": "corrected/model",
                        "pruned": "pruned",
                        **({student: student} if reconstruct else {}),
                        "distilled": "distilled/model",
                    },
                    data,
                    layout,
                ),
                exported(output),
                reported(output, self.title),
            ],
            {source: self.teacher},
        )  # fmt: skip


def partials(recipe: Recipe) -> dict[str, run.Partial[Any]]:
    """The distillations of a recipe for nemo_run, to be changed and given to an executor.

    Returns:
        By the stage's name, what :func:`nemo_minitron.recipes.distillation.distillation_recipe` returns, with the
        recipe's settings.
    """
    import nemo_run as run
    from nemo_minitron.recipes.distillation import distill

    def deferred(value: Any) -> Any:
        """Dataclasses as nemo_run's configurations of them."""
        if isinstance(value, list):
            return [deferred(item) for item in value]
        if not dataclasses.is_dataclass(value):
            return value
        fields = {field.name: deferred(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return run.Config(type(value), **fields)

    found = {}
    for stage in recipe.stages:
        if not isinstance(stage, DistillConfig):
            continue
        schedule = Schedule(**{field.name: getattr(stage, field.name) for field in dataclasses.fields(Schedule)})
        parts = (
            "data", "parallel", "loss", "intermediate", "teacher_correction", "teacher_cache", "teacher_placement",
            "teacher_parallel", "teachers", "on_policy", "quantize", "group_size",
        )  # fmt: skip
        found[stage.name] = run.Partial(
            distill,
            student=stage.student,
            teacher=stage.teacher,
            output=stage.output,
            schedule=deferred(schedule),
            result=stage.result,
            resume=stage.resume,
            seed=stage.runtime.seed,
            **{part: deferred(getattr(stage, part)) for part in parts},
        )
    return found
