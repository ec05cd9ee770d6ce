"""The sizes of a model (:class:`ModelShape`); its constants are :mod:`nemo_minitron.architecture`.

Names are Megatron's. Nothing here imports torch, so that plans and configuration errors take no time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_minitron.errors import ShapeError

__all__ = [
    "LAYER_SIZES",
    "SIZES",
    "LayerShape",
    "ModelShape",
    "padded_vocab",
    "require_uniform",
    "share_layers",
    "uniform_faults",
]

#: The sizes of a :class:`ModelShape` that pruning may change, without the vocabulary's. Megatron's configuration has
#: them under the same names.
SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "num_moe_experts",
)

#: Those that a layer may have of its own, and what a layer of size 0 has not.
LAYER_SIZES = {"ffn_hidden_size": "MLP", "num_query_groups": "attention"}


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a decoder layer that may differ from layer to layer, as in the models of Puzzle (arXiv 2411.19146).

    Attributes:
        ffn_hidden_size: width of its MLP; 0 for a layer without an MLP, None for the model's width.
        num_query_groups: its key/value heads; 0 for a layer without attention, None for the model's number. The query
            heads are the model's in every layer with attention.
    """

    ffn_hidden_size: int | None = None
    num_query_groups: int | None = None


@dataclass(frozen=True, eq=False, repr=False)
class ModelShape:
    """The sizes of a GPT-style decoder. All are global: no parallel layout changes them.

    If all layers are alike, the shape is uniform and ``layers`` is None. Otherwise ``layers`` has the sizes of every
    layer, and :meth:`at` returns them; reading ``ffn_hidden_size`` or ``num_query_groups`` raises a ShapeError.

    Attributes:
        num_layers: decoder layers.
        hidden_size: width of the residual stream.
        ffn_hidden_size: width of the MLP (of each half, where the MLP is gated).
        num_attention_heads: query heads.
        num_query_groups: key/value heads.
        head_dim: channels of one head (Megatron's ``kv_channels``). Explicit, because a pruned model
            rarely satisfies ``heads * head_dim == hidden``.
        vocab_size: true vocabulary, without the padding rows that Megatron adds.
        tied_embeddings: the output layer shares the word embedding.
        num_moe_experts: experts of each MLP, or None where it is dense. With experts, ``ffn_hidden_size`` is the width
            of each expert.
        layers: one entry for each layer; None where all are alike.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool = False
    num_moe_experts: int | None = None
    layers: tuple[LayerShape, ...] | None = None

    _MAY_BE_ZERO: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if faults := self.faults():
            raise ShapeError(faults)
        if self.layers is None:
            return
        layers = tuple(LayerShape(**{name: self._size(layer, name) for name in LAYER_SIZES}) for layer in self.layers)
        alike = len(set(layers)) == 1
        object.__setattr__(self, "layers", None if alike else layers)
        for name in LAYER_SIZES:
            if alike:
                object.__setattr__(self, name, getattr(layers[0], name))
            else:
                del vars(self)[name]

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Raises ShapeError for the sizes that layers have of their own; they are no attributes of this shape."""
            if name in LAYER_SIZES:
                raise ShapeError(f"{name}: the layers of this model have sizes of their own; ask shape.at(layer)")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModelShape):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash(tuple(self._values().items()))

    def __repr__(self) -> str:
        return f"ModelShape({', '.join(f'{name}={value!r}' for name, value in self._values().items())})"

    @property
    def uniform(self) -> bool:
        """Whether all layers are alike."""
        return self.layers is None

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head; 0 without attention."""
        return self.num_attention_heads // self.num_query_groups if self.num_query_groups else 0

    def at(self, layer: int | None) -> ModelShape:
        """The sizes of one layer, as a uniform shape with the same number of layers; the shape itself if it is uniform.

        A layer without an MLP has ``ffn_hidden_size`` 0; a layer without attention has ``num_query_groups`` 0 and
        ``num_attention_heads`` 0.

        Args:
            layer: 0-based; None, for what lies outside the layers, gives the shape itself.
        """
        return self if self.layers is None or layer is None else self._each[layer]

    def each(self) -> Sequence[ModelShape]:
        """:meth:`at` of every layer, in order."""
        return (self,) * self.num_layers if self.layers is None else self._each

    @cached_property
    def _each(self) -> tuple[ModelShape, ...]:
        assert self.layers is not None
        known: dict[LayerShape, ModelShape] = {}
        for layer in self.layers:
            sizes = self._values() | dataclasses.asdict(layer) | {"layers": None}
            if not layer.num_query_groups:
                sizes["num_attention_heads"] = 0
            whole = layer.num_query_groups and layer.ffn_hidden_size
            known[layer] = (ModelShape if whole else _PartialShape)(**sizes)
        return tuple(known[layer] for layer in self.layers)

    def _size(self, layer: LayerShape, name: str) -> int:
        own: int | None = getattr(layer, name)
        return vars(self)[name] if own is None else own

    def _values(self) -> dict[str, Any]:
        """The fields that this shape has, in order: without ``layers``, or without the sizes that layers have."""
        mine = vars(self)
        values = {field.name: mine[field.name] for field in dataclasses.fields(self) if field.name in mine}
        if self.layers is None:
            del values["layers"]
        return values

    def faults(self) -> list[str]:
        """Everything that makes these sizes impossible, as one-line messages."""
        faults = [
            f"{name}={value}: must be a whole number of at least 1"
            for name, value in self._values().items()
            if name not in ("tied_embeddings", "layers")
            and not (name == "num_moe_experts" and value is None)
            and not _is_size(value, 0 if name in self._MAY_BE_ZERO else 1)
        ]
        if faults:
            return faults
        if self.layers is not None:
            return self._layer_faults(self.layers)
        if self.num_query_groups and self.num_attention_heads % self.num_query_groups:
            faults.append(_uneven(self.num_attention_heads, self.num_query_groups))
        return faults

    def _layer_faults(self, layers: tuple[LayerShape, ...]) -> list[str]:
        if len(layers) != self.num_layers:
            return [f"layers: {len(layers)} entries for num_layers={self.num_layers}; each layer needs one"]
        faults = []
        for name, part in LAYER_SIZES.items():
            sizes = [self._size(layer, name) for layer in layers]
            faults += [
                f"layer {number}: {name}={size}: must be a whole number, 0 for a layer without {part}"
                for number, size in enumerate(sizes)
                if not _is_size(size, 0)
            ]
            if not any(sizes):
                faults.append(f"layers: {name}=0 in all of them; at least one needs {part}")
        if faults:
            return faults
        return [
            f"layer {number}: {_uneven(self.num_attention_heads, groups)}"
            for number, layer in enumerate(layers)
            if (groups := self._size(layer, "num_query_groups")) and self.num_attention_heads % groups
        ]

    def layout_faults(self, *, tensor: int, pipeline: int = 1, expert: int = 1) -> list[str]:
        """Why this shape cannot be split ``tensor`` ways by columns, ``pipeline`` ways by layers and ``expert`` ways by
        experts; empty if it can. A shape without experts is not split by them.

        Each message names the sizes that would fit.
        """
        faults = []
        for layer, shape in self._kinds():
            for name in ("num_query_groups", "num_attention_heads", "ffn_hidden_size"):
                size = getattr(shape, name)
                if size % tensor:
                    fits = [t for t in range(1, min(size, 64) + 1) if size % t == 0]
                    faults.append(
                        f"{_where(layer)}{name}={size} cannot be split over parallel.tensor={tensor}; it fits "
                        f"parallel.tensor in {fits}"
                    )
        if (experts := self.num_moe_experts or 0) % expert:
            fits = [ways for ways in range(1, min(experts, 64) + 1) if experts % ways == 0]
            faults.append(
                f"num_moe_experts={experts} cannot be shared out over parallel.expert={expert}; it fits "
                f"parallel.expert in {fits}"
            )
        if pipeline > self.num_layers:
            faults.append(
                f"num_layers={self.num_layers} cannot fill {pipeline} stages (parallel.pipeline, times "
                f"virtual_pipeline); use at most {self.num_layers}"
            )
        return faults

    def _kinds(self) -> list[tuple[int | None, ModelShape]]:
        """The number and the shape of the first layer of each kind; None and the shape itself if it is uniform."""
        if self.layers is None:
            return [(None, self)]
        return [(self.layers.index(layer), self.at(self.layers.index(layer))) for layer in dict.fromkeys(self.layers)]

    def pipeline_stage_sizes(self, stages: int) -> list[int]:
        """Number of layers of each pipeline stage, in order: as equal as possible, the first stages having one more.

        Args:
            stages: pipeline stages, times the model chunks of each under a virtual pipeline.

        Raises:
            ShapeError: if there are more stages than layers.
        """
        if faults := self.layout_faults(tensor=1, pipeline=stages):
            raise ShapeError(faults)
        return share_layers(self.num_layers, stages)

    def prune_faults(self, target: ModelShape, *, layers: Sequence[int] | None = None) -> list[str]:
        """Why ``target`` cannot be reached from this shape by removing units; empty if it can.

        Args:
            target: shape to reach.
            layers: the layers of this model that stay, if known. Needed if layers differ in size and not all stay.
        """
        faults = []
        for field in dataclasses.fields(self):
            if field.name in (*LAYER_SIZES, "layers") and not (self.uniform and target.uniform):
                continue
            ours, theirs = getattr(self, field.name), getattr(target, field.name)
            if field.name in ("head_dim", "tied_embeddings", "layers") or None in (ours, theirs):
                if ours != theirs:
                    faults.append(f"{field.name}: pruning keeps it at {ours}, the target asks for {theirs}")
            elif theirs > ours:
                faults.append(f"{field.name}={theirs}: the model has only {ours}")
        if faults:
            return faults
        if self.uniform and target.uniform:
            return _group_faults(self, target)
        if layers is None and not self.uniform and target.num_layers != self.num_layers:
            return [f"num_layers={target.num_layers}: the model's layers differ in size; name those to drop"]
        places = range(target.num_layers) if layers is None else layers
        for place, (layer, theirs) in enumerate(zip(places, target.each(), strict=False)):
            ours = self.at(layer)
            grown = [
                f"{name}={getattr(theirs, name)}: the model has only {getattr(ours, name)}"
                for name in LAYER_SIZES
                if getattr(theirs, name) > getattr(ours, name)
            ]
            of = _where(place) if place == layer else f"layer {place}, from the model's {layer}: "
            faults += [of + fault for fault in grown or _group_faults(ours, theirs)]
        return faults

    def replace(self, **changes: Any) -> ModelShape:
        """A copy with some sizes changed. A changed size applies to every layer.

        Raises:
            ShapeError: if the result is impossible.
        """
        if self.layers is None:
            return dataclasses.replace(self, **changes)
        own = {name: size for name, size in changes.items() if name in LAYER_SIZES}
        given = {"layers": tuple(dataclasses.replace(layer, **own) for layer in self.layers), **_largest(self.layers)}
        return ModelShape(**(self._values() | given | changes))

    def of_layers(self, layers: Sequence[int]) -> ModelShape:
        """The shape of the model with only these layers, with all their units."""
        own = None if self.layers is None else tuple(self.layers[layer] for layer in layers)
        return self.replace(num_layers=len(layers), layers=own)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; read by :meth:`from_dict`."""
        values = self._values()
        if self.layers is not None:
            values["layers"] = [dataclasses.asdict(layer) for layer in self.layers]
        return values

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ModelShape:
        """The shape from the values of :meth:`to_dict`.

        Raises:
            ShapeError: if the sizes are impossible.
            TypeError: if a size is missing or unknown.
        """
        if content.get("layers") is None:
            return cls(**content)
        layers = tuple(LayerShape(**layer) for layer in content["layers"])
        return cls(**{**_largest(layers), **content, "layers": layers})


