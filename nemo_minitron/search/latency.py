"""Latency of shapes: measured on the running device with random weights, and an additive model fitted to measurements.

A prefill runs a batch of whole sequences and fills the cache of keys and values; a decoding step adds one token to
each. Both run in one process of Megatron. A serving engine has other kernels, so ratios are more comparable than times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_minitron import axes
from nemo_minitron.architecture import Architecture
from nemo_minitron.search.space import Sizes
from nemo_minitron.shape import ModelShape

if TYPE_CHECKING:
    import torch

    from nemo_minitron.runtime.groups import Groups

__all__ = ["Latency", "LatencyCost", "Timer"]


@dataclass(frozen=True)
class Latency:
    """Medians, in seconds.

    Attributes:
        prefill: a batch of whole sequences.
        decode: one further token of each.
    """

    prefill: float
    decode: float


class Timer:
    """Measures shapes in turn with the unpruned shape, which stays in memory, so that both see the same machine.

    Args:
        shape: unpruned.
        architecture: constants of the models.
        groups: of a single process.
        batch_size: sequences.
        sequence_length: tokens of each; the decoding step is the one after them.
        dtype: of the weights.
        repeats: measurements of each, after a first one that is dropped.
    """

    def __init__(
        self,
        shape: ModelShape,
        architecture: Architecture,
        groups: Groups,
        *,
        batch_size: int,
        sequence_length: int,
        dtype: torch.dtype,
        repeats: int = 5,
    ) -> None:
        self.architecture, self.groups, self.dtype, self.repeats = architecture, groups, dtype, repeats
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self._unpruned = self._build(shape)

    def measure(self, shape: ModelShape) -> tuple[Latency, Latency]:
        """Latency of a shape, and of the unpruned model beside it.

        Raises:
            ShapeError: if the sizes and the constants contradict each other.
        """
        models = (self._build(shape), self._unpruned)
        times: tuple[list[tuple[float, float]], ...] = ([], [])
        for _ in range(self.repeats + 1):
            for model, measured in zip(models, times, strict=True):
                measured.append(self._run(model))
        ours, whole = (
            Latency(*(statistics.median(column) for column in zip(*measured[1:], strict=True))) for measured in times
        )
        return ours, whole

    def _build(self, shape: ModelShape) -> Any:
        from nemo_minitron.runtime.model import build_model

        # which layers would stay is not known here; the first ones have about the model's share of each type
        architecture = self.architecture.of_layers(range(shape.num_layers))
        (model,) = build_model(shape, architecture, self.groups, dtype=self.dtype, initialize=True)
        return model.eval()

    def _run(self, model: Any) -> tuple[float, float]:
        """Seconds of a prefill and of a decoding step."""
        import torch
        from megatron.core.inference.contexts import StaticInferenceContext

        device, length = next(model.parameters()).device, self.sequence_length
        tokens = torch.arange(length, device=device).expand(self.batch_size, length) % model.vocab_size
        positions = torch.arange(length, device=device).expand(self.batch_size, length)
        context = StaticInferenceContext(self.batch_size, length + 1)
        with torch.no_grad():
            started = self._now()
            model(tokens.contiguous(), positions, None, inference_context=context)
            filled = self._now()
            context.sequence_len_offset = length
            context.enable_decode_mode()
            model(tokens[:, :1].contiguous(), positions[:, -1:] + 1, None, inference_context=context)
            return filled - started, self._now() - filled

    def _now(self) -> float:
        """The time in seconds, after the device has finished its work."""
        import torch

        if self.groups.device.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class LatencyCost:
    """Latency as a sum over parts of a model, with coefficients that are fitted to measurements and not negative.

    Parts: a constant, the layers, their attention's and their MLPs' weights, attention scores, the output
    layer. So it never falls when a size grows, as a :data:`~nemo_minitron.search.space.Cost` must not.

    Args:
        table: of the family.
        shape: of the unpruned model.
        measured: shapes and their seconds; at least one shape.
        topk: experts that a token is sent to, of a mixture.
    """

    def __init__(
        self,
        table: axes.Family,
        shape: ModelShape,
        measured: Sequence[tuple[Sizes, float]],
        *,
        topk: int | None = None,
    ) -> None:
        import numpy as np
        from scipy.optimize import nnls

        self.shape, self._mlps, self._matrices = shape, topk or 1, 3 if table.gated else 2
        rows = np.array([self._parts(sizes) for sizes, _ in measured], dtype=float)
        seconds = np.array([seconds for _, seconds in measured])
        scale = rows.max(axis=0)
        # relative errors count, not absolute ones
        prices, _ = nnls(rows / scale / seconds[:, None], np.ones(len(seconds)))
        self._prices = [float(price) for price in prices / scale]
        #: Largest relative error at the measured shapes.
        self.error = float(np.abs(rows @ np.array(self._prices) / seconds - 1).max())

    def __call__(self, sizes: Sizes) -> float:
        """The latency in seconds."""
        return sum(price * part for price, part in zip(self._prices, self._parts(sizes), strict=True))

    def _parts(self, sizes: Sizes) -> tuple[float, ...]:
        layers, hidden, d = sizes.num_layers, sizes.hidden_size, self.shape.head_dim
        attention = hidden * d * (2 * sizes.num_attention_heads + 2 * sizes.num_query_groups)
        mlp = hidden * sizes.ffn_hidden_size * self._matrices * self._mlps
        return (
            1.0,
            layers,
            layers * attention,
            layers * mlp,
            layers * sizes.num_attention_heads * d,
            hidden * self.shape.vocab_size,
        )
