"""Run the checks in the layout, and the reference beside them; checks that fail do not stop the others.

Every rank of the stage calls :func:`prove`. It leads one child process at a time, for a group of checks each
(:mod:`~nemo_minitron.doctor.lead`). A check that raises, crashes or hangs ends the children of that attempt and is
noted as failed; new children run the remaining checks. Rank 0 also leads the reference, one process on the CPU, and
compares.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import DoctorConfig
from nemo_minitron.doctor.checks import CHECKS, Row, compare
from nemo_minitron.doctor.lead import POLL, Case, Leader, Outcome
from nemo_minitron.doctor.ranks import alone, of_environment

if TYPE_CHECKING:
    import torch

__all__ = ["Proof", "prove", "references"]


@dataclass
class Proof:
    """The result of :func:`prove`.

    Attributes:
        rows: a row for each quantity of each check in each precision.
        bandwidth: of all-reduces: ``group, ranks, bytes, precision, seconds, bus_gb_per_s``.
        device: of the models, as torch names it.
        seconds: in all.
    """

    rows: list[Row]
    bandwidth: list[dict[str, Any]]
    device: str
    seconds: float

    @property
    def failed(self) -> list[Row]:
        """Rows of failed checks."""
        return [row for row in self.rows if row.status == "failed"]


def prove(config: DoctorConfig, folder: Path, *, say: Callable[[str], None] = print) -> Proof | None:
    """Run the checks. Every rank calls it.

    Args:
        config: of the stage.
        folder: visible to all ranks; gets the children's logs, and ``work/``, which is removed at the end.
        say: called on rank 0 with a line about the progress.

    Returns:
        The result, on rank 0; None elsewhere.
    """
    started = time.monotonic()
    ranks = of_environment(config.runtime.collective_timeout_minutes)
    patience = 60 * (config.minutes + 5)
    work = folder / "work"
    if ranks.is_main:
        shutil.rmtree(work, ignore_errors=True)
        for old in folder.glob("check-*.log"):
            old.unlink()
        _make_material(config, work / "material")
        ranks.publish("material", True)
    ranks.wait("material", patience)
    cases, skipped = _cases(config)
    leader = Leader(config, folder, work, ranks, patience, say if ranks.is_main else _silent)
    outcomes: dict[Case, Outcome] = {}
    reference = _Reference(config, folder, work, sorted({check for check, _ in cases}, key=list(CHECKS).index))
    for number, group in enumerate(dict.fromkeys(CHECKS[check].group for check, _ in cases)):
        outcomes |= leader.run(group, [case for case in cases if CHECKS[case[0]].group == group])
        if ranks.is_main and number == 0:
            reference.start()  # not beside the first group, whose bandwidth it would take
    ranks.leave(seconds=30)
    if not ranks.is_main:
        return None
    say("the rest of the same in one process on the CPU")
    expected, missing = reference.result()
    rows = skipped
    for case in cases:
        rows += _rows(case, outcomes[case], work / "values", ranks.world, expected, missing)
    rows.sort(key=lambda row: list(CHECKS).index(row.check))
    bandwidth = [
        {**measured, "precision": precision}
        for (_, precision), outcome in outcomes.items()
        for measured in outcome.details.get("bandwidth", [])
    ]
    device = next((o.details["device"] for o in outcomes.values() if "device" in o.details), "")
    shutil.rmtree(work, ignore_errors=True)
    return Proof(rows, bandwidth, device, time.monotonic() - started)


def references(checks: Sequence[str], folder: Path, config: DoctorConfig | None = None) -> dict[str, dict[str, Any]]:
    """The reference values of checks, computed by one process on the CPU, in a layout of one process.

    Args:
        checks: names.
        folder: gets ``material/``, unless it is there, logs and values.
        config: gives the layout of the material; None for a layout of one process.

    Returns:
        Tensors of each check by quantity.

    Raises:
        RuntimeError: with the reason, if a reference could not be computed.
    """
    config = config or DoctorConfig()
    if not (folder / "material").exists():
        _make_material(config, folder / "material")
    reference = _Reference(config, folder, folder, list(checks))
    reference.start()
    expected, missing = reference.result()
    if missing:
        raise RuntimeError("; ".join(f"{check}: {reason}" for check, reason in missing.items()))
    return expected


def _make_material(config: DoctorConfig, folder: Path) -> None:
    from nemo_minitron.doctor.material import make_material

    make_material(folder, config.parallel)


def _cases(config: DoctorConfig) -> tuple[list[Case], list[Row]]:
    """The cases to run, and rows for checks that cannot run."""
    cases: list[Case] = []
    skipped: list[Row] = []
    for name in config.chosen:
        check = CHECKS[name]
        reason = check.refuses(config.parallel)
        for precision in config.precision:
            if reason is None:
                cases.append((name, precision))
            else:
                skipped.append(Row(name, precision, "", "not run", reason=reason))
    return cases, skipped


class _Reference:
    """The reference of all checks, made by a thread of rank 0 that leads one process on the CPU."""

    def __init__(self, config: DoctorConfig, folder: Path, work: Path, checks: list[str]) -> None:
        self._cases = [(check, "float32") for check in checks]
        own = work / "reference"
        self._leader = Leader(config, folder, own, alone(), 60.0, _silent, reference=True)
        self._material = work / "material"
        self._outcomes: dict[Case, Outcome] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: BaseException | None = None

    def start(self) -> None:
        """Start the thread."""
        self._leader.work.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (self._leader.work / "material").symlink_to(self._material.absolute())
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcomes = self._leader.run("reference", self._cases)
        except BaseException as error:
            self._error = error

    def result(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
        """Wait for the thread. Returns tensors by check and quantity, and the reasons for missing tensors."""
        if self._thread.ident is not None:  # there may be nothing to check
            self._thread.join()
        if self._error is not None:
            raise self._error
        values: dict[str, dict[str, torch.Tensor]] = {}
        missing: dict[str, str] = {}
        for case, outcome in self._outcomes.items():
            if outcome.reason:
                missing[case[0]] = outcome.reason
            else:
                values[case[0]] = _values(self._leader.work / "values", case, 1)
        return values, missing


def _rows(
    case: Case,
    outcome: Outcome,
    values: Path,
    world: int,
    expected: dict[str, dict[str, torch.Tensor]],
    missing: dict[str, str],
) -> list[Row]:
    name, precision = case
    reason = outcome.reason
    if not reason and name not in expected:
        reason = f"there is no CPU reference: {missing.get(name, 'it was not made')}"
    if reason:
        return [Row(name, precision, "", "failed", seconds=outcome.seconds, reason=reason)]
    measured = _values(values, case, world)
    return compare(CHECKS[name], precision, measured, expected[name], seconds=outcome.seconds)


def _values(folder: Path, case: Case, world: int, *, patience: float = 30.0) -> dict[str, torch.Tensor]:
    """The measured values of all ranks, merged."""
    from safetensors.torch import load_file

    values_by_name: dict[str, torch.Tensor] = {}
    deadline = time.monotonic() + patience  # a shared disk may show another node's file a little later
    for rank in range(world):
        path = folder / f"{case[0]}-{case[1]}.rank-{rank}.safetensors"
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(POLL)
        values_by_name |= load_file(path)
    return values_by_name


def _silent(text: str) -> None:
    del text