class _PartialShape(ModelShape):
    """The sizes of a layer that lacks a part, whose sizes are 0. No model has such sizes."""

    _MAY_BE_ZERO = frozenset((*LAYER_SIZES, "num_attention_heads"))

    __hash__ = ModelShape.__hash__


def share_layers(layers: int, stages: int) -> list[int]:
    """So many layers shared out over pipeline stages: as equal as can be, the first ones getting one more."""
    each, more = divmod(layers, stages)
    return [each + (stage < more) for stage in range(stages)]


def require_uniform(shape: ModelShape, what: str) -> None:
    """Refuse a model whose layers differ in size, since ``what`` cannot handle it.

    Raises:
        ShapeError: naming two layers that differ.
    """
    if faults := uniform_faults(shape, what):
        raise ShapeError(faults)


def uniform_faults(shape: ModelShape, what: str) -> list[str]:
    """Why :func:`require_uniform` would refuse a model, for a plan; empty if it would not."""
    if shape.layers is None:
        return []
    other = next(number for number, layer in enumerate(shape.layers) if layer != shape.layers[0])
    sizes = [
        f"layer {number} has " + ", ".join(f"{name}={size}" for name, size in dataclasses.asdict(layer).items())
        for number, layer in ((0, shape.layers[0]), (other, shape.layers[other]))
    ]
    return [
        f"{what}: takes no model whose layers differ in size ({'; '.join(sizes)}); such a model can be pruned, and "
        "written and read in the Hugging Face format"
    ]


