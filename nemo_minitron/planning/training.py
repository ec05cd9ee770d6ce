"""A training before it runs, and its FLOPs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_minitron import axes
from nemo_minitron.config.parts import ParallelLayout
from nemo_minitron.planning.model import Model
from nemo_minitron.shape import ModelShape

__all__ = ["ForwardFlops", "Training", "layer_flops"]


def layer_flops(model: Model, sizes: ModelShape, sequence_length: int) -> tuple[float, float]:
    """``layer`` and ``core`` of :class:`ForwardFlops` for a layer of these sizes, which may lack a part."""
    active = (model.architecture.moe_router_topk or 0) / (sizes.num_moe_experts or 1)
    matrices = sum(
        math.prod(axes.tensor_shape(row, sizes)) * (1.0 if row.expert is None else active)
        for row in axes.layer_parameters(model.table, sizes).values()
        if len(row.axes) == 2
    )
    return 2 * matrices, 2 * sequence_length * sizes.num_attention_heads * sizes.head_dim


@dataclass(frozen=True)
class ForwardFlops:
    """Operations of a forward pass, for one token; a multiplication and an addition are two.

    Matrices count by their size; the core of the attention counts half of the square, as a causal mask leaves it (what
    NeMo's ``flops_formulas`` does). Norms, activations, softmax and the embedding's look-up are left out.

    Attributes:
        layer: one layer, without the core of its attention; where layers differ, their mean.
        core: the core of one layer's attention: queries by keys, probabilities by values; likewise.
        output: the output layer.
        layers: number of them.
    """

    layer: float
    core: float
    output: float
    layers: int

    @classmethod
    def of(cls, model: Model, sequence_length: int) -> ForwardFlops:
        """The operations of a model for sequences of a length."""
        shape = model.shape
        each = shape.each()
        shares = [(each.count(sizes) / len(each), layer_flops(model, sizes, sequence_length)) for sizes in set(each)]
        return cls(
            layer=sum(share * layer for share, (layer, _) in shares),
            core=sum(share * core for share, (_, core) in shares),
            output=2 * shape.vocab_size * shape.hidden_size,
            layers=shape.num_layers,
        )

    @property
    def total(self) -> float:
        """Operations of the whole model."""
        return self.layers * (self.layer + self.core) + self.output


@dataclass(frozen=True)
class Training:
    """A training, apart from the machines that it runs on.

    Attributes:
        name: its name in the recipe.
        student: the model that is trained.
        teacher: the model whose logits it learns; None without a teacher.
        steps: optimizer steps.
        global_batch_size, micro_batch_size: sequences of a step, and of one pass on one data-parallel rank.
        sequence_length: tokens of each.
        layout: the layout that the recipe asks for.
        recompute: the recomputation that the recipe asks for (:data:`~nemo_minitron.planning.memory.RECOMPUTE`).
        bytes: of a weight: 2 in bf16 training, 4 in fp32.
        chunked: output layer and loss go over chunks of tokens, so that logits are never whole.
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
    chunked: bool = False

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
        """Model FLOPs of a step: three times a forward pass of the student, and one of the teacher."""
        each = 3 * ForwardFlops.of(self.student, self.sequence_length).total
        if self.teacher is not None:
            each += ForwardFlops.of(self.teacher, self.sequence_length).total
        return each * self.tokens_per_step

    @property
    def flops(self) -> float:
        """Model FLOPs of the whole training."""
        return self.steps * self.flops_per_step
