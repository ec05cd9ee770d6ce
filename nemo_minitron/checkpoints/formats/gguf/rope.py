"""RoPE scaling of a GGUF file: keys of its header, or the tensor ``rope_freqs.weight``.

llama.cpp stores Llama 3's scaling as the divisors of the frequencies, made in float32, and drops the four numbers that
they were made of. They are recovered here, and must give back every divisor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.formats.gguf.header import GGUFContent
from nemo_minitron.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["DIVISORS", "llama3_divisors", "rotary_scaling"]

DIVISORS = "rope_freqs.weight"
#: As transformers spells the kinds; the others of llama.cpp are refused.
_KEYS = {
    "linear": {"factor": "factor"},
    "yarn": {
        "factor": "factor",
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    },
}
#: Low and high factor and original context of Llama 3.1, 3.2 and 3.3.
_LLAMA3 = (1.0, 4.0, 8192)
#: Rounding of powers differs between machines by some units in the last place.
_TOLERANCE = 4 * 2.0**-23


def rotary_scaling(content: GGUFContent, architecture: str, *, theta: float, head_dim: int) -> dict[str, Any] | None:
    """HF's ``rope_scaling``, or None.

    Args:
        content: the file.
        architecture: its ``general.architecture``.
        theta: base of the frequencies.
        head_dim: channels of a head that are turned.

    Raises:
        CheckpointError: for a scaling that transformers cannot express.
    """
    prefix = f"{architecture}.rope.scaling."
    given = {key.removeprefix(prefix): content.fields[key] for key in list(content.fields) if key.startswith(prefix)}
    given.pop("finetuned", None)
    legacy = content.fields.get(f"{architecture}.rope.scale_linear")
    if legacy not in (None, 0.0, 1.0):
        given = {"type": "linear", "factor": legacy, **given}
    kind = given.pop("type", None) or ("linear" if given.get("factor") not in (None, 0.0, 1.0) else "none")
    divided = DIVISORS in content.tensors
    if divided and kind != "none":
        raise CheckpointError(f"{content.path}: has both {DIVISORS} and {prefix}type={kind!r}; only one is supported")
    if divided:
        divisors = content.tensor(DIVISORS)
        scaling = _llama3(divisors, theta, head_dim, given.get("original_context_length"))
        if scaling is None and not bool((divisors == 1).all()):
            raise CheckpointError(
                f"{content.path}: {DIVISORS} is not the scaling of Llama 3, the only one that is known in this form; "
                "import the model's Hugging Face directory"
            )
        return scaling
    if kind == "none":
        return None
    known = _KEYS.get(kind, {})
    if kind not in _KEYS or (other := sorted(given.keys() - known.keys())):
        named = f"{prefix}type={kind!r}" if kind not in _KEYS else f"{prefix}{other[0]}={given[other[0]]!r}"
        raise CheckpointError(f"{content.path}: {named} is not supported; import the model's Hugging Face directory")
    return {"rope_type": kind, **{key: given[name] for name, key in known.items() if name in given}}


def llama3_divisors(
    theta: float, head_dim: int, *, factor: float, low: float, high: float, original: float
) -> torch.Tensor:
    """``[head_dim / 2]`` float32: what llama.cpp stores for Llama 3's scaling (``convert_hf_to_gguf.py``).

    That is 1 for wave lengths below ``original / high``, ``factor`` above ``original / low``, and smooth in between.
    """
    import torch

    steps = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    lengths = 2 * math.pi / (1.0 / theta**steps)
    smooth = (original / lengths - low) / (high - low)
    middle = 1 / ((1 - smooth) / factor + smooth)
    outer = torch.where(lengths < original / high, 1.0, factor)
    return torch.where((lengths < original / high) | (lengths > original / low), outer, middle)


def _llama3(divisors: torch.Tensor, theta: float, head_dim: int, original: float | None) -> dict[str, Any] | None:
    """The four numbers that give these divisors to the last bits of float32; None if none do."""
    if divisors.shape != (head_dim // 2,) or not bool((divisors >= 1).all()) or float(divisors.max()) == 1:
        return None
    factor = float(divisors.max())
    for low, high, context in [_LLAMA3, *_fitted(divisors, theta, head_dim, factor, original)]:
        made = llama3_divisors(theta, head_dim, factor=factor, low=low, high=high, original=context)
        if bool(((made - divisors).abs() <= _TOLERANCE * divisors).all()):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    return None


def _fitted(
    divisors: torch.Tensor, theta: float, head_dim: int, factor: float, original: float | None
) -> list[tuple[float, float, int]]:
    """Low factor, high factor and context from the smooth part, which is a line over the frequencies.

    The line has two numbers: the low factor is 1 unless the header names the context.
    """
    import torch

    between = (divisors > 1) & (divisors < factor)
    if int(between.sum()) < 2:
        return []
    wide = divisors[between].double()
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64)[between] / head_dim
    frequencies = theta**-steps / (2 * math.pi)
    smooth = (1 / wide - 1 / factor) / (1 - 1 / factor)
    slope = float((smooth[-1] - smooth[0]) / (frequencies[-1] - frequencies[0]))
    start = float(smooth[0] - slope * frequencies[0])
    if slope <= 0 or start >= 0:
        return []
    # smooth = (context * frequency - low) / (high - low)
    low = 1.0 if original is None else round(-start / slope * original, 4)
    spread = low / -start
    context = slope * spread
    return [(low, round(low + spread, 4), round(context))]
