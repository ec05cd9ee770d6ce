"""The checks of ``minitron doctor --run``: what each runs, and how far it may differ from one process on the CPU.

A check is a module of this package with a function ``run(context) -> {quantity: tensor}``, which every rank of the
layout calls. The ranks that hold results return them (whole tensors, on the CPU), the others return nothing. The
reference is computed by the module's function ``reference(context)`` if it has one, otherwise by ``run``: in one
process, on the CPU, in float32. :data:`CHECKS` describes each check; nothing here imports torch before it is needed.

The tests on a GPU call them one by one::

    from nemo_minitron.doctor.checks import CHECKS, Context, compare, measure
    from nemo_minitron.doctor.prove import references

    expected = references(["forward"], folder)      # a process of its own, on the CPU
    actual = measure("forward", Context(material, layout, "bfloat16", scratch))  # in this process, on its device
    for row in compare(CHECKS["forward"], "bfloat16", actual, expected["forward"]):
        assert row.passed, row

With Transformer Engine, set ``NVIDIA_TF32_OVERRIDE=0`` in the environment, as the command does: otherwise its float32
products are computed in TF32.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nemo_minitron.runtime.requirements import faults

if TYPE_CHECKING:
    import torch

    from nemo_minitron.checkpoints.base import Checkpoint
    from nemo_minitron.config import ParallelLayout
    from nemo_minitron.doctor.material import Material
    from nemo_minitron.runtime.groups import Groups

__all__ = ["CHECKS", "Check", "Context", "Quantity", "Row", "compare", "measure", "module_of", "reference_of"]


@dataclass(frozen=True)
class Quantity:
    """One number, or tensor, that a check measures.

    Attributes:
        float32, bfloat16: largest difference that is allowed in each precision, relative to the reference.
        by_norm: the difference is ``|a - b| / |b|`` in the Euclidean norm; otherwise ``max |a - b| / max |b|``.
    """

    float32: float
    bfloat16: float
    by_norm: bool = False

    def tolerance(self, precision: str) -> float:
        """The allowed difference in a precision."""
        return float(getattr(self, precision))


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: of its module and in ``checks=[...]``.
        title: its description in tables.
        group: checks of one group share their processes.
        quantities: what it must return, by name.
        needs: packages beyond torch, transformers and Megatron-core, as keys of
            :data:`nemo_minitron.runtime.requirements.PARTS`; without them the check is not run.
    """

    name: str
    title: str
    group: str
    quantities: Mapping[str, Quantity]
    needs: tuple[str, ...] = ()

    def refuses(self, parallel: ParallelLayout) -> str | None:
        """Why the check cannot run under this layout or with the installed packages; None if it can."""
        if self.name == "sft" and parallel.virtual_pipeline is not None:
            return "NeMo-Aligner has no interleaved pipeline schedule (parallel.virtual_pipeline)"
        return "; ".join(faults({self.title: self.needs})) or None


_LOGITS = Quantity(1e-4, 5e-2)
_SCORE = Quantity(1e-4, 5e-2)
_LOSS = Quantity(1e-4, 2e-2)

CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        Check("allreduce", "all-reduce", "core", {"sum": Quantity(0.0, 0.0)}),
        Check("forward", "forward logits", "core", {"logits": _LOGITS}),
        Check("kl", "KL and its gradient", "core", {"kl": Quantity(1e-5, 1e-2), "gradient": Quantity(1e-5, 1e-2)}),
        Check(
            "score", "scoring", "core", dict.fromkeys(("ffn", "heads", "groups", "hidden", "layers"), _SCORE)
        ),
        Check("prune", "live pruning", "core", {"logits": _LOGITS}),
        Check(
            "convert", "conversion", "core", {"nemo2": _LOGITS, "hf": Quantity(1e-6, 1e-6)}
        ),
        Check(
            "distill",
            "distillation, saved and resumed",
            "distill",
            {
                "kl": _LOSS,
                "grad_norm": Quantity(1e-3, 5e-2),
                "validation_kl": _LOSS,
                "update": Quantity(2e-2, 3e-1, by_norm=True),
            },
            ("nemo", "lightning", "tensorboard"),
        ),
        Check(
            "sft",
            "fine-tuning (SFT)",
            "sft",
            {"loss": _LOSS, "validation_loss": _LOSS, "update": Quantity(2e-2, 3e-1, by_norm=True)},
            ("nemo", "lightning", "tensorboard", "nemo 1", "hydra", "nemo_aligner"),
        ),
    )
}  # fmt: skip
"""By name, in the order in which they run."""


