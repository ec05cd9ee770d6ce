"""Choose the units that stay from scores and a target shape. Imports no torch, so that plans can check targets."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from nemo_minitron.axes import KeptUnits
from nemo_minitron.config.stages.pruning import RANDOM
from nemo_minitron.config.tables import ESTIMATORS
from nemo_minitron.errors import ConfigError, NonFiniteError, ShapeError
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    import torch

__all__ = ["UnitScores", "choose_units", "target_shape"]


class UnitScores(Protocol):
    """What choosing uses of :class:`nemo_minitron.importance.Scores`: by global index, higher is more important."""

    @property
    def ffn(self) -> torch.Tensor:
        """MLP neurons, ``[L, F]``; ``[L, E, F]`` of a mixture of experts."""
        ...

    @property
    def experts(self) -> torch.Tensor | None:
        """Experts, ``[L, E]``; None for a dense model."""
        ...

    @property
    def heads(self) -> torch.Tensor:
        """Query heads, ``[L, A]``."""
        ...

    @property
    def groups(self) -> torch.Tensor:
        """Query groups, ``[L, G]``."""
        ...

    @property
    def hidden(self) -> torch.Tensor:
        """Hidden channels, ``[H]``."""
        ...

    @property
    def layers(self) -> torch.Tensor:
        """Layers, ``[L]``."""
        ...

    @property
    def shape(self) -> ModelShape:
        """Sizes of the scored model."""
        ...


def target_shape(
    shape: ModelShape, sizes: Mapping[str, int], *, layers_to_drop: Sequence[int] | None = None
) -> ModelShape:
    """The target shape of a request that names only some sizes.

    A size that is not given stays as it is; so does a size that layers have of their own, layer by layer. Where only
    ``num_query_groups`` is given and all layers are alike, every group keeps all its heads; where ``layers_to_drop`` is
    given, it fixes ``num_layers``.

    Raises:
        ShapeError: with every fault: sizes that do not exist or cannot be reached from ``shape``, layers that are
            not there, or are not named where the model's layers differ in size.
    """
    sizes = dict(sizes)
    if shape.uniform and "num_query_groups" in sizes and "num_attention_heads" not in sizes:
        sizes["num_attention_heads"] = sizes["num_query_groups"] * shape.heads_per_group
    faults, layers, left = [], None, shape
    if layers_to_drop is not None:
        faults = _drop_faults(shape, layers_to_drop)
        remain = shape.num_layers - len(set(layers_to_drop))
        if sizes.setdefault("num_layers", remain) != remain:
            faults.append(
                f"num_layers={sizes['num_layers']}: dropping {len(set(layers_to_drop))} of {shape.num_layers} layers "
                f"leaves {remain}; give one of the two"
            )
        if not faults and not shape.uniform:
            layers = _remaining(shape, layers_to_drop)
            left = shape.of_layers(layers)
    elif not shape.uniform and sizes.get("num_layers", shape.num_layers) != shape.num_layers:
        faults = [f"num_layers={sizes.pop('num_layers')}: the model's layers differ in size; name those to drop"]
    try:
        target = left.replace(**sizes)
    except ShapeError as error:
        raise ShapeError([*faults, *error.faults]) from None
    if faults := [*faults, *shape.prune_faults(target, layers=layers)]:
        raise ShapeError(faults)
    return target


def choose_units(
    scores: UnitScores | None,
    shape: ModelShape,
    target: ModelShape,
    *,
    method: str = "activation",
    seed: int = 1234,
    layers_to_drop: Sequence[int] | None = None,
    vocab: Sequence[int] | None = None,
) -> KeptUnits:
    """The units that stay. Indices ascend, so that keeping everything is the identity.

    Query groups are kept by their own score, then in each kept group the same number of heads by the heads' scores
    (heads of different groups cannot be mixed: they read different keys). Equal scores: the unit of the lower index
    stays.

    Args:
        scores: of the model; None for the random method, or if nothing but ``layers_to_drop`` is removed.
        shape: of the model.
        target: shape to reach. Its layers may have sizes of their own, each those of the layer that stays in its place.
        method: "random" draws units, a baseline of the same shape; the name of an estimator keeps the units with the
            highest scores, and the caller gives scores of that estimator.
        seed: of the random method.
        layers_to_drop: layers to remove whatever their scores (0-based), by either method.
        vocab: token ids that stay, ascending (:func:`nemo_minitron.checkpoints.tokenizer.trimming.choose_vocabulary`);
        None
            keeps all. They fix the target's vocabulary.

    Raises:
        ShapeError: if the target cannot be reached, with every fault, or the scores are of another shape.
        ConfigError: for an unknown method, or no scores where they are needed.
        NonFiniteError: if a score is NaN or infinite.
    """
    if method != RANDOM and method not in ESTIMATORS:
        raise ConfigError(f"method={method!r}: must be one of {', '.join([*ESTIMATORS, RANDOM])}")
    kept_layers = None
    if layers_to_drop is not None and not _drop_faults(shape, layers_to_drop):
        kept_layers = _remaining(shape, layers_to_drop)
    faults = shape.prune_faults(target, layers=kept_layers)
    if target.vocab_size != (shape.vocab_size if vocab is None else len(vocab)):
        faults.append(
            f"vocab_size={target.vocab_size}: {'no' if vocab is None else len(vocab)} token ids are given to keep; "
            "which tokens stay is decided by their frequencies (vocabulary.frequencies)"
        )
    if layers_to_drop is not None:
        faults += _drop_faults(shape, layers_to_drop)
        left = shape.num_layers - len(set(layers_to_drop))
        if left != target.num_layers:
            faults.append(f"num_layers={target.num_layers}: layers_to_drop leaves {left}; give one of the two")
    if faults:
        raise ShapeError(faults)
    if method == RANDOM:
        pick: _Picker = _Random(seed)
    elif scores is not None:
        pick = _Highest(scores, shape)
    elif (kept_layers is not None or target.num_layers == shape.num_layers) and target == shape.of_layers(
        range(shape.num_layers) if kept_layers is None else kept_layers
    ).replace(vocab_size=target.vocab_size):
        pick = _everything  # the layers are named, and nothing else goes
    else:
        raise ConfigError(f"scores: method={method} needs the scores of the model; run `minitron score`")

    layers = kept_layers
    if layers is None:
        layers = pick("layers", (), range(shape.num_layers), target.num_layers)
    ffn, groups, heads, experts, expert_ffn = [], [], [], [], []
    for layer, goal in zip(layers, target.each(), strict=True):
        sizes = shape.at(layer)
        q, neurons = sizes.heads_per_group, (range(sizes.ffn_hidden_size), goal.ffn_hidden_size)
        groups.append(tuple(pick("groups", (layer,), range(sizes.num_query_groups), goal.num_query_groups)))
        heads.append(
            tuple(
                tuple(pick("heads", (layer,), range(group * q, (group + 1) * q), goal.heads_per_group))
                for group in groups[-1]
            )
        )
        if shape.num_moe_experts is None or target.num_moe_experts is None:
            ffn.append(tuple(pick("ffn", (layer,), *neurons)))
        else:
            ffn.append(())
            some = target.num_moe_experts if goal.ffn_hidden_size else 0
            experts.append(tuple(pick("experts", (layer,), range(shape.num_moe_experts), some)))
            expert_ffn.append(tuple(tuple(pick("ffn", (layer, expert), *neurons)) for expert in experts[-1]))
    return KeptUnits(
        layers=tuple(layers),
        hidden=tuple(pick("hidden", (), range(shape.hidden_size), target.hidden_size)),
        ffn=tuple(ffn),
        groups=tuple(groups),
        heads=tuple(heads),
        experts=tuple(experts) if experts else None,
        expert_ffn=tuple(expert_ffn) if expert_ffn else None,
        vocab=tuple(vocab) if vocab is not None else None,
    )


class _Picker(Protocol):
    def __call__(self, axis: str, place: tuple[int, ...], candidates: range, count: int) -> list[int]:
        """``count`` of the candidates, ascending; ``place`` is the layer, or the layer and the expert."""
        ...


def _everything(axis: str, place: tuple[int, ...], candidates: range, count: int) -> list[int]:
    return list(candidates)


class _Random:
    """Random units. A seed gives the same units of an axis, whatever other axes are pruned."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, axis: str, place: tuple[int, ...], candidates: range, count: int) -> list[int]:
        key = f"{self._seed}/{axis}/{'/'.join(map(str, place)) or None}/{candidates.start}"
        return sorted(random.Random(key).sample(candidates, count))  # noqa: S311 - a baseline, not a secret


