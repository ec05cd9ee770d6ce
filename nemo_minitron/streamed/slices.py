"""Read a part of a model from a Megatron distributed checkpoint, by torch's own reader.

Megatron's reader takes every shard that this process does not ask for to be on another rank. A process that is alone
cannot ask for a part of a tensor with it, such as one layer of all layers' stacked weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

__all__ = ["ReadSlices"]


class _Slices(LoadPlanner):
    """Fills the local part of each sharded tensor, wherever the file's own parts begin and end."""

    def __init__(self, tensors: list[ShardedTensor]) -> None:
        self.tensors = {(tensor.key, tuple(tensor.global_offset)): tensor for tensor in tensors}
        self.metadata: Metadata | None = None

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for (key, offset), tensor in self.tensors.items():
            chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(_sizes(tensor)))
            items += create_read_items_for_chunk_list(key, self.metadata.state_dict_metadata[key], [chunk])  # type: ignore[arg-type]
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("tensors alone are asked for")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        index = read_item.dest_index
        assert index.offset is not None
        tensor = self.tensors[index.fqn, tuple(index.offset)]
        view: torch.Tensor = tensor.data.detach().view(_sizes(tensor))
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(axis, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing is left to do: the tensor is a view of the destination."""


class ReadSlices(TorchDistLoadShardedStrategy):  # type: ignore[misc]
    """For ``megatron.core.dist_checkpointing.load``: what is asked for may cover a part of a file."""

    def load(self, sharded_state_dict: Any, checkpoint_dir: Path) -> Any:
        """The state dict with its tensors filled."""
        tensors = [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)]
        checkpoint.load(
            {tensor.key: tensor.data for tensor in tensors},
            storage_reader=FileSystemReader(checkpoint_dir),
            planner=_Slices(tensors),
            no_dist=True,
        )

        def filled(value: Any) -> Any:
            return value.data if isinstance(value, ShardedTensor) else value

        return dict_list_map_inplace(filled, sharded_state_dict)


def _sizes(tensor: ShardedTensor) -> tuple[int, ...]:
    """Of the local part, with the axes that only the file has."""
    return (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
