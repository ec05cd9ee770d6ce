"""What a reconstruction changed, and what it gained on text that it did not see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_minitron.report.run import Run
from nemo_minitron.report.tables import Table

__all__ = ["Reconstruction", "reconstructions"]


@dataclass(frozen=True)
class Reconstruction:
    """One reconstruction.

    Attributes:
        name: of its stage.
        summary: what was changed, in a sentence.
        table: losses by source, before and after; None where nothing was measured.
    """

    name: str
    summary: str
    table: Table | None


def reconstructions(run: Run) -> list[Reconstruction]:
    """Of every ``reconstruct`` stage that wrote what it did."""
    return [Reconstruction(name, _summary(content), _losses(name, content)) for name, content in run.reconstructions]


def _summary(content: dict[str, Any]) -> str:
    layers = content["layers"]
    matrices = [matrix for layer in layers for matrix in layer["matrices"]]
    refitted = sum(matrix["ridge"] is not None for matrix in matrices)
    summary = f"{refitted:,} of {len(matrices):,} matrices and scales were refitted to the teacher by least squares"
    trained = [layer["block"] for layer in layers if layer.get("block")]
    if trained:
        better = sum(block["steps"] > 0 for block in trained)
        summary += f"; gradient steps made {better:,} of {len(trained):,} layers better"
    return summary + "."


def _losses(name: str, content: dict[str, Any]) -> Table | None:
    losses = content.get("losses") or {}
    if not losses:
        return None
    rows = []
    for source, values in losses.items():
        teacher, pruned, after = (values[model] for model in ("teacher", "pruned", "reconstructed"))
        share = f"{(pruned - after) / (pruned - teacher):.0%}" if pruned > teacher else "–"
        seen = "no" if values.get("outside") else "yes"
        numbers = (f"{value:.3f}" for value in (teacher, pruned, after))
        rows.append([source, seen, f"{values['blocks']:,}", *numbers, share])
    headings = ["text", "in the calibration", "blocks", "teacher", "pruned", "reconstructed", "gap closed"]
    return Table(f"Held-out loss before and after {name}, in nats per token", headings, rows, ["" for _ in rows])
