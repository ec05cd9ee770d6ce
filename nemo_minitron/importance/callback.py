"""Score a model while NeMo validates it: a Lightning callback for NeMo 2's own trainer.

trainer = nl.Trainer(..., callbacks=[ScoreDuringValidation("runs/scores", shape)])
llm.validate(model, data, trainer=trainer)  # or llm.train, llm.finetune: at each validation
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from nemo_minitron.errors import CheckpointError, ConfigError, ShapeError
from nemo_minitron.importance.aggregation import Criterion
from nemo_minitron.importance.hooks import ActivationRecorder
from nemo_minitron.importance.score import collect
from nemo_minitron.importance.scores import Scores, save_criteria
from nemo_minitron.runtime import cpu
from nemo_minitron.runtime.atomic import write_aside
from nemo_minitron.runtime.groups import ParallelLayout, current
from nemo_minitron.runtime.model import shape_of
from nemo_minitron.shape import SIZES, ModelShape

__all__ = ["ScoreDuringValidation"]


class ScoreDuringValidation(pl.Callback):
    """Score every unit by its activations on the batches of an ordinary validation, which has no gradients.

    The hooks are on from the start of a validation to its end, under any TP x PP x DP layout; then the scores are
    gathered and rank 0 writes them. A later validation of the same training replaces them by scores of the weights
    at that time. Lightning's sanity check before a training is left out. The validation's own metrics do not change.

    Every sample that is validated counts. Data modules that repeat samples to fill a batch give them that weight.

    Attributes:
        scores: by criterion, of the last validation; None before the first.
    """

    def __init__(
        self,
        output: str | Path,
        shape: ModelShape,
        *,
        criteria: Sequence[tuple[str, str]] = (("mean", "l2"),),
        fingerprint: str | None = None,
    ) -> None:
        """Keep the settings.

        Args:
            output: directory for the score file of the first criterion; others lie in its ``criteria/``.
            shape: of the whole model, as its checkpoint states it (:func:`~nemo_minitron.checkpoints.open_checkpoint`).
            criteria: pairs of aggregations over sequence and batch.
            fingerprint: of the weights (:func:`~nemo_minitron.importance.fingerprint`), kept with the scores; None
                where they are being trained.

        Raises:
            ConfigError: for no criteria.
        """
        super().__init__()
        cpu.ensure()  # NeMo builds the model before it validates
        if not criteria:
            raise ConfigError("criteria: none is given; give at least one pair of aggregations, as ('mean', 'l2')")
        self.output = Path(output)
        self.shape = shape
        self.criteria = [Criterion(*criterion) for criterion in criteria]
        self.fingerprint = fingerprint
        self.scores: dict[Criterion, Scores] | None = None
        self._recorder: ActivationRecorder | None = None
        self._hooks = ExitStack()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the hooks.

        Raises:
            ConfigError: without NeMo's strategy, with context or expert parallelism, or for an unknown aggregation.
            ShapeError: if the model does not have the given shape.
        """
        self._detach()
        if trainer.sanity_checking:
            return
        chunks = _megatron_chunks(trainer)
        self._check_shape(chunks)
        self._recorder = ActivationRecorder(chunks, current(_layout(chunks)), self.criteria)
        self._hooks.enter_context(self._recorder.attached())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the hooks, gather the scores, and write them on rank 0.

        Raises:
            NonFiniteError: if an activation is NaN or infinite; on every rank, naming layer and module.
            CheckpointError: if the scores cannot be written.
        """
        recorder, self._recorder = self._recorder, None
        self._hooks.close()
        if recorder is None:
            return
        recorder.check_finite()
        counts = torch.tensor([recorder.samples, recorder.tokens], device=next(recorder.chunks[0].parameters()).device)
        dist.all_reduce(counts, group=recorder.groups.dp)
        samples, tokens = counts.tolist()
        if not samples:
            return
        self.scores = collect(recorder, self.shape, samples=samples, tokens=tokens, fingerprint=self.fingerprint)
        if recorder.groups.is_main:
            with write_aside(self.output, overwrite=True, error=CheckpointError) as aside:
                save_criteria([self.scores[criterion] for criterion in recorder.criteria], aside)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the model as it was."""
        self._detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the model as it was."""
        self._detach()

    def _detach(self) -> None:
        self._hooks.close()
        self._recorder = None

    def _check_shape(self, chunks: list[Any]) -> None:
        live = shape_of(chunks[0].config)
        if faults := [
            f"{name}={getattr(self.shape, name)}: the model that is validated has {getattr(live, name)}; give its own "
            "shape"
            for name in SIZES
            if getattr(self.shape, name) != getattr(live, name)
        ]:
            raise ShapeError(faults)


def _megatron_chunks(trainer: pl.Trainer) -> list[Any]:
    """The Megatron-core models under NeMo's wrappers (its Lightning module, Megatron's DDP and precision wrappers)."""
    from megatron.core.models.gpt import GPTModel

    chunks = []
    for part in getattr(trainer.strategy, "megatron_parallel", None) or []:
        while not isinstance(part, GPTModel) and hasattr(part, "module"):
            part = part.module
        chunks.append(part)
    if not chunks or not all(isinstance(chunk, GPTModel) for chunk in chunks):
        raise ConfigError(
            f"ScoreDuringValidation: {type(trainer.strategy).__name__} runs no Megatron GPT model; use "
            "nemo.lightning.MegatronStrategy"
        )
    return chunks


def _layout(chunks: list[Any]) -> ParallelLayout:
    """The layout that NeMo's strategy has set up."""
    from megatron.core import parallel_state

    config = chunks[0].config
    for name in ("context_parallel_size", "expert_model_parallel_size"):
        if getattr(config, name) > 1:
            raise ConfigError(f"{name}={getattr(config, name)}: scores are gathered without it; set it to 1")
    return ParallelLayout(
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        data=parallel_state.get_data_parallel_world_size(),
        virtual_pipeline=len(chunks) if len(chunks) > 1 else None,
        sequence_parallel=config.sequence_parallel,
    )
