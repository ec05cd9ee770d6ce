"""The rounds of ``minitron iterate`` up to one, as a job of its own; nothing but the rounds is written."""

from __future__ import annotations

from typing import Any

from nemo_minitron.config import IterateConfig
from nemo_minitron.jobs.launch import job_folder
from nemo_minitron.stages.shared.iterate_jobs import ROUND
from nemo_minitron.stages.shared.iterate_rounds import prune_in_rounds

__all__ = ["run"]


def run(config: IterateConfig) -> dict[str, Any]:
    """Go on up to the round that the job's folder names. Every rank runs this.

    Returns:
        ``round``, and ``resumed``: the rounds that were saved before.

    Raises:
        MinitronError: as the stage.
    """
    last = int((job_folder() / ROUND).read_text())
    return {"round": last, "resumed": prune_in_rounds(config, last=last).resumed}
