"""The shapes of iterative pruning, from the model's shape to the target in several rounds."""

from __future__ import annotations

from nemo_minitron.errors import ShapeError
from nemo_minitron.shape import ModelShape, require_uniform

__all__ = ["SPACINGS", "intermediate_shapes"]

SPACINGS = ("geometric", "linear")


def intermediate_shapes(
    shape: ModelShape,
    target: ModelShape,
    rounds: int,
    *,
    spacing: str = "geometric",
    tensor: int = 1,
    pipeline: int = 1,
) -> list[ModelShape]:
    """Shape after each round; the last is ``target``.

    Every axis goes from its size to the target's in equal ratios ("geometric") or equal steps ("linear"), rounded to a
    size that the layout can hold. Each shape can be pruned from the one before. Rounds in which nothing would change
    are left out, so there may be fewer shapes than ``rounds``.

    Args:
        shape, target: start and end; the vocabulary is the target's from the first round on, since scores do not
            choose it.
        rounds: at least 1.
        spacing: one of :data:`SPACINGS`.
        tensor, pipeline: layout in which the shapes in between are scored.

    Raises:
        ShapeError: if ``target`` cannot be reached from ``shape``, the layout cannot hold one of the two, or layers
            differ in size.
    """
    for given in (shape, target):
        require_uniform(given, "pruning in rounds")
    faults = shape.prune_faults(target)
    for what, given in (("model", shape), ("target", target)):
        faults += [f"{what}: {fault}" for fault in given.layout_faults(tensor=tensor, pipeline=pipeline)]
    if faults:
        raise ShapeError(faults)
    shapes, before = [], shape

    def between(start: int, end: int, done: int, multiple: int, least: int = 1) -> int:
        share = done / rounds
        size = start * (end / start) ** share if spacing == "geometric" else start + (end - start) * share
        rounded = max(round(size / multiple), 1) * multiple
        return min(max(rounded, end, least), start)

    for done in range(1, rounds):
        # What splits over tensor parallel must stay a multiple of it; its ends are, so the clamps keep it one.
        groups = between(shape.num_query_groups, target.num_query_groups, done, tensor)
        per_group = between(shape.heads_per_group, target.heads_per_group, done, 1)
        experts = (
            None
            if shape.num_moe_experts is None or target.num_moe_experts is None
            else between(shape.num_moe_experts, target.num_moe_experts, done, 1)
        )
        now = target.replace(
            num_layers=between(shape.num_layers, target.num_layers, done, 1, pipeline),
            hidden_size=between(shape.hidden_size, target.hidden_size, done, 1),
            ffn_hidden_size=between(shape.ffn_hidden_size, target.ffn_hidden_size, done, tensor),
            num_query_groups=groups,
            num_attention_heads=groups * per_group,
            num_moe_experts=experts,
        )
        if now not in (before, target):
            shapes.append(now)
            before = now
    return [*shapes, target]
