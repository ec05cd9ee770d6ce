"""What a logit cache says of itself: ``manifest.json``, and beside it the tokenizer of the teacher.

Plans read it, so torch is not imported.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_minitron.checkpoints.tokenizer.files import find_tokenizer
from nemo_minitron.errors import DataError
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.files import replace_file

__all__ = ["MANIFEST", "TOKENIZER", "Manifest", "cached_tokenizer"]

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
"""Directory with the files of the teacher's tokenizer, which says what the cached token ids mean."""
FORMAT_VERSION = 1
VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_WIDE = 1 << 16
"""Token ids from there on take three bytes."""


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
        values: "float32", "float16", "bfloat16" or "int8". A log-probability has no need of the range of bfloat16, so
            float16 is eight times finer at the same size.
        dtype: that the teacher computed in.
        temperature: of the log-probabilities.
    """

    teacher: str
    tokenizer: str
    vocab_size: int
    sequence_length: int
    k: int | None
    values: str
    dtype: str
    temperature: float = 1.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk per token, with a sample's key and checksum divided by its tokens."""
        width = VALUE_BYTES[self.values]
        per_token = 8 if self.values == "int8" else 0
        if self.k is None:
            per_token += self.vocab_size * width
        else:
            per_token += self.k * (width + 2 + (self.vocab_size > _WIDE)) + 4
        return per_token + 40 / self.sequence_length

    @property
    def digest(self) -> str:
        """Hash of the manifest. Every shard holds it, so that a shard of another cache is refused."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: Manifest) -> list[str]:
        """``"k=64, not 128"`` for each field in which another manifest differs from this one."""
        own, others = asdict(self), asdict(other)
        return [f"{name}={own[name]}, not {others[name]}" for name in own if own[name] != others[name]]

    def write(self, directory: Path) -> None:
        """As ``manifest.json``."""
        directory.mkdir(parents=True, exist_ok=True)
        content = {"version": FORMAT_VERSION, **asdict(self), "bytes_per_token": round(self.bytes_per_token, 2)}
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
            if version != FORMAT_VERSION:
                raise DataError(f"{path} has format version {version}; this release reads {FORMAT_VERSION}")
            content.pop("bytes_per_token")
            manifest = cls(**content)
            if manifest.values not in VALUE_BYTES:
                raise ValueError(f"values={manifest.values!r}")
            return manifest
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} cannot be read ({error}); write the cache again with `minitron cache --overwrite`"
            ) from error
