"""Forward hooks on a live Megatron ``GPTModel`` that keep running statistics of every unit.

The activations of one decoder layer that are read, in the order of the forward pass (arXiv 2407.14679, section 2.2; the
paper's sum over sequence and batch stands for the two aggregations):

=================  ==========================================================  ===============================
site               activation                                                  units
=================  ==========================================================  ===============================
``input_norm``     output of the normalisation before attention, ``LN(X)``     hidden channels
``attention``      input of ``self_attention.linear_proj``: each query head's  query heads
                   output, its L2 norm over the channels of the head
``mlp_norm``       output of the normalisation before the MLP                  hidden channels
``ffn``            input of ``mlp.linear_fc2``, of every expert where the MLP  FFN neurons
                   is a mixture
``experts``        output of each expert, the router's weight in it, its L2    experts
                   norm over the channels of the residual stream
``block``          cosine of the layer's input and output, token by token      layers (block influence)
=================  ==========================================================  ===============================

:class:`Recorder` reads them and keeps the statistics, O(units). Its subclasses turn an activation into statistics, one
for each estimator: :class:`ActivationRecorder` here, ``TaylorRecorder`` in :mod:`~nemo_minitron.importance.taylor`,
others by their entries in :mod:`~nemo_minitron.importance.estimators`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nemo_minitron.errors import NonFiniteError, ShapeError
from nemo_minitron.importance.aggregation import AGGREGATIONS, Aggregation, Criterion, aggregation
from nemo_minitron.importance.experts import TokenPlaces, token_places
from nemo_minitron.runtime.groups import Groups
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

__all__ = ["SITES", "ActivationRecorder", "BlockInfluence", "Key", "Reading", "Recorder"]

SITES = ("input_norm", "attention", "groups", "mlp_norm", "ffn", "experts", "block")
_MODULES = {
    "input_norm": "input_layernorm (its output)",
    "attention": "self_attention.linear_proj (its input)",
    "groups": "self_attention.linear_proj (its input)",
    "mlp_norm": "pre_mlp_layernorm (its output)",
    "ffn": "mlp.linear_fc2 (its input)",
    "experts": "an expert (its output)",
    "block": "the whole layer (its output)",
}
_FINITE = torch.iinfo(torch.int64).max


class Key(NamedTuple):
    """Key of statistics: a site of a layer (0-based, of the whole model), and the expert in a mixture."""

    layer: int
    site: str
    expert: int = 0


class Reading(NamedTuple):
    """An activation that is to be added to the statistics.

    Attributes:
        key: layer, site and expert.
        x: ``[s, b, units * width]``, or ``[tokens, units * width]`` with ``places``.
        width: channels of one unit, which become one value a token.
        sequence_split: under sequence parallelism this rank has ``s/tp`` of the tokens.
        partial: the activation is the sum of ``x`` over the tensor-parallel ranks.
        places: of an expert's tokens in the micro-batch.
    """

    key: Key
    x: torch.Tensor
    width: int = 1
    sequence_split: bool = False
    partial: bool = False
    places: TokenPlaces | None = None


class Recorder(ABC):
    """Running statistics of one rank's chunks.

    Attributes:
        rows: how many of the micro-batch's samples count, or None for all; set before each forward pass. The
            schedules want equally sized micro-batches, so the last one may be filled up with samples that do not count.
        span: the layers whose statistics this rank holds, 0-based in the whole model; None for those of its chunks.
            Passes that run layer by layer have one layer in the chunks at a time.
        samples, tokens: numbers that this data-parallel rank has run.
        statistics: by key and criterion, ``[k, units on this rank]`` float64; of "block" under the
            activation estimator ``[1, 1]``, the sum of cosines.
    """

    #: What :meth:`check_finite` calls the values read.
    reads: str = "an activation"

    def __init__(self, chunks: Sequence[GPTModel], groups: Groups, criteria: Sequence[Criterion]) -> None:
        self.chunks = chunks
        self.groups = groups
        self.criteria = list(dict.fromkeys(criteria))
        for criterion in self.criteria:
            self.batch_aggregation(criterion)
        self.rows: int | None = None
        self.span: Sequence[int] | None = None
        self.samples = 0
        self.tokens = 0
        self.statistics: dict[Key, dict[Criterion, torch.Tensor]] = {}

    # ------------------------------------------------------------------------------------- what an estimator brings

    @abstractmethod
    def read(self, reading: Reading) -> None:
        """Add an activation to the statistics: call :meth:`keep` with each criterion's values."""

    @abstractmethod
    def read_block(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add a layer's input and output, ``[s (/tp), b, H]``, to the statistics."""

    def layer_scores(self, units: Callable[[str, int], torch.Tensor], shape: ModelShape, tokens: int) -> torch.Tensor:
        """``[L]`` scores of the layers, from what :meth:`read_block` kept on all ranks. Collective.

        Args:
            units: ``(site, size) -> [L, size]`` scores of a site by the criterion; here of "block", one a layer.
            shape: of the whole model.
            tokens: run by all data-parallel ranks together.
        """
        return units("block", 1)[:, 0]

    def batch_aggregation(self, criterion: Criterion) -> Aggregation:
        """How the values of samples become one.

        Raises:
            ConfigError: for a name that is not known.
        """
        return aggregation(criterion.batch, "aggregation.batch")

    def group_scores(
        self, units: Callable[[str, int], torch.Tensor], heads: torch.Tensor, shape: ModelShape
    ) -> torch.Tensor:
        """``[L, G]`` scores of the query groups. Collective.

        Args:
            units: ``(site, size) -> [L, size]`` scores of a site whose units are split over tensor-parallel ranks.
            heads: ``[L, A]``, the heads' scores.
            shape: of the whole model.
        """
        return torch.linalg.vector_norm(heads.view(shape.num_layers, shape.num_query_groups, -1), dim=-1)

    def finish(self) -> None:  # noqa: B027 - most have nothing to do
        """Called after the last pass through the chunks, of a streamed pass after each layer. Collective."""

    # ------------------------------------------------------------------------------------------------------- the hooks

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block the hooks are attached.

        Raises:
            ShapeError: for a layer that lacks one of the modules to read.
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

    def _hook_layer(self, layer: Any) -> list[Any]:
        index = layer.layer_number - 1
        attention, mlp = layer.self_attention, layer.mlp
        mixture = hasattr(mlp, "router")
        needed = ["self_attention.linear_proj", "mlp.experts.local_experts" if mixture else "mlp.linear_fc2"]
        for path in needed:
            if not _has(layer, path):
                raise ShapeError(
                    f"decoder.layers.{index}: has no {path} ({type(mlp).__name__}); only layers with attention and a "
                    "dense MLP, or with experts one by one (moe_grouped_gemm=False), can be scored"
                )

        def record_heads(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            heads = attention.num_attention_heads_per_partition
            width = args[0].shape[-1] // heads
            self.read(Reading(Key(index, "attention"), args[0], width=width))  # [s, b, A/tp * head_dim]

        def record_block(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            self._count(index, before)
            self.read_block(index, before, output[0] if isinstance(output, tuple) else output)

        handles = [
            self._hook_norm(Key(index, "input_norm"), layer.input_layernorm, attention.linear_qkv),
            attention.linear_proj.register_forward_pre_hook(record_heads),
            self._hook_norm(Key(index, "mlp_norm"), layer.pre_mlp_layernorm, None if mixture else mlp.linear_fc1),
        ]
        handles += self._hook_experts(index, mlp) if mixture else [self._hook_ffn(Key(index, "ffn"), mlp.linear_fc2)]
        # Last, so that an error is told of the module in which it arose.
        return [*handles, layer.register_forward_hook(record_block, with_kwargs=True)]

    def _hook_norm(self, key: Key, norm: Any, linear: Any) -> Any:
        """Read a normalisation's output: from its own module, or computed again where it is fused into ``linear``."""
        if hasattr(linear, "layer_norm_weight"):
            return self._hook_fused_norm(key, linear)

        def record_output(module: Any, args: Any, output: torch.Tensor) -> None:
            self.read(Reading(key, output, sequence_split=True))  # [s (/tp), b, H]

        return norm.register_forward_hook(record_output)

    def _hook_fused_norm(self, key: Key, linear: Any) -> Any:
        """Transformer Engine's layer-norm-linear does not show its norm's output; input and weight give it."""

        def record_input(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            self.read(Reading(key, fused_norm(module, args[0]), sequence_split=True))

        return linear.register_forward_pre_hook(record_input)

    def _hook_ffn(self, key: Key, linear: Any, places: list[TokenPlaces] | None = None) -> Any:
        def record_ffn(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            self.read(Reading(key, args[0], places=places[key.expert] if places else None))  # [s, b, F/tp]

        return linear.register_forward_pre_hook(record_ffn)

    def _hook_experts(self, index: int, mlp: Any) -> list[Any]:
        """Read each expert of Megatron's ``SequentialMLP``.

        Their outputs contain the router's weight: Megatron multiplies by it before the down projection.
        """
        places: list[TokenPlaces] = []  # of the micro-batch that is running, by expert

        def record_routing(module: Any, args: tuple[torch.Tensor, ...], output: tuple[Any, torch.Tensor]) -> None:
            places[:] = token_places(output[1], args[0].shape, self.groups, self.rows)

        def record_expert(expert: int) -> Any:
            def record(module: Any, args: Any, output: Any) -> None:
                x, key = output[0], Key(index, "experts", expert)  # [tokens, H]
                self.read(Reading(key, x, width=x.shape[-1], partial=True, places=places[expert]))

            return record

        handles = [mlp.router.register_forward_hook(record_routing)]
        for number, expert in zip(mlp.local_expert_indices, mlp.experts.local_experts, strict=True):
            handles.append(self._hook_ffn(Key(index, "ffn", number), expert.linear_fc2, places))
            handles.append(expert.register_forward_hook(record_expert(number)))
        return handles

    # -------------------------------------------------------------------------------------------------- the statistics

    def over_sequence(self, reading: Reading, x: torch.Tensor, sequence: Aggregation) -> torch.Tensor:
        """``[s (/tp), b, units]`` values of a reading -> ``[b, units]`` over the whole sequence. Collective."""
        statistics, length = sequence.statistics(x, 0), x.shape[0]  # [k, b, units]
        if reading.sequence_split and self.groups.layout.sequence_parallel:
            statistics, length = sequence.all_reduce(statistics, self.groups.tp), length * self.groups.layout.tensor
        return sequence.finish(statistics, length)

    def layers(self) -> list[int]:
        """The layers on this rank, 0-based in the whole model."""
        if self.span is not None:
            return list(self.span)
        return [layer.layer_number - 1 for layer in self.modules()]

    def modules(self) -> list[Any]:
        """Megatron's layers in the chunks."""
        return [layer for chunk in self.chunks for layer in chunk.decoder.layers]

    def _count(self, layer: int, x: torch.Tensor) -> None:
        """Count samples and tokens at the first layer on this rank, which sees each of them once."""
        if layer == self.layers()[0]:
            rows = x.shape[1] if self.rows is None else self.rows
            self.samples += rows
            self.tokens += (
                rows * x.shape[0] * (self.groups.layout.tensor if self.groups.layout.sequence_parallel else 1)
            )

    @torch.no_grad()
    def keep(self, key: Key, criterion: Criterion, values: torch.Tensor) -> None:
        """Add ``[b, units]`` values, of the samples that count, to the running statistics of the batch aggregation."""
        batch = self.batch_aggregation(criterion)
        values = values.double()
        if not len(values):
            # A data-parallel rank without samples still takes part in the collectives: nothing is what zeros add up to.
            values = values.new_zeros(1, values.shape[-1])
        statistics = batch.statistics(values, 0)
        before = self.statistics.setdefault(key, {}).get(criterion)
        self.statistics[key][criterion] = statistics if before is None else batch.combine(before, statistics)

    def saved(self) -> dict[str, torch.Tensor]:
        """The statistics as named tensors, from which :meth:`restore` goes on."""
        return {
            "/".join((str(key.layer), key.site, str(key.expert), *criterion)): values
            for key, by_criterion in self.statistics.items()
            for criterion, values in by_criterion.items()
        }

    def restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Put statistics back that :meth:`saved` gave."""
        device = self.groups.device.torch
        self.statistics = {}
        for name, values in saved.items():
            layer, site, expert, sequence, batch = name.split("/")
            kept = self.statistics.setdefault(Key(int(layer), site, int(expert)), {})
            kept[Criterion(sequence, batch)] = values.to(device)

    def check_finite(self) -> None:
        """Stop on the first value, in forward order, that is NaN or infinite. Collective: every rank raises alike.

        Raises:
            NonFiniteError: naming the layer and the module.
        """
        bad = [
            key.layer * len(SITES) + SITES.index(key.site)
            for key, values in self.statistics.items()
            if not all(bool(torch.isfinite(statistics).all()) for statistics in values.values())
        ]
        first = torch.tensor(min(bad, default=_FINITE), dtype=torch.int64, device=self.groups.device.torch)
        for group in (self.groups.model, self.groups.dp):
            dist.all_reduce(first, dist.ReduceOp.MIN, group=group)
        if int(first) != _FINITE:
            layer, site = divmod(int(first), len(SITES))
            raise NonFiniteError(
                f"decoder.layers.{layer}: {self.reads} of {_MODULES[SITES[site]]} is NaN or infinite; check the "
                "checkpoint's weights in and before that layer, or score in runtime.dtype=float32"
            )


class BlockInfluence(Recorder):
    """A recorder whose scores of layers are their block influence, whatever else it reads."""

    @torch.no_grad()
    def read_block(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add the sum of the cosines over the tokens: one number for all criteria."""
        before, after = before[:, : self.rows].detach(), after[:, : self.rows].detach()
        wide = torch.promote_types(before.dtype, torch.float32)
        cosines = F.cosine_similarity(before.to(wide), after.to(wide), dim=-1)
        sums = self.statistics.setdefault(Key(layer, "block"), {})
        total = cosines.sum(dtype=torch.float64).view(1, 1)
        sums[self.criteria[0]] = sums.get(self.criteria[0], 0) + total

    def layer_scores(self, units: Callable[[str, int], torch.Tensor], shape: ModelShape, tokens: int) -> torch.Tensor:
        """``[L]``, 1 less the mean cosine over all tokens."""
        groups = self.groups
        cosines = torch.zeros(shape.num_layers, dtype=torch.float64, device=groups.device.torch)
        for key, sums in self.statistics.items():
            if key.site == "block":
                cosines[key.layer] = sums[self.criteria[0]][0, 0]
        for group in (groups.pp, groups.dp, *([groups.tp] if groups.layout.sequence_parallel else [])):
            dist.all_reduce(cosines, group=group)
        return 1 - cosines.cpu() / tokens


class ActivationRecorder(BlockInfluence):
    """Magnitudes of activations (arXiv 2407.14679, section 2.2); one pass serves any number of criteria."""

    def __init__(self, chunks: Sequence[GPTModel], groups: Groups, criteria: Sequence[Criterion]) -> None:
        super().__init__(chunks, groups, criteria)
        for criterion in self.criteria:
            aggregation(criterion.sequence, "aggregation.sequence")

    def values(self, reading: Reading) -> torch.Tensor:
        """``[s (/tp), b, units]`` values of the samples that count; of a unit of several channels, their L2 norm."""
        x, width = reading.x.detach(), reading.width
        if reading.partial and self.groups.layout.tensor > 1:
            x = x.contiguous().clone()
            dist.all_reduce(x, group=self.groups.tp)
        if width > 1:
            x = torch.linalg.vector_norm(x.unflatten(-1, (x.shape[-1] // width, width)), dim=-1)
        return x[:, : self.rows] if reading.places is None else reading.places.spread(x)

    @torch.no_grad()
    def read(self, reading: Reading) -> None:
        """Aggregate over the sequence."""
        x = self.values(reading)
        by_sequence: dict[str, torch.Tensor] = {}
        for criterion in self.criteria:
            if criterion.sequence not in by_sequence:
                by_sequence[criterion.sequence] = self.over_sequence(reading, x, AGGREGATIONS[criterion.sequence])
            self.keep(reading.key, criterion, by_sequence[criterion.sequence])


def _has(module: Any, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module is not None


def fused_norm(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """The normalisation inside Transformer Engine's ``LayerNormLinear``, by that module's own settings."""
    weight = linear.layer_norm_weight
    if getattr(linear, "zero_centered_gamma", False):
        weight = weight + 1
    if linear.normalization == "RMSNorm":
        return F.rms_norm(x, x.shape[-1:], weight, linear.eps)
    return F.layer_norm(x, x.shape[-1:], weight, linear.layer_norm_bias, linear.eps)
