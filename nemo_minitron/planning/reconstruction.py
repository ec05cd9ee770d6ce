"""The arithmetic of a reconstruction by least squares."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.planning.model import Model

__all__ = ["HOST_FLOAT64", "ReconstructionFlops"]

#: Times that an operation in float64 takes of one of a forward pass, on processors.
HOST_FLOAT64 = 2.0

#: Forward passes of a layer of the pruned model, in parts, while its matrices are refitted one after the other.
_PASSES = 3
#: Ridges that are tried for a matrix, and the solution with all tokens.
_SOLUTIONS = 9


@dataclass(frozen=True)
class ReconstructionFlops:
    """Operations of a reconstruction. Small beside them: norms, the attention scores, and what reads the disk.

    Attributes:
        forward: of both models on the calibration tokens, in their precision.
        float64: of the sums over the tokens and of the solutions.
    """

    forward: float
    float64: float

    @classmethod
    def of(cls, teacher: Model, student: Model, tokens: float) -> ReconstructionFlops:
        """Of a pruned model, whose layers are all alike.

        Args:
            teacher: unpruned.
            student: pruned.
            tokens: of calibration, of all ranks together.
        """
        own, shape = teacher.shape, student.shape
        experts = shape.num_moe_experts or 1
        used = min(experts, teacher.architecture.moe_router_topk or 1) if shape.num_moe_experts else 1
        heads, groups = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
        up = shape.ffn_hidden_size * (2 if student.table.gated else 1)
        readers = [(heads + 2 * groups, 1, 1), (up, used, experts)]  # rows, those of a token, and how many there are
        writers = [(heads, 1, 1), (shape.ffn_hidden_size, used, experts)]  # columns
        sums = solved = 0.0
        for rows, each, count in readers:
            # inputs with inputs, targets with inputs, targets with targets
            sums += each * (shape.hidden_size**2 + own.hidden_size * shape.hidden_size + own.hidden_size**2)
            solved += count * (shape.hidden_size**3 / 3 + 2 * rows * shape.hidden_size**2)
        for columns, each, count in writers:
            sums += each * (columns**2 + columns * shape.hidden_size)
            solved += count * (columns**3 / 3 + 2 * shape.hidden_size * columns**2)
        return cls(
            2.0 * tokens * (_layers(teacher) + _PASSES * _layers(student)),
            shape.num_layers * (2.0 * tokens * sums + _SOLUTIONS * solved),
        )


def _layers(model: Model) -> float:
    """Parameters that a token meets in the layers."""
    parts = model.parts()
    mlp = parts.get("MLP", 0)
    experts = model.shape.num_moe_experts
    if experts:
        mlp = mlp * min(experts, model.architecture.moe_router_topk or 1) // experts
    return parts.get("attention", 0) + mlp
