"""Results of a search: their journal, their order, and which of them none other beats."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError, ConfigError
from nemo_minitron.runtime.files import replace_file
from nemo_minitron.search.space import Sizes

__all__ = ["FILE_NAME", "Journal", "Result", "kendall_tau", "pareto_front", "read_search"]

FILE_NAME = "search.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Result:
    """What is known of one candidate. What was not measured is None.

    Attributes:
        sizes: the searched sizes.
        parameters: exact number.
        memory: bytes of the fullest rank, by the memory model.
        prefill, decode: seconds, measured.
        prefill_ratio, decode_ratio: the same over the unpruned model's, measured in turn with it.
        loss: without training, nats per calibration token.
        standard_error: of ``loss``, over blocks.
        distilled_loss: after the short distillation, on the same tokens.
        distill_seconds: wall time of pruning and distillation.
        outside: the budget that a measurement put the candidate out of; None within all.
    """

    sizes: Sizes
    parameters: int
    memory: int | None = None
    prefill: float | None = None
    decode: float | None = None
    prefill_ratio: float | None = None
    decode_ratio: float | None = None
    loss: float | None = None
    standard_error: float | None = None
    distilled_loss: float | None = None
    distill_seconds: float | None = None
    outside: str | None = None

    @property
    def name(self) -> str:
        """Of the candidate."""
        return self.sizes.name

    @property
    def state(self) -> str:
        """How far the candidate is: "listed", "ranked", "distilled" or "outside"."""
        if self.outside is not None:
            return "outside"
        if self.loss is None:
            return "listed"
        return "ranked" if self.distilled_loss is None else "distilled"

    def with_values(self, **values: Any) -> Result:
        """A copy that knows more."""
        return replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "state": self.state, **asdict(self), "sizes": self.sizes._asdict()}


@dataclass
class Journal:
    """What a search has found so far, a line for each step of a candidate, in a file that outlives the process.

    The first line says what every result depends on. Later lines are ``{"name": ..., <values>}``; of two values of the
    same name the later one holds. The half line of a process that was killed is dropped.

    Attributes:
        path: of the file; only one process may write it at a time.
        subject: JSON values that every result depends on; not the space nor the budget, so that a search over a wider
            space takes up what is there.
    """

    path: Path
    subject: dict[str, Any] = field(repr=False)

    def read(self) -> dict[str, dict[str, Any]]:
        """Values by candidate; the file is left ready for :meth:`append`.

        Raises:
            ConfigError: if the file is of another search.
        """
        head = json.dumps({"format_version": FORMAT_VERSION, **self.subject}, sort_keys=True, default=str)
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.is_file() else []
        if not lines:
            self._write([head.encode()])
            return {}
        if lines[0] != head.encode():
            raise ConfigError(
                f"output: {self.path} holds results made with other settings ({_differences(lines[0], head)}); pass "
                "--overwrite to begin anew, or choose another output"
            )
        found: dict[str, dict[str, Any]] = {}
        whole = lines[:1]
        for line in lines[1:]:
            try:
                values = json.loads(line)
                found.setdefault(values.pop("name"), {}).update(values)
            except (ValueError, KeyError, TypeError, AttributeError):
                break
            whole.append(line)
        if self.path.stat().st_size != sum(len(line) + 1 for line in whole):
            self._write(whole)
        return found

    def append(self, name: str, **values: Any) -> None:
        """Add what was found out about a candidate, and see it onto the disk."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"name": name, **values}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _write(self, lines: Sequence[bytes]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, b"\n".join(lines) + b"\n")


def _differences(before: bytes, now: str) -> str:
    try:
        old = dict(json.loads(before))
    except ValueError:
        return "not a journal of a search"
    new = json.loads(now)
    return ", ".join(sorted(key for key in {*old, *new} if old.get(key) != new.get(key)))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the ``(cost, loss)`` pairs that none other beats, by rising cost.

    One beats another if it is no worse in both and better in one; of equal pairs the first stays.
    """
    best, front = float("inf"), []
    for position in sorted(range(len(points)), key=lambda one: (*points[one], one)):
        if points[position][1] < best:
            best = points[position][1]
            front.append(position)
    return front


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation of two measurements of the same candidates: tau-b (Kendall, 1945), which allows for ties.

    Returns:
        From -1 (order turned around) to 1 (same order); None where there is no order to compare.
    """
    agree = ties_first = ties_second = pairs = 0
    for i in range(len(first)):
        for j in range(i):
            a, b = first[i] - first[j], second[i] - second[j]
            agree += (a > 0) * (b > 0) + (a < 0) * (b < 0) - (a > 0) * (b < 0) - (a < 0) * (b > 0)
            ties_first += a == 0
            ties_second += b == 0
            pairs += 1
    scale = (pairs - ties_first) * (pairs - ties_second)
    return agree / scale**0.5 if scale else None


def read_search(directory: str | Path) -> dict[str, Any]:
    """What a search wrote into :data:`FILE_NAME`.

    Raises:
        CheckpointError: if it is missing, damaged or of another version.
    """
    path = Path(directory) / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no readable result of a search ({error}); run `minitron search`") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format version {version}, this release reads {FORMAT_VERSION}; search again"
        )
    return content
