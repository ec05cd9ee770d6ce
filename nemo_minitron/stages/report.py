"""``minitron report``: ``index.html`` and ``report.md`` from the outputs of a run's stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron.config import ReportConfig
from nemo_minitron.jobs.atomic import stage_output
from nemo_minitron.jobs.plans import PlannedPath, StagePlan

__all__ = ["plan", "run"]


def plan(config: ReportConfig) -> StagePlan:
    """What :func:`run` would read and write."""
    names = ("index.html", "report.md")
    # Not among `reads`: in a pipeline that has not run yet, no single stage writes the run's directory.
    runs = [f"{run}{'' if Path(run).is_dir() else ' (not there yet)'}" for run in (config.run, *config.others)]
    return StagePlan(
        "report",
        writes=[PlannedPath(str(Path(config.output) / name), "report") for name in names],
        notes=[f"reads the records of the stages in {', '.join(runs)}"],
    )


def run(config: ReportConfig) -> dict[str, Any]:
    """Write the report. An earlier report is replaced: it can always be made again.

    Returns:
        ``stages``: how many the report shows; ``remarks``: the parts that it had to leave out.

    Raises:
        DataError: if the run directory holds no finished stage.
        ConfigError: if the output exists and is not a report.
    """
    from nemo_minitron.report import write_comparison, write_report

    with stage_output(config.output, overwrite=True) as output:
        if config.others:
            compared = write_comparison([config.run, *config.others], output, title=config.title)
            return {"runs": len(compared.runs), "remarks": [r for run in compared.runs for r in run.remarks]}
        written = write_report(
            config.run,
            output,
            title=config.title,
            base_model=config.base_model,
            license_name=config.license,
            price=config.price_per_gpu_hour,
            currency=config.currency,
        )
    return {"stages": len(written.stages), "remarks": written.remarks}
