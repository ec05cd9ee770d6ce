"""Hugging Face to NeMo 2, read by every rank of the layout, and back, loaded by transformers."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.doctor.checks import Context
from nemo_minitron.doctor.checks.forward import ROWS, logits_of

__all__ = ["reference", "run"]


def run(context: Context) -> dict[str, torch.Tensor]:
    """``nemo2``: logits of the converted model in the layout; ``hf``: of the model exported back, by transformers."""
    groups = context.groups()
    nemo2, hf = context.scratch / "nemo2", context.scratch / "hf"
    if groups.is_main:
        write_checkpoint(context.material.teacher, nemo2, "nemo2", dtype=context.precision)
        write_checkpoint(open_checkpoint(nemo2), hf, "hf", dtype="float32")
    dist.barrier()
    loaded = {"hf": _by_transformers(hf, context)} if groups.is_main else {}
    logits = logits_of(context.model(open_checkpoint(nemo2), groups), groups, context)
    return loaded if logits is None else {**loaded, "nemo2": logits}


def reference(context: Context) -> dict[str, torch.Tensor]:
    """Logits of the original model, by transformers."""
    logits = _by_transformers(context.material.teacher.path, context)
    return {"hf": logits, "nemo2": logits.clone()}


@torch.no_grad()
def _by_transformers(path: Path, context: Context) -> torch.Tensor:
    """``[rows, s, V]`` logits in float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    tokens = context.material.blocks(ROWS * context.material.layout.pipeline, seed=2)[:, :-1]
    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32, local_files_only=True).eval()
    logits: torch.Tensor = model(tokens).logits
    return logits
