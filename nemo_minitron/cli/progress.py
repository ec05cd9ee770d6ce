"""Show a pipeline that runs: a line for each stage, and a table at its end."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from nemo_minitron.config import StageConfig
from nemo_minitron.jobs.plans import human_bytes

__all__ = ["ConsoleDisplay", "elapsed"]

_LINE_ENDS = re.compile(rb"[\r\n]+")
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class ConsoleDisplay:
    """A :class:`~nemo_minitron.jobs.pipeline.Display` on a console."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def stage(self, number: int, count: int, name: str) -> _Line:
        """The line of a stage."""
        return _Line(self._console, f"[{number}/{count}] {name}")

    def note(self, text: str) -> None:
        """A remark between stages."""
        self._console.print(text, markup=False)

    def summary(self, stages: Sequence[StageConfig], records: Sequence[dict[str, Any]], skipped: set[str]) -> None:
        """The closing table."""
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
            table.add_row(
                config.name, state, elapsed(record["seconds"]), human_bytes(peak) if peak else "", config.output
            )
        new = sum(record["seconds"] for c, record in zip(stages, records, strict=True) if c.name not in skipped)
        table.caption = f"{len(stages) - len(skipped)} made in {elapsed(new)}, {len(skipped)} kept"
        self._console.print(table)


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
        """Keep the last line of the output."""
        for piece in reversed(_LINE_ENDS.split(data)):
            if text := _CONTROLS.sub("", piece.decode(errors="replace")).strip():
                self.last = text
                return

    def _render(self) -> Spinner:
        text = Text.assemble((self.name, "bold"), f"  {elapsed(time.monotonic() - self.started)}  ", (self.last, "dim"))
        text.truncate(max(20, self.console.width - 4), overflow="ellipsis")
        self._spinner.update(text=text)
        return self._spinner

    def made(self, record: dict[str, Any]) -> None:
        """Print the stage's metrics, in green."""
        self._close("green", _figures(record["metrics"]))

    def kept(self) -> None:
        """Print that the stage was done before."""
        self._close("dim", "done before")

    def failed(self) -> None:
        """Print that the stage refused its settings or inputs, or crashed."""
        self._close("red", "failed")

    def interrupted(self, logs: Path) -> None:
        """Print the path of the stage's logs."""
        self._close("red", f"interrupted; logs: {logs}")

    def _close(self, style: str, note: str) -> None:
        """Print how the stage ended."""
        clock = elapsed(time.monotonic() - self.started)
        self.console.print(Text.assemble((self.name, "bold"), f"  {clock}  ", (note, style)))


def _figures(metrics: dict[str, Any]) -> str:
    """The plain numbers among a stage's metrics, on one line."""
    numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return (
        ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v:,}" for k, v in list(numbers.items())[:5])
        or "done"
    )


def elapsed(seconds: float) -> str:
    """``75`` -> ``1:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
