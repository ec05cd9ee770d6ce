"""A teacher's logits on disk: written once under any layout, read under any other.

A cache is a directory of safetensors shards and a ``manifest.json``. Samples are addressed by content: their key is a
hash of the input tokens (and of the documents in them), so order, epoch and micro-batch do not matter. A shard is
complete in itself and named after its samples; it is written aside and renamed, so any number of processes may write,
and a killed process loses only its last shard. Every sample has a checksum, which is checked when it is read.

Of each token a cache keeps the log-probabilities at temperature 1 of the teacher's ``k`` likeliest tokens, and in
float32 the log of the probability of all others. Reading gives a distribution again: the stored values are rounded, so
they are scaled to sum to one minus the probability of all others, which is stored and never computed from them. With
``k: null`` it keeps all log-probabilities, from which any loss at any temperature can be computed.

====================  ==================  =========================================================
tensor of a shard     of n samples        what
====================  ==================  =========================================================
``keys``              ``[n, 32]`` uint8   sha256
``crc``               ``[n]`` int64       crc32 of the key and the sample's rows, by tensor name
``tokens_low``        ``[n, s, k]`` uint16  token numbers, their low 16 bits, likeliest first
``tokens_high``       ``[n, s, k]`` uint8   the bits above, where the vocabulary has more than 65,536
``values``            ``[n, s, k or V]``  log-probabilities: floats, or uint8 of ``offset + scale value``
``offset, scale``     ``[n, s]`` float32  of "int8"
``log_rest``          ``[n, s]`` float32  log of the probability of all other tokens
====================  ==================  =========================================================
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoints.fingerprint import same_fingerprint
from nemo_minitron.distillation.losses.common import CommonTokens
from nemo_minitron.distillation.losses.kernels import TopTokens
from nemo_minitron.distillation.teachers.manifest import MANIFEST, Manifest
from nemo_minitron.errors import DataError
from nemo_minitron.runtime.atomic import write_aside
from nemo_minitron.runtime.files import take_umask

__all__ = ["LogitCache", "Manifest", "decode_logits", "decode_top", "encode", "sample_keys", "write_shard"]

logger = logging.getLogger(__name__)

_LOW_BITS = 1 << 16

Sample = dict[str, torch.Tensor]
"""The tensors of one sample, without their first dimension ``n``."""


def sample_keys(tokens: torch.Tensor, starts: torch.Tensor) -> list[bytes]:
    """sha256 of each sample's input tokens, and where it holds several documents, of their starts.

    Args:
        tokens: ``[n, s]`` input tokens.
        starts: ``[n, s]``, as :mod:`~nemo_minitron.distillation.teachers.documents` gives them.
    """
    keys = []
    for ids, first in zip(tokens.to("cpu", torch.int32), starts.to("cpu", torch.int32), strict=True):
        digest = hashlib.sha256(ids.contiguous().numpy().astype("<i4").tobytes())
        if first.any():
            digest.update(b"documents" + first.contiguous().numpy().astype("<i4").tobytes())
        keys.append(digest.digest())
    return keys


def encode(manifest: Manifest, top: TopTokens | None = None, log_probabilities: torch.Tensor | None = None) -> Sample:
    """A sample as it is stored.

    Args:
        manifest: says how.
        top: of the sample's s tokens, likeliest first, where the cache keeps k tokens.
        log_probabilities: ``[s, V]`` where it keeps all.
    """
    stored: Sample = {}
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


def decode_top(stored: Sample, *, k: int | None = None, common: CommonTokens | None = None) -> TopTokens:
    """A stored sample (or several, stacked) as a distribution over its likeliest tokens and one ghost token.

    Args:
        stored: ``[..., k]`` and ``[...]`` tensors.
        k: number of tokens to take; the others join the ghost token. None takes all.
        common: tokens that take part; None for all. What is known of the others is taken out: those that are stored.
            Others are in the mass that the cache keeps of all that are not stored, and stay there.

    Returns:
        ``[n, k]`` and ``[n]``, n being the number of tokens: float32, summing to one. With ``common`` there may be
        fewer than k tokens at a position.
    """
    values = _values(stored).flatten(0, -2).double()
    tokens = stored["tokens_low"].to(torch.int64)
    if "tokens_high" in stored:
        tokens += stored["tokens_high"].to(torch.int64) * _LOW_BITS
    log_rest = stored["log_rest"].flatten().double()
    # The left-over mass is exact; what the tokens share is one minus it.
    log_top = values - values.logsumexp(-1, keepdim=True) + torch.log(-torch.expm1(log_rest))[:, None]
    tokens = tokens.flatten(0, -2)
    if common is not None:
        tokens, log_top, log_rest = _restricted(tokens, log_top, log_rest, common)
    if k is not None and k < tokens.shape[-1]:
        log_rest = torch.logaddexp(log_rest, log_top[:, k:].logsumexp(-1))
        tokens, log_top = tokens[:, :k], log_top[:, :k]
    return TopTokens(tokens, log_top.float(), log_rest.float(), full=common is None)


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


def write_shard(directory: Path, manifest: Manifest, samples: Sequence[tuple[bytes, Sample]]) -> Path:
    """Write samples as a shard, whole or not at all.

    Returns:
        Its path; its name is a hash of the keys.

    Raises:
        DataError: if it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    keys = [key for key, _ in samples]
    names = samples[0][1].keys()
    tensors = {name: torch.stack([stored[name] for _, stored in samples]) for name in names}
    tensors["keys"] = torch.tensor([list(key) for key in keys], dtype=torch.uint8)
    tensors["crc"] = torch.tensor([_crc(key, stored) for key, stored in samples], dtype=torch.int64)
    path = directory / f"shard-{hashlib.sha256(b''.join(keys)).hexdigest()[:20]}.safetensors"
    try:
        with write_aside(path, overwrite=True, error=DataError, parents=False) as aside:
            save_file(tensors, aside, metadata={"manifest": manifest.digest})
            take_umask(aside)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path}: cannot be written ({error}); what was written before is whole. Make room, or see to the "
            "directory's permissions, and run `minitron cache` again"
        ) from error
    return path


