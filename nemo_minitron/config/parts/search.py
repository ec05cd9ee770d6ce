"""The space, the budget and the short distillation of a search."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

from nemo_minitron.config.parts.checks import DTYPES, LATENCIES, MEMORY_USES, choice, positive
from nemo_minitron.config.parts.losses import LossConfig
from nemo_minitron.config.parts.schedule import ShortSchedule

__all__ = ["AxisConfig", "BudgetConfig", "ShortDistillConfig", "SpaceConfig"]


@dataclass
class AxisConfig:
    """Candidates of one size of a searched shape; an axis that gives neither ``min`` nor ``values`` stays as it is.

    Attributes:
        min: smallest candidate.
        max: largest candidate; null takes the model's own size.
        multiple: all candidates are multiples of this.
        values: instead, the candidates themselves.
    """

    min: int | None = None
    max: int | None = None
    multiple: int = 1
    values: list[int] | None = None

    def faults(self) -> list[str]:
        """Sizes below 1, contradictions."""
        faults = positive(self, "min", "max", "multiple")
        if self.values is not None:
            faults += [f"values: {value} must be above 0" for value in self.values if value <= 0]
            if not self.values:
                faults.append("values: is empty; leave it null to keep the model's own size")
            if (self.min, self.max, self.multiple) != (None, None, 1):
                faults.append("values: names the candidates already; leave min, max and multiple out")
        elif self.min is None and (self.max is not None or self.multiple != 1):
            faults.append("min: is needed with max or multiple; or give values")
        elif self.min is not None and self.max is not None and self.min > self.max:
            faults.append(f"min={self.min}: lies above max={self.max}")
        return faults


@dataclass
class SpaceConfig:
    """The sizes that a search may change. Where groups change and heads are not named, each group keeps its heads.

    Attributes:
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        ffn_hidden_size: width of the MLP (of each half, where the MLP is gated); with experts, of each expert.
        num_attention_heads: query heads of a layer.
        num_query_groups: key/value heads of a layer.
        num_moe_experts: experts of a layer.
    """

    num_layers: AxisConfig = field(default_factory=AxisConfig)
    hidden_size: AxisConfig = field(default_factory=AxisConfig)
    ffn_hidden_size: AxisConfig = field(default_factory=AxisConfig)
    num_attention_heads: AxisConfig = field(default_factory=AxisConfig)
    num_query_groups: AxisConfig = field(default_factory=AxisConfig)
    num_moe_experts: AxisConfig = field(default_factory=AxisConfig)

    def given(self) -> dict[str, AxisConfig]:
        """The axes that are searched."""
        axes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: axis for name, axis in axes.items() if axis != AxisConfig()}

    def faults(self) -> list[str]:
        """Nothing to search."""
        if self.given():
            return []
        return ["num_layers: no axis is searched; give at least one axis {min, multiple} or {values}"]


@dataclass
class BudgetConfig:
    """What a searched shape may cost; every budget that is given holds.

    Attributes:
        parameters: number of parameters, within ``tolerance``.
        share: instead, share of the model's own number.
        active_parameters: number of parameters that a token uses in a mixture of experts, within ``tolerance``: all
            outside the experts, and those of as many experts as a token is sent to.
        active_share: instead, share of the model's own number of them.
        tolerance: how far from each of these numbers a shape may lie: 0.05 allows 5 % to either side.
        memory_gib: GiB of the fullest rank of ``student_layout``, by the memory model.
        memory_of: "inference" (weights and the cache of keys and values) or "training" (weights, gradients, Adam,
            activations).
        latency_ms: milliseconds on the running device, measured.
        latency_of: "prefill" (a whole batch of sequences) or "decode" (one further token of each).
        floor: without a number of parameters, shapes that use less than this share of the memory or latency are
            left out.
        batch_size: number of sequences for memory and latency.
        sequence_length: tokens of each sequence.
        dtype: type of weights and cache in the memory model; latency is measured in ``runtime.dtype``.
        recompute: in the memory of "training", activations within a layer are computed again in the backward pass.
    """

    ADDED: ClassVar[tuple[str, ...]] = ("active_parameters", "active_share")

    parameters: float | None = None
    share: float | None = None
    active_parameters: float | None = None
    active_share: float | None = None
    tolerance: float = 0.05
    memory_gib: float | None = None
    memory_of: str = "inference"
    latency_ms: float | None = None
    latency_of: str = "prefill"
    floor: float = 0.8
    batch_size: int = 1
    sequence_length: int = 512
    dtype: str = "bfloat16"
    recompute: bool = False

    def faults(self) -> list[str]:
        """No budget, two of the same kind, values out of range."""
        faults = [
            *positive(
                self, "parameters", "share", "active_parameters", "active_share", "memory_gib", "latency_ms",
                "batch_size", "sequence_length",
            ),
            *choice(self, "memory_of", MEMORY_USES),
            *choice(self, "latency_of", LATENCIES),
            *choice(self, "dtype", DTYPES),
            *(f"{name}={getattr(self, name)}: must lie in [0, 1)" for name in ("tolerance", "floor")
              if not 0 <= getattr(self, name) < 1),
        ]  # fmt: skip
        for name, share in (("parameters", "share"), ("active_parameters", "active_share")):
            value = getattr(self, share)
            if value is not None and value > 1:
                faults.append(f"{share}={value}: pruning does not grow a model; give at most 1")
            if getattr(self, name) is not None and value is not None:
                faults.append(f"{name}: give one of {name} and {share}, not both")
        given = (
            self.parameters, self.share, self.active_parameters, self.active_share, self.memory_gib, self.latency_ms,
        )  # fmt: skip
        if all(value is None for value in given):
            faults.append(
                "parameters: no budget is given; set parameters, share, active_parameters, active_share, memory_gib or "
                "latency_ms"
            )
        return faults


@dataclass
class ShortDistillConfig(ShortSchedule):
    """The short distillation that ranks the best shapes of a search; its data are the search's.

    Attributes:
        loss: as in ``distill``.
    """

    loss: LossConfig = field(default_factory=LossConfig)

    def faults(self) -> list[str]:
        """Left to the distillation's own configuration, which the search makes of it."""
        return []
