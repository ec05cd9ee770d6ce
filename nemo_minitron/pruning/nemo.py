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
from nemo_minitron.checkpoints.live import load_into
from nemo_minitron.errors import CheckpointError, ShapeError
from nemo_minitron.pruning.kept import kept_path, load_kept, read_live_kept
from nemo_minitron.pruning.live import gpt_chunks, kept_types, live_shape, set_pipeline_stages
from nemo_minitron.pruning.transforms import DepthPrune, WidthPrune
from nemo_minitron.pruning.wrapping import update_io, without_ddp
from nemo_minitron.runtime import cpu
from nemo_minitron.runtime.groups import ParallelLayout, current_groups
from nemo_minitron.runtime.model import shape_of
from nemo_minitron.shape import SIZES, ModelShape

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from nemo_minitron.checkpoints import Checkpoint

__all__ = ["PruneTransform"]


class PruneTransform(ModelTransform):
    """Prune a model, layers first and then everything else, at the start of a NeMo 2 training or validation.

    Pass it as ``llm.train(..., model_transform=PruneTransform("runs/pruned/kept.json"))`` (``peft=`` of
    ``llm.finetune``), with a model of the unpruned shape and the unpruned weights in the ``restore_config`` of
    ``AutoResume``. As NeMo's PEFT does, it holds back Megatron's gradient buffers and the optimizer until the weights
    are restored and pruned, so neither is ever made for the unpruned model. The configuration that NeMo writes into its
    checkpoints becomes the pruned model's; a training that goes on from such a checkpoint is built in the pruned shape
    at once and is not pruned again.

    With ``weights`` the pruned model is filled from a checkpoint of its shape, such as the output of ``minitron
    reconstruct``: each rank reads its own shard, in any layout and format, and no unpruned weights need be restored.

    Args:
        kept: units that stay, or the path of the ``kept.json`` that holds them.
        weights: checkpoint of the pruned shape whose tensors the pruned model gets; None keeps what pruning leaves.
        family: key of the model's axes table; None takes the one that has the model's parameters.

    Raises:
        ShapeError: when called, if units, model and layout do not fit; see :class:`~nemo_minitron.pruning.WidthPrune`.
        CheckpointError: if ``kept`` or ``weights`` cannot be read, or ``weights`` has another shape or other kept
            units; or if a training resumes from a checkpoint of neither the unpruned nor the pruned shape.
    """

    def __init__(
        self, kept: KeptUnits | str | Path, *, weights: str | Path | None = None, family: str | None = None
    ) -> None:
        super().__init__()
        cpu.ensure()  # NeMo builds the model before it calls the transform
        self.kept, self.shape = read_live_kept(kept)
        if self.kept.vocab is not None:
            raise ShapeError(
                "the kept units leave out a part of the vocabulary, which NeMo's tokenizer would not follow; prune the "
                "checkpoint (`minitron prune`) and train the result"
            )
        self.family = family
        self.weights = None if weights is None else Path(weights)
        if self.weights is not None:
            self._checkpoint(self.shape)
        self._done = False

    def __call__(self, model: nn.Module) -> nn.Module:
        """Prune ``model`` in place, fill it from ``weights`` if there are some, and return it."""
        shape = live_shape(gpt_chunks(model)[0])
        filled = None if self.weights is None else self._checkpoint(shape)
        with without_ddp(model):
            if len(self.kept.layers) < shape.num_layers:
                DepthPrune(self.kept)(model)
            WidthPrune(self.kept, family=self.family)(model)
            if filled is not None:
                load_into(gpt_chunks(model), filled, current_groups())
        return model

    def _checkpoint(self, unpruned: ModelShape | None) -> Checkpoint:
        """The weights that the pruned model gets.

        Args:
            unpruned: shape of the model that is pruned; its vocabulary may be padded. None where it is not known.
        """
        from nemo_minitron.checkpoints import open_checkpoint

        assert self.weights is not None
        stored = open_checkpoint(self.weights)
        remedy = "give the model that `minitron reconstruct` made of these kept units"
        if unpruned is not None:
            unpruned = unpruned.replace(
                vocab_size=stored.shape.vocab_size, tied_embeddings=stored.shape.tied_embeddings
            )
            if faults := self.kept.faults(unpruned):
                raise ShapeError(faults)
            if stored.shape != (target := self.kept.target(unpruned)):
                raise CheckpointError(
                    f"weights={self.weights}: is of {stored.shape}, not of the pruned shape {target}; {remedy}"
                )
        own = kept_path(self.weights)
        if own.is_file() and load_kept(own)[0] != self.kept:
            raise CheckpointError(f"weights={self.weights}: was made of other kept units ({own}); {remedy}")
        return stored

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


def _resize_config(config: Any, target: ModelShape) -> None:
    for name in SIZES:
        setattr(config, name, getattr(target, name))
    config.kv_channels = target.head_dim
    if target.num_moe_experts is not None:
        config.moe_ffn_hidden_size = target.ffn_hidden_size
