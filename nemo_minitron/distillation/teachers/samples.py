"""A sample of a logit cache: from a distribution to tensors and back.

:mod:`~nemo_minitron.distillation.teachers.logit_cache` says what the tensors are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nemo_minitron.distillation.losses.common import CommonTokens
from nemo_minitron.distillation.losses.kernels import TopTokens
from nemo_minitron.distillation.teachers.manifest import Manifest
from nemo_minitron.distillation.teachers.packing import Grid, TokenOrder, pack, unpack

__all__ = ["Sample", "decode_logits", "decode_top", "encode", "packed_samples", "unpacked_sample"]

_LOW_BITS = 1 << 16

Sample = dict[str, torch.Tensor]
"""The tensors of one sample, without their first dimension ``n``. Of a compact cache, which packs them when they are
written and unpacks them when they are read, ``tokens`` ``[s, k]`` int32, -1 where there is none, ``values`` float32 and
``log_rest``."""


def encode(manifest: Manifest, top: TopTokens | None = None, log_probabilities: torch.Tensor | None = None) -> Sample:
    """A sample as it is stored.

    Args:
        manifest: says how.
        top: of the sample's s tokens, likeliest first, where the cache keeps k tokens.
        log_probabilities: ``[s, V]`` where it keeps all.
    """
    stored: Sample = {}
    if manifest.compact:
        assert top is not None, "the settings were checked"
        stored = _encode_compact(manifest, top)
        return {name: tensor.cpu().contiguous() for name, tensor in stored.items()}
    if top is not None:
        values = top.log_probabilities.float()
        stored["tokens_low"] = (top.tokens % _LOW_BITS).to(torch.uint16)
        if manifest.vocab_size > _LOW_BITS:
            stored["tokens_high"] = (top.tokens // _LOW_BITS).to(torch.uint8)
        stored["log_rest"] = top.log_rest.float()
    else:
        assert log_probabilities is not None
        values = log_probabilities.float()
    if manifest.values == "int8":
        low, high = values.amin(-1), values.amax(-1)
        scale = (high - low) / 255
        steps = (values - low[:, None]) / torch.where(scale > 0, scale, 1.0)[:, None]
        stored |= {"values": steps.round().clamp(0, 255).to(torch.uint8), "offset": low, "scale": scale}
    else:
        stored["values"] = values.to(getattr(torch, manifest.values))
    return {name: tensor.cpu().contiguous() for name, tensor in stored.items()}


def _encode_compact(manifest: Manifest, top: TopTokens) -> Sample:
    """The tokens up to ``top_p``, and their log-probabilities on the grid that can be stored."""
    assert manifest.error_bound is not None
    log_p, log_rest = top.log_probabilities.double(), top.log_rest.double()
    kept = log_p.isfinite()
    if manifest.top_p is not None:
        p = log_p.exp()
        kept &= p.cumsum(-1) - p < manifest.top_p
    kept[..., 0] = True
    dropped = log_p.masked_fill(kept, float("-inf")).logsumexp(-1)
    grid = Grid(manifest.error_bound)
    values = torch.from_numpy(grid.values(grid.levels(log_p.float().cpu().numpy())))
    return {
        "tokens": top.tokens.masked_fill(~kept, -1).to(torch.int32),
        "values": values.masked_fill(~kept.cpu(), float("-inf")),
        "log_rest": torch.logaddexp(log_rest, dropped).float(),
    }


def decode_top(stored: Sample, *, k: int | None = None, common: CommonTokens | None = None) -> TopTokens:
    """A stored sample (or several, stacked) as a distribution over its likeliest tokens and one ghost token.

    Args:
        stored: ``[..., k]`` and ``[...]`` tensors.
        k: number of tokens to take; the others join the ghost token. None takes all.
        common: tokens that take part; None for all. What is known of the others is taken out: those that are stored.
            Others are in the mass that the cache keeps of all that are not stored, and stay there.

    Returns:
        ``[n, k]`` and ``[n]``, n being the number of tokens: float32, summing to one. With ``common``, or a cache that
        has a ``top_p``, there may be fewer than k tokens at a position. Those of a compact cache are likeliest first
        only where some are left out.
    """
    values = _values(stored).flatten(0, -2).double()
    compact = "tokens" in stored
    tokens = stored["tokens" if compact else "tokens_low"].to(torch.int64)
    if "tokens_high" in stored:
        tokens += stored["tokens_high"].to(torch.int64) * _LOW_BITS
    log_rest = stored["log_rest"].flatten().double()
    # The left-over mass is exact; what the tokens share is one minus it.
    log_top = values - values.logsumexp(-1, keepdim=True) + torch.log(-torch.expm1(log_rest))[:, None]
    tokens = tokens.flatten(0, -2)
    if common is not None:
        tokens, log_top, log_rest = _restricted(tokens, log_top, log_rest, common)
    if k is not None and k < tokens.shape[-1]:
        if compact:
            order = log_top.argsort(dim=-1, descending=True, stable=True)
            tokens, log_top = tokens.gather(-1, order), log_top.gather(-1, order)
        log_rest = torch.logaddexp(log_rest, log_top[:, k:].logsumexp(-1))
        tokens, log_top = tokens[:, :k], log_top[:, :k]
    full = common is None and not (compact and bool((tokens < 0).any()))
    return TopTokens(tokens, log_top.float(), log_rest.float(), full=full)


def _restricted(
    tokens: torch.Tensor, log_top: torch.Tensor, log_rest: torch.Tensor, common: CommonTokens
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[n, k]``, ``[n, k]`` and ``[n]`` without the tokens that take no part, likeliest first, and scaled to one."""
    gone = (tokens >= common.size) | torch.isin(tokens, torch.tensor(common.left_out, dtype=tokens.dtype))
    order = gone.to(torch.uint8).argsort(dim=-1, stable=True)
    gone = gone.gather(-1, order)
    tokens = tokens.gather(-1, order).masked_fill(gone, -1)
    log_top = log_top.gather(-1, order).masked_fill(gone, float("-inf"))
    log_sum = torch.logaddexp(log_top.logsumexp(-1), log_rest)
    return tokens, log_top - log_sum[:, None], log_rest - log_sum


