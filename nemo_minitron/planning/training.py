"""A training before it runs, and the arithmetic of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_minitron import axes
from nemo_minitron.config.parts import ParallelLayout
from nemo_minitron.planning.model import Model

__all__ = ["ForwardFlops", "Training"]


@dataclass(frozen=True)
class ForwardFlops:
    """Operations of a forward pass, for one token; a multiplication and an addition are two.

    Matrices count by their size; the core of the attention counts half of the square, as a causal mask leaves it (what
    NeMo's ``flops_formulas`` does). Norms, activations, softmax and the embedding's look-up are left out.

    Attributes:
        layer: one layer, without the core of its attention.
        core: the core of one layer's attention: queries by keys, probabilities by values.
        output: the output layer.
        layers: number of them.
    """

    layer: float
    core: float
    output: float
    layers: int

    @classmethod
    def of(cls, model: Model, sequence_length: int) -> ForwardFlops:
        """Of a model at a length of its sequences."""
        shape, table = model.shape, model.table
        active = (model.architecture.moe_router_topk or 0) / (shape.num_moe_experts or 1)
        matrices = sum(
            math.prod(axes.tensor_shape(row, shape)) * (1.0 if row.expert is None else active)
            for row in axes.layer_parameters(table, shape).values()
            if len(row.axes) == 2
        )
        return cls(
            layer=2 * matrices,
            core=2 * sequence_length * shape.num_attention_heads * shape.head_dim,
            output=2 * shape.vocab_size * shape.hidden_size,
            layers=shape.num_layers,
        )

    @property
    def total(self) -> float:
        """Of the whole model."""
        return self.layers * (self.layer + self.core) + self.output


@dataclass(frozen=True)
class Training:
    """What a training does, whatever it runs on.

    Attributes:
        name: how the recipe calls it.
        student: the model that is trained.
        teacher: the model whose logits it learns; None without one.
        steps: optimizer steps.
        global_batch_size, micro_batch_size: sequences of a step, and of one pass on one data-parallel rank.
        sequence_length: tokens of each.
        layout: that the recipe asks for.
        recompute: that the recipe asks for (:data:`~nemo_minitron.planning.memory.RECOMPUTE`).
        bytes: of a weight: 2 in bf16 training, 4 in fp32.
    """

    name: str
    student: Model
    teacher: Model | None
    steps: int
    global_batch_size: int
    micro_batch_size: int
    sequence_length: int
    layout: ParallelLayout
    recompute: str = "none"
    bytes: int = 2

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.global_batch_size * self.sequence_length

    @property
    def tokens(self) -> int:
        """Tokens of the whole training."""
        return self.steps * self.tokens_per_step

    @property
    def flops_per_step(self) -> float:
        """Model FLOPs of a step: three forward passes of the student's worth, one of the teacher's."""
        each = 3 * ForwardFlops.of(self.student, self.sequence_length).total
        if self.teacher is not None:
            each += ForwardFlops.of(self.teacher, self.sequence_length).total
        return each * self.tokens_per_step

    @property
    def flops(self) -> float:
        """Model FLOPs of the whole training."""
        return self.steps * self.flops_per_step