def _largest(layers: Iterable[LayerShape]) -> dict[str, int]:
    """The largest sizes of any layer, in place of the model's, if each layer has its own."""
    return {
        name: max(sizes)
        for name in LAYER_SIZES
        if (sizes := [size for layer in layers if isinstance(size := getattr(layer, name), int)])
    }


def _is_size(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _uneven(heads: int, groups: int) -> str:
    return (
        f"num_attention_heads={heads} is not a multiple of num_query_groups={groups}: every group needs the same "
        "number of heads"
    )


def _group_faults(ours: ModelShape, theirs: ModelShape) -> list[str]:
    """Whether groups would need more heads than they have."""
    if theirs.heads_per_group <= ours.heads_per_group:
        return []
    return [
        f"num_attention_heads={theirs.num_attention_heads} in num_query_groups={theirs.num_query_groups} "
        f"needs {theirs.heads_per_group} heads a group; the model's groups have {ours.heads_per_group}"
    ]


def _where(layer: int | None) -> str:
    return "" if layer is None else f"layer {layer}: "


def padded_vocab(vocab_size: int, *, tensor: int, multiple: int = 128) -> int:
    """Vocabulary rows of a model split ``tensor`` ways: the next multiple of ``multiple * tensor``.

    As ``nemo.collections.llm.gpt.model.base.get_vocab_size`` and Megatron's ``vocab_size_with_padding``.
    """
    step = multiple * tensor
    return -(-vocab_size // step) * step
