"""Prune a model inside NeMo 2's own trainings.

:class:`PruneTransform` is the ``model_transform`` of ``llm.train`` and ``llm.finetune``: NeMo builds and fills the
whole model, the transform prunes it, and only then are gradient buffers and optimizer made. A plain ``DepthPrune`` or
``WidthPrune`` works there too: :mod:`~nemo_minitron.pruning.wrapping` takes down what NeMo has built by then, and
builds it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer.states import TrainerFn
from nemo.lightning.pytorch.callbacks import ModelTransform
from torch import nn

from nemo_minitron.axes import KeptUnits
from nemo_minitron.errors import CheckpointError, ShapeError
from nemo_minitron.pruning.kept import read_live_kept
from nemo_minitron.pruning.live import gpt_chunks, kept_types, set_pipeline_stages
from nemo_minitron.pruning.transforms import DepthPrune, WidthPrune
from nemo_minitron.pruning.wrapping import update_io
from nemo_minitron.runtime import cpu
from nemo_minitron.runtime.groups import ParallelLayout
from nemo_minitron.runtime.model import shape_of
from nemo_minitron.shape import SIZES, ModelShape

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["PruneTransform"]


class PruneTransform(ModelTransform):
    """Prune a model, layers first and then everything else, at the start of a NeMo 2 training or validation.

    Pass it as ``llm.train(..., model_transform=PruneTransform("runs/pruned/kept.json"))`` (``peft=`` of
    ``llm.finetune``), with a model of the unpruned shape and the unpruned weights in the ``restore_config`` of
    ``AutoResume``. As NeMo's PEFT does, it holds back Megatron's gradient buffers and the optimizer until the weights
    are restored and pruned, so neither is ever made for the unpruned model. The configuration that NeMo writes into its
    checkpoints becomes the pruned model's; a training that goes on from such a checkpoint is built in the pruned shape
    at once and is not pruned again.

    Args:
        kept: units that stay, or the path of the ``kept.json`` that holds them.
        family: key of the model's axes table; None takes the one that has the model's parameters.

    Raises:
        ShapeError: when called, if units, model and layout do not fit; see :class:`~nemo_minitron.pruning.WidthPrune`.
        CheckpointError: if ``kept`` cannot be read, or a training resumes from a checkpoint of neither the unpruned nor
            the pruned shape.
    """

    def __init__(self, kept: KeptUnits | str | Path, *, family: str | None = None) -> None:
        super().__init__()
        cpu.ensure()  # NeMo builds the model before it calls the transform
        self.kept, self.shape = read_live_kept(kept)
        if self.kept.vocab is not None:
            raise ShapeError(
                "the kept units leave out a part of the vocabulary, which NeMo's tokenizer would not follow; prune the "
                "checkpoint (`minitron prune`) and train the result"
            )
        self.family = family
        self._done = False

    def __call__(self, model: nn.Module) -> nn.Module:
        """Prune ``model`` in place, and return it."""
        if len(self.kept.layers) < shape_of(_first_config(model)).num_layers:
            DepthPrune(self.kept)(model)
        return WidthPrune(self.kept, family=self.family)(model)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before the model is built: hold back gradient buffers and optimizer."""
        super().setup(trainer, pl_module, stage=stage)
        if trainer.ckpt_path is not None:
            self._resume(Path(str(trainer.ckpt_path)), trainer, pl_module)
        if not self._done:
            trainer.strategy._init_model_parallel = False
            trainer.strategy._setup_optimizers = False

    def apply_transform(self, trainer: pl.Trainer) -> None:
        """Prune, then let NeMo make gradient buffers and optimizer."""
        if self._done:
            return
        self._done = True
        super().apply_transform(trainer)
        update_io(trainer.lightning_module)
        trainer.strategy.init_model_parallel()
        if trainer.state.fn == TrainerFn.FITTING:
            trainer.strategy.setup_optimizers(trainer)
            trainer.lightning_module.optim.on_fit_start(trainer, trainer.lightning_module)

    def _resume(self, checkpoint: Path, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Going on from a pruned checkpoint: the model is built in that shape.

        Raises:
            CheckpointError: if it is of another shape.
        """
        from nemo_minitron.checkpoints import open_checkpoint

        # NeMo resumes from the weights inside of a checkpoint.
        checkpoint = checkpoint.parent if checkpoint.name == "weights" else checkpoint
        stored = open_checkpoint(checkpoint).shape
        unpruned = shape_of(pl_module.config).replace(
            vocab_size=stored.vocab_size, tied_embeddings=stored.tied_embeddings
        )
        if faults := self.kept.faults(unpruned):
            raise ShapeError(faults)
        target = self.kept.target(unpruned)
        if stored != target:
            raise CheckpointError(
                f"{checkpoint}: is of {stored}, not of the pruned shape {target}; to start from unpruned weights give "
                "them as AutoResume(restore_config=RestoreConfig(path=...)), to go on give this training's checkpoint"
            )
        types = kept_types(pl_module.config, self.kept.layers)
        _resize_config(pl_module.config, target)
        if getattr(pl_module.config, "layer_types", None) is not None:
            pl_module.config.layer_types = types
        if target.num_layers != unpruned.num_layers:
            strategy = trainer.strategy
            layout = ParallelLayout(
                pipeline=strategy.pipeline_model_parallel_size,
                virtual_pipeline=strategy.virtual_pipeline_model_parallel_size,
            )
            if faults := target.layout_faults(tensor=1, pipeline=layout.pipeline_stages):
                raise ShapeError(faults)
            set_pipeline_stages(pl_module.config, target, layout)
        update_io(pl_module)
        self._done = True


def _first_config(model: nn.Module) -> Any:
    return gpt_chunks(model)[0].config


def _resize_config(config: Any, target: ModelShape) -> None:
    for name in SIZES:
        setattr(config, name, getattr(target, name))
    config.kv_channels = target.head_dim
    if target.num_moe_experts is not None:
        config.moe_ffn_hidden_size = target.ffn_hidden_size
