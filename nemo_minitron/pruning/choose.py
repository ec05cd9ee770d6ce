"""From scores and a target shape to the units that stay. No torch at import, so that plans can check their targets."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from nemo_minitron.axes import KeptUnits
from nemo_minitron.errors import ConfigError, NonFiniteError, ShapeError
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    import torch

__all__ = ["METHODS", "UnitScores", "choose_units", "target_shape"]

METHODS = ("activation", "random")


class UnitScores(Protocol):
    """What choosing needs of :class:`nemo_minitron.importance.Scores`: global indices, higher matters more."""

    @property
    def ffn(self) -> torch.Tensor:
        """``[L, F]``."""
        ...

    @property
    def heads(self) -> torch.Tensor:
        """``[L, A]``."""
        ...

    @property
    def groups(self) -> torch.Tensor:
        """``[L, G]``."""
        ...

    @property
    def hidden(self) -> torch.Tensor:
        """``[H]``."""
        ...

    @property
    def layers(self) -> torch.Tensor:
        """``[L]``."""
        ...

    @property
    def shape(self) -> ModelShape:
        """Of the scored model."""
        ...


def target_shape(
    shape: ModelShape, sizes: Mapping[str, int], *, layers_to_drop: Sequence[int] | None = None
) -> ModelShape:
    """The shape that a request stands for.

    Sizes that are not given stay. Where only ``num_query_groups`` is given, every group keeps all its heads; where
    ``layers_to_drop`` is given, it fixes ``num_layers``.

    Raises:
        ShapeError: with every fault: sizes that do not exist or cannot be reached from ``shape``, layers that are
            not there.
    """
    sizes = dict(sizes)
    if "num_query_groups" in sizes and "num_attention_heads" not in sizes:
        sizes["num_attention_heads"] = sizes["num_query_groups"] * shape.heads_per_group
    faults = []
    if layers_to_drop is not None:
        faults = _drop_faults(shape, layers_to_drop)
        left = shape.num_layers - len(set(layers_to_drop))
        if sizes.setdefault("num_layers", left) != left:
            faults.append(
                f"num_layers={sizes['num_layers']}: dropping {len(set(layers_to_drop))} of {shape.num_layers} layers "
                f"leaves {left}; give one of the two"
            )
    try:
        target = shape.replace(**sizes)
    except ShapeError as error:
        raise ShapeError([*faults, *error.faults]) from None
    if faults := [*faults, *shape.prune_faults(target)]:
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
) -> KeptUnits:
    """The units that stay. Indices ascend, so that keeping everything is the identity.

    Query groups are kept by their own score, then within each kept group the same number of heads by theirs (heads of
    different groups cannot be mixed: they read different keys). Equal scores: the unit of the lower index stays.

    Args:
        scores: of the model; not needed (None) for the random method, nor where ``layers_to_drop`` is all that goes.
        shape: of the model.
        target: shape to reach.
        method: "activation" keeps the highest scores; "random" draws units, the baseline of the same shape.
        seed: of the random method.
        layers_to_drop: layers to remove whatever their scores (0-based), by either method.

    Raises:
        ShapeError: if the target cannot be reached, with every fault, or the scores are of another shape.
        ConfigError: for an unknown method, or no scores where they are needed.
        NonFiniteError: if a score is NaN or infinite.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r}: must be one of {', '.join(METHODS)}")
    faults = shape.prune_faults(target)
    if layers_to_drop is not None:
        faults += _drop_faults(shape, layers_to_drop)
        left = shape.num_layers - len(set(layers_to_drop))
        if left != target.num_layers:
            faults.append(f"num_layers={target.num_layers}: layers_to_drop leaves {left}; give one of the two")
    if faults:
        raise ShapeError(faults)
    if method == "random":
        pick: _Picker = _Random(seed)
    elif scores is not None:
        pick = _Highest(scores, shape)
    elif layers_to_drop is not None and target == shape.replace(num_layers=target.num_layers):
        pick = _everything  # the layers are named, and nothing else goes
    else:
        raise ConfigError("scores: method=activation needs the scores of the model; run `minitron score`")

    if layers_to_drop is not None:
        layers = [layer for layer in range(shape.num_layers) if layer not in layers_to_drop]
    else:
        layers = pick("layers", None, range(shape.num_layers), target.num_layers)
    q = shape.heads_per_group
    ffn, groups, heads = [], [], []
    for layer in layers:
        ffn.append(tuple(pick("ffn", layer, range(shape.ffn_hidden_size), target.ffn_hidden_size)))
        groups.append(tuple(pick("groups", layer, range(shape.num_query_groups), target.num_query_groups)))
        heads.append(
            tuple(
                tuple(pick("heads", layer, range(group * q, (group + 1) * q), target.heads_per_group))
                for group in groups[-1]
            )
        )
    hidden = tuple(pick("hidden", None, range(shape.hidden_size), target.hidden_size))
    return KeptUnits(layers=tuple(layers), hidden=hidden, ffn=tuple(ffn), groups=tuple(groups), heads=tuple(heads))


class _Picker(Protocol):
    def __call__(self, axis: str, layer: int | None, candidates: range, count: int) -> list[int]:
        """``count`` of the candidates, ascending."""
        ...


def _everything(axis: str, layer: int | None, candidates: range, count: int) -> list[int]:
    return list(candidates)


class _Random:
    """Units at random: the same for the same seed, whichever axes are pruned besides."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, axis: str, layer: int | None, candidates: range, count: int) -> list[int]:
        key = f"{self._seed}/{axis}/{layer}/{candidates.start}"
        return sorted(random.Random(key).sample(candidates, count))  # noqa: S311 - a baseline, not a secret


class _Highest:
    """Units of the highest scores."""

    def __init__(self, scores: UnitScores, shape: ModelShape) -> None:
        if scores.shape != shape:
            raise ShapeError(f"the scores are of a model of {scores.shape}, not of {shape}; score this model first")
        self._values = {name: getattr(scores, name).tolist() for name in ("ffn", "heads", "groups", "hidden", "layers")}

    def __call__(self, axis: str, layer: int | None, candidates: range, count: int) -> list[int]:
        values = self._values[axis] if layer is None else self._values[axis][layer]
        if bad := [i for i in candidates if not abs(values[i]) < float("inf")]:
            where = axis if layer is None else f"layer {layer} {axis}"
            raise NonFiniteError(f"{where}: the score of unit {bad[0]} is {values[bad[0]]}; score the model again")
        return sorted(sorted(candidates, key=lambda i: (-values[i], i))[:count])


def _drop_faults(shape: ModelShape, layers_to_drop: Sequence[int]) -> list[str]:
    found = [
        f"layers_to_drop: {layer} is not a layer of the model, which has 0..{shape.num_layers - 1}"
        for layer in layers_to_drop
        if not 0 <= layer < shape.num_layers
    ]
    if len(set(layers_to_drop)) != len(layers_to_drop):
        found.append(f"layers_to_drop={list(layers_to_drop)}: a layer is named twice")
    if not found and len(layers_to_drop) == shape.num_layers:
        found.append(f"layers_to_drop: names all {shape.num_layers} layers; leave at least one")
    return found
