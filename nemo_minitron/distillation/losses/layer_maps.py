"""Which layer of the student learns from which of the teacher, and on which pipeline stage each lives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_minitron.config import IntermediateConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    from nemo_minitron.runtime.groups import ParallelLayout

__all__ = ["LayerMaps", "layer_maps", "layer_ranks", "proportional"]


def proportional(student: int, teacher: int) -> dict[int, int]:
    """Map each student layer (0-based) to the teacher layer at the same share of the depth; the last to the last.

    The uniform mapping of TinyBERT (arXiv 1909.10351, section 3), for depths of any ratio.
    """
    return {layer: max(0, (2 * (layer + 1) * teacher + student) // (2 * student) - 1) for layer in range(student)}


@dataclass(frozen=True)
class LayerMaps:
    """Student layer -> teacher layer, 0-based, for each loss between layers; empty where the loss is not configured.

    Attributes:
        hidden: for the losses of hidden states (a layer's output).
        attention: for the losses of attention relations.
    """

    hidden: dict[int, int]
    attention: dict[int, int]


def layer_maps(
    config: IntermediateConfig,
    student: ModelShape,
    teacher: ModelShape,
    *,
    tensor: int = 1,
    kept_layers: Sequence[int] | None = None,
) -> LayerMaps:
    """The maps of a configuration.

    Args:
        config: an explicit map wins.
        student, teacher: their shapes.
        tensor: tensor-parallel size, which the relation heads are split over.
        kept_layers: the teacher's layers that a student pruned from it kept: each student layer maps to the layer that
            it was. None maps layers by their share of the depth.

    Raises:
        ConfigError: for layers that a model does not have, and relation heads that do not fit; all at once.
    """
    automatic = proportional(student.num_layers, teacher.num_layers)
    if kept_layers is not None:
        automatic = dict(enumerate(kept_layers))
    hidden = automatic if config.layers is None else dict(config.layers)
    attention = dict(config.attention_layers or {max(automatic): automatic[max(automatic)]})
    faults = []
    for name, layers in (("layers", hidden), ("attention_layers", attention)):
        for model, shape, given in (("student", student, layers.keys()), ("teacher", teacher, layers.values())):
            faults += [
                f"intermediate.{name}: the {model} has no layer {layer}; its layers are 0 to {shape.num_layers - 1}"
                for layer in sorted(set(given))
                if not 0 <= layer < shape.num_layers
            ]
    if heads := config.relation_heads:
        if heads % tensor:
            faults.append(f"intermediate.relation_heads={heads}: is not a multiple of parallel.tensor={tensor}")
        for model, shape in (("student", student), ("teacher", teacher)):
            for what, count in (("queries", shape.num_attention_heads), ("keys", shape.num_query_groups)):
                if count * shape.head_dim % heads:
                    faults.append(
                        f"intermediate.relation_heads={heads}: does not divide the {count * shape.head_dim} channels "
                        f"of the {model}'s {what}"
                    )
    if faults:
        raise ConfigError(faults)
    return LayerMaps(hidden if config.hidden else {}, attention if config.relation_heads else {})


def layer_ranks(shape: ModelShape, layout: ParallelLayout) -> list[int]:
    """The pipeline rank of each layer, under any number of stages and virtual stages."""
    sizes = shape.pipeline_stage_sizes(layout.pipeline_stages)
    return [stage % layout.pipeline for stage, size in enumerate(sizes) for _ in range(size)]
