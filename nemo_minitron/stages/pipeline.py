"""Run stages one after the other, each in its own processes, leaving out what is already done.

A stage is done when the record of its output was made from the same settings and the same inputs (their records'
hashes). So a pipeline that was stopped, by an error or by a kill, goes on where it was when it is started again, and
one whose settings have changed makes again what depends on them, and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from nemo_minitron.config import PipelineConfig, StageConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.jobs.warm import warm_pool
from nemo_minitron.runtime.files import replace_file
from nemo_minitron.stages.base import human_bytes, read_record
from nemo_minitron.stages.earlier import earlier_outputs, keep, recall, recall_begun, stage_state
from nemo_minitron.stages.execute import run_stage
from nemo_minitron.stages.job import job_folder_of
from nemo_minitron.stages.needs import check_needs

__all__ = ["prepare", "run_pipeline", "show_status", "write_manifest"]

_LINE_ENDS = re.compile(rb"[\r\n]+")
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run_pipeline(
    pipeline: PipelineConfig, stages: list[StageConfig], *, overwrite: bool, console: Console
) -> list[dict[str, Any]]:
    """Run what is not done yet.

    Args:
        pipeline, stages: from :func:`~nemo_minitron.config.load_pipeline`.
        overwrite: replace outputs that were made with other settings, instead of keeping them beside the new ones.
        console: for one line per stage and the closing table.

    Returns:
        The stages' records.

    Raises:
        ConfigError: if another run works here.
        MissingDependency: if a stage that is not done needs a package that is not there; nothing is started.
        MinitronError, StageCrashError: what a stage failed by, with the stage's name; later stages are not started.
    """
    check_needs(config for config in stages if stage_state(config)[0] != "done")
    folder = Path(pipeline.output)
    folder.mkdir(parents=True, exist_ok=True)
    device = "cpu" if all(config.runtime.device == "cpu" for config in stages) else "auto"
    with _locked(folder), warm_pool(device):
        write_manifest(folder, pipeline, stages)
        records, skipped = [], set()
        for number, config in enumerate(stages, 1):
            line = _Line(console, f"[{number}/{len(stages)}] {config.name}")
            state, reasons = stage_state(config)
            todo = prepare(config, overwrite)
            if state in ("changed", "begun"):
                what = "comes back from" if todo is None else "made again for"
                console.print(f"{config.name}: {what} other settings ({'; '.join(reasons)})", markup=False)
            if todo is None:
                record = read_record(config.output)
                skipped.add(config.name)
                line.close("dim", "done before")
            else:
                record = _run(todo, line)
            records.append(record or {})
        _show_summary(console, stages, records, skipped)
    return records


def prepare(config: StageConfig, overwrite: bool = False) -> StageConfig | None:
    """What is to be run of a stage, and room for it. Call it on one rank, right before the stage starts.

    An output of other settings or inputs is kept under its identity (:mod:`nemo_minitron.stages.earlier`), or replaced
    under ``overwrite``; one of just these, kept before, comes back. A stage that leads others keeps what they made:
    they are asked one by one.

    Args:
        config: of the stage.
        overwrite: replace what was made with other settings or inputs, instead of keeping it.

    Returns:
        The configuration to run it with, or None if it is done.
    """
    state, _ = stage_state(config)
    if state == "done" or recall(config):
        return None
    changed = state in ("changed", "begun")
    if changed and not (overwrite or config.overwrite):
        if not (config.LEADS and getattr(config, "resume", False)):
            keep(config)
            recall_begun(config)
        return config
    if changed or (state == "unfinished" and not getattr(config, "resume", False)):
        return dataclasses.replace(config, overwrite=True)
    return config


def show_status(folder: Path, console: Console) -> None:
    """Print how far the pipeline in ``folder`` is.

    Raises:
        ConfigError: if there is none.
    """
    path = folder / "pipeline.json"
    if not path.is_file():
        raise ConfigError(f"{folder}: holds no pipeline (pipeline.json is missing); give the output of `minitron run`")
    manifest = json.loads(path.read_text())
    table = Table(title=f"{manifest['name']}: {folder}", title_justify="left")
    for heading in ("stage", "state", "time", "output"):
        table.add_column(heading, justify="right" if heading == "time" else "left", overflow="fold")
    earlier: list[Path] = []
    for stage in manifest["stages"]:
        record = read_record(stage["output"])
        state = "done" if record else "unfinished" if Path(stage["output"]).exists() else "-"
        table.add_row(stage["name"], state, _clock(record["seconds"]) if record else "", stage["output"])
        earlier += earlier_outputs(stage["output"])
    console.print(table)
    if earlier:
        console.print("Kept of other settings, and used again if they come back:", highlight=False)
        for path in earlier:
            console.print(f"  {path}", markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of the directory while this one lives; the system drops the lock if it is killed."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{folder}: another `minitron run` is at work here; wait for it or stop it") from error
        yield


def write_manifest(folder: Path, pipeline: PipelineConfig, stages: list[StageConfig]) -> None:
    """``pipeline.json``: the stages in order and where each writes; reports and ``minitron status`` read it."""
    manifest = {
        "name": pipeline.name,
        "stages": [{"name": s.name, "stage": s.STAGE, "output": s.output} for s in stages],
        "configs": {s.name: dataclasses.asdict(s) for s in stages},
    }
    replace_file(folder / "pipeline.json", json.dumps(manifest, indent=2, default=str) + "\n")


def _run(config: StageConfig, line: _Line) -> dict[str, Any]:
    """Run one stage under its line; a failure carries the stage's name."""
    try:
        with line:
            record = run_stage(config, line.output)
    except Exception as error:
        line.close("red", "failed")
        error.args = (f"stage {config.name}: {error}",)
        raise
    except KeyboardInterrupt:
        line.close("red", f"interrupted; logs: {job_folder_of(config)}")
        raise
    line.close("green", _figures(record["metrics"]))
    return record


