"""The losses of a distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from nemo_minitron.config.parts.checks import BALANCES, choice, not_negative, positive
from nemo_minitron.config.tables import LOGIT_LOSSES, STATE_LOSSES, Table

__all__ = ["CorrectionConfig", "IntermediateConfig", "LossConfig"]


@dataclass
class LossConfig:
    """The loss of a token's logits, as defined in :mod:`nemo_minitron.distillation.losses.reference`.

    Attributes:
        kind: divergence of teacher and student
        temperature: T of both distributions; the divergence comes times T squared.
        beta: weight of the teacher in "jensen_shannon".
        k: tokens that "top_k" keeps.
        label_weight: share ``w`` of the labels' cross-entropy (at temperature 1): ``(1 - w) divergence + w CE``; 1 is
            the language-model loss alone, for which no teacher is needed.
    """

    kind: str = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    k: int = 64
    label_weight: float = 0.0

    TABLES: ClassVar[dict[str, Table[Any]]] = {"kind": LOGIT_LOSSES}

    def faults(self) -> list[str]:
        """Unknown kinds and values out of range."""
        faults = [*choice(self, "kind", LOGIT_LOSSES), *positive(self, "temperature", "k")]
        if not 0 < self.beta < 1:
            faults.append(f"beta={self.beta}: must lie between 0 and 1; their limits are forward_kl and reverse_kl")
        if not 0 <= self.label_weight <= 1:
            faults.append(
                f"label_weight={self.label_weight}: must lie in [0, 1], 1 being the language-model loss alone"
            )
        return faults


@dataclass
class CorrectionConfig:
    """Training of the teacher on the labels while it teaches; the other settings are those of the student.

    Attributes:
        lr: peak learning rate of the teacher; null does not train it.
        min_lr: learning rate of the teacher at the last step.
    """

    lr: float | None = None
    min_lr: float = 0.0

    def faults(self) -> list[str]:
        """A schedule that rises."""
        faults = [*positive(self, "lr"), *not_negative(self, "min_lr")]
        if self.lr is not None and self.min_lr > self.lr:
            faults.append(f"min_lr={self.min_lr}: lies above lr={self.lr}")
        return faults


@dataclass
class IntermediateConfig:
    """Losses between the states inside the two models, as in :mod:`nemo_minitron.distillation.losses.states`.

    Attributes:
        hidden: null for none, or the loss between the hidden states that leave the mapped layers, the mean over these
            layers
        embedding: the same between the outputs of the embeddings
        relation_heads: R of the attention relations, the mean over their mapped layers; null for none.
        layers: student layer -> teacher layer, counted from 0, for the hidden states; null maps each layer of a pruned
            student to the teacher layer that it was cut from, and each layer of another student to the teacher layer at
            the same relative depth.
        attention_layers: the same of the attention relations; null takes the last layer alone.
        hidden_weight, embedding_weight, attention_weight: weight of that loss in the sum of the three.
        balance: "fixed" adds the sum to the loss of the logits; "dynamic" scales it to the size that the loss of the
            logits had in the step before (arXiv 2407.14679, section 3).
    """

    hidden: str | None = None
    embedding: str | None = None
    relation_heads: int | None = None
    layers: dict[int, int] | None = None
    attention_layers: dict[int, int] | None = None
    hidden_weight: float = 1.0
    embedding_weight: float = 1.0
    attention_weight: float = 1.0
    balance: str = "fixed"

    TABLES: ClassVar[dict[str, Table[Any]]] = {"hidden": STATE_LOSSES, "embedding": STATE_LOSSES}

    def weights(self) -> dict[str, float]:
        """The weights of the losses that are asked for: "hidden", "embedding", "attention"."""
        asked = {"hidden": self.hidden, "embedding": self.embedding, "attention": self.relation_heads}
        return {part: getattr(self, f"{part}_weight") for part, given in asked.items() if given is not None}

    def faults(self) -> list[str]:
        """Unknown choices, values out of range, options of a loss that is not asked for."""
        faults = [
            *choice(self, "hidden", STATE_LOSSES),
            *choice(self, "embedding", STATE_LOSSES),
            *choice(self, "balance", BALANCES),
            *positive(self, "relation_heads", "hidden_weight", "embedding_weight", "attention_weight"),
        ]
        for name, loss in (("layers", "hidden"), ("attention_layers", "relation_heads")):
            layers = getattr(self, name)
            if layers is not None and getattr(self, loss) is None:
                faults.append(f"{name}={layers}: is of the loss {loss}, which is not asked for")
            elif layers is not None and not layers:
                faults.append(f"{name}={{}}: maps no layer; leave it null for the automatic map")
        if self.balance == "dynamic" and not self.weights():
            faults.append("balance=dynamic: there is no intermediate loss to balance; ask for one")
        return faults
