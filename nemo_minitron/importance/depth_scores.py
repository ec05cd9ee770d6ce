"""``depth.json``: measurements of a model without some of its layers; and the journal of a measurement under way."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError, ConfigError, MinitronError, ShapeError
from nemo_minitron.importance.candidates import Candidate
from nemo_minitron.importance.subject import check_subject
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.files import replace_file
from nemo_minitron.runtime.journal import Codec, Journal
from nemo_minitron.shape import ModelShape

__all__ = ["FILE_NAME", "DepthScores", "Measurement", "depth_journal"]

FILE_NAME = "depth.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Measurement:
    """A measurement of the model without some of its layers.

    Attributes:
        loss: nats per calibration token.
        accuracy: on the task; None without a task.
    """

    loss: float
    accuracy: float | None = None


@dataclass(frozen=True)
class DepthScores:
    """The measurements, by the layers that were left out.

    Attributes:
        measured: by candidate; ``()`` is the whole model.
        shape: of the model.
        samples, tokens: of calibration.
        task, questions: name of the task and number of its questions; None without a task.
        fingerprint: of the model's weights, or None where it was not known.
    """

    measured: dict[Candidate, Measurement] = field(repr=False)
    shape: ModelShape
    samples: int
    tokens: int
    task: str | None = None
    questions: int | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if () not in self.measured:
            raise ShapeError("depth scores: the whole model was not measured; run `minitron depth` again")
        for layers, measurement in self.measured.items():
            if list(layers) != sorted(set(layers)) or any(not 0 <= n < self.shape.num_layers for n in layers):
                raise ShapeError(f"depth scores: {list(layers)} are no layers of a model of {self.shape.num_layers}")
            numbers = [measurement.loss, *([] if measurement.accuracy is None else [measurement.accuracy])]
            if not all(math.isfinite(number) for number in numbers):
                raise ShapeError(f"depth scores: {numbers} without layers {list(layers)} is not finite")
            if (measurement.accuracy is None) != (self.task is None):
                raise ShapeError(f"depth scores: without layers {list(layers)} the task was not measured, or none is")

    def costs(self, criterion: str) -> dict[Candidate, tuple[float, ...]]:
        """The cost of leaving layers out: by "loss" the increase of the loss, by "task" the decrease of the accuracy.

        Lower is better. Accuracy is coarse; between equal accuracies the loss decides.

        Raises:
            ConfigError: for a criterion that was not measured.
        """
        whole = self.measured[()]
        if criterion == "loss":
            return {layers: (measurement.loss - whole.loss,) for layers, measurement in self.measured.items() if layers}
        if criterion != "task":
            raise ConfigError(f"criterion={criterion!r}: must be loss or task")
        if whole.accuracy is None:
            raise ConfigError(
                "criterion=task: no task was measured; run `minitron depth` with task.path or task.builtin"
            )
        return {
            layers: (whole.accuracy - measurement.accuracy, measurement.loss - whole.loss)
            for layers, measurement in self.measured.items()
            if layers and measurement.accuracy is not None
        }

    def check(self, shape: ModelShape, model_fingerprint: str | None, *, where: str) -> None:
        """Make sure that these are measurements of a given model.

        Raises:
            ShapeError: if the sizes differ.
            CheckpointError: if the weights differ.
        """
        check_subject(
            (self.shape, self.fingerprint),
            (shape, model_fingerprint),
            where=where,
            remedy="run `minitron depth` on this model first",
        )

    def save(self, directory: str | Path) -> None:
        """Write :data:`FILE_NAME` into a directory, whole or not at all."""
        path = Path(directory) / FILE_NAME
        content = {
            "format_version": FORMAT_VERSION,
            "shape": self.shape.to_dict(),
            "fingerprint": self.fingerprint,
            "samples": self.samples,
            "tokens": self.tokens,
            "task": self.task,
            "questions": self.questions,
            "baseline": _values(self.measured[()]),
            "candidates": [
                {"layers": layers, **_values(measurement)}
                for layers, measurement in sorted(self.measured.items())
                if layers
            ],
        }
        replace_file(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> DepthScores:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: if it is missing, damaged, of another version, or contradicts itself.
        """
        path = Path(directory) / FILE_NAME
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            version = content["format_version"]
            if version != FORMAT_VERSION:
                raise CheckpointError(
                    f"{path}: has format version {version}, this release reads {FORMAT_VERSION}; measure again"
                )
            rows = [{"layers": [], **content["baseline"]}, *content["candidates"]]
            return cls(
                measured=dict(_measurement(row) for row in rows),
                shape=ModelShape.from_dict(content["shape"]),
                **{name: content[name] for name in ("samples", "tokens", "task", "questions", "fingerprint")},
            )
        except FileNotFoundError:
            raise CheckpointError(f"{path.parent}: no depth scores there; run `minitron depth`") from None
        except CheckpointError:
            raise
        except MinitronError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: is not readable ({error}); run `minitron depth` again") from None


def _values(measurement: Measurement) -> dict[str, float]:
    return {"loss": measurement.loss, **({} if measurement.accuracy is None else {"accuracy": measurement.accuracy})}


def _measurement(row: dict[str, Any]) -> tuple[Candidate, Measurement]:
    return tuple(row["layers"]), Measurement(float(row["loss"]), row.get("accuracy"))


#: A line of a journal: ``{"layers": [...], "loss": ...}`` and, where there is a task, ``"accuracy"``.
_CODEC: Codec[tuple[Candidate, Measurement]] = Codec(
    to_json=lambda entry: {"layers": list(entry[0]), **_values(entry[1])}, from_json=_measurement
)


def depth_journal(path: str | Path, subject: dict[str, Any]) -> Journal[tuple[Candidate, Measurement]]:
    """The journal of a measurement under way: candidates with their measurements, the whole model first.

    Args:
        path: of the file; only one process may use it.
        subject: JSON values that every measurement depends on. A journal with other values is begun anew.
    """
    return Journal(path, {"format_version": FORMAT_VERSION, **subject}, _CODEC)
