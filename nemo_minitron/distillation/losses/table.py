"""The losses by their names in the configuration: one entry each, which everything else reads.

Nothing heavy is imported; a function that an entry names is imported when it is first called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import tables
from nemo_minitron.config.tables import Table, deferred

if TYPE_CHECKING:
    import torch

    from nemo_minitron.config import LossConfig

__all__ = ["LOGIT_LOSSES", "STATE_LOSSES", "LogitLoss", "StateLoss"]

_REFERENCE = "nemo_minitron.distillation.losses.reference"
_KERNELS = "nemo_minitron.distillation.losses.kernels"
_STATES = "nemo_minitron.distillation.losses.states"


@dataclass(frozen=True)
class LogitLoss:
    """A divergence between the teacher's and the student's logits of a token.

    Exactly one of ``kernel``, ``from_top_k`` and ``fused`` is given. ``n`` is a number of tokens, ``valid`` that of
    this rank's columns without padding.

    Attributes:
        name: ``loss.kind`` in the configuration.
        reference: ``(student, teacher, *, temperature, **options) -> [...]`` of whole ``[..., V]`` logits, by plain
            autograd, times ``temperature ** 2``; the tests hold the others to its value and its gradient.
        kernel: ``(p, q, columns, **options) -> ([n], [n, valid])``: the loss at temperature 1 and its derivative by
            ``q``, float32 or wider; ``p`` and ``q`` are the teacher's and the student's ``[n, valid]`` logits, divided
            by the temperature, and only read. ``columns`` adds up over the vocabulary
            (:class:`~nemo_minitron.distillation.losses.kernels.Columns`).
        from_top_k: ``(top, q, columns, **options)``, the same for a loss that knows the teacher's ``loss.k`` likeliest
            tokens alone (:class:`~nemo_minitron.distillation.losses.kernels.TopTokens`). It can be read from a cache.
        fused: ``(p, q, columns, *, temperature, out, **options) -> [n]``, which divides by the temperature and writes
            the derivative itself, as :func:`~nemo_minitron.distillation.losses.kernels.forward_kl` documents.
        options: settings of :class:`~nemo_minitron.config.LossConfig` that go to the functions above by name; "k" goes
            to the reference alone.
        over_all: for a loss ``from_top_k``: the loss that it equals when ``loss.k`` is the whole vocabulary. With a
            cache of the likeliest tokens, this loss stands in for that one, as a lower bound.
        note: a few words for ``--help``.
    """

    name: str
    reference: Callable[..., torch.Tensor]
    kernel: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    from_top_k: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    fused: Callable[..., torch.Tensor] | None = None
    options: tuple[str, ...] = ()
    over_all: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if sum(form is not None for form in (self.kernel, self.from_top_k, self.fused)) != 1:
            raise ValueError(f"logit loss {self.name!r}: give exactly one of kernel, from_top_k and fused")

    def kernel_options(self, loss: LossConfig) -> dict[str, Any]:
        """The kernel's keyword arguments."""
        return {name: getattr(loss, name) for name in self.options if name != "k"}

    def expected(self, student: torch.Tensor, teacher: torch.Tensor, loss: LossConfig) -> torch.Tensor:
        """The divergence by the reference, with a loss's settings: ``[..., V]`` twice -> ``[...]``."""
        options = {name: getattr(loss, name) for name in self.options}
        return self.reference(student, teacher, temperature=loss.temperature, **options)


@dataclass(frozen=True)
class StateLoss:
    """A loss between two hidden states.

    Attributes:
        name: of ``intermediate.hidden`` and ``intermediate.embedding`` in the configuration.
        function: ``(student, teacher, projection) -> [...]`` of ``[..., H_s]`` and ``[..., H_t]`` states;
            ``projection`` is ``[H_t, H_s]``, or None where the widths are equal. By plain autograd; no gradient flows
            to the teacher.
        note: a few words for ``--help``.
    """

    name: str
    function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    note: str = ""


OWN_LOGIT_LOSSES = (
    LogitLoss(
        "forward_kl",
        reference=deferred(f"{_REFERENCE}:forward_kl"),
        fused=deferred(f"{_KERNELS}:forward_kl"),
        note="the papers' choice",
    ),
    LogitLoss(
        "reverse_kl",
        reference=deferred(f"{_REFERENCE}:reverse_kl"),
        kernel=deferred(f"{_KERNELS}:reverse_kl"),
    ),
    LogitLoss(
        "jensen_shannon",
        reference=deferred(f"{_REFERENCE}:jensen_shannon"),
        kernel=deferred(f"{_KERNELS}:jensen_shannon"),
        options=("beta",),
    ),
    LogitLoss(
        "top_k",
        reference=deferred(f"{_REFERENCE}:top_k_kl"),
        from_top_k=deferred(f"{_KERNELS}:top_k_kl"),
        options=("k",),
        over_all="forward_kl",
        note="the teacher's likeliest tokens and one ghost token for all others",
    ),
)
OWN_STATE_LOSSES = (
    StateLoss("mse", deferred(f"{_STATES}:hidden_mse")),
    StateLoss("cosine", deferred(f"{_STATES}:hidden_cosine")),
)

LOGIT_LOSSES: Table[LogitLoss] = tables.LOGIT_LOSSES
"""By name. ``LOGIT_LOSSES.register(LogitLoss(...))`` adds one in this process, and the entry points
``nemo_minitron.losses`` of an installed package do so in every process, the ranks of ``minitron`` too."""
STATE_LOSSES: Table[StateLoss] = tables.STATE_LOSSES
"""By name; the entry points are ``nemo_minitron.state_losses``."""
