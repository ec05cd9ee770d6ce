"""Why llama.cpp cannot compute a model: what its architectures lack (``src/models/*.cpp`` of llama.cpp)."""

from __future__ import annotations

import math
from typing import Any

from nemo_minitron import axes
from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.formats.gguf.architectures import WRITTEN, written_as
from nemo_minitron.shape import ModelShape, uniform_faults

__all__ = ["gguf_faults"]

_ADVICE = "export it as hf"
#: Architectures -> types of RoPE scaling that they compute.
_SCALINGS: dict[str, tuple[str, ...]] = {"llama": ("llama3", "linear", "yarn"), "gemma3": ("linear",), "nemotron": ()}
_OTHERS = ("linear", "yarn")
#: Keys of "yarn" that llama.cpp has another formula for, or none.
_YARN = ("mscale", "mscale_all_dim")


def gguf_faults(shape: ModelShape, architecture: Architecture) -> list[str]:
    """Why a model cannot be written as GGUF; empty if it can."""
    family = architecture.family
    name = written_as(family, shape)
    if name is None:
        return [
            f"format=gguf: llama.cpp has no architecture for the family {family!r} here; it has them for "
            f"{', '.join(WRITTEN)}; {_ADVICE}"
        ]
    if faults := uniform_faults(shape, "format=gguf"):
        return faults
    return [
        f"format=gguf: {fault}; {_ADVICE}"
        for fault in (*_attention(shape, architecture), *_scaling(name, architecture), *_own(name, shape, architecture))
    ]


def _attention(shape: ModelShape, architecture: Architecture) -> list[str]:
    window = architecture.sliding_window
    # a window as long as the longest sequence hides nothing
    if architecture.windowed and window is not None and window < architecture.max_position_embeddings:
        return [
            f"sliding_window={window}: llama.cpp's architecture for the family {architecture.family!r} attends to all "
            "tokens, and would compute another model"
        ]
    if architecture.rotary_percent != 1 and not axes.family(architecture.family).partial_rotary:
        return [f"partial_rotary_factor={architecture.rotary_percent}: llama.cpp turns whole heads in this family"]
    return []


def _scaling(name: str, architecture: Architecture) -> list[str]:
    scaling: dict[str, Any] = architecture.rotary_scaling or {}
    kind = architecture.rotary_type
    if kind != "default" and kind not in _SCALINGS.get(name, _OTHERS):
        return [f"rope_scaling of type {kind!r}: llama.cpp has none in the architecture {name!r}"]
    faults = [f"rope_scaling.{key}={scaling[key]!r}: llama.cpp has no such setting" for key in _YARN if key in scaling]
    if (given := scaling.get("attention_factor")) is not None:
        usual = 0.1 * math.log(scaling["factor"]) + 1
        if not math.isclose(given, usual, rel_tol=1e-6):
            faults.append(f"rope_scaling.attention_factor={given!r}: llama.cpp takes {usual:.6g} for this factor")
    return faults


def _own(name: str, shape: ModelShape, architecture: Architecture) -> list[str]:
    faults = []
    wide = shape.num_attention_heads * shape.head_dim
    if name == "nemotron" and wide != shape.hidden_size:
        faults.append(
            f"num_attention_heads={shape.num_attention_heads} of head_dim={shape.head_dim} are {wide} wide: llama.cpp "
            f"wants hidden_size={shape.hidden_size} in the architecture 'nemotron'"
        )
    if architecture.moe_router_pre_softmax:
        faults.append("norm_topk_prob=false: llama.cpp normalises the weights of a token's experts in this family")
    if name == "gemma3":
        # the 27B model is known by its 62 layers
        known = shape.hidden_size // shape.num_attention_heads if shape.num_layers == 62 else shape.head_dim
        scalar = architecture.query_pre_attn_scalar
        if (shape.head_dim if scalar is None else scalar) != known:
            faults.append(
                f"query_pre_attn_scalar={scalar:g}: llama.cpp takes {known} for a Gemma 3 of {shape.num_layers} layers"
            )
    return faults
