"""The jobs of ``minitron iterate`` on a cluster: one for each round, of which the last is the stage itself."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.config import IterateConfig
from nemo_minitron.jobs.stage_jobs import Prepared
from nemo_minitron.stages.shared.iterate_rounds import rounds_folder

__all__ = ["finish", "finished", "prepare"]

#: The file in a job's folder that says up to which round it goes.
ROUND = "round"


def prepare(config: IterateConfig, name: str, folder: Path) -> Prepared:
    """A job goes up to its round; a round that is saved is not run again."""
    (folder / ROUND).write_text(name.partition("-")[2])
    return Prepared(config, "shared.iterate_round")


def finish(config: IterateConfig, name: str, folder: Path) -> None:
    """Nothing is left to do: the round is saved."""


def finished(config: IterateConfig) -> set[str]:
    """The rounds that are saved. If they are of other settings, the next job makes them again."""
    return {path.stem for path in rounds_folder(config).glob("round-*.json")}
