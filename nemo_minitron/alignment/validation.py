"""Validation batches of another size than the training's, for those of Aligner's models that assume one size."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from nemo_aligner.utils.utils import configure_batch_sizes

__all__ = ["ValidationBatches"]


class ValidationBatches:
    """Mixin for one of Aligner's models: it may then validate on batches of another size, as ``GPTSFTModel`` may."""

    cfg: Any

    def prepare_for_validation_step(self) -> None:
        """As ``GPTSFTModel`` does."""
        super().prepare_for_validation_step()  # type: ignore[misc]
        self._configure(self.cfg.data.validation_ds)

    def finish_validation_step(self) -> None:
        """Back to the batches of training."""
        super().finish_validation_step()  # type: ignore[misc]
        self._configure(self.cfg.data.train_ds)

    def _configure(self, batches: Any) -> None:
        configure_batch_sizes(
            mbs=batches.micro_batch_size,
            gbs=batches.global_batch_size,
            dp=parallel_state.get_data_parallel_world_size(),
        )
