"""Choosing the next token: greedy, or drawn from the tempered and truncated distribution.

A draw depends only on the seed, the number of the request and the number of the token: not on which requests share a
batch, nor on the model's parallel layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_minitron.config import Sampling
from nemo_minitron.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["check_sampling", "choose", "draws"]


def check_sampling(sampling: Sampling, seed: int) -> None:
    """Refuse settings that leave nothing to draw from.

    Raises:
        ConfigError: with all faults at once.
    """
    faults = [f"sampling.{fault}" for fault in sampling.faults()]
    if not 0 <= seed < 2**63:
        faults.append(f"seed={seed}: must lie between 0 and 2**63 - 1")
    if faults:
        raise ConfigError(faults)


def draws(count: int, *, seed: int, request: int) -> torch.Tensor:
    """``[count]`` float64 numbers in [0, 1) for one request, from a counter-based generator (Philox).

    Args:
        count: how many; a smaller count gives the first numbers of a larger one.
        seed: 0 or more.
        request: number of the request, 0 or more.
    """
    import numpy as np
    import torch

    generator = np.random.Generator(np.random.Philox(key=np.array([seed, request], dtype=np.uint64)))
    return torch.from_numpy(generator.random(count))


def choose(logits: torch.Tensor, sampling: Sampling, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row and the model's log-probability of it.

    Computed in float64, so that rounding differences between layouts rarely change the drawn token. Of equal logits the
    lower id comes first, in the greedy choice, in ``top_k`` and in ``top_p``. Otherwise the tokens that stay are those
    of transformers' ``TemperatureLogitsWarper``, ``TopKLogitsWarper`` and ``TopPLogitsWarper`` in this order.

    Args:
        logits: ``[b, V]`` over the true vocabulary, whole on this rank.
        sampling: the settings.
        drawn: ``[b]`` float64 numbers in [0, 1), one per row; the token is where the cumulative probability exceeds it.

    Returns:
        ``[b]`` int64 ids and ``[b]`` float64 log-probabilities under the model itself, that is before temperature and
        truncation.
    """
    import torch

    logits = logits.double()
    if sampling.greedy:
        token = _first(logits == logits.amax(dim=-1, keepdim=True))
    elif sampling.top_k is None and sampling.top_p == 1:
        token = _draw((logits / sampling.temperature).softmax(dim=-1), drawn)
    else:
        # A stable sort keeps equal logits in the order of their ids.
        ordered, ids = (logits / sampling.temperature).sort(dim=-1, descending=True, stable=True)
        if sampling.top_k is not None:
            ordered, ids = ordered[:, : sampling.top_k], ids[:, : sampling.top_k]
        probabilities = ordered.softmax(dim=-1)
        # A token goes when those before it hold enough already; so the first always stays.
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
        token = ids.gather(-1, _draw(probabilities, drawn)[:, None]).squeeze(-1)
    chosen = logits.gather(-1, token[:, None]).squeeze(-1)
    return token, chosen - torch.logsumexp(logits, dim=-1)


def _draw(weights: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """``[b, n]`` weights, ``[b]`` numbers in [0, 1) -> ``[b]`` positions, by inversion of the cumulative weights."""
    cumulated = weights.cumsum(dim=-1)
    return _first(cumulated > drawn.to(weights.device)[:, None] * cumulated[:, -1:])


def _first(hits: torch.Tensor) -> torch.Tensor:
    """``[b, n]`` bool -> ``[b]`` position of the first True; 0 where a row has none (its logits are NaN)."""
    import torch

    positions = torch.arange(hits.shape[-1], device=hits.device)
    first = positions.where(hits, hits.shape[-1]).amin(dim=-1)
    return first.where(first < hits.shape[-1], 0)
