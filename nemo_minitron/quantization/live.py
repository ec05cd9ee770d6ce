"""Rounding inside a live Megatron model: a student that is trained for a quantization.

Forward, each matrix is its weight rounded as an export of it would be, and, where the scheme says so, its input is
rounded too; backward, gradients pass straight through to the float weight. Parameters, checkpoints and optimizer stay
those of the float model. ModelOpt's own quantizers in Megatron layers are not used: they freeze the ranges of weights
at calibration, have one for queries, keys and values together in FP8, and are a part of every checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_minitron.axes import Axis, entry, split_gate, split_qkv
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.errors import ConfigError
from nemo_minitron.quantization import fake
from nemo_minitron.quantization.matrices import matrices_of
from nemo_minitron.quantization.schemes import Scheme
from nemo_minitron.runtime.groups import Groups

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["LiveRounding"]


@dataclass
class _Linear:
    """A matrix of this rank.

    Attributes:
        name: canonical.
        module: that holds it.
        rows: ``[m]`` which part a row is of: a query, key or value, a gate or an up-projection.
        parts: number of parts.
        limit: largest absolute input; None until it is known, or where inputs are not rounded.
        seen: largest absolute input so far, while ranges are measured.
    """

    name: str
    module: torch.nn.Module
    rows: torch.Tensor
    parts: int
    limit: torch.Tensor | None = None
    seen: torch.Tensor | None = None


class LiveRounding:
    """Rounds the matrices of a model; :meth:`attach` it to every chunk of this rank.

    Cost: in each forward pass a pass over the weights, and for FP8 and NVFP4 an all-reduce over the tensor-parallel
    ranks of a few numbers a matrix.

    Args:
        scheme: what the model is trained for.
        ranges: canonical name -> largest absolute input, of all layers; None: :meth:`measuring` finds them.

    Attributes:
        chunks: of this rank, in the order in which they were attached.
    """

    def __init__(self, scheme: Scheme, ranges: Mapping[str, float] | None = None) -> None:
        self.scheme = scheme
        self.ranges = dict(ranges) if ranges is not None else None
        self.chunks: list[GPTModel] = []
        self._linears: list[_Linear] = []
        self._measuring = False

    @property
    def lacks_ranges(self) -> bool:
        """Whether inputs are rounded, by ranges that are not known yet."""
        return self.scheme.inputs and self.ranges is None

    def attach(self, chunk: GPTModel, model: Checkpoint, groups: Groups) -> None:
        """Round in a chunk of the model from now on.

        Args:
            chunk: of this rank, with this rank's shard of the weights.
            model: its sizes and family.
            groups: of this process.

        Raises:
            ConfigError: for layers in which an input cannot be rounded.
        """
        self.chunks.append(chunk)
        held = matrices_of(model.family, model.shape, self.scheme).canonical
        for layer in chunk.decoder.layers:
            number = layer.layer_number - 1
            for below, module in layer.named_modules():
                name = f"decoder.layers.{number}.{below}.weight"
                weight = getattr(module, "weight", None)
                if name not in held or not isinstance(weight, torch.nn.Parameter):
                    continue
                if self.scheme.inputs and getattr(module, "layer_norm_weight", None) is not None:
                    raise ConfigError(
                        f"quantize={self.scheme.name}: rounds inputs, and Transformer Engine's layers have the norm "
                        "and the matrix in one kernel; use int4, or an environment without Transformer Engine"
                    )
                shape = model.shape.at(number)
                axis = entry(model.family, model.shape, name).row.axes[0]
                linear = _Linear(name, module, *_row_parts(axis, weight.shape[0], shape))
                linear.rows = linear.rows.to(weight.device)
                if self.ranges is not None and self.scheme.inputs:
                    linear.limit = torch.tensor(self.ranges[name], device=weight.device)
                self._linears.append(linear)
                self._hook(linear, groups)

    @contextmanager
    def measuring(self, groups: Groups) -> Iterator[None]:
        """Measure the ranges of inputs in the forward passes of the block, which round nothing. Collective.

        At its end :attr:`ranges` are those of all ranks.
        """
        self._measuring = True
        try:
            yield
        finally:
            self._measuring = False
        own = torch.stack([linear.seen for linear in self._linears if linear.seen is not None])
        for group in (groups.tp, groups.dp_cp):
            dist.all_reduce(own, op=dist.ReduceOp.MAX, group=group)
        mine = {linear.name: limit for linear, limit in zip(self._linears, own.tolist(), strict=True)}
        everyone: list[Any] = [None] * dist.get_world_size(groups.pp)
        dist.all_gather_object(everyone, mine, group=groups.pp)
        self.ranges = {name: limit for each in everyone for name, limit in each.items()}
        for linear in self._linears:
            linear.seen = None
            linear.limit = torch.tensor(self.ranges[linear.name], device=linear.rows.device)

    def _hook(self, linear: _Linear, groups: Groups) -> None:
        module, scheme = linear.module, self.scheme
        for name in ("gradient_accumulation_fusion", "fuse_wgrad_accumulation"):
            if getattr(module, name, False):  # its kernel adds to the gradient of a parameter, which this weight is not
                setattr(module, name, False)

        def before(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            x = arguments[0]
            if self._measuring:
                largest = x.detach().abs().amax().float()
                linear.seen = largest if linear.seen is None else torch.maximum(linear.seen, largest)
                return None
            # Found before the parameter of that name, which stays where it is.
            vars(module)["weight"] = _rounded(module._parameters["weight"], linear, scheme, groups)
            if not scheme.inputs or linear.limit is None:
                return None
            x = fake.fp8(x, linear.limit, clips=True) if scheme.group is None else fake.nvfp4(x, linear.limit)
            return (x, *arguments[1:])

        def after(*_: Any) -> None:
            vars(module).pop("weight", None)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)


def _rounded(weight: Any, linear: _Linear, scheme: Scheme, groups: Groups) -> torch.Tensor:
    """A weight of this rank, ``[m, n]``, rounded as the export of the whole matrix would be."""
    if scheme.packed_rows:
        assert scheme.group is not None
        return fake.int4(weight, scheme.group)
    with torch.no_grad():
        rows = weight.detach().abs().amax(1).float()
        limits = rows.new_zeros(linear.parts).scatter_reduce(0, linear.rows, rows, "amax")
        dist.all_reduce(limits, op=dist.ReduceOp.MAX, group=groups.tp)
    if scheme.group is None:
        return fake.fp8(weight, limits[linear.rows][:, None])
    return fake.nvfp4(weight, limits.max(), scheme.group)  # ModelOpt: one outer scale for what readers fuse


def _row_parts(axis: Axis, count: int, shape: Any) -> tuple[torch.Tensor, int]:
    """``[count]`` numbers of the parts that the rows of a rank are of, and how many there are."""
    rows = torch.arange(count)
    parts: Sequence[torch.Tensor] = (rows,)
    if axis is Axis.QKV:
        parts = split_qkv(rows[:, None], shape)
    elif axis is Axis.GATED_FFN:
        parts = split_gate(rows)
    of = torch.empty(count, dtype=torch.int64)
    for number, part in enumerate(parts):
        of[part.flatten()] = number
    return of, len(parts)
