"""The contents of a run directory, read from the files that the stages wrote. Nothing else is computed.

If a file is missing, its part of the report is left out. A file that exists but cannot be read is listed in
:attr:`Run.remarks`, so that no gap goes unnoticed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.formats import detect
from nemo_minitron.config import STAGES, StageConfig
from nemo_minitron.errors import DataError, MinitronError
from nemo_minitron.jobs import skipped
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.files import is_earlier
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Curve", "Model", "Run", "ScoreSet", "StageRun", "collect", "stage_of"]

#: What a model is to the run; it decides names and colours.
ROLES = ("teacher", "pruned", "random", "distilled", "other")


@dataclass(frozen=True)
class Part:
    """A checkpoint inside a stage's output: its name, format and size in bytes."""

    name: str
    kind: str
    size: int


@dataclass(frozen=True)
class StageRun:
    """One finished stage.

    Attributes:
        name, stage: from its record.
        path: its output.
        size: of the output, in bytes.
        record: the whole record.
    """

    name: str
    stage: str
    path: Path
    size: int
    record: dict[str, Any]

    @property
    def seconds(self) -> float:
        """Wall time."""
        return float(self.record["seconds"])

    @property
    def peak_rss(self) -> int | None:
        """Largest resident size of any of its processes, in bytes."""
        return self.record.get("peak_rss_bytes")

    @property
    def config(self) -> dict[str, Any]:
        """Its resolved configuration."""
        return self.record["config"]

    def parts(self) -> list[Part]:
        """The checkpoints directly inside its output."""
        parts = []
        for path in sorted(self.path.iterdir()) if self.path.is_dir() else []:
            entry = detect(path)
            if entry is not None and entry.write is not None:
                parts.append(Part(path.name, entry.title, _size(path)))
        return parts


@dataclass(frozen=True)
class Model:
    """A checkpoint of the run.

    Attributes:
        name: of its stage.
        role: one of :data:`ROLES`.
        shape, parameters: its sizes.
        kept: the units that a pruned model kept, as ``axes.KeptUnits`` names them, by index in the unpruned model;
            None where that is not recorded.
    """

    name: str
    role: str
    shape: ModelShape
    parameters: int
    kept: dict[str, Any] | None = None


@dataclass(frozen=True)
class ScoreSet:
    """Scores of one ``score`` stage: arrays ``ffn [L, F]`` or ``[L, E, F]``, ``heads [L, A]``, ..."""

    name: str
    arrays: dict[str, np.ndarray]
    info: dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """Metrics of one ``distill`` or ``correct`` stage, a dictionary a line."""

    name: str
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]


