"""A model without weights, as plans use it: sizes and constants."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_minitron import axes
from nemo_minitron.architecture import Architecture
from nemo_minitron.errors import ShapeError
from nemo_minitron.shape import ModelShape, padded_vocab

__all__ = ["Model", "pipeline_stage_parameters"]


@dataclass(frozen=True)
class Model:
    """Sizes and constants of a model that need not exist yet.

    Attributes:
        shape: its sizes.
        architecture: its constants.
    """

    shape: ModelShape
    architecture: Architecture = field(default_factory=Architecture)

    @property
    def table(self) -> axes.Family:
        """Its family's parameters."""
        return axes.family(self.architecture.family)

    @property
    def parameters(self) -> int:
        """Exact number of parameters, tied embeddings counted once."""
        return axes.parameter_count(self.table, self.shape)

    def parts(self) -> dict[str, int]:
        """Number of parameters of embedding, attention, MLP, norms and output layer; empty parts are left out."""
        counts = dict.fromkeys(("embedding", "attention", "MLP", "norms", "output layer"), 0)
        for entry in axes.parameters(self.table, self.shape):
            counts[_part(entry, self.table)] += entry.count
        return {part: count for part, count in counts.items() if count}


def _part(entry: axes.Entry, table: axes.Family) -> str:
    if "norm" in entry.name:
        return "norms"
    if entry.name == table.output:
        return "output layer"
    if entry.name in table.first:
        return "embedding"
    return "attention" if entry.row.part == "attention" else "MLP"


def pipeline_stage_parameters(
    model: Model, *, tensor: int, pipeline: int = 1, virtual_pipeline: int | None = None
) -> list[dict[str, tuple[int, ...]]]:
    """The parameters that each rank of a layout holds.

    Args:
        model: the model.
        tensor, pipeline, virtual_pipeline: parallel sizes.

    Returns:
        For each pipeline stage, canonical name to local shape, the same on all its tensor-parallel ranks; vocabularies
        with Megatron's padding. Where embeddings are tied, the last of several stages holds a copy under the name of
        the output layer.

    Raises:
        ShapeError: if the layout cannot split the model.
    """
    chunks = virtual_pipeline or 1
    if faults := model.shape.layout_faults(tensor=tensor, pipeline=pipeline * chunks):
        raise ShapeError(faults)
    padded = model.shape.replace(vocab_size=padded_vocab(model.shape.vocab_size, tensor=tensor))
    sizes = padded.pipeline_stage_sizes(pipeline * chunks)
    # layers go virtual stage by virtual stage, pipeline rank by pipeline rank within one
    rank_of_layer = [run % pipeline for run, size in enumerate(sizes) for _ in range(size)]
    ranks: list[dict[str, tuple[int, ...]]] = [{} for _ in range(pipeline)]

    def local(entry: axes.Entry) -> tuple[int, ...]:
        cut = entry.row.tensor_parallel_dim
        return tuple(size // tensor if dim == cut else size for dim, size in enumerate(entry.shape))

    for entry in axes.parameters(model.table, padded):
        outer = 0 if entry.name in model.table.first else pipeline - 1
        ranks[outer if entry.layer is None else rank_of_layer[entry.layer]][entry.name] = local(entry)
    if padded.tied_embeddings and pipeline > 1:
        ranks[-1][model.table.output] = local(axes.entry(model.table, padded, model.table.output))
    return ranks
