"""The units that survive pruning, as scores, search, checkpoint pruning and live transforms exchange them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from nemo_minitron.shape import LayerShape, ModelShape

__all__ = ["KeptUnits"]

_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(?=\.)")
_Rows = tuple[tuple[int, ...], ...]
_EXPERT = re.compile(r"(\.local_experts\.)(\d+)(?=\.)")


@dataclass(frozen=True)
class KeptUnits:
    """The units that survive pruning, by global index in the unpruned model. The order given is the order kept.

    ``ffn``, ``groups``, ``heads``, ``experts`` and ``expert_ffn`` have one entry for each *kept* layer. Layers may keep
    different numbers of neurons and groups; a part whose entry is empty is removed with its norm.

    Attributes:
        layers: kept layers, ascending.
        hidden: kept channels of the residual stream, the same in every layer.
        ffn: per kept layer, the kept neurons; of a mixture of experts, an empty tuple.
        groups: per kept layer, the kept query groups.
        heads: per kept layer and kept group, the kept query heads (global head index), equally many in each group, and
            in all in each layer with attention.
        experts: per kept layer, the kept experts; None where the MLPs are dense.
        expert_ffn: per kept layer and kept expert, the kept neurons of that expert; None where the MLPs are dense.
        vocab: kept token ids, ascending; None keeps all of them.
    """

    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    ffn: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[tuple[int, ...], ...], ...] = field(repr=False)
    experts: tuple[tuple[int, ...], ...] | None = None
    expert_ffn: tuple[tuple[tuple[int, ...], ...], ...] | None = field(default=None, repr=False)
    vocab: tuple[int, ...] | None = field(default=None, repr=False)

    @classmethod
    def everything(cls, shape: ModelShape) -> KeptUnits:
        """Keep every unit: pruning with this is the identity."""
        each, experts = shape.each(), shape.num_moe_experts
        neurons = [tuple(range(sizes.ffn_hidden_size)) for sizes in each]
        there = [range((experts or 0) if width else 0) for width in neurons]
        return cls(
            layers=tuple(range(shape.num_layers)),
            hidden=tuple(range(shape.hidden_size)),
            ffn=tuple(neurons) if experts is None else ((),) * shape.num_layers,
            groups=tuple(tuple(range(sizes.num_query_groups)) for sizes in each),
            heads=tuple(_all_heads(sizes) for sizes in each),
            experts=None if experts is None else tuple(map(tuple, there)),
            expert_ffn=None
            if experts is None
            else tuple((width,) * len(some) for width, some in zip(neurons, there, strict=True)),
        )

    def target(self, shape: ModelShape) -> ModelShape:
        """The shape that remains of ``shape``."""
        layers = tuple(
            LayerShape(len(neurons), len(groups)) for neurons, groups in zip(self._neurons(), self.groups, strict=True)
        )
        return shape.replace(
            num_layers=len(self.layers),
            hidden_size=len(self.hidden),
            ffn_hidden_size=max(layer.ffn_hidden_size or 0 for layer in layers),
            num_query_groups=max(layer.num_query_groups or 0 for layer in layers),
            num_attention_heads=max(sum(map(len, heads)) for heads in self.heads),
            num_moe_experts=None if self.experts is None else max(map(len, self.experts)),
            vocab_size=shape.vocab_size if self.vocab is None else len(self.vocab),
            layers=layers,
        )

    def _neurons(self) -> _Rows:
        """Per kept layer, the kept neurons; of a mixture those of the first expert, as all have equally many."""
        if self.expert_ffn is None:
            return self.ffn
        return tuple(experts[0] if experts else () for experts in self.expert_ffn)

    def compose(self, later: KeptUnits) -> KeptUnits:
        """Units of the unpruned model that stay after pruning with these and then with ``later``.

        Args:
            later: units of the model that is pruned with these.
        """
        at = later.layers

        def pick(rows: _Rows, further: _Rows) -> _Rows:
            return tuple(
                tuple(rows[layer][index] for index in chosen) for layer, chosen in zip(at, further, strict=True)
            )

        flat = tuple(tuple(head for group in layer for head in group) for layer in self.heads)
        experts = expert_ffn = None
        if self.experts is not None and self.expert_ffn is not None and later.experts and later.expert_ffn:
            experts = pick(self.experts, later.experts)
            expert_ffn = tuple(
                tuple(
                    tuple(self.expert_ffn[layer][expert][index] for index in neurons)
                    for expert, neurons in zip(kept, chosen, strict=True)
                )
                for layer, kept, chosen in zip(at, later.experts, later.expert_ffn, strict=True)
            )
        vocab = self.vocab
        if later.vocab is not None:
            vocab = later.vocab if vocab is None else tuple(vocab[token] for token in later.vocab)
        return KeptUnits(
            layers=tuple(self.layers[layer] for layer in at),
            hidden=tuple(self.hidden[channel] for channel in later.hidden),
            ffn=pick(self.ffn, later.ffn),
            groups=pick(self.groups, later.groups),
            heads=tuple(
                tuple(tuple(flat[layer][head] for head in group) for group in groups)
                for layer, groups in zip(at, later.heads, strict=True)
            ),
            experts=experts,
            expert_ffn=expert_ffn,
            vocab=vocab,
        )

    def source(self, name: str) -> str:
        """Canonical name of a parameter of the pruned model -> name of the unpruned parameter that it is cut from."""
        layer = _LAYER.match(name)
        if layer is None:
            return name
        position = int(layer[2])
        if self.experts is not None:
            kept = self.experts[position]
            name = _EXPERT.sub(lambda match: f"{match[1]}{kept[int(match[2])]}", name)
        return _LAYER.sub(rf"\g<1>{self.layers[position]}", name, count=1)

    def faults(self, shape: ModelShape) -> list[str]:
        """Why these units are impossible for a model of ``shape``; empty if they are possible."""
        faults = _indices("layers", self.layers, shape.num_layers) + _indices("hidden", self.hidden, shape.hidden_size)
        if list(self.layers) != sorted(self.layers):
            faults.append("layers: must ascend")
        if self.vocab is not None:
            faults += _indices("vocab", self.vocab, shape.vocab_size)
            if list(self.vocab) != sorted(self.vocab):
                faults.append("vocab: must ascend")
        mixture = shape.num_moe_experts is not None
        for name in ("experts", "expert_ffn"):
            if (getattr(self, name) is not None) is not mixture:
                faults.append(
                    f"{name}: is {'needed for' if mixture else 'not for'} a model of {shape.num_moe_experts} experts"
                )
        for name in ("ffn", "groups", "heads", "experts", "expert_ffn"):
            rows = getattr(self, name)
            if rows is not None and len(rows) != len(self.layers):
                faults.append(f"{name}: {len(rows)} layers of indices for {len(self.layers)} kept layers")
        if faults:
            return faults
        for index, layer in enumerate(self.layers):
            faults += self._attention_faults(index, shape.at(layer)) + self._mlp_faults(index, shape.at(layer))
        for name, rows in (("ffn", self._neurons()), ("groups", self.groups)):
            if not any(rows):
                faults.append(f"{name}: nothing is kept in any layer")
        for name, counts in (
            ("heads", {sum(map(len, indices)) for indices in self.heads} - {0}),
            ("experts", {len(indices) for indices in self.experts or ()} - {0}),
        ):
            if len(counts) > 1:
                faults.append(f"{name}: layers keep different numbers ({sorted(counts)}); all need the same")
        return faults

    def _attention_faults(self, index: int, shape: ModelShape) -> list[str]:
        """``shape`` has the sizes of the layer, as in :meth:`_mlp_faults`."""
        layer, q = self.layers[index], shape.heads_per_group
        faults = _indices(f"layer {layer} groups", self.groups[index], shape.num_query_groups, least=0)
        if len(self.heads[index]) != len(self.groups[index]):
            return [*faults, f"layer {layer} heads: one row of heads is needed for each kept group"]
        for group, heads in zip(self.groups[index], self.heads[index], strict=True):
            faults += _indices(f"layer {layer} group {group} heads", heads, shape.num_attention_heads)
            if any(head // max(q, 1) != group for head in heads):
                faults.append(f"layer {layer} group {group}: a kept head belongs to another group")
        if len({len(heads) for heads in self.heads[index]}) > 1:
            faults.append(f"layer {layer}: groups keep different numbers of heads")
        return faults

    def _mlp_faults(self, index: int, shape: ModelShape) -> list[str]:
        layer = self.layers[index]
        if self.experts is None or self.expert_ffn is None:
            return _indices(f"layer {layer} ffn", self.ffn[index], shape.ffn_hidden_size, least=0)
        faults = _indices(f"layer {layer} experts", self.experts[index], shape.num_moe_experts or 0, least=0)
        if self.ffn[index]:
            faults.append(f"layer {layer} ffn: must be empty, the neurons of experts are in expert_ffn")
        if len(self.expert_ffn[index]) != len(self.experts[index]):
            return [*faults, f"layer {layer} expert_ffn: one row of neurons is needed for each kept expert"]
        for expert, neurons in zip(self.experts[index], self.expert_ffn[index], strict=True):
            faults += _indices(f"layer {layer} expert {expert} ffn", neurons, shape.ffn_hidden_size)
        if len(counts := {len(neurons) for neurons in self.expert_ffn[index]}) > 1:
            faults.append(f"layer {layer} ffn: experts keep different numbers ({sorted(counts)}); all need the same")
        return faults


def _all_heads(sizes: ModelShape) -> _Rows:
    """The query heads of a layer, group by group."""
    q = sizes.heads_per_group
    return tuple(tuple(range(group * q, (group + 1) * q)) for group in range(sizes.num_query_groups))


def _indices(name: str, indices: tuple[int, ...], size: int, *, least: int = 1) -> list[str]:
    faults = []
    if len(indices) < least:
        faults.append(f"{name}: nothing is kept")
    if len(set(indices)) != len(indices):
        faults.append(f"{name}: an index is repeated")
    if any(not 0 <= index < size for index in indices):
        where = f"outside 0..{size - 1}" if size else "in a part that the layer lacks"
        faults.append(f"{name}: an index lies {where}")
    return faults
