"""The inputs of each stage, from its record."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.report.run import Run, stage_of
from nemo_minitron.report.tables import Table

__all__ = ["lineage_table"]


def lineage_table(run: Run) -> Table:
    """Stage, identity, and the identity of everything that it read.

    An identity is the hash of a stage's settings and of the identities of its inputs: two outputs with the same
    identity were made with the same settings from the same inputs.
    """
    rows = []
    for stage in run.stages:
        parents = stage.record.get("parents") or {}
        origins = [f"{field}: {_name(parent['path'], run)} {parent['hash'][:12]}" for field, parent in parents.items()]
        rows.append([stage.name, stage.stage, str(stage.record.get("hash", ""))[:12], "; ".join(origins) or "–"])
    return Table("What each stage was made from", ["stage", "kind", "identity", "made from"], rows, ["" for _ in rows])


def _name(path: str, run: Run) -> str:
    """The stage that wrote ``path`` and the part of its output, or the path's last component."""
    place, owner = Path(path).absolute(), stage_of(path, run)
    if owner is None:
        return place.name
    part = place.relative_to(Path(owner.config["output"]).absolute())
    return owner.name if str(part) == "." else f"{owner.name}/{part}"
