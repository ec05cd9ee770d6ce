"""Logits of a checkpoint by the other side's own loader, each in a process of its own.

``python -m nemo_minitron.checkpoints.verification.loaders KIND PATH TOKENS OUT DTYPE``, where KIND is

- ``hf``: transformers' ``AutoModelForCausalLM``;
- ``nemo2``: NeMo 2's ``ModelConnector.nemo_load``;
- ``nemo``: NeMo 1's ``MegatronGPTModel.restore_from``;
- ``megatron``: a plain Megatron-core model filled by :func:`nemo_minitron.checkpoints.live.load_into`, which reads any
  format without running anything that the file names (NeMo's loaders unpickle and instantiate, so they are used only
  on what we wrote ourselves).

A process of its own, because each of these sets up process groups and global state that a running stage must keep.
TOKENS holds ``ids`` ``[rows, s]``; OUT gets ``logits`` ``[rows, s, vocabulary rows]`` in float32. Weights are
rounded to DTYPE and computed with in float32.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["LOADERS"]


def _hf(path: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=dtype, local_files_only=True).float().eval()
    return model(ids).logits


def _megatron(path: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    import dataclasses

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.checkpoints.live import load_into
    from nemo_minitron.checkpoints.weights import CastWeights
    from nemo_minitron.runtime.groups import ParallelLayout, initialize
    from nemo_minitron.runtime.model import build_model

    checkpoint = open_checkpoint(path)
    weights = CastWeights(checkpoint.weights, str(dtype).removeprefix("torch."))
    checkpoint = dataclasses.replace(checkpoint, weights=weights)
    groups = initialize(ParallelLayout())
    chunks = build_model(checkpoint.shape, checkpoint.architecture, groups)
    load_into(chunks, checkpoint, groups)
    return _forward(chunks[0].eval(), ids)


def _nemo2(path: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from nemo import lightning as nl
    from nemo.lightning import _strategy_lib
    from nemo.lightning.io.api import load_context

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
    return _forward(model.module.eval(), ids)


def _nemo(path: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from lightning.pytorch import Trainer
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy, NLPSaveRestoreConnector
    from omegaconf import OmegaConf

    from nemo_minitron.checkpoints.formats.nemo1.door import unpack_nemo1
    from nemo_minitron.runtime.groups import ParallelLayout, initialize

    del dtype
    initialize(ParallelLayout())  # Megatron-core takes its groups while the model is built, NeMo 1 makes them after
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".verify.") as scratch:
        config = unpack_nemo1(path, Path(scratch)) | {"precision": 32}
        connector = NLPSaveRestoreConnector()
        connector.model_extracted_dir = scratch
        trainer = Trainer(
            devices=1,
            num_nodes=1,
            accelerator="cpu",
            precision=32,
            strategy=NLPDDPStrategy(process_group_backend="gloo"),
            logger=False,
            enable_checkpointing=False,
        )
        model = MegatronGPTModel.restore_from(
            str(path),
            trainer=trainer,
            override_config_path=OmegaConf.create(config),
            save_restore_connector=connector,
            map_location=torch.device("cpu"),
        )
        return _forward(model.get_model_module_list()[0].eval(), ids)


def _forward(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a Megatron-core ``GPTModel``, one row at a time; ``True`` in the mask hides."""
    positions = torch.arange(ids.shape[1])[None]
    mask = torch.triu(torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool), diagonal=1)[None, None]
    return torch.cat([model(row[None], positions, mask).float() for row in ids])


LOADERS: dict[str, Callable[[Path, torch.Tensor, torch.dtype], torch.Tensor]] = {
    "hf": _hf,
    "nemo2": _nemo2,
    "nemo": _nemo,
    "megatron": _megatron,
}


def main(kind: str, path: str, tokens: str, out: str, dtype: str) -> None:
    """Compute the logits and save them to ``out`` (safetensors)."""
    from safetensors.torch import load_file, save_file

    if kind != "hf":
        from nemo_minitron.runtime import cpu

        cpu.activate()  # a check needs no device, and each format is loaded the way that was tested
    with torch.no_grad():
        logits = LOADERS[kind](Path(path), load_file(tokens)["ids"], getattr(torch, dtype))
    save_file({"logits": logits.float().contiguous()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
