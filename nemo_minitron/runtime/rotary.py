"""RoPE scaling of a live model: its frequencies, its positions, and the scale of its attention.

``GPTModel`` can be configured with linear interpolation and a part of Llama 3's scaling, and with nothing of YaRN's. So
the frequencies are set in the built model here, for plain Megatron models and for NeMo's alike. The formulas are those
of transformers' ``modeling_rope_utils``, operation by operation, so that the float32 frequencies have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from nemo_minitron.architecture import Architecture

if TYPE_CHECKING:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

__all__ = ["attention_settings", "interpolation_factor", "scale_rotary", "yarn_attention_factor", "yarn_frequencies"]


def interpolation_factor(architecture: Architecture) -> float | None:
    """``seq_len_interpolation_factor`` of Megatron's and NeMo's GPT models: positions are divided by it.

    transformers divides the frequencies instead; the angles are the same up to two roundings.
    """
    if architecture.rotary_scaling is None or architecture.rotary_type != "linear":
        return None
    return float(architecture.rotary_scaling["factor"])


def attention_settings(architecture: Architecture, head_dim: int) -> dict[str, float]:
    """Settings of Megatron's configuration for the scale of attention scores; empty where the defaults do.

    YaRN multiplies cosine and sine, and with them the rotated queries and keys, by a factor. They have all channels of
    a head here, so the attention scores are multiplied by its square (arXiv 2309.00071, section 3.4).
    """
    own = architecture.softmax_scale
    if architecture.rotary_scaling is None or architecture.rotary_type != "yarn":
        return {} if own is None else {"softmax_scale": own}
    scale = 1 / math.sqrt(head_dim) if own is None else own
    return {"softmax_scale": yarn_attention_factor(architecture.rotary_scaling) ** 2 * scale}


def scale_rotary(rotary: RotaryEmbedding, architecture: Architecture) -> None:
    """Set the frequencies of a model's RoPE, in place, before its first forward pass.

    Of type "linear" there is nothing to set: see :func:`interpolation_factor`.
    """
    scaling = architecture.rotary_scaling
    if scaling is None:
        return
    if architecture.rotary_type == "llama3":
        # ``GPTModel(rope_scaling=True)`` takes the factor alone and fixes the others at those of Llama 3.1
        rotary.inv_freq = rotary._apply_scaling(
            rotary.inv_freq,
            factor=scaling["factor"],
            low_freq_factor=scaling["low_freq_factor"],
            high_freq_factor=scaling["high_freq_factor"],
            original_max_position_embeddings=scaling["original_max_position_embeddings"],
        )
    elif architecture.rotary_type == "yarn":
        frequencies = yarn_frequencies(scaling, base=architecture.rotary_base, dim=2 * len(rotary.inv_freq))
        rotary.inv_freq = frequencies.to(rotary.inv_freq)


def yarn_frequencies(scaling: Mapping[str, Any], *, base: float, dim: int) -> torch.Tensor:
    """Inverse frequencies under YaRN (arXiv 2309.00071, section 3.2), ``[dim / 2]`` float32.

    Frequencies that turn more than ``beta_fast`` times within the original context stay, those that turn less than
    ``beta_slow`` times are divided by ``factor``, and between them is a ramp.

    Args:
        scaling: of type "yarn".
        base: theta of RoPE.
        dim: channels of a head that are turned.
    """

    def channel(rotations: float) -> float:
        """The place, along the channels, of the frequency with so many turns within the original context."""
        turned = scaling["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return (dim * math.log(turned)) / (2 * math.log(base))

    # 32 and 1 are the paper's
    low = max(math.floor(channel(scaling.get("beta_fast", 32.0))), 0)
    high: float = min(math.ceil(channel(scaling.get("beta_slow", 1.0))), dim - 1)
    if low == high:
        high += 0.001
    powers = base ** (torch.arange(0, dim, 2).float() / dim)
    own, divided = 1.0 / powers, 1.0 / (scaling["factor"] * powers)
    kept = 1 - torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    return divided * (1 - kept) + own * kept


def yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    """What YaRN multiplies cosine and sine by."""

    def magnitude(weight: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * weight * math.log(scaling["factor"]) + 1.0

    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)
