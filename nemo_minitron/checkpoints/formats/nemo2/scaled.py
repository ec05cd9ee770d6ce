"""NeMo 2 configurations of models whose RoPE scaling NeMo has no class for.

A checkpoint's context names the class, so NeMo opens it where this package is installed, and elsewhere says that it is
missing; a configuration of NeMo's own would compute another model there. One class for each that a family writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

from nemo.collections.llm.gpt.model.base import GPTConfig
from nemo.collections.llm.gpt.model.llama import LlamaConfig
from nemo.collections.llm.gpt.model.mixtral import MixtralConfig
from nemo.collections.llm.gpt.model.qwen2 import Qwen2Config
from nemo.collections.llm.gpt.model.qwen3 import Qwen3Config, Qwen3MoEConfig

from nemo_minitron.architecture import Architecture
from nemo_minitron.runtime.rotary import scale_rotary

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = [
    "ScaledGPTConfig",
    "ScaledLlamaConfig",
    "ScaledMixtralConfig",
    "ScaledQwen2Config",
    "ScaledQwen3Config",
    "ScaledQwen3MoEConfig",
]


@dataclass
class _Scaled:
    """Comes before the class that it extends.

    Attributes:
        rotary_scaling: as in :class:`~nemo_minitron.architecture.Architecture`.
    """

    rotary_scaling: Optional[dict[str, Any]] = None  # noqa: UP045 (NeMo evaluates it)

    def configure_model(self, *arguments: Any, **options: Any) -> GPTModel:
        """NeMo's model with the frequencies of its scaling; the scale of the attention is a setting of NeMo's own."""
        model: GPTModel = super().configure_model(*arguments, **options)  # type: ignore[misc]
        constants = Architecture(rotary_base=self.rotary_base, rotary_scaling=self.rotary_scaling)  # type: ignore[attr-defined]
        scale_rotary(model.rotary_pos_emb, constants)
        return model


@dataclass
class ScaledGPTConfig(_Scaled, GPTConfig):
    """A ``GPTConfig`` with scaled RoPE."""


@dataclass
class ScaledLlamaConfig(_Scaled, LlamaConfig):
    """A ``LlamaConfig`` with scaled RoPE."""


@dataclass
class ScaledMixtralConfig(_Scaled, MixtralConfig):
    """A ``MixtralConfig`` with scaled RoPE."""


@dataclass
class ScaledQwen2Config(_Scaled, Qwen2Config):
    """A ``Qwen2Config`` with scaled RoPE."""


@dataclass
class ScaledQwen3Config(_Scaled, Qwen3Config):
    """A ``Qwen3Config`` with scaled RoPE."""


@dataclass
class ScaledQwen3MoEConfig(_Scaled, Qwen3MoEConfig):
    """A ``Qwen3MoEConfig`` with scaled RoPE."""
