"""Run stages one after the other, each in its own processes, leaving out what is already done.

A stage is done when the record of its output was made from the same settings and the same inputs (their records'
hashes). So a pipeline that was stopped, by an error or by a kill, goes on where it was when it is started again. After
a change of settings, only the stages that depend on them run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from nemo_minitron.config import PipelineConfig, StageConfig
from nemo_minitron.jobs.contents import results_of
from nemo_minitron.jobs.dry_run import check_pipeline_space
from nemo_minitron.jobs.lease import leased
from nemo_minitron.jobs.local import run_output
from nemo_minitron.jobs.manifest import check_manifest, write_manifest
from nemo_minitron.jobs.needs import check_needs
from nemo_minitron.jobs.output import Output
from nemo_minitron.jobs.warm import warm_pool

__all__ = ["Display", "StageLine", "run_pipeline"]


class StageLine(Protocol):
    """The line of a stage on the display; entered while the stage runs."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *_: object) -> None: ...

    def output(self, data: bytes) -> None:
        """Called with the ``data`` that rank 0 printed."""

    def made(self, record: dict[str, Any]) -> None:
        """The stage ended well."""

    def kept(self) -> None:
        """The stage was done before."""

    def failed(self) -> None:
        """The stage refused its settings or inputs, or crashed."""

    def interrupted(self, logs: Path) -> None:
        """The user stopped the stage."""


class Display(Protocol):
    """Shows a pipeline that runs (:class:`nemo_minitron.cli.progress.ConsoleDisplay`)."""

    def stage(self, number: int, count: int, name: str) -> StageLine:
        """The line of a stage."""

    def note(self, text: str) -> None:
        """A remark between stages."""

    def summary(self, stages: Sequence[StageConfig], records: Sequence[dict[str, Any]], skipped: set[str]) -> None:
        """All stages, at the end; ``skipped`` names those that were done before."""


def run_pipeline(
    pipeline: PipelineConfig, stages: list[StageConfig], *, overwrite: bool, display: Display
) -> list[dict[str, Any]]:
    """Run the stages that are not done.

    Args:
        pipeline, stages: from :func:`~nemo_minitron.config.load_pipeline`.
        overwrite: replace outputs that were made with other settings, instead of archiving them.
        display: one line per stage, and the closing table.

    Returns:
        The stages' records.

    Raises:
        ConfigError: if another run uses the directory, or another program's ``pipeline.json`` is in it.
        DiskError: if the stages that are not done cannot fit on the disk; nothing is started.
        MissingDependency: if a stage that is not done needs a package that is not installed; nothing is started.
        MinitronError, StageCrashError: the failure of a stage, with its name; later stages are not started.
    """
    check_needs(config for config in stages if Output(config).state()[0] != "done")
    folder = Path(pipeline.output)
    damage = check_manifest(folder)
    check_pipeline_space(stages)
    folder.mkdir(parents=True, exist_ok=True)
    device = "cpu" if all(config.runtime.device == "cpu" for config in stages) else "auto"
    with leased(folder / ".lease", str(folder), "minitron run"), warm_pool(device):
        if damage is not None:
            display.note(f"{damage}; it is written anew")
        write_manifest(folder, pipeline, stages)
        records, skipped = [], set()
        remade: list[Path] = []  # outputs whose content is no longer what later stages were made from
        for number, config in enumerate(stages, 1):
            line = display.stage(number, len(stages), config.name)
            output = Output(config)
            stale = _reads(config, remade)
            if not stale and (record := output.done_record()) is not None:
                skipped.add(config.name)
                line.kept()
                records.append(record)
                continue
            with output.leased():
                (state, reasons), again = output.state(), output.is_stale()
                damaged = output.record() if state == "damaged" else None
                todo = output.replaced_by(overwrite=True) if stale else output.prepare(overwrite=overwrite)
                if state in ("changed", "begun") and again:
                    display.note(f"{config.name}: made again, as {'; '.join(reasons)}")
                elif state in ("changed", "begun"):
                    what = "comes back from" if todo is None else "made again for"
                    display.note(f"{config.name}: {what} other settings ({'; '.join(reasons)})")
                elif state == "damaged":
                    display.note(f"{config.name}: made again, as {'; '.join(reasons)}")
                if todo is None:
                    record = output.record()
                    skipped.add(config.name)
                    line.kept()
                else:
                    record = _run(todo, line)
                    if stale or (damaged is not None and results_of(record["files"]) != results_of(damaged["files"])):
                        remade.append(output.path.absolute())
            records.append(record or {})
        display.summary(stages, records, skipped)
    return records


def _reads(config: StageConfig, outputs: Sequence[Path]) -> bool:
    """Whether a stage reads one of these outputs, a part of it, or a directory that holds it."""
    inputs = [Path(path).absolute() for path in config.inputs().values()]
    return any(path.is_relative_to(output) or output.is_relative_to(path) for path in inputs for output in outputs)


def _run(output: Output, line: StageLine) -> dict[str, Any]:
    """Run one stage under its line; a failure carries the stage's name."""
    try:
        with line:
            record = run_output(output, line.output)
    except Exception as error:
        line.failed()
        error.args = (f"stage {output.config.name}: {error}",)
        raise
    except KeyboardInterrupt:
        line.interrupted(output.folder)
        raise
    line.made(record)
    return record
