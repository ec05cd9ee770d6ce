"""Logits of a Hugging Face directory by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.architecture import SLIDING
from nemo_minitron.checkpoints.formats.huggingface.config import from_hf, read_json, to_hf
from nemo_minitron.checkpoints.formats.huggingface.rotary import read_scaling, scaling_type
from nemo_minitron.runtime.versions import matches

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

__all__ = ["hf_logits", "load_transformers"]

#: Keys that both generations have, with another meaning (YaRN's context).
_MEANT_OTHERWISE = ("max_position_embeddings",)


def hf_logits(path: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[rows, s, V]`` logits of transformers' model, weights rounded to ``dtype``, in float32 arithmetic."""
    return load_transformers(path, dtype).float().eval()(ids).logits


def load_transformers(path: Path, dtype: torch.dtype) -> Any:
    """Transformers' model of a directory, which computes what this suite reads from it.

    transformers up to 4.52 knows types of layers as a pattern only. There a model whose types have no pattern gets them
    after it is built, and computes without its cache, which goes by the pattern.
    """
    from transformers import AutoModelForCausalLM

    config: Any = _config(path)
    types: list[str] = getattr(config, "layer_types", None) or []
    unknown = getattr(config, "sliding_window_pattern", types) is None  # Qwen's have a list too, and no pattern
    by_hand = bool(types) and unknown and matches("transformers<4.53")
    if by_hand:
        config.sliding_window_pattern, config.use_cache = 1, False
    model = AutoModelForCausalLM.from_pretrained(path, config=config, torch_dtype=dtype, local_files_only=True)
    if by_hand:
        model.generation_config.cache_implementation, model.generation_config.use_cache = None, False
        for layer, kind in zip(model.model.layers, types, strict=True):
            slides = kind == SLIDING
            layer.is_sliding = layer.self_attn.is_sliding = slides
            layer.self_attn.sliding_window = config.sliding_window if slides else None
    return model


def _config(path: Path) -> PretrainedConfig:
    """The configuration in a directory, by transformers; of YaRN, and what transformers 4 does not know of a file that
    transformers 5 wrote, as this suite reads it.

    See :func:`~nemo_minitron.checkpoints.formats.huggingface.rotary.read_scaling`.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    content = read_json(path / "config.json")
    if "rope_parameters" in content and matches("transformers<5"):
        spelled = to_hf(*from_hf(content, path / "config.json"), dtype="float32")
        for key, value in spelled.items():
            # What the file says under another name (rope_parameters, num_local_experts), or not at all.
            if key not in content or key in _MEANT_OTHERWISE:
                setattr(config, key, value)
        return config
    scaling = getattr(config, "rope_scaling", None)
    # transformers 5 goes by the factor
    if scaling_type(scaling) == "yarn" and not hasattr(config, "rope_parameters"):
        config.rope_scaling, config.max_position_embeddings = read_scaling(scaling, config.max_position_embeddings)
    return config
