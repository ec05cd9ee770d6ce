"""The values of all losses of a step, the same on every rank, and the weight of the intermediate ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from nemo_minitron.runtime.groups import Groups

__all__ = ["LOGITS", "Balance"]

LOGITS = "logits"
"""The part of :attr:`Balance.means` that is the loss of the logits."""
_TOKENS = "tokens"


class Balance:
    """Gathers the losses of a step's micro-batches and weighs the intermediate ones against that of the logits.

    Under dynamic balance the training's loss is ``L_logits + alpha L_intermediate`` with ``alpha = L_logits /
    L_intermediate`` (arXiv 2407.14679, section 3) of the step before, over its whole global batch: the values are
    summed over micro-batches, pipeline stages, data- and context-parallel ranks, once a step, in two small all-reduces.
    So alpha is one number, the same for every micro-batch and rank. In the first step it is 1.

    Attributes:
        alpha: weight of the intermediate losses in the step that runs; 1 under fixed balance.
        means: of the last step that ended, by part, per valid token: "logits", and of each intermediate loss with its
            own weight in it; "alpha" as it was in that step.
    """

    def __init__(self, parts: list[str], *, dynamic: bool) -> None:
        self.parts = [LOGITS, _TOKENS, *parts]
        self.dynamic = dynamic
        self.alpha = 1.0
        self.means: dict[str, float] = {}
        self._sums: dict[str, Any] = {}
        self._tensor_parallel = 1

    @property
    def weighs(self) -> bool:
        """Whether there are intermediate losses to weigh."""
        return len(self.parts) > 2

    def begin(self, groups: Groups) -> None:
        """Start a step."""
        self._sums = {}
        self._tensor_parallel = groups.layout.tensor

    def add(self, part: str, value: torch.Tensor, *, shared: bool = True) -> None:
        """Add the loss of a micro-batch, summed over its tokens.

        Args:
            part: name of the loss.
            value: scalar.
            shared: each tensor-parallel rank has the whole value; otherwise each has a part of the sum.
        """
        value = value.detach().double()
        self._sums[part] = self._sums.get(part, 0) + (value / self._tensor_parallel if shared else value)

    def add_logits(self, loss: torch.Tensor, tokens: torch.Tensor) -> None:
        """Add a micro-batch's loss of logits, summed over its valid tokens, and their number; on the last stage."""
        self.add(LOGITS, loss)
        self.add(_TOKENS, tokens)

    def end(self, groups: Groups, *, training: bool) -> None:
        """Finish a step; every rank calls it. A training step sets the alpha of the next."""
        sums = torch.zeros(len(self.parts), dtype=torch.float64, device=groups.device.torch)
        for index, part in enumerate(self.parts):
            sums[index] = self._sums.get(part, 0)
        dist.all_reduce(sums, group=groups.model)
        dist.all_reduce(sums, group=groups.dp_cp)
        values = dict(zip(self.parts, sums.tolist(), strict=True))
        tokens = values.pop(_TOKENS)
        self.means = {part: value / max(tokens, 1) for part, value in values.items()}
        self.means["alpha"] = self.alpha
        intermediate = sum(value for part, value in values.items() if part != LOGITS)
        if training and self.dynamic and intermediate > 0:
            self.alpha = values[LOGITS] / intermediate

    def state_dict(self) -> dict[str, float]:
        """What a resumed training needs."""
        return {"alpha": self.alpha} if self.dynamic else {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on with a checkpoint's alpha."""
        if self.dynamic:
            self.alpha = state["alpha"]
