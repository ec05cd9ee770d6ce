"""A stage of the alignment package that a signal stops, and that is started again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["stopped_and_resumed"]


def stopped_and_resumed(stage: ModuleType, config: Any, *, only: int | None = None) -> str:
    """SIGUSR1 comes in every step, or in the ``only`` one; then the same command again.

    Returns:
        What the first one said.
    """
    from nemo_minitron.alignment.metrics import MetricsLog
    from nemo_minitron.errors import PreemptedError

    logged: Callable[..., None] = MetricsLog.log_metrics

    def signalled(self: MetricsLog, metrics: dict[str, Any], step: int, prefix: str = "") -> None:
        logged(self, metrics, step, prefix)
        if prefix == "train/" and only in (None, step):
            os.kill(os.getpid(), signal.SIGUSR1)

    MetricsLog.log_metrics = signalled  # type: ignore[method-assign]
    said = "nothing"
    try:
        stage.run(config)
    except PreemptedError as error:
        said = str(error)
    finally:
        MetricsLog.log_metrics = logged  # type: ignore[method-assign]
    stage.run(config)
    return said
