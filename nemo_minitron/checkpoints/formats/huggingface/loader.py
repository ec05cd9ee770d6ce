"""Logits of a Hugging Face directory by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.checkpoints.formats.huggingface.config import read_json
from nemo_minitron.checkpoints.formats.huggingface.rotary import older_spelling, read_scaling, scaling_type

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

__all__ = ["hf_config", "hf_logits"]


def hf_logits(path: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[rows, s, V]`` logits of ``AutoModelForCausalLM``, weights rounded to ``dtype``, in float32 arithmetic."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, config=hf_config(path), torch_dtype=dtype, local_files_only=True)
    return model.float().eval()(ids).logits


def hf_config(path: Path) -> PretrainedConfig:
    """The configuration in a directory, by transformers, which then computes what this suite reads from it.

    See :func:`~nemo_minitron.checkpoints.formats.huggingface.rotary.read_scaling`.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    scaling = older_spelling(read_json(path / "config.json"))[0].get("rope_scaling")
    # transformers 5 goes by the factor
    if scaling_type(scaling) == "yarn" and not hasattr(config, "rope_parameters"):
        config.rope_scaling, config.max_position_embeddings = read_scaling(scaling, config.max_position_embeddings)
    return config