def _crc(key: bytes, stored: Sample) -> int:
    crc = zlib.crc32(key)
    for name in sorted(stored):
        crc = zlib.crc32(stored[name].contiguous().view(torch.uint8).numpy(), crc)
    return crc


class LogitCache:
    """An existing cache, read sample by sample.

    Memory: 32 bytes of key and some 100 of index a sample; shards are mapped, not read.

    Args:
        directory: with a manifest.
        repair: remove unfinished files of a killed writer and damaged shards, so that they are written again; otherwise
            they are refused.

    Raises:
        DataError: for a directory that is not a cache, and for damaged shards, all at once.
    """

    def __init__(self, directory: Path, *, repair: bool = False) -> None:
        manifest = Manifest.read(directory)
        if manifest is None:
            raise DataError(f"{directory}: is no logit cache (it has no {MANIFEST}); write one with `minitron cache`")
        self.directory, self.manifest = directory, manifest
        self._places: dict[bytes, tuple[str, int]] = {}
        self._open: dict[str, Any] = {}
        faults = []
        if repair:
            for left in directory.glob(".shard-*.partial.*"):
                left.unlink(missing_ok=True)
        for path in sorted(directory.glob("shard-*.safetensors")):
            fault = self._index(path, verify=repair)
            if fault is not None and repair:
                logger.warning("%s: %s; it is written again", path, fault)
                path.unlink(missing_ok=True)
            elif fault is not None:
                faults.append(f"{path.name}: {fault}")
        if faults:
            raise DataError(
                f"{directory}: {len(faults)} damaged shards; run `minitron cache` again, which writes anew what they "
                "held\n" + "\n".join(f"  - {fault}" for fault in faults)
            )

    def _index(self, path: Path, *, verify: bool) -> str | None:
        """Add a shard's samples to the index; returns what is wrong with the shard, or None."""
        from safetensors import SafetensorError, safe_open

        try:
            shard = safe_open(path, framework="pt")
            metadata = shard.metadata() or {}
            if metadata.get("manifest") != self.manifest.digest:
                return "belongs to another cache"
            keys = [bytes(row) for row in shard.get_tensor("keys").numpy()]
            crcs = shard.get_tensor("crc").tolist()
            names = [name for name in shard.keys() if name not in ("keys", "crc")]  # noqa: SIM118
            self._open[path.name] = (shard, names, crcs)
            if verify and any(_crc(key, self._rows(path.name, row)) != crcs[row] for row, key in enumerate(keys)):
                return "its checksums do not hold"
        except (SafetensorError, OSError) as error:
            return f"cannot be read ({error})"
        for row, key in enumerate(keys):
            self._places.setdefault(key, (path.name, row))
        return None

    def _rows(self, shard: str, row: int) -> Sample:
        file, names, _ = self._open[shard]
        return {name: file.get_slice(name)[row] for name in names}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    @property
    def bytes_on_disk(self) -> int:
        """Size of all shards in bytes."""
        return sum(path.stat().st_size for path in self.directory.glob("shard-*.safetensors"))

    def read(self, key: bytes) -> Sample:
        """A sample.

        Raises:
            DataError: if it is missing, or its checksum is wrong.
        """
        if key not in self._places:
            raise DataError(
                f"{self.directory}: has no sample {key.hex()[:12]}..., which the training asks for; it is a cache of "
                "other data. Run `minitron cache` with the data settings of this training"
            )
        shard, row = self._places[key]
        stored = self._rows(shard, row)
        if _crc(key, stored) != self._open[shard][2][row]:
            raise DataError(
                f"{self.directory / shard}: sample {row} does not have the checksum it was written with; run "
                "`minitron cache` again, which writes damaged shards anew"
            )
        return stored

    def require(self, keys: Iterable[bytes], *, what: str) -> None:
        """Check that the cache has these samples.

        Raises:
            DataError: with the number of missing samples.
        """
        wanted = set(keys)
        missing = len(wanted - self._places.keys())
        if missing:
            raise DataError(
                f"{self.directory}: lacks {missing} of the {len(wanted)} samples of {what}. It is a cache of other "
                "data, or its writing was stopped: run `minitron cache` with the data settings of this training"
            )

    def check(self, *, sequence_length: int, teacher: str | None) -> None:
        """Check that a training with these values may use the cache; None skips a check.

        Vocabularies are compared by :func:`~nemo_minitron.distillation.compatibility.common_with_cache`.

        Raises:
            DataError: with all differences.
        """
        asked = {
            "sequence_length": (sequence_length, "data.sequence_length"),
            "teacher": (teacher, "the fingerprint of the teacher that was named"),
        }
        faults = [
            f"its {name} is {getattr(self.manifest, name)}, {what} is {value}"
            for name, (value, what) in asked.items()
            if value is not None and not _agree(value, getattr(self.manifest, name))
        ]
        if faults:
            raise DataError(
                f"{self.directory}: is a cache of something else\n"
                + "\n".join(f"  - {fault}" for fault in faults)
                + "\nwrite one for this training with `minitron cache`"
            )


def _agree(asked: Any, held: Any) -> bool:
    """Whether two values are equal, or two fingerprints of the same weights."""
    if isinstance(asked, str) and isinstance(held, str):
        return same_fingerprint(asked, held)
    return bool(asked == held)
