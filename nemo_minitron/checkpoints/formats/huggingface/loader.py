"""Logits of a Hugging Face directory by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["hf_logits"]


def hf_logits(path: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[rows, s, V]`` logits of ``AutoModelForCausalLM``, weights rounded to ``dtype``, in float32 arithmetic."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=dtype, local_files_only=True).float().eval()
    return model(ids).logits
