"""The harness's task over documents in memory."""

from __future__ import annotations

from typing import Any

from lm_eval.api.task import ConfigurableTask

__all__ = ["PackTask"]


class PackTask(ConfigurableTask):
    """``ConfigurableTask`` whose ``custom_dataset`` takes no settings, so that the harness asks for none."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Nothing is downloaded: the documents are in memory."""
        self.dataset = self.config.custom_dataset()
