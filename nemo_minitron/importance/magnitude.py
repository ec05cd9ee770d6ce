"""Weight magnitude as importance: the L2 norm of a unit's weights. Needs neither data nor a live model."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nemo_minitron.axes import Axis, parameters, split_gate, split_qkv
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.errors import NonFiniteError
from nemo_minitron.importance.scores import Scores
from nemo_minitron.shape import ModelShape, require_uniform

__all__ = ["magnitude_scores"]

_ROWS = 4096  # of a tensor squared at a time


def magnitude_scores(
    checkpoint: Checkpoint, *, fingerprint: str | None = None, progress: Callable[[int], None] | None = None
) -> Scores:
    """Score every unit by the L2 norm of its weights, the baseline of magnitude pruning (Han et al., arXiv 1506.02626).

    The axes table says which weights belong to a unit, for any family: of an FFN neuron its rows of the up- (and
    gate) projection and its column of the down projection; of a query head its rows of Q and column of O; of a query
    group those of its heads, and K and V; of a hidden channel every weight that reads or writes it, embeddings
    included; of an expert all its matrices and its row of the router; of a layer all its parameters. Biases count as
    weights.

    Memory: one tensor of the checkpoint, and O(units).

    Args:
        checkpoint: opened; its tensors are read one at a time.
        fingerprint: of the weights, kept with the scores.
        progress: called with the number of tensors done since its last call.

    Raises:
        CheckpointError: if a tensor cannot be read.
        ShapeError: if layers differ in size.
        NonFiniteError: if a weight is NaN or infinite, naming the tensor.
    """
    shape = checkpoint.shape
    require_uniform(shape, "scoring")
    sums = _Sums(shape)
    for entry in parameters(checkpoint.family, shape):
        name, row, layer = entry.name, entry.row, entry.layer
        tensor = checkpoint.weights.tensor(name)
        total = 0.0
        for dimension, axis in enumerate(row.axes):
            squares = _square_sums(tensor, dimension)
            sums.add(axis, squares, layer, row.expert)
            total = float(squares.sum())
        if not total < float("inf"):
            raise NonFiniteError(f"{checkpoint.path}: {name} holds NaN or infinite weights; mend the checkpoint first")
        if layer is not None:
            sums.layers[layer] += total
            if row.expert is not None:
                sums.experts[layer, row.expert] += total
        if progress is not None:
            progress(1)
    return Scores(
        ffn=sums.ffn.sqrt() if shape.num_moe_experts else sums.ffn[:, 0].sqrt(),
        heads=sums.heads.sqrt(),
        groups=(sums.heads.view(shape.num_layers, shape.num_query_groups, -1).sum(-1) + sums.keys_values).sqrt(),
        hidden=sums.hidden.sqrt(),
        layers=sums.layers.sqrt(),
        experts=sums.experts.sqrt() if shape.num_moe_experts else None,
        shape=shape,
        samples=0,
        tokens=0,
        estimator="magnitude",
        sequence="none",
        batch="none",
        fingerprint=fingerprint,
    )


def _square_sums(tensor: torch.Tensor, dimension: int) -> torch.Tensor:
    """``[size of the dimension]`` float64 sums of squares over all others, without a float64 copy of the tensor."""
    rest = [other for other in range(tensor.ndim) if other != dimension]
    parts = []
    for rows in tensor.split(_ROWS):
        squares = rows.double().square_()
        parts.append(squares.sum(rest) if rest else squares)
    return torch.cat(parts) if dimension == 0 else torch.stack(parts).sum(0)


class _Sums:
    """Sums of squares by unit, float64."""

    def __init__(self, shape: ModelShape) -> None:
        layers, experts, groups = shape.num_layers, shape.num_moe_experts or 1, shape.num_query_groups
        self.shape = shape
        self.hidden = torch.zeros(shape.hidden_size, dtype=torch.float64)
        self.layers = torch.zeros(layers, dtype=torch.float64)
        self.ffn = torch.zeros(layers, experts, shape.ffn_hidden_size, dtype=torch.float64)
        self.experts = torch.zeros(layers, experts, dtype=torch.float64)
        self.heads = torch.zeros(layers, shape.num_attention_heads, dtype=torch.float64)
        self.keys_values = torch.zeros(layers, groups, dtype=torch.float64)

    def add(self, axis: Axis, squares: torch.Tensor, layer: int | None, expert: int | None) -> None:
        """``[size of the axis]`` sums of squares of one parameter."""
        shape = self.shape
        if axis is Axis.HIDDEN:
            self.hidden += squares
        elif layer is None:
            return  # the vocabulary, the only other axis outside the layers
        elif axis is Axis.FFN:
            self.ffn[layer, expert or 0] += squares
        elif axis is Axis.GATED_FFN:
            gate, up = split_gate(squares)
            self.ffn[layer, expert or 0] += gate + up
        elif axis is Axis.HEADS:
            self.heads[layer] += squares.view(shape.num_attention_heads, shape.head_dim).sum(1)
        elif axis is Axis.QKV:
            queries, keys, values = (part.view(-1, shape.head_dim).sum(1) for part in split_qkv(squares, shape))
            self.heads[layer] += queries
            self.keys_values[layer] += keys + values
        elif axis is Axis.EXPERTS:
            self.experts[layer] += squares