def decode_logits(stored: Sample) -> torch.Tensor:
    """``[..., V]`` float32 log-probabilities (as stored: softmax makes them sum to one) of a cache that keeps all."""
    return _values(stored)


def _values(stored: Sample) -> torch.Tensor:
    values = stored["values"].float()
    return values if "scale" not in stored else values * stored["scale"][..., None] + stored["offset"][..., None]


def packed_samples(manifest: Manifest, samples: Sequence[Sample]) -> list[Sample]:
    """Samples as a compact shard has them: ``packed`` and ``order`` uint8 and ``log_rest``."""
    assert manifest.error_bound is not None
    tokens = [sample["tokens"].numpy() for sample in samples]
    order, grid = TokenOrder.of(tokens, manifest.vocab_size), Grid(manifest.error_bound)
    ranks, stored = order.ranks(), _bytes(order.stored)
    return [
        {
            "packed": _bytes(pack(ids, sample["values"].numpy(), ranks, grid)),
            "order": stored,
            "log_rest": sample["log_rest"],
        }
        for ids, sample in zip(tokens, samples, strict=True)
    ]


def unpacked_sample(manifest: Manifest, row: Sample) -> Sample:
    """A sample of a compact shard, as :func:`encode` made it, in the order of the shard's ranks.

    Raises:
        ValueError: for what :func:`packed_samples` did not make.
    """
    assert manifest.error_bound is not None
    assert manifest.k is not None
    tokens, values = unpack(
        row["packed"].numpy(),
        TokenOrder.read(row["order"].numpy().tobytes(), manifest.vocab_size),
        Grid(manifest.error_bound),
        positions=len(row["log_rest"]),
        k=manifest.k,
    )
    return {"tokens": torch.from_numpy(tokens), "values": torch.from_numpy(values), "log_rest": row["log_rest"]}


def _bytes(content: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())
