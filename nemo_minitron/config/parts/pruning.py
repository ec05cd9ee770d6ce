"""Settings of scores, of the pruned sizes, and of the choice of layers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from nemo_minitron.config.parts.checks import AGGREGATIONS, DEPTH_CRITERIA, DEPTH_FORMS, TAYLOR_LOSSES, choice, positive

__all__ = ["AggregationConfig", "DepthChoiceConfig", "TargetConfig", "TaylorConfig", "VocabularyConfig"]


@dataclass
class AggregationConfig:
    """How activations become one score per unit: "mean", "l1", "l2", "variance" or "max".

    Attributes:
        sequence: statistic over the tokens of a sample; null is the mean (of the Taylor estimator, the sum it always
            takes).
        batch: statistic over the samples. The estimator "reconstruction" has all tokens together, and no choice.
    """

    sequence: str | None = None
    batch: str = "l2"

    def faults(self) -> list[str]:
        """Unknown choices."""
        return [*choice(self, "sequence", AGGREGATIONS), *choice(self, "batch", AGGREGATIONS)]


@dataclass
class TaylorConfig:
    """What the estimator "taylor" estimates.

    Attributes:
        loss: "labels" for the change of the loss on the text; "kl" for the divergence from the unpruned model's own
            distribution, by labels that are drawn from it.
    """

    loss: str = "labels"

    def faults(self) -> list[str]:
        """Unknown choices."""
        return choice(self, "loss", TAYLOR_LOSSES)


@dataclass
class TargetConfig:
    """Sizes of the pruned model; null keeps the model's own. A path in place of the sizes is ``search``.

    Attributes:
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        ffn_hidden_size: width of the MLP (of each half, where the MLP is gated); with experts, of each expert.
        num_attention_heads: query heads of a layer.
        num_query_groups: key/value heads of a layer.
        num_moe_experts: experts of a layer.
        search: instead of sizes, the output of ``minitron search``, whose best shape is taken.
    """

    PATHS: ClassVar[tuple[str, ...]] = ("search",)
    #: Settings that a later release added; see ``StageConfig.ADDED``.
    ADDED: ClassVar[tuple[str, ...]] = ("search",)
    #: The setting that a plain text stands for, where a mapping may be.
    TEXT: ClassVar[str] = "search"

    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    num_moe_experts: int | None = None
    search: str | None = None

    @property
    def asked(self) -> bool:
        """Whether any size is asked for, here or by a search."""
        return self.search is not None or bool(self.given())

    def given(self) -> dict[str, int]:
        """The sizes that are asked for here."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value is not None and name != "search"}

    def faults(self) -> list[str]:
        """Sizes below 1, heads that do not fill their groups, and sizes beside those of a search."""
        faults = positive(self, *(f.name for f in dataclasses.fields(self) if f.name != "search"))
        if self.search is not None and self.given():
            sizes = ", ".join(self.given())
            faults.append(f"search={self.search}: gives all sizes; leave out {sizes}, or leave the search out")
        heads, groups = self.num_attention_heads, self.num_query_groups
        if not faults and heads is not None and groups is not None and heads % groups:
            faults.append(f"num_attention_heads={heads}: is not a multiple of num_query_groups={groups}")
        return faults


@dataclass
class VocabularyConfig:
    """A smaller vocabulary: the most frequent tokens, and all tokens that are needed to write them and any text.

    Attributes:
        size: tokens to keep; null keeps all.
        frequencies: output of ``minitron tokens``, or a file with one ``id<TAB>count`` a line.
    """

    PATHS: ClassVar[tuple[str, ...]] = ("frequencies",)

    size: int | None = None
    frequencies: str | None = None

    def faults(self) -> list[str]:
        """One without the other."""
        faults = positive(self, "size")
        if (self.size is None) != (self.frequencies is None):
            missing = "size" if self.size is None else "frequencies"
            faults.append(f"{missing}: a vocabulary is trimmed to a size by frequencies; give both or none")
        return faults


@dataclass
class DepthChoiceConfig:
    """How the layers to drop are chosen.

    Attributes:
        criterion: "block_influence" (of the scores), or "loss" or "task" (of ``depth_scores``).
        form: "lowest" drops the layers that cost least alone; "contiguous" the run of neighbouring layers that costs
            least together; "greedy" the cheapest layer, then the cheapest of the remaining model, and so on.
    """

    criterion: str = "block_influence"
    form: str = "lowest"

    def faults(self) -> list[str]:
        """Unknown choices, influence chosen greedily."""
        faults = [
            *choice(self, "criterion", DEPTH_CRITERIA),
            *choice(self, "form", DEPTH_FORMS),
        ]
        if self.criterion == "block_influence" and self.form == "greedy":
            faults.append("form=greedy: block influence is measured once; choose lowest, or criterion=loss")
        return faults
