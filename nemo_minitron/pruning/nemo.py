"""Pruning inside NeMo 2's own trainings: what surrounds a model there, and how it follows the pruned model.

:class:`PruneTransform` is the ``model_transform`` of ``llm.train`` and ``llm.finetune``: NeMo builds and fills the
whole model, the transform prunes it, and only then are gradient buffers and optimizer made. A plain ``DepthPrune`` or
``WidthPrune`` works there too; :func:`unwrapped` takes down what NeMo has built by then, and builds it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from nemo.lightning.megatron_parallel import MegatronParallel
from nemo.lightning.pytorch.callbacks import ModelTransform
from torch import nn

from nemo_minitron.axes import KeptUnits
from nemo_minitron.errors import CheckpointError, ShapeError
from nemo_minitron.pruning.live import CONFIG_SIZES, fresh, gpt_chunks, owned_parameters, set_stages
from nemo_minitron.pruning.transforms import DepthPrune, WidthPrune, read_kept
from nemo_minitron.runtime.groups import ParallelLayout
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["PruneTransform", "unwrapped"]


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
        CheckpointError: if ``kept`` cannot be read, or a training should go on from a checkpoint that is neither of
            the unpruned nor of the pruned shape.
    """

    def __init__(self, kept: KeptUnits | str | Path, *, family: str | None = None) -> None:
        super().__init__()
        self.kept, self.shape = read_kept(kept)
        if self.kept.vocab is not None:
            raise ShapeError(
                "the kept units leave out a part of the vocabulary, which NeMo's tokenizer would not follow; prune the "
                "checkpoint (`minitron prune`) and train the result"
            )
        self.family = family
        self._done = False

    def __call__(self, model: nn.Module) -> nn.Module:
        """Prune ``model`` in place, and return it."""
        if len(self.kept.layers) < _config_shape(_first_config(model)).num_layers:
            DepthPrune(self.kept)(model)
        return WidthPrune(self.kept, family=self.family)(model)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called before the model is built: hold back what the unpruned model must not have."""
        super().setup(trainer, pl_module, stage=stage)
        if trainer.ckpt_path is not None:
            self._resume(Path(str(trainer.ckpt_path)), trainer, pl_module)
        if not self._done:
            trainer.strategy._init_model_parallel = False
            trainer.strategy._setup_optimizers = False

    def apply_transform(self, trainer: pl.Trainer) -> None:
        """Prune, then let NeMo make what it was kept from making."""
        if self._done:
            return
        self._done = True
        super().apply_transform(trainer)
        _update_io(trainer.lightning_module)
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
        unpruned = _config_shape(pl_module.config).replace(
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
        _resize_config(pl_module.config, target)
        if target.num_layers != unpruned.num_layers:
            strategy = trainer.strategy
            layout = ParallelLayout(
                pipeline=strategy.pipeline_model_parallel_size,
                virtual_pipeline=strategy.virtual_pipeline_model_parallel_size,
            )
            if faults := target.layout_faults(tensor=1, pipeline=layout.stages):
                raise ShapeError(faults)
            set_stages(pl_module.config, target, layout)
        _update_io(pl_module)
        self._done = True


@contextmanager
def unwrapped(module: MegatronParallel) -> Iterator[None]:
    """Within the block NeMo's model is bare; after it, it has gradient buffers and an optimizer for what it is then.

    Memory: the parameters leave Megatron's buffers one by one, so for a moment the unpruned parameters exist twice;
    :class:`PruneTransform` has no such moment.

    Args:
        module: NeMo's ``MegatronParallel``, wrapped for training.

    Raises:
        ShapeError: if its optimizer holds a state already.
    """
    trainer: Any = module.trainer
    fitting = trainer.state.fn == TrainerFn.FITTING
    if fitting and any(_has_state(optimizer) for optimizer in trainer.strategy.optimizers):
        raise ShapeError(
            "the optimizer has taken steps already, or was restored; its state is of the unpruned parameters. Prune at "
            "the start of a training, and go on from its checkpoints with PruneTransform"
        )
    if fitting:
        trainer.strategy.optimizers = []
    module.teardown_ddp()
    for chunk in module:
        del chunk.original_getattr
        chunk.module = chunk.module.module
        vars(chunk).pop("buffers", None)
    for chunk in gpt_chunks(module):
        for _, parameter, owners in owned_parameters(chunk):
            # Out of the buffers, and rid of the hooks by which they gather gradients
            bare = fresh(parameter, parameter.detach().clone())
            for owner, leaf in owners:
                setattr(owner, leaf, bare)
    yield
    module.init_ddp()
    if fitting:
        trainer.strategy.setup_optimizers(trainer)
    _update_io(trainer.lightning_module)


def _has_state(optimizer: Any) -> bool:
    """Whether an optimizer, Megatron's or torch's, has taken a step."""
    inner = getattr(optimizer, "mcore_optimizer", optimizer)
    chained = getattr(inner, "chained_optimizers", [inner])
    states = [getattr(one, "optimizer", one) for one in chained]
    return any(
        float(torch.as_tensor(entry["step"])) > 0
        for one in states
        if one is not None
        for entry in one.state.values()
        if isinstance(entry, dict) and "step" in entry
    )


def _first_config(model: nn.Module) -> Any:
    return gpt_chunks(model)[0].config


def _config_shape(config: Any) -> ModelShape:
    """Sizes out of NeMo's or Megatron's configuration; the vocabulary's is not known there."""
    sizes = {name: getattr(config, name) for name in CONFIG_SIZES}
    head_dim = config.kv_channels or config.hidden_size // config.num_attention_heads
    if sizes["num_moe_experts"] is not None and config.moe_ffn_hidden_size is not None:
        sizes["ffn_hidden_size"] = config.moe_ffn_hidden_size
    return ModelShape(**{**sizes, "num_query_groups": sizes["num_query_groups"] or sizes["num_attention_heads"]},
                      head_dim=head_dim, vocab_size=1)  # fmt: skip


def _resize_config(config: Any, target: ModelShape) -> None:
    for name in CONFIG_SIZES:
        setattr(config, name, getattr(target, name))
    config.kv_channels = target.head_dim
    if target.num_moe_experts is not None:
        config.moe_ffn_hidden_size = target.ffn_hidden_size


def _update_io(pl_module: Any) -> None:
    """What NeMo writes into a checkpoint's context is what the module was made from: say what it is now."""
    made_from = getattr(getattr(pl_module, "__io__", None), "config", None)
    for name in (*CONFIG_SIZES, "kv_channels", "moe_ffn_hidden_size"):
        if made_from is not None:
            setattr(made_from, name, getattr(pl_module.config, name))
