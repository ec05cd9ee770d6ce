"""``minitron plan``: the costs of the trainings of a recipe, or of a configuration, on a cluster.

The models' sizes come from the recipe, or from existing checkpoints; the output of a pruning stage has the sizes of its
target. Nothing is read but small JSON files, and torch is not imported.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from nemo_minitron.checkpoints.model_record import peek_architecture, peek_shape
from nemo_minitron.cli.plan_tables import show_costs
from nemo_minitron.config import (
    STAGES,
    AlignConfig,
    ClusterConfig,
    CorrectConfig,
    CorrectionConfig,
    DistillConfig,
    ImportConfig,
    IterateConfig,
    PruneConfig,
    SftConfig,
    StageConfig,
    find_config,
    load,
    load_part,
    load_pipeline,
)
from nemo_minitron.errors import ConfigError, MinitronError
from nemo_minitron.planning import Model, Training, load_recipe, recipe_names
from nemo_minitron.planning.plot import plot_layouts
from nemo_minitron.pruning.choose import target_shape

__all__ = ["Subject", "read_cluster", "read_subject", "show_plan", "trainings_of", "write_pipeline"]

_PREFIX = "cluster."


@dataclass(frozen=True)
class Subject:
    """The stages and models of a plan.

    Attributes:
        title: of the heading.
        stages: in order.
        models: sizes that are known before anything runs, by the path that a stage reads.
    """

    title: str
    stages: list[StageConfig]
    models: dict[str, Model] = field(default_factory=dict)


def show_plan(
    name: str, overrides: Sequence[str], console: Console, *, plot: Path | None, save: Path | None, rows: int
) -> None:
    """Print the costs of the trainings of a recipe or configuration.

    Args:
        name, overrides: as :func:`read_subject` and :func:`read_cluster` take them.
        console: to print on.
        plot: file of a picture to draw; None for none.
        save: file to write the recipe to, as a pipeline.
        rows: number of layouts to show of each training.

    Raises:
        ConfigError: for settings that cannot be planned, or if there is no training.
    """
    cluster = read_cluster(overrides)
    subject = read_subject(name, overrides)
    trainings, notes = trainings_of(subject)
    if not trainings:
        raise ConfigError(["no training whose steps are known is in it", *notes], source=name)
    if save is not None:
        write_pipeline(name, save)
    console.print(f"[bold]{subject.title}[/]")
    costs = show_costs(trainings, cluster, console, rows=rows)
    for note in notes:
        console.print(f"note: {note}")
    if plot is not None:
        plot_layouts(
            [(training.name, of) for training, of in zip(trainings, costs, strict=True)], cluster, plot, rows=rows
        )
        console.print(f"plot: {plot}")
    if save is not None:
        console.print(f"pipeline: {save}")


def read_cluster(overrides: Sequence[str]) -> ClusterConfig:
    """The cluster that the ``cluster.*=`` items among the overrides describe.

    Raises:
        ConfigError: with every fault.
    """
    return load_part(
        ClusterConfig, [override.removeprefix(_PREFIX) for override in overrides if override.startswith(_PREFIX)]
    )


def read_subject(name: str, overrides: Sequence[str]) -> Subject:
    """A recipe, a pipeline, or the configuration of one training.

    Args:
        name: of a shipped recipe, or a YAML file as ``minitron run`` or a training stage takes it.
        overrides: ``key=value`` items; those of the cluster are ignored. A recipe takes the overrides of a pipeline:
            ``stages.distilled.steps=500``.

    Raises:
        ConfigError: if there is no such recipe or file, or with every fault of its settings.
    """
    overrides = [override for override in overrides if not override.startswith(_PREFIX)]
    if name in recipe_names():
        recipe = load_recipe(name)
        if not overrides:
            return Subject(recipe.title, recipe.stages, recipe.models)
        with tempfile.TemporaryDirectory() as scratch:
            path = write_pipeline(name, Path(scratch) / f"{name}.yaml")
            return Subject(recipe.title, load_pipeline(path, overrides)[1], recipe.models)
    try:
        path = find_config(name)
    except ConfigError as error:
        known = f"shipped recipes: {', '.join(recipe_names())}"
        raise ConfigError([*error.faults, known], source=error.source) from None
    if "stages" in (keys := _keys(path)):
        pipeline, stages = load_pipeline(path, overrides)
        return Subject(pipeline.name, stages)
    trainings = {kind: cls for kind, cls in STAGES.items() if _is_training(cls)}
    fitting = [kind for kind, cls in trainings.items() if {"data"} <= keys <= set(cls.__dataclass_fields__)]
    if not fitting:
        raise ConfigError(
            f"{name}: is neither a pipeline nor a training; plan a recipe ({', '.join(recipe_names())}), a file with "
            f"`stages`, or a configuration of {', '.join(trainings)}"
        )
    return Subject(path.stem, [load(fitting[0], path, overrides)])


def write_pipeline(name: str, path: Path) -> Path:
    """Write a recipe as a file for ``minitron run``.

    Raises:
        ConfigError: if there is no such recipe.
    """
    recipe = load_recipe(name)
    head = f"# {recipe.title}\n#   minitron run {path.name}\n"
    path.write_text(head + yaml.safe_dump(recipe.pipeline(), sort_keys=False, width=120, allow_unicode=True))
    return path


def trainings_of(subject: Subject) -> tuple[list[Training], list[str]]:
    """The trainings of a subject, in order, and remarks on stages that are not planned.

    Raises:
        ConfigError: with all models whose sizes are not known.
    """
    models = {_key(path): model for path, model in subject.models.items()}
    trainings: list[Training] = []
    notes: list[str] = []
    faults: list[str] = []
    for config in subject.stages:
        name = config.name or config.STAGE
        try:
            if isinstance(config, ImportConfig):
                _follow_import(config, models)
            elif isinstance(config, PruneConfig | IterateConfig):
                models[_key(config.output)] = _pruned(config, _model(config.model, models))
            elif (training := _training(name, config, models)) is not None:
                trainings.append(training)
                notes += _teacher_notes(name, config)
                models[_key(f"{config.output}/model")] = training.student
            elif isinstance(config, AlignConfig):
                notes.append(f"{name}: {config.STAGE} is not planned for")
                models[_key(f"{config.output}/model")] = _model(config.model, models)
        except MinitronError as error:
            faults += [f"{name}: {fault}" for fault in getattr(error, "faults", [str(error)])]
    if faults:
        raise ConfigError(faults, source=subject.title)
    return trainings, notes


def _is_training(cls: type[StageConfig]) -> bool:
    return issubclass(cls, DistillConfig | CorrectConfig | SftConfig)


def _training(name: str, config: StageConfig, models: dict[str, Model]) -> Training | None:
    """The training of a stage; None if it does not train, or its number of steps is not known beforehand."""
    if not isinstance(config, DistillConfig | CorrectConfig | SftConfig) or config.steps is None:
        return None
    teacher = None
    if isinstance(config, DistillConfig):
        student = _model(config.student, models)
        if config.taught and config.teacher is not None and config.teacher_cache is None:
            teacher = _model(config.teacher, models)
    else:
        student = _model(config.model, models)
    return Training(
        name=name,
        student=student,
        teacher=teacher,
        steps=config.steps,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        sequence_length=_length(config),
        layout=config.parallel,
        recompute="none" if isinstance(config, SftConfig) else config.recompute,
        bytes=2 if config.precision.startswith("bf16") else 4,
    )


def _teacher_notes(name: str, config: StageConfig) -> list[str]:
    """Remarks on the costs of a distillation that the plan does not include."""
    if not isinstance(config, DistillConfig):
        return []
    notes = []
    if config.teacher_cache is not None:
        notes.append(f"{name}: the teacher's logits come from a cache; reading them is not counted")
    elif config.teacher_placement != "shared":
        notes.append(f"{name}: teacher_placement={config.teacher_placement} is planned as if it were shared")
    if config.teacher_correction != CorrectionConfig():
        notes.append(f"{name}: the teacher's own training meanwhile is not counted")
    return notes


def _length(config: DistillConfig | CorrectConfig | SftConfig) -> int:
    return config.data.max_length if isinstance(config, SftConfig) else config.data.sequence_length


def _follow_import(config: ImportConfig, models: dict[str, Model]) -> None:
    """Give an imported model the sizes of its source, if known; a stage that needs unknown sizes reports them."""
    origin = config.source or config.package or ""
    for path in (origin, config.output):
        try:
            models[_key(config.output)] = _model(path, models)
            return
        except ConfigError:
            continue


def _pruned(config: PruneConfig | IterateConfig, model: Model) -> Model:
    sizes, dropped = config.target.given(), None
    if isinstance(config, PruneConfig):
        if config.search is not None:
            raise ConfigError(
                f"search={config.search}: its best shape is not known before the search; plan with a target"
            )
        dropped = config.layers_to_drop
        if config.vocabulary.size is not None:
            sizes["vocab_size"] = config.vocabulary.size
    return Model(target_shape(model.shape, sizes, layers_to_drop=dropped), model.architecture)


def _model(path: str, models: dict[str, Model]) -> Model:
    """The sizes of the model at a path.

    Raises:
        ConfigError: if they are not known.
        CheckpointError: if a checkpoint there cannot be read.
    """
    if (known := models.get(_key(path))) is not None:
        return known
    shape, architecture = peek_shape(path), peek_architecture(path)
    if shape is not None and architecture is not None:
        return Model(shape, architecture)
    file = Path(path) / "config.json"
    if file.is_file():
        from nemo_minitron.checkpoints.formats.huggingface.config import from_hf, read_json

        return Model(*from_hf(read_json(file), file))
    raise ConfigError(
        f"{path}: its sizes are not known before it is there; import the model first, or plan a recipe, which states "
        f"them ({', '.join(recipe_names())})"
    )


def _key(path: str) -> str:
    return os.path.normpath(path)


def _keys(path: Path) -> set[str]:
    """Top-level keys of a YAML file; its faults are reported when it is loaded."""
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return set()
    return set(content) if isinstance(content, dict) else set()
