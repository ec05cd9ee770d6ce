"""Megatron's tokenised corpora, ``.bin`` and ``.idx``, as a source of documents.

``megatron.core.datasets.indexed_dataset``, which reads them, checks nothing; so the index is compared with the file
sizes first. Documents are those of the index. Each is closed by EOS, unless it ends with EOS already
(``preprocess_data.py --append-eod``).
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np

from nemo_minitron.data.splits import DocumentTable
from nemo_minitron.errors import DataError

__all__ = ["IndexedStream", "check_pair", "pair"]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, documents + 1
_DTYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}  # of megatron.core.datasets.indexed_dataset.DType


def pair(prefix: str) -> tuple[Path, Path]:
    """Paths of the ``.bin`` and the ``.idx`` file of a prefix."""
    return Path(prefix + ".bin"), Path(prefix + ".idx")


def check_pair(prefix: str) -> str:
    """Refuse an invalid index, or one that does not fit its ``.bin``. Returns numpy's name of the tokens' type.

    Raises:
        DataError: with the part that does not fit.
    """
    binary, index = pair(prefix)
    for path in (binary, index):
        if not path.is_file():
            raise DataError(f"megatron {prefix}: {path} does not exist; give the prefix of a .bin and .idx pair")
    with index.open("rb") as stream:
        head = stream.read(_HEADER.size)
        if not head.startswith(_MAGIC):
            raise DataError(
                f"{index}: is no Megatron index (it begins with {head[:9]!r}); make it by preprocess_data.py"
            )
        if len(head) < _HEADER.size:
            raise DataError(f"{index}: is cut off; make it anew")
        _, version, code, sequences, documents = _HEADER.unpack(head)
        if version != 1:
            raise DataError(f"{index}: has version {version}, only 1 is known; make it anew")
        if code not in _DTYPES:
            raise DataError(f"{index}: its tokens are of type {code}, not whole numbers; make it anew")
        # lengths int32, byte offsets int64, documents int64; multimodal files have a byte for each sequence besides
        expected = _HEADER.size + 12 * sequences + 8 * documents
        size = index.stat().st_size
        if size not in (expected, expected + sequences):
            raise DataError(f"{index}: holds {size} bytes, {expected} are due for {sequences} sequences; it is cut off")
        if size != expected and sequences:
            raise DataError(f"{index}: is of a multimodal corpus; only text can be read")
        lengths = np.fromfile(stream, "<i4", sequences)
        offsets = np.fromfile(stream, "<i8", sequences)
        starts = np.fromfile(stream, "<i8", documents)
    dtype = _DTYPES[code]
    width, size = np.dtype(dtype).itemsize, binary.stat().st_size
    if (lengths < 0).any() or (offsets < 0).any():
        raise DataError(f"{index}: has sequences of negative length or place; make it anew")
    due = int((offsets + lengths.astype(np.int64) * width).max(initial=0))
    if due > size or int(lengths.astype(np.int64).sum()) * width != size:
        raise DataError(
            f"{binary}: holds {size} bytes, its index tells of {int(lengths.astype(np.int64).sum()) * width}; one of "
            "them is cut off or of another corpus, make both anew"
        )
    if not size:
        raise DataError(f"megatron {prefix}: holds no tokens; give a corpus that does")
    if documents < 1 or starts[0] != 0 or starts[-1] != sequences or (np.diff(starts) < 0).any():
        raise DataError(f"{index}: its documents do not cover its {sequences} sequences; make it anew")
    return dtype


class IndexedStream:
    """The documents of a ``.bin``/``.idx`` pair, memory-mapped.

    Args:
        prefix: of both files.
        end: id of EOS.
        seed: of the order of documents, which is a hash of the seed, the index file and a document's number in it.

    Attributes:
        table: lengths, sizes (tokens) and order of the documents.

    Raises:
        DataError: see :func:`check_pair`; or for a corpus without tokens.
    """

    answers = None

    def __init__(self, prefix: str, *, end: int, seed: int) -> None:
        dtype = check_pair(prefix)
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        binary, index = pair(prefix)
        self._data = IndexedDataset(prefix, mmap=True)
        lengths = np.asarray(self._data.sequence_lengths, dtype=np.int64)
        starts = np.asarray(self._data.document_indices, dtype=np.int64)
        self._begins = np.concatenate([[0], np.cumsum(lengths)])  # of sequences, in tokens
        sizes = self._begins[starts[1:]] - self._begins[starts[:-1]]
        self._numbers = np.nonzero(sizes)[0]  # of the documents that hold something
        self._first, self._past = starts[:-1][self._numbers], starts[1:][self._numbers]
        self._sizes, self._end = sizes[self._numbers], end
        # the last token of each document: the end of its last sequence that is not empty
        last = np.searchsorted(self._begins, self._begins[self._past], side="left") - 1
        places = np.asarray(self._data.index.sequence_pointers)[last] // np.dtype(dtype).itemsize + lengths[last] - 1
        closed = np.memmap(binary, dtype, "r")[places] == end
        identity = hashlib.sha256(index.read_bytes()).hexdigest()
        keys = b"".join(hashlib.sha256(f"{seed}\0{identity}\0{number}".encode()).digest() for number in self._numbers)
        self.table = DocumentTable(
            self._sizes + ~closed, self._sizes, np.frombuffer(keys, dtype=np.uint8).reshape(len(closed), 32)
        )

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """``[stop - start]`` int64 of a document."""
        parts = []
        low, high = self._begins[self._first[document]] + start, self._begins[self._first[document]] + stop
        sequence = int(np.searchsorted(self._begins, low, side="right")) - 1
        while low < high and sequence < self._past[document]:
            offset = int(low - self._begins[sequence])
            count = int(min(high, self._begins[sequence + 1]) - low)
            if count:
                parts.append(self._data.get(sequence, offset=offset, length=count).astype(np.int64))
            low, sequence = low + count, sequence + 1
        if stop > self._sizes[document]:
            parts.append(np.array([self._end]))
        return np.concatenate(parts)
