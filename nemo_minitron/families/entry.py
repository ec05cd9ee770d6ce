"""What a model family is: the axes of its parameters, and what transformers and NeMo call them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal

__all__ = ["Axis", "Family", "HFFamily", "NeMo2Family", "Parameter"]


class Axis(Enum):
    """What one dimension of a parameter ranges over."""

    HIDDEN = "hidden"  # channels of the residual stream
    FFN = "ffn"  # MLP neurons
    GATED_FFN = "gated_ffn"  # all gates, then all up-projections: 2 x neurons
    HEADS = "heads"  # query heads x head_dim, heads in group order
    QKV = "qkv"  # per group: its query heads, its key head, its value head, each x head_dim
    VOCAB = "vocab"
    HEAD_DIM = "head_dim"  # channels within a head (QK norm)
    EXPERTS = "experts"  # experts of a mixture (rows of its router)


@dataclass(frozen=True)
class Parameter:
    """One row of a family's table.

    Attributes:
        axes: the axis of each dimension, outermost first.
        tensor_parallel_dim: the dimension that TP cuts, or None where every TP rank holds all of it.
        expert: which expert of its layer the parameter belongs to; set by :func:`nemo_minitron.axes.parameters`, None
            outside experts.
        part: what of its layer it belongs to, the norm before it included; a layer without that part does not have it.
            Left None, :class:`Family` sets it by the name: "attention" below ``self_attention.``, or else "mlp". None
            outside the layers.
    """

    axes: tuple[Axis, ...]
    tensor_parallel_dim: int | None = None
    expert: int | None = None
    part: Literal["attention", "mlp"] | None = None


@dataclass(frozen=True)
class HFFamily:
    """A family in transformers.

    Attributes:
        architecture: class that is written.
        model_type: transformers' key of it.
        reads: classes that are read, with what their configuration takes for keys that a ``config.json`` leaves out.
        needs: keys and the values that the axes table stands for; another value is refused.
        writes: keys and values that are written beside the sizes and constants.
        layer: canonical name below ``decoder.layers.N.`` -> names below ``model.layers.N.``.
        expert: canonical name below ``...local_experts.E.`` -> names below ``model.layers.N.``, with ``{}`` for ``E``.
        outer: canonical name -> name, outside the layers.
        by_layer: class and type of models whose layers have sizes of their own (``block_configs``), one of ``reads``;
            None where transformers' users know none.
        windowed: class and type of models all of whose layers attend within a sliding window, the class one of
            ``reads``; None where such models are refused.
        epsilon: key of the norms' epsilon.
        width: key of the MLP's width; with experts, of each expert's.
        experts: key of the number of experts.
        normalized: key that says whether the weights of a token's experts are normalised to sum to 1; None: they are.
        other_names: other names of keys, as some releases write them, and the keys.
        fused: canonical names, as in ``layer`` and ``expert``, -> names below ``model.layers.N.`` in files where all
            experts of a layer are one tensor ``[E, ...]``, gates before up-projections; as transformers 5 holds them,
            and saves them if told to. Names that are not there stay as they are.
        unused: keys that have no meaning in these models, and why.
    """

    architecture: str
    model_type: str
    reads: Mapping[str, Mapping[str, Any]]
    needs: Mapping[str, Any]
    writes: Mapping[str, Any]
    layer: Mapping[str, tuple[str, ...]]
    outer: Mapping[str, str]
    expert: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_layer: tuple[str, str] | None = None
    windowed: tuple[str, str] | None = None
    epsilon: str = "rms_norm_eps"
    width: str = "intermediate_size"
    experts: str = "num_local_experts"
    normalized: str | None = None
    other_names: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NeMo2Family:
    """A family in NeMo 2. The defaults are for one that NeMo has no classes for: a ``GPTConfig`` then says it all.

    Attributes:
        module: below ``nemo.collections.llm.gpt.model``.
        config, model: classes in it that are written.
        reads: beginnings of the names of configuration classes that may be of this family.
        rotary_percent: what the configuration takes where a file is silent.
        scaled: class that is written where RoPE is scaled as Llama 3's is; None where NeMo has none.
        windowed: classes that are written where all layers attend within a sliding window; None where NeMo has none.
    """

    module: str = "base"
    config: str = "GPTConfig"
    model: str = "GPTModel"
    reads: tuple[str, ...] = ("GPTConfig",)
    rotary_percent: float = 1.0
    scaled: str | None = None
    windowed: NeMo2Family | None = None


@dataclass(frozen=True)
class Family:
    """A model family as data, for algorithms and formats. No algorithm compares a family's name.

    Attributes:
        name: key in :data:`nemo_minitron.families.FAMILIES`.
        layer: parameters of one decoder layer, by name below ``decoder.layers.N.``.
        first: parameters before the layers (first pipeline stage).
        last: parameters after the layers (last pipeline stage).
        expert: of a mixture of experts, parameters of one expert, by name below
            ``decoder.layers.N.mlp.experts.local_experts.E.``; empty where the MLP is dense.
        output: name of the output layer, absent where embeddings are tied.
        activation: of the MLP: "silu", "gelu_tanh" or "squared_relu".
        normalization: Megatron's name: "RMSNorm" or "LayerNorm".
        zero_centered_norm: norm weights are stored minus one (``layernorm_zero_centered_gamma``, NeMo's "layernorm1p").
        partial_rotary: RoPE may turn a part of each head; elsewhere it turns all of it.
        scaled_embedding: embeddings are multiplied by the root of the hidden size before the first layer.
        layer_types: layers are of two types, as :attr:`~nemo_minitron.architecture.Architecture.layer_types` says: full
            attention, and attention within a sliding window with a rotary base of its own.
        hf: names in transformers; None if transformers does not have the family.
        nemo2: names in NeMo 2; None if NeMo 2 does not have the family.
        nemo1: keys of a NeMo 1 ``model_config.yaml`` with the family's values; None if NeMo 1 cannot hold the family.
        note: how it differs from Llama, in a few words.
    """

    name: str
    layer: dict[str, Parameter]
    first: dict[str, Parameter]
    last: dict[str, Parameter]
    expert: dict[str, Parameter] = field(default_factory=dict)
    output: str = "output_layer.weight"
    activation: str = "silu"
    normalization: str = "RMSNorm"
    zero_centered_norm: bool = False
    partial_rotary: bool = False
    scaled_embedding: bool = False
    layer_types: bool = False
    hf: HFFamily | None = None
    nemo2: NeMo2Family | None = None
    nemo1: Mapping[str, Any] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        """Set in each row of a layer the part that it belongs to."""
        for field_name in ("layer", "expert"):
            rows = {
                name: row
                if row.part
                else replace(row, part="attention" if name.startswith("self_attention.") else "mlp")
                for name, row in getattr(self, field_name).items()
            }
            object.__setattr__(self, field_name, rows)

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate beside its up-projection."""
        return any(Axis.GATED_FFN in row.axes for row in (*self.layer.values(), *self.expert.values()))

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return "self_attention.linear_qkv.bias" in self.layer

    @property
    def normalizes_topk(self) -> bool:
        """Whether the weights of a token's experts are normalised in every model of the family."""
        return self.hf is None or self.hf.normalized is None

    @property
    def scales_rotary(self) -> bool:
        """Whether models of the family may have scaled RoPE."""
        return self.hf is None or "rope_scaling" not in self.hf.needs

    @property
    def qk_layernorm(self) -> bool:
        """Whether each head's queries and keys are normalised."""
        return "self_attention.q_layernorm.weight" in self.layer

    @property
    def post_norms(self) -> bool:
        """Whether the outputs of attention and MLP are normalised before they are added to the residual stream."""
        return "mlp.linear_fc2.post_layernorm.weight" in self.layer
