"""Logits of a NeMo 2 directory by NeMo 2."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["nemo2_distributed", "nemo2_logits"]


def nemo2_distributed(path: Path, scratch: Path) -> tuple[Path, str]:
    """The weights of a NeMo 2 directory, and what stands before their names."""
    del scratch
    return path / "weights", "module."


def nemo2_logits(path: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[rows, s, vocabulary rows]`` logits in float32 arithmetic, by the steps of ``ModelConnector.nemo_load``.

    NeMo builds what ``context/io.json`` names: for checkpoints that the suite wrote, and no others.
    """
    from nemo_minitron.runtime import cpu

    cpu.activate()  # a check needs no device, and this way of loading is the tested one
    import torch
    from nemo import lightning as nl
    from nemo.lightning import _strategy_lib
    from nemo.lightning.io.api import load_context

    from nemo_minitron.checkpoints.verification.forward import model_logits

    del dtype  # the stored tensors have it already
    # the steps of nemo.lightning.io.connector.ModelConnector.nemo_load, with the parameters kept in float32
    model: Any = load_context(path, subpath="model")
    model.config.bf16 = model.config.fp16 = False
    model.config.params_dtype = torch.float32
    model.config.perform_initialization = False
    strategy = nl.MegatronStrategy(
        ddp="pytorch", setup_optimizers=False, process_group_backend="gloo", ckpt_load_strictness=None
    )
    trainer = nl.Trainer(devices=1, accelerator="cpu", strategy=strategy, logger=False)
    trainer.strategy.connect(model)
    trainer.strategy.setup_environment()
    with _strategy_lib.megatron_cpu_init_context(model.config):
        model.configure_model()
    trainer.strategy.setup(trainer)
    trainer.strategy.load_checkpoint(path)
    return model_logits(model.module.eval(), ids)
