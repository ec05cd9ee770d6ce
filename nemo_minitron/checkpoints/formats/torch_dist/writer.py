"""Write Megatron's ``torch_dist`` distributed checkpoints without a process group and without a live model.

The files are written by ``torch.distributed.checkpoint`` itself; a :class:`SavePlanner` lists the tensors
and gives it one at a time. The result is what megatron-core 0.13 writes for a GPT model at TP 1, PP 1:
layers stacked under one key with a leading layer dimension (a chunk a layer), or, where they differ in size, under a
key each; ``_extra_state`` objects that hold None, ``common.pt`` and ``metadata.json``. Megatron's loader cuts it up for
any TP x PP.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from nemo_minitron import axes
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.weights import CastWeights, torch_dtype, writing_order
from nemo_minitron.errors import CheckpointError

__all__ = ["write_torch_dist"]

_EXPERTS = "mlp.experts.experts."


def write_torch_dist(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    prefix: str,
    dtype: str,
    vocab_rows: int,
    common: dict[str, Any],
    progress: Callable[[str, int, int], None] | None = None,
) -> str:
    """Write the tensors of ``checkpoint`` as a distributed checkpoint into ``directory`` (created).

    One file for each layer and one for each tensor outside the layers. Memory: torch keeps the tensors of a file until
    it is closed, so one layer, plus the embedding while it is written.

    Args:
        checkpoint: the checkpoint to write.
        directory: an empty or new directory.
        prefix: before every key, "module." for NeMo 2, "model." for ``.nemo``.
        dtype: of the tensors written.
        vocab_rows: rows of embedding and output layer; those beyond the vocabulary are zero.
        common: content of ``common.pt``, plain values only.
        progress: called as ``progress(tensor name, tensors done, tensors in all)``.

    Returns:
        The hash of all tensors, for the model record.

    Raises:
        CheckpointError: if the source is damaged.
        OSError: from the file system (full disk).
    """
    directory.mkdir(parents=True, exist_ok=True)
    planner = _Planner(checkpoint, prefix, dtype, vocab_rows, progress)
    writer = _FilePerLayer(directory, single_file_per_rank=True, sync_files=False, thread_count=1)
    try:
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:
        # torch wraps what went wrong on each rank; there is one rank, and its error is the one to show
        raise next(iter(error.failures.values()))[0] from error
    torch.save(common, directory / "common.pt")
    content = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (directory / "metadata.json").write_text(json.dumps(content), encoding="utf-8")
    return planner.weights.content()


@dataclasses.dataclass(frozen=True)
class _Source:
    """The source of a write item: a canonical tensor; None for padding and for ``_extra_state``."""

    name: str | None
    file: str


class _Planner(dcp.SavePlanner):
    """Lists every tensor of the model as a write item and reads it only when it is to be written."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        prefix: str,
        dtype: str,
        vocab_rows: int,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self._checkpoint, self._dtype, self._rows = checkpoint, torch_dtype(dtype), vocab_rows
        self.weights, self._progress = CastWeights(checkpoint.weights, dtype), progress
        self._shapes = writing_order(checkpoint.architecture, checkpoint.shape)
        self._sources: dict[MetadataIndex, _Source] = {}
        self._done = 0
        self._items = self._tensors(prefix) + self._extra_states(prefix)

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing to set up: the tensors come from the checkpoint, not from a state dict."""

    def create_local_plan(self) -> SavePlan:
        """All items; this process writes everything."""
        return SavePlan(self._items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Torch's default metadata, and Megatron's note on flattened tensors (there are none)."""
        plans, metadata = create_default_global_save_plan(all_plans, rewrite_index_hints=False)
        tensors = [item.index.fqn for item in self._items if item.type is WriteItemType.SHARD]
        metadata.mcore_data = {key: {} for key in dict.fromkeys(tensors)}  # type: ignore[attr-defined]
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """As planned."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Read the tensor of one item (``[1, ...]`` for one of a layer, ``[1, 1, ...]`` of an expert), or make one."""
        source = self._sources[write_item.index]
        if source.name is None and write_item.tensor_data is not None:
            return torch.zeros(write_item.tensor_data.chunk.sizes, dtype=self._dtype)
        if source.name is None:
            buffer = io.BytesIO()
            torch.save([None], buffer)
            return buffer
        tensor = self.weights.tensor(source.name)
        if tuple(tensor.shape) != self._shapes[source.name]:
            raise CheckpointError(
                f"{self._checkpoint.path}: {source.name} has shape {list(tensor.shape)} where the model's sizes ask "
                f"for {list(self._shapes[source.name])}"
            )
        assert write_item.tensor_data is not None
        tensor = tensor.reshape(write_item.tensor_data.chunk.sizes)
        self._done += 1
        if self._progress is not None:
            self._progress(source.name, self._done, len(self._shapes))
        return tensor.contiguous()

    def file_of(self, item: WriteItem) -> str:
        """The file of an item."""
        return self._sources[item.index].file

    def _tensors(self, prefix: str) -> list[WriteItem]:
        items = []
        for name, sizes in self._shapes.items():
            layer, expert, below = axes.name_parts(name)
            if layer is not None:
                shape = self._checkpoint.shape
                key, place, stacked = f"{prefix}decoder.layers.", [layer], [shape.num_layers]
                if not shape.uniform:
                    key, place, stacked = f"{key}{layer}.", [], []
                if expert is not None:
                    key += _EXPERTS
                    place, stacked = [*place, expert], [*stacked, shape.num_moe_experts or 0]
                key += below
                ones = [1] * len(place)
                source = _Source(name, str(layer))
                items.append(self._item(key, (*stacked, *sizes), (*place, *_zeros(sizes)), (*ones, *sizes), source))
                continue
            row = axes.parameter(self._checkpoint.family, name)
            padding = self._rows - sizes[0] if row.axes[0] is axes.Axis.VOCAB else 0
            total = (sizes[0] + padding, *sizes[1:])
            items.append(self._item(prefix + name, total, _zeros(sizes), sizes, _Source(name, name)))
            if padding:
                # a chunk of its own: joining it to the embedding would need a second copy of that
                offsets, chunk = (sizes[0], *_zeros(sizes[1:])), (padding, *sizes[1:])
                items.append(self._item(prefix + name, total, offsets, chunk, _Source(None, name)))
        return items

    def _item(
        self, key: str, total: tuple[int, ...], offsets: tuple[int, ...], chunk: tuple[int, ...], source: _Source
    ) -> WriteItem:
        index = MetadataIndex(key, offsets)
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(chunk)),
            properties=TensorProperties(dtype=self._dtype),
            size=torch.Size(total),
        )
        self._sources[index] = source
        return WriteItem(index, WriteItemType.SHARD, tensor_data=data)

    def _extra_states(self, prefix: str) -> list[WriteItem]:
        """``_extra_state`` of every module that has one in some layer spec.

        The linears of every spec expect it, as do Transformer Engine's attention and norms. Megatron's loader fails if
        an expected object is absent, and ignores others.
        """
        table, shape = self._checkpoint.family, self._checkpoint.shape

        def state(module: str, layer: int, expert: int | None = None) -> tuple[str, str]:
            place = [(layer, shape.num_layers)] if shape.uniform else []
            place += [] if expert is None else [(expert, shape.num_moe_experts or 0)]
            at, of = (".".join(map(str, numbers)) for numbers in zip(*place or [(0, 1)], strict=True))
            below = "" if shape.uniform else f"{layer}."
            return f"{prefix}decoder.layers.{below}{module}._extra_state/shard_{at}_{of}", str(layer)

        places = []
        for layer, sizes in enumerate(shape.each()):
            rows = axes.layer_parameters(table, sizes)
            modules = _modules(name for name, row in rows.items() if row.expert is None)
            modules += ["self_attention.core_attention"] if sizes.num_query_groups else []
            places += [state(module, layer) for module in modules if module != "mlp.router"]
        places += [
            state(_EXPERTS + module, layer, expert)
            for layer, sizes in enumerate(shape.each())
            for expert in range(shape.num_moe_experts or 0)
            for module in _modules(table.expert)
            if sizes.ffn_hidden_size
        ]
        final = "decoder.final_layernorm"
        places.append((f"{prefix}{final}._extra_state/shard_0_1", f"{final}.weight"))
        items = []
        for key, file in places:
            index = MetadataIndex(key)
            items.append(WriteItem(index, WriteItemType.BYTE_IO))
            self._sources[index] = _Source(None, file)
        return items


def _modules(rows: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in rows))


class _FilePerLayer(dcp.FileSystemWriter):
    """torch's writer, called once for each file, so that a file's tensors are freed before the next file."""

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        """Write the plan file by file; results of all files."""
        assert isinstance(planner, _Planner)
        groups: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            groups.setdefault(planner.file_of(item), []).append(item)
        results: list[WriteResult] = []
        for number, items in enumerate(groups.values()):
            place = dataclasses.replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            part = dataclasses.replace(plan, items=items, storage_data=place)
            results += super().write_data(part, planner).wait()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _zeros(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (0,) * len(sizes)
