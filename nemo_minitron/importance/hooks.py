"""Forward hooks on a live Megatron ``GPTModel`` that keep running statistics of every unit's activations.

What is read, for one decoder layer, in the order of the forward pass (arXiv 2407.14679, section 2.2; the sum over
sequence and batch that the paper writes stands for the two aggregations):

=================  ==========================================================  ===============================
site               activation                                                  units
=================  ==========================================================  ===============================
``input_norm``     output of the normalisation before attention, ``LN(X)``     hidden channels
``attention``      input of ``self_attention.linear_proj``: each query head's  query heads
                   output, its L2 norm over the channels of the head
``mlp_norm``       output of the normalisation before the MLP                  hidden channels
``ffn``            input of ``mlp.linear_fc2``                                 FFN neurons
``block``          cosine of the layer's input and output, token by token      layers (block influence)
=================  ==========================================================  ===============================

The state is O(units): for each site the statistics of its batch aggregation, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nemo_minitron.errors import NonFiniteError, ShapeError
from nemo_minitron.importance.aggregation import Aggregation
from nemo_minitron.runtime.groups import Groups

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["SITES", "Recorder"]

SITES = ("input_norm", "attention", "mlp_norm", "ffn", "block")
_MODULES = {
    "input_norm": "input_layernorm (its output)",
    "attention": "self_attention.linear_proj (its input)",
    "mlp_norm": "pre_mlp_layernorm (its output)",
    "ffn": "mlp.linear_fc2 (its input)",
    "block": "the whole layer (its output)",
}
_FINITE = torch.iinfo(torch.int64).max


class Recorder:
    """Running statistics of one rank's chunks.

    Attributes:
        rows: how many of the micro-batch's samples count; set before each forward pass. The schedules want equally
            sized micro-batches, so the last one may be filled up with samples that do not count.
        statistics: ``(layer, site) -> [k, units on this rank]`` float64; of "block": ``[1, 1]``, the sum of cosines.
    """

    def __init__(
        self, chunks: Sequence[GPTModel], groups: Groups, *, sequence: Aggregation, batch: Aggregation
    ) -> None:
        self.chunks = chunks
        self.groups = groups
        self.sequence = sequence
        self.batch = batch
        self.rows = 0
        self.statistics: dict[tuple[int, str], torch.Tensor] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks are on within the block.

        Raises:
            ShapeError: for a layer without the modules that are read (a mixture of experts).
        """
        handles: list[Any] = []
        try:
            for chunk in self.chunks:
                for layer in chunk.decoder.layers:
                    handles += self._hook_layer(layer)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def check_finite(self) -> None:
        """Stop on the first activation, in forward order, that is NaN or infinite. Collective: every rank raises alike.

        Raises:
            NonFiniteError: naming the layer and the module.
        """
        bad = [
            layer * len(SITES) + SITES.index(site)
            for (layer, site), stats in self.statistics.items()
            if not bool(torch.isfinite(stats).all())
        ]
        device = next(self.chunks[0].parameters()).device
        first = torch.tensor(min(bad, default=_FINITE), dtype=torch.int64, device=device)
        for group in (self.groups.model, self.groups.dp):
            dist.all_reduce(first, dist.ReduceOp.MIN, group=group)
        if int(first) != _FINITE:
            layer, site = divmod(int(first), len(SITES))
            raise NonFiniteError(
                f"decoder.layers.{layer}: an activation of {_MODULES[SITES[site]]} is NaN or infinite; check the "
                "checkpoint's weights in and before that layer, or score in runtime.dtype=float32"
            )

    # ------------------------------------------------------------------------------------------------------- recording

    def _hook_layer(self, layer: Any) -> list[Any]:
        index = layer.layer_number - 1
        heads = self._heads(layer)

        def record_heads(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            context = args[0]  # [s, b, heads/tp * head_dim]
            per_head = context.view(*context.shape[:2], heads, -1)
            self._add(index, "attention", torch.linalg.vector_norm(per_head, dim=-1))

        def record_ffn(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            self._add(index, "ffn", args[0])  # [s, b, F/tp]

        def record_block(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            self._add_block(index, before, output[0] if isinstance(output, tuple) else output)

        for path in ("self_attention.linear_proj", "mlp.linear_fc2"):
            if not _has(layer, path):
                raise ShapeError(
                    f"decoder.layers.{index}: has no {path} ({type(layer.mlp).__name__}); only dense decoder layers "
                    "can be scored"
                )
        return [
            self._hook_norm(index, "input_norm", layer.input_layernorm, layer.self_attention.linear_qkv),
            layer.self_attention.linear_proj.register_forward_pre_hook(record_heads),
            self._hook_norm(index, "mlp_norm", layer.pre_mlp_layernorm, layer.mlp.linear_fc1),
            layer.mlp.linear_fc2.register_forward_pre_hook(record_ffn),
            layer.register_forward_hook(record_block, with_kwargs=True),
        ]

    @staticmethod
    def _heads(layer: Any) -> int:
        """Query heads on this rank."""
        return layer.self_attention.num_attention_heads_per_partition

    def _hook_norm(self, index: int, site: str, norm: Any, linear: Any) -> Any:
        """Read a normalisation's output: of its own module, or worked out again where it is fused into ``linear``.

        Transformer Engine's layer-norm-linear does not show its norm's output; its input and ``layer_norm_weight`` do.
        """
        if hasattr(linear, "layer_norm_weight"):

            def record_input(module: Any, args: tuple[torch.Tensor, ...]) -> None:
                self._add(index, site, _fused_norm(module, args[0]), sequence_split=True)

            return linear.register_forward_pre_hook(record_input)

        def record_output(module: Any, args: Any, output: torch.Tensor) -> None:
            self._add(index, site, output, sequence_split=True)  # [s (/tp), b, H]

        return norm.register_forward_hook(record_output)

    @torch.no_grad()
    def _add(self, layer: int, site: str, x: torch.Tensor, *, sequence_split: bool = False) -> None:
        """``[s, b, units]`` activations; ``sequence_split``: under sequence parallelism this rank has ``s/tp``."""
        if not self.rows:
            # A data-parallel rank without samples still takes part in the collectives: nothing is what zeros add up to.
            nothing = torch.zeros(1, x.shape[-1], dtype=torch.float64, device=x.device)
            return self._keep(layer, site, self.batch.statistics(nothing, 0), self.batch.combine)
        length = x.shape[0]
        statistics = self.sequence.statistics(x[:, : self.rows].detach(), 0)  # [k, b, units]
        if sequence_split and self.groups.layout.sequence_parallel:
            statistics = self.sequence.all_reduce(statistics, self.groups.tp)
            length *= self.groups.layout.tensor
        scores = self.sequence.finish(statistics, length)  # [b, units]
        return self._keep(layer, site, self.batch.statistics(scores.double(), 0), self.batch.combine)

    @torch.no_grad()
    def _add_block(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """``[s (/tp), b, H]`` in and out of a layer -> the sum of their cosines over the tokens."""
        before, after = before[:, : self.rows], after[:, : self.rows]
        cosines = F.cosine_similarity(before.detach().float(), after.detach().float(), dim=-1)
        self._keep(layer, "block", cosines.sum(dtype=torch.float64).view(1, 1), torch.add)

    def _keep(
        self,
        layer: int,
        site: str,
        statistics: torch.Tensor,
        combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        before = self.statistics.get((layer, site))
        self.statistics[layer, site] = statistics if before is None else combine(before, statistics)


def _has(module: Any, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module is not None


def _fused_norm(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """The normalisation inside Transformer Engine's ``LayerNormLinear``, by that module's own settings."""
    weight = linear.layer_norm_weight
    if getattr(linear, "zero_centered_gamma", False):
        weight = weight + 1
    if linear.normalization == "RMSNorm":
        return F.rms_norm(x, x.shape[-1:], weight, linear.eps)
    return F.layer_norm(x, x.shape[-1:], weight, linear.layer_norm_bias, linear.eps)