@dataclass
class Run:
    """Everything that the report shows."""

    path: Path
    name: str
    stages: list[StageRun] = field(default_factory=list)
    models: list[Model] = field(default_factory=list)
    scores: list[ScoreSet] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    evaluations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    roles: dict[str, str] = field(default_factory=dict)
    origins: dict[str, dict[str, Any]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def kept(self) -> dict[str, Any] | None:
        """The units that the first scored pruning kept."""
        return next((model.kept for model in self.models if model.role == "pruned" and model.kept is not None), None)

    @property
    def teacher(self) -> Model | None:
        """The unpruned model."""
        return next((model for model in self.models if model.role == "teacher"), None)

    @property
    def small(self) -> Model | None:
        """The last model that was made smaller; a distilled model is preferred."""
        return next((m for role in ("distilled", "pruned") for m in reversed(self.models) if m.role == role), None)

    @property
    def trained_tokens(self) -> int:
        """Tokens of all trainings together."""
        return sum(curve.train[-1].get("tokens", 0) for curve in self.curves if curve.train)


def collect(directory: str | Path) -> Run:
    """Read a run directory.

    Raises:
        DataError: if it is not a directory, or holds no finished stage.
    """
    path = Path(directory)
    if not path.is_dir():
        raise DataError(f"{path}: no such run directory; give the output of `minitron run`")
    run = Run(path, path.resolve().name)
    manifest = _json(path / "pipeline.json", run)
    if isinstance(manifest, dict) and isinstance(manifest.get("name"), str):
        run.name = manifest["name"]
    run.stages = _stages(path, run)
    if not run.stages:
        raise DataError(f"{path}: holds no finished stage (no record.json); run the stages first")
    for stage in run.stages:
        reader = {"score": _scores, "correct": _curve, "distill": _curve, "evaluate": _evaluation}.get(stage.stage)
        if reader is not None:
            reader(stage, run)
        if _config_class(stage).MAKES_MODEL:
            _model(stage, run)
    for _, evaluation in run.evaluations:
        for name, model in evaluation["models"].items():
            origin = stage_of(model["path"], run)
            run.roles.setdefault(name, "other" if origin is None else _role(origin))
            if origin is not None:
                run.origins.setdefault(name, origin.config)
    return run


def _stages(path: Path, run: Run) -> list[StageRun]:
    stages = []
    for file in [*path.glob("*/record.json"), *path.glob("*.nemo.record.json")]:
        record = _json(file, run)
        if record is None:
            continue
        output = file.parent if file.name == "record.json" else file.with_name(file.name.removesuffix(".record.json"))
        if is_earlier(output):
            continue
        try:
            stage = StageRun(record["name"], record["stage"], output, _size(output), record)
            _ = (float(stage.seconds), stage.config["output"])
        except (KeyError, TypeError, ValueError) as error:
            run.remarks.append(f"{file.relative_to(path)} is not a record of a stage ({error!r}); left out")
            continue
        if stage.stage != "report":
            stages.append(stage)
        metrics = record.get("metrics")
        if isinstance(metrics, dict) and (count := metrics.get(skipped.METRIC)):
            where = skipped.skipped_path(output).relative_to(path)
            run.remarks.append(f"{stage.name} left out {count} bad records of its data, which {where} lists")
    return sorted(stages, key=lambda stage: (str(stage.record.get("started") or ""), stage.name))


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _json(path: Path, run: Run) -> Any:
    """Content of a JSON file; None, with a remark, where it cannot be read."""
    if not path.is_file():
        return None
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        run.remarks.append(f"{path.relative_to(run.path)} cannot be read ({error}); left out")
        return None


def stage_of(path: str, run: Run) -> StageRun | None:
    """The stage that wrote ``path``: its output is the path or contains it.

    Both paths are compared as they were recorded, so this works for a run that was moved since.
    """
    place = Path(path).absolute()
    return next((s for s in run.stages if place.is_relative_to(Path(s.config["output"]).absolute())), None)


def _config_class(stage: StageRun) -> type[StageConfig]:
    """The class of a stage's configuration; the base class if the package of that stage is not installed."""
    return STAGES.get(stage.stage, StageConfig)


def _role(stage: StageRun) -> str:
    if stage.stage == "prune" and stage.config.get("method") == "random":
        return "random"
    return _config_class(stage).ROLE


def _model(stage: StageRun, run: Run) -> None:
    for place in (stage.path / "minitron.json", stage.path / "model" / "minitron.json"):
        content = _json(place, run)
        if content is None:
            continue
        try:
            shape = ModelShape.from_dict(content["shape"])
            table = axes.family(Architecture(**content["architecture"]).family)
        except (KeyError, TypeError, MinitronError) as error:
            run.remarks.append(f"{place.relative_to(run.path)} is not a model record ({error!r}); left out")
            continue
        run.models.append(Model(stage.name, _role(stage), shape, axes.parameter_count(table, shape), _kept(stage, run)))
        return


def _kept(stage: StageRun, run: Run) -> dict[str, Any] | None:
    """The kept units in a pruning's ``kept.json``."""
    content = _json(stage.path / "kept.json", run)
    if content is None:
        return None
    try:
        kept = content["kept"]
        _ = [len(kept[name]) for name in ("layers", "hidden", "ffn", "groups", "heads")]
    except (KeyError, TypeError) as error:
        run.remarks.append(f"the kept units of {stage.name} cannot be understood ({error!r}); left out")
        return None
    return kept


def _scores(stage: StageRun, run: Run) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(stage.path / "scores.safetensors")
    except (OSError, SafetensorError) as error:
        run.remarks.append(f"the scores of {stage.name} cannot be read ({error}); left out")
        return
    run.scores.append(ScoreSet(stage.name, arrays, _json(stage.path / "scores.json", run) or {}))


def _curve(stage: StageRun, run: Run) -> None:
    path = stage.path / "metrics.jsonl"
    if not path.is_file():
        run.remarks.append(f"{stage.name} left no metrics.jsonl; its curves are left out")
        return
    train: list[dict[str, Any]] = []
    validation: list[dict[str, Any]] = []
    bad = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = parse_json(line)
            (validation if row.get("split") == "validation" else train).append(row)
        except (ValueError, AttributeError):
            bad += 1
    if bad:
        run.remarks.append(f"{path.relative_to(run.path)}: {bad} unreadable lines are left out")
    if train or validation:
        run.curves.append(Curve(stage.name, train, validation))


def _evaluation(stage: StageRun, run: Run) -> None:
    content = _json(stage.path / "evaluation.json", run)
    try:
        if content is not None and all(math.isfinite(model["loss"]) for model in content["models"].values()):
            run.evaluations.append((stage.name, content))
    except (KeyError, TypeError, AttributeError) as error:
        run.remarks.append(f"the evaluation of {stage.name} is incomplete ({error!r}); left out")