class _Highest:
    """The units with the highest scores."""

    def __init__(self, scores: UnitScores, shape: ModelShape) -> None:
        if scores.shape != shape:
            raise ShapeError(f"the scores are of a model of {scores.shape}, not of {shape}; score this model first")
        self._values = {name: getattr(scores, name).tolist() for name in ("ffn", "heads", "groups", "hidden", "layers")}
        if scores.experts is not None:
            self._values["experts"] = scores.experts.tolist()

    def __call__(self, axis: str, place: tuple[int, ...], candidates: range, count: int) -> list[int]:
        values = self._values[axis]
        for index in place:
            values = values[index]
        if bad := [i for i in candidates if not abs(values[i]) < float("inf")]:
            where = " ".join(f"{name} {index}" for name, index in zip(("layer", "expert"), place, strict=False))
            raise NonFiniteError(
                f"{where} {axis}: the score of unit {bad[0]} is {values[bad[0]]}; score the model again".lstrip()
            )
        return sorted(sorted(candidates, key=lambda i: (-values[i], i))[:count])


def _remaining(shape: ModelShape, layers_to_drop: Sequence[int]) -> list[int]:
    return [layer for layer in range(shape.num_layers) if layer not in layers_to_drop]


def _drop_faults(shape: ModelShape, layers_to_drop: Sequence[int]) -> list[str]:
    faults = [
        f"layers_to_drop: {layer} is not a layer of the model, which has 0..{shape.num_layers - 1}"
        for layer in layers_to_drop
        if not 0 <= layer < shape.num_layers
    ]
    if len(set(layers_to_drop)) != len(layers_to_drop):
        faults.append(f"layers_to_drop={list(layers_to_drop)}: a layer is named twice")
    if not faults and len(layers_to_drop) == shape.num_layers:
        faults.append(f"layers_to_drop: names all {shape.num_layers} layers; leave at least one")
    return faults
