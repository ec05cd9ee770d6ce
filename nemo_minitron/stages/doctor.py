"""``minitron doctor --run``: check on this machine, in a layout, that the suite computes the same as one CPU process.

Output: ``doctor.json``, with a row for each quantity of each check, bandwidths, and facts of the machine.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

from rich.console import Console

from nemo_minitron.config import DoctorConfig, PipelineConfig, SlurmConfig
from nemo_minitron.errors import FailedChecksError
from nemo_minitron.jobs.atomic import stage_output
from nemo_minitron.jobs.output import Output
from nemo_minitron.jobs.plans import PlannedPath, StagePlan

__all__ = ["plan", "run", "submit_doctor"]


def plan(config: DoctorConfig) -> StagePlan:
    """What :func:`run` would check."""
    from nemo_minitron.doctor.checks import CHECKS

    plan = StagePlan("doctor", writes=[PlannedPath(config.output, "doctor.json")])
    plan.costs["checks"] = ", ".join(CHECKS[name].title for name in config.chosen)
    plan.costs["precision"] = ", ".join(config.precision)
    plan.notes.append("a tiny random model in this layout against one process on the CPU; some minutes")
    for name in config.chosen:
        if (reason := CHECKS[name].refuses(config.parallel)) is not None:
            plan.notes.append(f"{CHECKS[name].title} is not run: {reason}")
    return plan


def run(config: DoctorConfig) -> dict[str, Any]:
    """Run the checks, on every rank; rank 0 compares, prints the tables and writes ``doctor.json``.

    Returns:
        ``passed, not_run, seconds, device``.

    Raises:
        FailedChecksError: if a check has failed; ``doctor.json`` is written before.
    """
    from nemo_minitron.doctor.facts import gather
    from nemo_minitron.doctor.prove import prove
    from nemo_minitron.doctor.show import show_proof

    folder = Output(config).folder
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if "COLUMNS" in os.environ else 120)
    proof = prove(config, folder, say=lambda text: console.print(f"checking: {text}", markup=False, highlight=False))
    if proof is None:
        return {}
    show_proof(proof, config, console)
    content = {
        "version": 1,
        "layout": dataclasses.asdict(config.parallel),
        "precision": config.precision,
        "device": proof.device,
        "passed": not proof.failed,
        "rows": [dataclasses.asdict(row) for row in proof.rows],
        "bandwidth": proof.bandwidth,
        "seconds": proof.seconds,
        "facts": dataclasses.asdict(gather()),
    }
    with stage_output(config.output, overwrite=True) as aside:
        (aside / "doctor.json").write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    if proof.failed:
        names = ", ".join(dict.fromkeys(f"{row.check} ({row.precision})" for row in proof.failed))
        raise FailedChecksError(f"failed on this machine: {names}. See {config.output}/doctor.json; logs: {folder}")
    return {
        "passed": sum(row.passed for row in proof.rows),
        "not_run": sum(row.status == "not run" for row in proof.rows),
        "seconds": proof.seconds,
        "device": proof.device,
    }


def submit_doctor(config: DoctorConfig, slurm: SlurmConfig, *, dry_run: bool, console: Console) -> None:
    """Submit the stage as a pipeline of one stage, or print its script.

    The manifest and nemo_run's records are with the stage's logs; give that directory to ``minitron status``.

    Raises:
        MinitronError: see :func:`~nemo_minitron.jobs.slurm_submit.submit`.
    """
    from nemo_minitron.jobs.slurm_submit import submit

    config = dataclasses.replace(config, name=config.name or config.STAGE)
    pipeline = PipelineConfig(name=config.name, output=str(Output(config).folder))
    submit(pipeline, [config], slurm, overwrite=True, dry_run=dry_run, console=console)
