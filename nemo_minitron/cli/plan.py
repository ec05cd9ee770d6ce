"""``minitron plan``: the costs of the trainings of a recipe, or of a configuration, on a cluster.

The models' sizes come from the recipe, or from existing checkpoints; the output of a pruning stage has the sizes of its
target. Nothing is read but small JSON files, and torch is not imported.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from nemo_minitron.checkpoints.model_record import peek_architecture, peek_shape
from nemo_minitron.cli.plan_layouts import saved_stages
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
    ReconstructConfig,
    SftConfig,
    StageConfig,
    find_config,
    load,
    load_part,
    load_pipeline,
    shipped_configs,
)
from nemo_minitron.config.spelling import nearest
from nemo_minitron.errors import ConfigError, MinitronError
from nemo_minitron.parsing import parse_yaml
from nemo_minitron.planning import Model, Recipe, Training, load_recipe, recipe_names
from nemo_minitron.planning.plot import plot_layouts
from nemo_minitron.planning.recipe import pipeline_content
from nemo_minitron.pruning.choose import target_shape
from nemo_minitron.search.results import FILE_NAME
from nemo_minitron.stages.shared.target import target_sizes

__all__ = ["Subject", "read_cluster", "read_subject", "show_plan", "trainings_of", "write_pipeline"]

_PREFIX = "cluster."


@dataclass(frozen=True)
class Subject:
    """The stages and models of a plan.

    Attributes:
        title: of the heading.
        stages: in order.
        models: sizes that are known before anything runs, by the path that a stage reads.
        name: of the pipeline.
        output: directory of its run.
    """

    title: str
    stages: list[StageConfig]
    models: dict[str, Model] = field(default_factory=dict)
    name: str = ""
    output: str = ""


def show_plan(
    name: str, overrides: Sequence[str], console: Console, *, plot: Path | None, save: Path | None, rows: int
) -> None:
    """Print the costs of the trainings of a recipe or configuration.

    Args:
        name, overrides: as :func:`read_subject` and :func:`read_cluster` take them.
        console: to print on.
        plot: file of a picture to draw; None for none.
        save: file to write what is planned to, as a pipeline.
        rows: number of layouts to show of each training.

    Raises:
        ConfigError: for settings that cannot be planned, or if there is no training.
    """
    cluster = read_cluster(overrides)
    subject = read_subject(name, overrides)
    trainings, notes = trainings_of(subject)
    if not trainings:
        raise ConfigError(["no training whose steps are known is in it", *notes], source=name)
    saved = None if save is None else saved_stages(subject.stages, trainings, cluster)
    console.print(f"[bold]{subject.title}[/]")
    costs = show_costs(trainings, cluster, console, rows=rows)
    for note in notes:
        console.print(f"note: {note}")
    if plot is not None:
        plot_layouts(
            [(training.name, of) for training, of in zip(trainings, costs, strict=True)], cluster, plot, rows=rows
        )
        console.print(f"plot: {plot}")
    if save is not None and saved is not None:
        stages, changes = saved
        _write(subject, stages, save)
        for change in changes:
            console.print(f"note: {change}")
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
    _refuse_unprefixed(overrides)
    if name in recipe_names():
        recipe = load_recipe(name)
        planned = _of_recipe(recipe)
        if not overrides:
            return planned
        with tempfile.TemporaryDirectory() as scratch:
            path = _write(planned, planned.stages, Path(scratch) / f"{name}.yaml")
            pipeline, stages = load_pipeline(path, overrides)
            return dataclasses.replace(planned, name=pipeline.name, output=pipeline.output, stages=stages)
    try:
        path = find_config(name)
    except ConfigError:
        recipes = recipe_names()
        raise ConfigError(
            f"{name}: is neither a recipe nor a file{nearest(name, [*recipes, *shipped_configs()])}; give the YAML of "
            f"a pipeline or training, or one of the shipped recipes: {', '.join(recipes)}"
        ) from None
    if "stages" in (keys := _keys(path)):
        pipeline, stages = load_pipeline(path, overrides)
        return Subject(pipeline.name, stages, name=pipeline.name, output=pipeline.output)
    trainings = {kind: cls for kind, cls in STAGES.items() if _is_training(cls)}
    fitting = [kind for kind, cls in trainings.items() if {"data"} <= keys <= set(cls.__dataclass_fields__)]
    if not fitting:
        raise ConfigError(
            f"{name}: is neither a pipeline nor a training; plan a recipe ({', '.join(recipe_names())}), a file with "
            f"`stages`, or a configuration of {', '.join(trainings)}"
        )
    stage = load(fitting[0], path, overrides)
    return Subject(path.stem, [stage], name=path.stem, output=str(Path(stage.output).parent))


def _refuse_unprefixed(overrides: Sequence[str]) -> None:
    """Settings of the cluster that lack ``cluster.``."""
    names = {field.name for field in dataclasses.fields(ClusterConfig)}
    faults = [
        f"override {override!r}: is a setting of the cluster; did you mean {_PREFIX}{override}?"
        for override in overrides
        if override.partition("=")[0] in names
    ]
    if faults:
        raise ConfigError(faults)


def write_pipeline(name: str, path: Path) -> Path:
    """Write a recipe as it is as a file for ``minitron run``.

    Raises:
        ConfigError: if there is no such recipe.
    """
    recipe = load_recipe(name)
    return _write(_of_recipe(recipe), recipe.stages, path)


def _of_recipe(recipe: Recipe) -> Subject:
    return Subject(recipe.title, recipe.stages, recipe.models, recipe.name, recipe.output)


def _write(subject: Subject, stages: Sequence[StageConfig], path: Path) -> Path:
    """Write stages of a subject as a file for ``minitron run``."""
    head = f"# {subject.title}\n#   minitron run {path.name}\n"
    content = pipeline_content(subject.name, subject.output, stages)
    path.write_text(head + yaml.safe_dump(content, sort_keys=False, width=120, allow_unicode=True))
    return path


def trainings_of(subject: Subject) -> tuple[list[Training], list[str]]:
    """The trainings of a subject, in order, and remarks on stages that are not planned.

    Raises:
        ConfigError: with all models whose sizes are not known.
    """
    models: dict[str, Model | None] = {_key(path): model for path, model in subject.models.items()}
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
                if models[_key(config.output)] is None:
                    notes.append(f"{name}: its sizes are those that {config.target.search} finds")
            elif isinstance(config, ReconstructConfig):
                models[_key(config.output)] = _model(config.model, models)
            elif (training := _training(name, config, models)) is not None:
                trainings.append(training)
                notes += _teacher_notes(name, config)
                models[_key(f"{config.output}/model")] = training.student
            elif isinstance(config, AlignConfig):
                notes.append(f"{name}: {config.STAGE} is not planned for")
                models[_key(f"{config.output}/model")] = _model(config.model, models)
        except _LaterError as later:
            notes.append(f"{name}: is not planned, as the sizes of {later} are not known before the search has run")
            models[_key(f"{config.output}/model")] = None
        except MinitronError as error:
            faults += [f"{name}: {fault}" for fault in getattr(error, "faults", [str(error)])]
    if faults:
        raise ConfigError(faults, source=subject.title)
    return trainings, notes


class _LaterError(Exception):
    """The path of a model whose sizes a search has yet to find."""


def _is_training(cls: type[StageConfig]) -> bool:
    return issubclass(cls, DistillConfig | CorrectConfig | SftConfig)


def _training(name: str, config: StageConfig, models: dict[str, Model | None]) -> Training | None:
    """The training of a stage; None if it does not train, or its number of steps is not known beforehand."""
    if not isinstance(config, DistillConfig | CorrectConfig | SftConfig) or config.steps is None:
        return None
    teacher = None
    if isinstance(config, DistillConfig):
        student = _model(config.student, models)
        if config.taught and config.teacher is not None and config.teacher_cache is None:
            teacher = _model(config.teacher, models)
        elif config.taught and config.teachers:
            each = [_model(entry.model, models) for entry in config.teachers]
            teacher = max(each, key=lambda model: model.parameters)
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
        bytes=4 if config.precision == "32" else 2,  # a cluster's GPUs take bfloat16 for auto
        chunked=not isinstance(config, SftConfig) and config.logits == "chunks",
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
    if config.taught and len(config.teachers) > 1:
        notes.append(
            f"{name}: of its {len(config.teachers)} teachers the largest alone is planned; the dry run counts all"
        )
    if config.teacher_correction != CorrectionConfig():
        notes.append(f"{name}: the teacher's own training meanwhile is not counted")
    if config.on_policy.share:
        notes.append(f"{name}: the answers that the student writes (on_policy) are not counted")
    return notes


def _length(config: DistillConfig | CorrectConfig | SftConfig) -> int:
    return config.data.max_length if isinstance(config, SftConfig) else config.data.sequence_length


def _follow_import(config: ImportConfig, models: dict[str, Model | None]) -> None:
    """Give an imported model the sizes of its source, if known; a stage that needs unknown sizes reports them."""
    origin = config.source or config.package or ""
    for path in (origin, config.output):
        try:
            models[_key(config.output)] = _model(path, models)
            return
        except ConfigError:
            continue


def _pruned(config: PruneConfig | IterateConfig, model: Model) -> Model | None:
    """The pruned model; None if a search that has not run finds its sizes."""
    search, dropped = config.target.search, None
    if search is not None and not (Path(search) / FILE_NAME).exists():
        return None
    sizes = target_sizes(config.target)
    if isinstance(config, PruneConfig):
        dropped = config.layers_to_drop
        if config.vocabulary.size is not None:
            sizes["vocab_size"] = config.vocabulary.size
    return Model(target_shape(model.shape, sizes, layers_to_drop=dropped), model.architecture)


def _model(path: str, models: dict[str, Model | None]) -> Model:
    """The sizes of the model at a path.

    Raises:
        _LaterError: if a search has yet to find them.
        ConfigError: if they are not known.
        CheckpointError: if a checkpoint there cannot be read.
    """
    if _key(path) in models:
        if (known := models[_key(path)]) is None:
            raise _LaterError(path)
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
        content: Any = parse_yaml(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return set()
    return set(content) if isinstance(content, dict) else set()
