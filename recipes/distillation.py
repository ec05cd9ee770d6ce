"""Distillation as a recipe of nemo_run, in the way of ``nemo.collections.llm.recipes``.

A recipe is data: :func:`distillation_recipe` returns a ``run.Partial`` whose every setting can be changed before an
executor starts it, here or on a cluster::

    import nemo_run as run
    from nemo_minitron.recipes.distillation import distillation_recipe

    recipe = distillation_recipe("runs/pruned", "runs/teacher", "data/*.jsonl", "runs/distilled", tensor=2, devices=8)
    recipe.schedule.lr = 2e-4
    recipe.loss.kind = "top_k"
    recipe.schedule.logits = "chunks"
    run.run(recipe, executor=run.LocalExecutor(ntasks_per_node=8, launcher="torchrun"))

Half of a training on answers that the student writes itself::

    recipe.on_policy.share = 0.5
    recipe.on_policy.prompts.path = "data/prompts.jsonl"

Two teachers, of a recipe whose ``teacher`` is None::

    recipe.teachers = [
        run.Config(TeacherConfig, name="large", model="runs/teacher", weight=0.7),
        run.Config(TeacherConfig, name="corrected", model="runs/corrected/model", weight=0.3),
    ]
"""

from __future__ import annotations

import dataclasses
from typing import Any

import nemo_run as run

from nemo_minitron.config import (
    CorrectionConfig,
    DataConfig,
    DistillConfig,
    IntermediateConfig,
    LossConfig,
    OnPolicyConfig,
    OnPolicyPrompts,
    ParallelLayout,
    RuntimeConfig,
    Sampling,
    Schedule,
    SourceConfig,
    TeacherConfig,
)
from nemo_minitron.errors import ConfigError

__all__ = ["distill", "distillation_recipe"]


@run.cli.entrypoint(name="distill", namespace="minitron")
def distill(
    student: str,
    teacher: str | None,
    output: str,
    data: DataConfig,
    parallel: ParallelLayout,
    schedule: Schedule,
    loss: LossConfig,
    intermediate: IntermediateConfig,
    teacher_correction: CorrectionConfig,
    teacher_cache: str | None = None,
    teacher_placement: str = "shared",
    teacher_parallel: ParallelLayout | None = None,
    result: str = "last",
    resume: bool = True,
    overwrite: bool = False,
    seed: int = 0,
    teachers: list[TeacherConfig] | None = None,
    on_policy: OnPolicyConfig | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
) -> dict[str, Any]:
    """Distil, on every process that an executor started (as torchrun or Slurm do); what ``minitron distill`` runs.

    Args:
        student, teacher: checkpoints; no teacher where nothing is learnt from one, or with ``teachers``.
        output: directory; gets ``model/``, ``metrics.jsonl`` and the training state.
        data: text.
        parallel: layout of both models, unless the teacher has its own; as many processes must run.
        schedule: hyper-parameters.
        loss: of the logits.
        intermediate: losses inside the models.
        teacher_correction: training of the teacher meanwhile.
        teacher_cache: output of ``minitron cache``, whose logits take the teacher's place.
        teacher_placement, teacher_parallel: "shared", or "own_layout" or "own_ranks" and that layout; on ranks of its
            own as many further processes must run.
        result: "last" or "best" checkpoint as the model; see ``schedule.keep_best``.
        resume: go on from the last checkpoint in ``output``, under the same settings.
        overwrite: replace what is there.
        seed: of every random generator, and so of the order of repeated passes over the data.
        teachers: several teachers in place of ``teacher``.
        on_policy: training on answers that the student writes itself.
        quantize, group_size: quantization to train the student for, and the columns of a scale of "int4".

    Returns:
        The figures of the record, on rank 0.

    Raises:
        ConfigError: with all that is wrong with the settings.
        MinitronError: as the stage.
    """
    from nemo_minitron.jobs.in_place import run_in_place

    settings = {field.name: getattr(schedule, field.name) for field in dataclasses.fields(schedule)}
    return run_in_place(
        DistillConfig(
            student=student,
            teacher=teacher,
            output=output,
            data=data,
            parallel=parallel,
            loss=loss,
            intermediate=intermediate,
            teacher_correction=teacher_correction,
            teacher_cache=teacher_cache,
            teacher_placement=teacher_placement,
            teacher_parallel=teacher_parallel or ParallelLayout(),
            result=result,
            resume=resume,
            overwrite=overwrite,
            runtime=RuntimeConfig(seed=seed),
            teachers=teachers or [],
            on_policy=on_policy or OnPolicyConfig(),
            quantize=quantize,
            group_size=group_size,
            **settings,
        )
    )


@run.cli.factory(target=distill, name="distillation")
def distillation_recipe(
    student: str,
    teacher: str | None,
    text: str,
    output: str,
    num_nodes: int = 1,
    devices: int = 8,
    tensor: int = 1,
    pipeline: int = 1,
    sequence_length: int = 4096,
    steps: int = 1000,
    micro_batch_size: int = 1,
    global_batch_size: int = 128,
    precision: str = "bf16-mixed",
    context: int = 1,
) -> run.Partial[Any]:
    """The recipe of the Minitron papers: forward KL alone, AdamW, warm-up and cosine decay.

    Args:
        student, teacher: checkpoints.
        text: JSONL, Parquet or text files, or a pattern of them.
        output: directory.
        num_nodes, devices: processes are their product; those that ``tensor``, ``pipeline`` and ``context`` leave are
            data-parallel.
        tensor, pipeline, context: parallel sizes of both models.
        sequence_length, steps, micro_batch_size, global_batch_size: of the training.
        precision: "bf16-mixed" on GPUs, "32" on a CPU.

    Returns:
        A partial of :func:`distill`, to be changed and run.

    Raises:
        ConfigError: if the processes cannot be shared out.
    """
    processes, model = num_nodes * devices, tensor * pipeline * context
    if processes % model:
        raise ConfigError(
            f"num_nodes * devices = {processes}: is not a multiple of tensor * pipeline * context = {model}; change "
            "either"
        )
    warmup = min(100, steps // 10)
    return run.Partial(
        distill,
        student=student,
        teacher=teacher,
        output=output,
        data=run.Config(
            DataConfig, sources=[run.Config(SourceConfig, name="corpus", path=text)], sequence_length=sequence_length
        ),
        parallel=run.Config(ParallelLayout, tensor=tensor, pipeline=pipeline, data=processes // model, context=context),
        schedule=run.Config(
            Schedule,
            steps=steps,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            lr=1e-4,
            min_lr=1e-5,
            warmup_steps=warmup,
            precision=precision,
            keep_best="kl",
        ),
        loss=run.Config(LossConfig),
        intermediate=run.Config(IntermediateConfig),
        teacher_correction=run.Config(CorrectionConfig),
        on_policy=run.Config(OnPolicyConfig, prompts=run.Config(OnPolicyPrompts), sampling=run.Config(Sampling)),
    )