@dataclass
class Context:
    """The input of a check.

    Attributes:
        material: models and tokens; the same on every rank, and for the reference.
        layout: of the processes that run.
        precision: "float32" or "bfloat16".
        scratch: empty directory that all ranks see.
        timeout_minutes: of a collective.
        details: further results of the check, as JSON values.
    """

    material: Material
    layout: ParallelLayout
    precision: str
    scratch: Path
    timeout_minutes: float = 10.0
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        import torch

        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    @property
    def trainer_precision(self) -> str:
        """The precision as trainings name it."""
        return "bf16-mixed" if self.precision == "bfloat16" else "32"

    def groups(self) -> Groups:
        """The process groups, made by the first check of the process."""
        from nemo_minitron.runtime.groups import initialize

        return initialize(self.layout, timeout_minutes=self.timeout_minutes)

    def model(self, checkpoint: Checkpoint, groups: Groups) -> list[Any]:
        """This rank's chunks of a model, filled."""
        from nemo_minitron.checkpoints import load_into
        from nemo_minitron.runtime.model import build_model

        chunks = build_model(checkpoint.shape, checkpoint.architecture, groups, dtype=self.dtype)
        load_into(chunks, checkpoint, groups)
        return chunks


@dataclass(frozen=True)
class Row:
    """One quantity of a check in one precision, against the reference.

    Attributes:
        check, precision, quantity: their names.
        status: "passed", "failed" or "not run".
        difference, tolerance: relative; None where there is nothing to compare.
        seconds: that the check took on its slowest rank, all quantities together.
        reason: why a check failed or was not run.
    """

    check: str
    precision: str
    quantity: str
    status: str
    difference: float | None = None
    tolerance: float | None = None
    seconds: float | None = None
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether the check ran and its difference is within the tolerance."""
        return self.status == "passed"


def module_of(name: str) -> ModuleType:
    """Import the module of a check, with everything that it needs."""
    return importlib.import_module(f"{__name__}.{name}")


def measure(name: str, context: Context) -> dict[str, torch.Tensor]:
    """Run a check on this rank.

    Returns:
        The quantities that this rank holds, on the CPU.
    """
    values: dict[str, torch.Tensor] = module_of(name).run(context)
    return values


def reference_of(name: str, context: Context) -> dict[str, torch.Tensor]:
    """The reference for :func:`measure`, computed in this process: on the CPU, in a layout of one process."""
    module = module_of(name)
    values: dict[str, torch.Tensor] = getattr(module, "reference", module.run)(context)
    return values


def compare(
    check: Check,
    precision: str,
    actual: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    *,
    seconds: float | None = None,
) -> list[Row]:
    """Compare the quantities that a check measured with its reference.

    Args:
        check: the check.
        precision: of ``actual``.
        actual, expected: tensors by quantity.
        seconds: that the check took.

    Returns:
        A row for each quantity of the check. A quantity that is missing, of another shape or not finite has failed.
    """
    rows = []
    for name, quantity in check.quantities.items():
        tolerance = quantity.tolerance(precision)
        difference, reason = None, ""
        if name not in actual or name not in expected:
            reason = f"{'the check' if name not in actual else 'the CPU reference'} has no {name}"
        elif actual[name].shape != expected[name].shape:
            reason = f"has shape {list(actual[name].shape)}, on the CPU {list(expected[name].shape)}"
        else:
            difference = _difference(actual[name], expected[name], by_norm=quantity.by_norm)
            if not math.isfinite(difference):
                reason = "is not finite"
            elif difference > tolerance:
                reason = f"differs from the CPU by {difference:.2g}, {tolerance:.0e} is allowed"
        status = "failed" if reason else "passed"
        if difference is not None and not math.isfinite(difference):
            difference = None
        rows.append(Row(check.name, precision, name, status, difference, tolerance, seconds, reason))
    return rows


def _difference(actual: torch.Tensor, expected: torch.Tensor, *, by_norm: bool) -> float:
    """Relative difference; infinite or NaN where either is."""
    value, reference = actual.double(), expected.double()
    if by_norm:
        apart, scale = (value - reference).norm(), reference.norm()
    else:
        apart, scale = (value - reference).abs().max(), reference.abs().max()
    if float(scale) == 0.0:
        return 0.0 if float(apart) == 0.0 else math.inf
    return float(apart / scale)