class _Line:
    """One line of a stage: on a terminal a spinner, the time and the last thing that rank 0 printed."""

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name, self.last = console, name, ""
        self.started = time.monotonic()
        self._live: Live | None = None
        self._spinner = Spinner("dots")

    def __enter__(self) -> _Line:
        if self.console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=8, transient=True)
            self._live.start()
        else:
            self.console.print(f"{self.name} ...", highlight=False, markup=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def output(self, data: bytes) -> None:
        """Keep the last line of what came."""
        for piece in reversed(_LINE_ENDS.split(data)):
            if text := _CONTROLS.sub("", piece.decode(errors="replace")).strip():
                self.last = text
                return

    def _render(self) -> Spinner:
        text = Text.assemble((self.name, "bold"), f"  {_clock(time.monotonic() - self.started)}  ", (self.last, "dim"))
        text.truncate(max(20, self.console.width - 4), overflow="ellipsis")
        self._spinner.update(text=text)
        return self._spinner

    def close(self, style: str, note: str) -> None:
        """Print how the stage ended."""
        clock = _clock(time.monotonic() - self.started)
        self.console.print(Text.assemble((self.name, "bold"), f"  {clock}  ", (note, style)))


def _figures(metrics: dict[str, Any]) -> str:
    """The plain numbers among a stage's metrics, on one line."""
    numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return (
        ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v:,}" for k, v in list(numbers.items())[:5])
        or "done"
    )


def _show_summary(
    console: Console, stages: list[StageConfig], records: list[dict[str, Any]], skipped: set[str]
) -> None:
    table = Table(title="Stages", title_justify="left")
    for heading, justify in (
        ("stage", "left"),
        ("", "left"),
        ("time", "right"),
        ("peak memory", "right"),
        ("output", "left"),
    ):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for config, record in zip(stages, records, strict=True):
        peak = record.get("peak_rss_bytes")
        state = "kept" if config.name in skipped else "made"
        table.add_row(config.name, state, _clock(record["seconds"]), human_bytes(peak) if peak else "", config.output)
    new = sum(record["seconds"] for c, record in zip(stages, records, strict=True) if c.name not in skipped)
    table.caption = f"{len(stages) - len(skipped)} made in {_clock(new)}, {len(skipped)} kept"
    console.print(table)


def _clock(seconds: float) -> str:
    """``75`` -> ``1:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
