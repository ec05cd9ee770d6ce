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

A compact cache has ``keys``, ``crc`` and ``log_rest`` as above, and packs tokens and values together
(:mod:`~nemo_minitron.distillation.teachers.packing`). With a ``top_p`` a position has fewer than k tokens where fewer
reach that probability; the others join those that are not kept.

====================  ==================  =========================================================
``packed``            ``[bytes]`` uint8   the samples, one after another
``ends``              ``[n]`` int64       where each ends
``order``             ``[bytes]`` uint8   the order of the vocabulary, which a sample's crc includes
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
from nemo_minitron.distillation.teachers.manifest import MANIFEST, Manifest
from nemo_minitron.distillation.teachers.samples import (
    Sample,
    decode_logits,
    decode_top,
    encode,
    packed_samples,
    unpacked_sample,
)
from nemo_minitron.errors import DataError
from nemo_minitron.runtime.atomic import write_aside
from nemo_minitron.runtime.files import take_umask

__all__ = ["LogitCache", "Manifest", "Sample", "decode_logits", "decode_top", "encode", "sample_keys", "write_shard"]

logger = logging.getLogger(__name__)

_PACKED = ("packed", "order")


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
    rows = [stored for _, stored in samples]
    if manifest.compact:
        rows = packed_samples(manifest, rows)
    tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name not in _PACKED}
    if manifest.compact:
        tensors["packed"] = torch.cat([row["packed"] for row in rows])
        tensors["ends"] = torch.tensor([len(row["packed"]) for row in rows]).cumsum(0)
        tensors["order"] = rows[0]["order"]
    tensors["keys"] = torch.tensor([list(key) for key in keys], dtype=torch.uint8)
    tensors["crc"] = torch.tensor([_crc(key, row) for key, row in zip(keys, rows, strict=True)], dtype=torch.int64)
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
            names = [name for name in shard.keys() if name not in ("keys", "crc", "ends", *_PACKED)]  # noqa: SIM118
            ends: list[int] = []
            if self.manifest.compact:
                ends = [0, *shard.get_tensor("ends").tolist()]
                size = shard.get_slice("packed").get_shape()[0]
                if len(ends) != len(keys) + 1 or ends != sorted(ends) or ends[-1] != size:
                    return "the ends of its samples do not fit its size"
            self._open[path.name] = (shard, names, crcs, ends)
            if verify and any(_crc(key, self._rows(path.name, row)) != crcs[row] for row, key in enumerate(keys)):
                return "its checksums do not hold"
        except (SafetensorError, OSError) as error:
            return f"cannot be read ({error})"
        for row, key in enumerate(keys):
            self._places.setdefault(key, (path.name, row))
        return None

    def _rows(self, shard: str, row: int) -> Sample:
        """As it is stored."""
        file, names, _, ends = self._open[shard]
        stored = {name: file.get_slice(name)[row] for name in names}
        if ends:
            stored["packed"] = file.get_slice("packed")[ends[row] : ends[row + 1]]
            stored["order"] = file.get_tensor("order")
        return stored

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
        if not self.manifest.compact:
            return stored
        try:
            return unpacked_sample(self.manifest, stored)
        except ValueError as error:
            raise DataError(
                f"{self.directory / shard}: sample {row} cannot be unpacked ({error}); run `minitron cache` again with "
                "--overwrite"
            ) from error

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
