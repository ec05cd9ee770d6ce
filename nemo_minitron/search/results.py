"""Results of a search: their journal, their Pareto front, and how well two measurements agree in order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.journal import Codec, Journal
from nemo_minitron.search.space import Sizes

__all__ = [
    "FILE_NAME",
    "FINDINGS",
    "JOURNAL_NAME",
    "Result",
    "best_sizes",
    "by_candidate",
    "candidate_journal",
    "kendall_tau",
    "pareto_front",
    "read_search",
    "search_journal",
]

FILE_NAME = "search.json"
JOURNAL_NAME = "candidates.jsonl"
MEASURED_NAME = "measured.jsonl"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Result:
    """The results of one candidate. A value that was not measured is None.

    Attributes:
        sizes: the searched sizes.
        parameters: exact number.
        active_parameters: number of them that a token uses; None for a dense model.
        memory: bytes of the fullest rank, by the memory model.
        prefill, decode: seconds, measured.
        prefill_ratio, decode_ratio: the same divided by those of the unpruned model, measured in turn with it.
        loss: without training, nats per calibration token.
        standard_error: of ``loss``, over blocks.
        distilled_loss: after the short distillation, on the same tokens.
        distill_seconds: wall time of pruning and distillation.
        outside: the budget that a measurement exceeded; None if it is within all budgets.
        accuracy: on the task, without training, 0 to 1.
        distilled_accuracy: on the task after the short distillation.
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
    active_parameters: int | None = None
    accuracy: float | None = None
    distilled_accuracy: float | None = None

    @property
    def name(self) -> str:
        """Name of the candidate."""
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
        """A copy with further values."""
        return replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"name": self.name, "state": self.state, **asdict(self), "sizes": self.sizes._asdict()}


def _finding(values: Any) -> tuple[str, dict[str, Any]]:
    return values["name"], {key: value for key, value in values.items() if key != "name"}


#: A line of the journal of a search: ``{"name": ..., <values>}``, with results of a candidate.
FINDINGS: Codec[tuple[str, dict[str, Any]]] = Codec(
    to_json=lambda finding: {"name": finding[0], **finding[1]}, from_json=_finding
)


def search_journal(output: str | Path, subject: dict[str, Any]) -> Journal[tuple[str, dict[str, Any]]]:
    """The journal of a search: a line with a candidate's name and values for each of its steps.

    Args:
        output: directory of the search; only one process may write its journal at a time.
        subject: JSON values that every result depends on; neither space nor budget, so that a search over a wider space
            reuses the results. :meth:`~nemo_minitron.runtime.journal.Journal.read` refuses a journal with
            another subject.
    """
    path = Path(output) / JOURNAL_NAME
    return Journal(path, {"format_version": FORMAT_VERSION, **subject}, FINDINGS, refuse_other=True)


def candidate_journal(folder: str | Path, subject: dict[str, Any]) -> Journal[tuple[str, dict[str, Any]]]:
    """What was measured of one distilled candidate, until the search takes it into its journal.

    Jobs that measure candidates side by side, on any hosts, write a file each.

    Args:
        folder: of the candidate.
        subject: as for :func:`search_journal`.
    """
    return Journal(Path(folder) / MEASURED_NAME, {"format_version": FORMAT_VERSION, **subject}, FINDINGS)


def by_candidate(findings: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Values by candidate; of two values with the same name, the later counts."""
    merged: dict[str, dict[str, Any]] = {}
    for name, values in findings:
        merged.setdefault(name, {}).update(values)
    return merged


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the ``(cost, loss)`` pairs on the Pareto front, by rising cost.

    A pair is on the front unless another is no worse in both values and better in one; of equal pairs the first counts.
    """
    best, front = float("inf"), []
    for position in sorted(range(len(points)), key=lambda index: (*points[index], index)):
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
    """The content of the file :data:`FILE_NAME` of a search.

    Raises:
        CheckpointError: if it is missing, damaged or of another version.
    """
    path = Path(directory) / FILE_NAME
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        version = content["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no readable result of a search ({error}); run `minitron search`") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format version {version}, this release reads {FORMAT_VERSION}; search again"
        )
    return content


def best_sizes(directory: str | Path) -> dict[str, int]:
    """The sizes of the best shape of a search, by the names of :class:`~nemo_minitron.shape.ModelShape`.

    Raises:
        CheckpointError: as :func:`read_search`, or if its best candidate is not among its results.
    """
    content = read_search(directory)
    try:
        (sizes,) = (entry["sizes"] for entry in content["candidates"] if entry["name"] == content["best"])
        return {name: int(size) for name, size in sizes.items() if size is not None}
    except (KeyError, TypeError, ValueError, AttributeError):
        path = Path(directory) / FILE_NAME
        raise CheckpointError(f"{path}: does not name one of its candidates as the best; search again") from None
