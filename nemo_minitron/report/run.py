"""What a report is about: the finished stages of a run, and what they left."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.formats import FORMATS, detect
from nemo_minitron.config import STAGES, StageConfig
from nemo_minitron.runtime.files import size_of
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ROLES", "Curve", "Model", "Part", "Run", "ScoreSet", "StageRun", "stage_of"]

#: What a model is to the run; it decides names and colours.
ROLES = ("teacher", "pruned", "random", "reconstructed", "distilled", "aligned", "other")


@dataclass(frozen=True)
class Part:
    """A checkpoint inside a stage's output.

    Attributes:
        name, kind, size: its path there, its format and its size in bytes.
        weight_error: root mean square of what its matrices lose, relative to the model's; None where that is not known.
    """

    name: str
    kind: str
    size: int
    weight_error: float | None = None


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

    @property
    def kind(self) -> type[StageConfig]:
        """The class of its configuration; the base class if the package of that stage is not installed."""
        return STAGES.get(self.stage, StageConfig)

    @property
    def metrics(self) -> dict[str, Any]:
        """What it returned."""
        metrics = self.record.get("metrics")
        return metrics if isinstance(metrics, dict) else {}

    @property
    def parents(self) -> dict[str, str]:
        """Path of each thing that it read, by setting."""
        parents = self.record.get("parents")
        entries = parents.items() if isinstance(parents, dict) else ()
        return {name: str(entry["path"]) for name, entry in entries if isinstance(entry, dict) and "path" in entry}

    def parts(self) -> list[Part]:
        """The checkpoints directly inside its output."""
        parts = []
        for path in sorted(self.path.iterdir()) if self.path.is_dir() else []:
            entry = detect(path)
            if entry is not None and entry.write is not None:
                parts.append(Part(path.name, entry.title, size_of(path)))
        for name, form in (self.metrics.get("formats") or {}).items():
            for kind, file in (form.get("files") or {}).items():  # of a format that is a file for each kind of numbers
                title = f"{FORMATS[name].title} {kind}" if name in FORMATS else kind
                lost = file.get("weight_error")
                parts.append(Part(f"{Path(form['path']).name}/{file['file']}", title, file["bytes"], lost))
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
        path: of the checkpoint; None where there is none on disk.
        lineage: what it was made from, as its ``minitron.json`` says.
    """

    name: str
    role: str
    shape: ModelShape
    parameters: int
    kept: dict[str, Any] | None = None
    path: Path | None = None
    lineage: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoreSet:
    """Scores of one ``score`` stage: arrays ``ffn [L, F]`` or ``[L, E, F]``, ``heads [L, A]``, ..."""

    name: str
    arrays: dict[str, np.ndarray]
    info: dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """Metrics of one training, a dictionary a line."""

    name: str
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]


@dataclass
class Run:
    """Everything that the report shows.

    Attributes:
        path, name: of the run directory.
        stages: finished stages, in the order in which they started.
        models, scores, curves, alignments: what they left; the curves of trainings on text, and of alignments.
        evaluations, searches, servings, reconstructions: the content of ``evaluation.json``, of ``search.json``, of
            ``benchmark.json`` and of ``reconstruction.json``, with the stage's name.
        roles: of the models of the evaluations and benchmarks, by their names there.
        origins: the stages that made them; only of those that a stage of the run made.
        remarks: what was left out, and why.
    """

    path: Path
    name: str
    stages: list[StageRun] = field(default_factory=list)
    models: list[Model] = field(default_factory=list)
    scores: list[ScoreSet] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    alignments: list[Curve] = field(default_factory=list)
    evaluations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    searches: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    servings: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    reconstructions: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    roles: dict[str, str] = field(default_factory=dict)
    origins: dict[str, StageRun] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def teacher(self) -> Model | None:
        """The unpruned model."""
        return next((model for model in self.models if model.role == "teacher"), None)

    @property
    def result(self) -> Model | None:
        """The model that the run was for.

        That is the one that was exported last; without an export the last one that was aligned, or distilled, or
        reconstructed, or pruned. None in a run that changed no model.
        """
        for stage in reversed(self.stages):
            made = stage_of(str(stage.config.get("model")), self) if stage.stage == "export" else None
            model = self.model_of(made) if made is not None else None
            if model is not None and model.role != "teacher":
                return model
        roles = ("aligned", "distilled", "reconstructed", "pruned")
        return next((model for role in roles for model in reversed(self.models) if model.role == role), None)

    @property
    def trained_tokens(self) -> int:
        """Tokens of all trainings on text together."""
        return sum(int(curve.train[-1].get("tokens") or 0) for curve in self.curves if curve.train)

    def model_of(self, stage: StageRun) -> Model | None:
        """The model that a stage made."""
        return next((model for model in self.models if model.name == stage.name), None)

    def measured(self, stage: StageRun, evaluation: dict[str, Any]) -> list[str]:
        """Names under which an evaluation measured the model that a stage made, or an export of it."""
        names = []
        for name, model in evaluation["models"].items():
            origin = stage_of(model["path"], self)
            if origin is not None and origin.stage == "export" and origin is not stage:
                origin = stage_of(str(origin.config.get("model")), self)
            if origin is stage:
                names.append(name)
        return names


def stage_of(path: str, run: Run) -> StageRun | None:
    """The stage that wrote ``path``: its output is the path or contains it.

    Both paths are compared as they were recorded, so this works for a run that was moved since.
    """
    place = Path(path).absolute()
    return next((s for s in run.stages if place.is_relative_to(Path(s.config["output"]).absolute())), None)
