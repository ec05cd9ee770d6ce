"""What a logit cache says of itself: ``manifest.json``, and beside it the tokenizer of the teacher.

Plans read it, so torch is not imported.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoints.tokenizer.files import find_tokenizer
from nemo_minitron.config.stages.cache import LEAST_ERROR_BOUND, MOST_ERROR_BOUND
from nemo_minitron.errors import DataError
from nemo_minitron.parsing import parse_json
from nemo_minitron.planning.disk import logits_bytes
from nemo_minitron.runtime.files import replace_file

__all__ = ["MANIFEST", "TOKENIZER", "Manifest", "cached_tokenizer"]

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
"""Directory with the files of the teacher's tokenizer, which says what the cached token ids mean."""
COMPACT = "compact"
VALUES = ("float32", "float16", "bfloat16", "int8", COMPACT)
_VERSIONS = {True: 2, False: 1}
"""Of manifests of compact caches, and of others."""
_OF_COMPACT = ("error_bound", "top_p")
"""Fields that other caches do not write: their manifests and shards are as they were before there was this form."""


def cached_tokenizer(directory: Path) -> Path | None:
    """The teacher's tokenizer in a cache; None in caches that were written before it was kept."""
    return find_tokenizer(directory / TOKENIZER)


@dataclass(frozen=True)
class Manifest:
    """The contents of a cache, and how they are stored.

    Attributes:
        teacher: :func:`~nemo_minitron.checkpoints.fingerprint.model_fingerprint` of the model.
        tokenizer: :func:`~nemo_minitron.checkpoints.tokenizer.trimming.tokenizer_fingerprint` of its tokenizer.
        vocab_size: rows of the teacher's vocabulary, all of which the log-probabilities are over.
        sequence_length: s.
        k: tokens kept; None for all.
        values: "float32", "float16", "bfloat16", "int8" or "compact". A log-probability has no need of the range of
            bfloat16, so float16 is eight times finer at the same size.
        dtype: that the teacher computed in.
        temperature: of the log-probabilities.
        error_bound: of "compact", largest error of a stored log-probability in nats.
        top_p: of "compact", probability that the kept tokens reach, where k suffice; None keeps k everywhere.
    """

    teacher: str
    tokenizer: str
    vocab_size: int
    sequence_length: int
    k: int | None
    values: str
    dtype: str
    temperature: float = 1.0
    error_bound: float | None = None
    top_p: float | None = None

    @property
    def compact(self) -> bool:
        """Whether samples are packed (:mod:`nemo_minitron.distillation.teachers.packing`)."""
        return self.values == COMPACT

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk per token, with a sample's key and checksum divided by its tokens.

        Of a compact cache an estimate, which ``top_p`` makes smaller.
        """
        per_token = logits_bytes(self.vocab_size, self.k, self.values, error_bound=self.error_bound)
        return per_token + 40 / self.sequence_length

    def _fields(self) -> dict[str, Any]:
        """As they are written and hashed."""
        fields = asdict(self)
        return fields if self.compact else {name: fields[name] for name in fields if name not in _OF_COMPACT}

    @property
    def digest(self) -> str:
        """Hash of the manifest. Every shard holds it, so that a shard of another cache is refused."""
        return hashlib.sha256(json.dumps(self._fields(), sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: Manifest) -> list[str]:
        """``"k=64, not 128"`` for each field in which another manifest differs from this one."""
        own, others = asdict(self), asdict(other)
        return [f"{name}={own[name]}, not {others[name]}" for name in own if own[name] != others[name]]

    def write(self, directory: Path) -> None:
        """As ``manifest.json``."""
        directory.mkdir(parents=True, exist_ok=True)
        content = {
            "version": _VERSIONS[self.compact],
            **self._fields(),
            "bytes_per_token": round(self.bytes_per_token, 2),
        }
        replace_file(directory / MANIFEST, json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """The manifest in a directory; None where there is none.

        Raises:
            DataError: if it cannot be read.
        """
        path = directory / MANIFEST
        if not path.is_file():
            return None
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            version = content.pop("version")
            if version not in _VERSIONS.values():
                raise DataError(f"{path} has format version {version}; this release reads 1 and 2")
            content.pop("bytes_per_token")
            manifest = cls(**content)
            if manifest.values not in VALUES or version != _VERSIONS[manifest.compact]:
                raise ValueError(f"version {version} with values={manifest.values!r}")
            if manifest.compact and not (isinstance(manifest.k, int) and _bound_fits(manifest.error_bound)):
                raise ValueError(f"k={manifest.k!r}, error_bound={manifest.error_bound!r}")
            return manifest
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} cannot be read ({error}); write the cache again with `minitron cache --overwrite`"
            ) from error


def _bound_fits(error_bound: Any) -> bool:
    return isinstance(error_bound, float) and LEAST_ERROR_BOUND <= error_bound <= MOST_ERROR_BOUND
