"""Logits of a ``.nemo`` by NeMo 1."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["nemo1_distributed", "nemo1_logits"]


def nemo1_distributed(path: Path, scratch: Path) -> tuple[Path, str]:
    """The weights of a ``.nemo``, unpacked into ``scratch``, and what stands before their names."""
    from nemo_minitron.checkpoints.formats.nemo1.checkpoint import unpack_nemo1

    unpack_nemo1(path, scratch)
    return scratch / "model_weights", "model."


def nemo1_logits(path: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[rows, s, vocabulary rows]`` logits in float32 arithmetic, by ``MegatronGPTModel.restore_from``.

    For archives that the suite wrote, and no others: NeMo builds the class that a file names.
    """
    from nemo_minitron.runtime import cpu

    cpu.activate()  # a check needs no device, and this way of loading is the tested one
    import torch
    from lightning.pytorch import Trainer
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy, NLPSaveRestoreConnector
    from omegaconf import OmegaConf

    from nemo_minitron.checkpoints.formats.nemo1.checkpoint import unpack_nemo1
    from nemo_minitron.checkpoints.verification.forward import model_logits
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
        return model_logits(model.get_model_module_list()[0].eval(), ids)
