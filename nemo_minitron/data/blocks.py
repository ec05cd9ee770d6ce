"""Token blocks ``[n, sequence_length + 1]`` and what is known of them. :mod:`~nemo_minitron.data.build` makes them.

Input and label of a block are ``block[:-1]`` and ``block[1:]``.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    import torch

__all__ = ["Blocks"]

_TOGETHER = 1024  # blocks looked at together


@dataclass(frozen=True)
class Blocks:
    """Token blocks, which documents they hold, which labels count, and where they come from.

    ``len()`` is the number of blocks; an index (int, slice or tensor) gives those blocks, as ``Blocks``.

    Attributes:
        tokens: ``[n, s + 1]`` int64; input and label of a block are ``[:-1]`` and ``[1:]``.
        domain: ``[n]`` int64, index into ``domains``.
        domains: names of the sources.
        segments: ``[n, s + 1]`` int32, number of a token's document within the block, -1 for padding; None where each
            block is one text.
        loss_mask: ``[n, s]`` bool, labels (tokens 1 to s) that are to be learned; None if all are.
    """

    tokens: torch.Tensor
    domain: torch.Tensor
    domains: tuple[str, ...]
    segments: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None

    @classmethod
    def of(cls, blocks: torch.Tensor | Blocks) -> Blocks:
        """Plain ``[n, s + 1]`` tokens as blocks of one text each; ``Blocks`` are returned unchanged."""
        import torch

        if isinstance(blocks, Blocks):
            return blocks
        return cls(blocks, torch.zeros(len(blocks), dtype=torch.int64), ("",))

    @classmethod
    def cat(cls, parts: Sequence[Blocks]) -> Blocks:
        """Concatenate blocks of equal length; domains of equal name become one domain."""
        import torch

        names = tuple(dict.fromkeys(name for part in parts for name in part.domains))
        domain = [torch.tensor([names.index(name) for name in part.domains])[part.domain] for part in parts]
        segments = loss_mask = None
        if any(part.segments is not None for part in parts):
            whole = [torch.zeros_like(p.tokens, dtype=torch.int32) if p.segments is None else p.segments for p in parts]
            segments = torch.cat(whole)
        if any(part.loss_mask is not None for part in parts):
            every = [
                torch.ones_like(p.tokens[:, 1:], dtype=torch.bool) if p.loss_mask is None else p.loss_mask
                for p in parts
            ]
            loss_mask = torch.cat(every)
        return cls(torch.cat([part.tokens for part in parts]), torch.cat(domain), names, segments, loss_mask)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int | slice | torch.Tensor) -> Blocks:
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(index)  # which also ends a loop over the blocks
            index = slice(index, index + 1 or None)
        return dataclasses.replace(
            self,
            tokens=self.tokens[index],
            domain=self.domain[index],
            segments=None if self.segments is None else self.segments[index],
            loss_mask=None if self.loss_mask is None else self.loss_mask[index],
        )

    @property
    def shape(self) -> torch.Size:
        """``[n, s + 1]``."""
        return self.tokens.shape

    @property
    def sequence_length(self) -> int:
        """Number of inputs, and of labels, in a block."""
        return self.tokens.shape[1] - 1

    def counted(self) -> torch.Tensor | None:
        """``[n, s]`` bool: labels to be learned that belong to their input's document. None if all count."""
        from nemo_minitron.runtime.masks import counted_labels

        if self.segments is None:
            return self.loss_mask
        within = counted_labels(self.segments)
        return within if self.loss_mask is None else within & self.loss_mask

    @property
    def labels(self) -> int:
        """How many labels count."""
        if self.segments is None and self.loss_mask is None:
            return len(self) * self.sequence_length
        return sum(int(counted.sum()) for _, part in self._parts() if (counted := part.counted()) is not None)

    def uncounted(self) -> dict[str, int]:
        """Why labels do not count, and how many: ``filling`` of blocks, ``beginnings`` of documents, which no token of
        their document comes before, and labels that are ``masked``. Reasons of no label are left out.
        """
        from nemo_minitron.runtime.masks import FILLING, counted_labels

        reasons = {"filling": 0, "beginnings": 0, "masked": 0}
        for _, part in self._parts():
            counted = None
            if part.segments is not None:
                filling = part.segments[:, 1:] == FILLING
                counted = counted_labels(part.segments)
                reasons["filling"] += int(filling.sum())
                reasons["beginnings"] += int((~counted & ~filling).sum())
            if part.loss_mask is not None:
                masked = ~part.loss_mask if counted is None else ~part.loss_mask & counted
                reasons["masked"] += int(masked.sum())
        return {reason: number for reason, number in reasons.items() if number}

    def text(self) -> torch.Tensor:
        """``[m]`` int64: the tokens of all inputs, without padding."""
        inputs = self.tokens[:, :-1]
        return inputs.flatten() if self.segments is None else inputs[self.segments[:, :-1] >= 0]

    def content(self) -> str:
        """sha256 over tokens, segments and loss mask."""
        digest = hashlib.sha256()
        for name in ("tokens", "segments", "loss_mask"):
            if (tensor := getattr(self, name)) is not None:
                digest.update(b"" if name == "tokens" else name.encode())
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check_labels(self, what: str) -> None:
        """Refuse blocks without any label that counts: their loss would be 0 / 0.

        Raises:
            DataError: with the number of such blocks and the index of the first.
        """
        empty: list[int] = []
        for start, part in self._parts():
            if (counted := part.counted()) is None:
                return
            empty += [start + int(row) for row in (~counted.any(dim=1)).nonzero()]
        if empty:
            raise DataError(
                f"{what}: {len(empty)} of {len(self)} blocks (the first is block {empty[0]}) have no label that "
                "counts, all their tokens are masked; leave them out, or check the answers in the data"
            )

    def check_common(self, rows: int, unlike: Mapping[int, str], *, what: str, names: Sequence[str]) -> None:
        """Refuse tokens that do not mean the same to two models that read them.

        Args:
            rows: that both models have.
            unlike: id -> what it is to both, of ids that do not mean the same.
            what: the blocks, for messages.
            names: of the models, for messages.

        Raises:
            DataError: with the first such token, how often any occurs, and where.
        """
        import torch

        stray = torch.tensor(sorted(unlike), dtype=torch.int64)
        count, first = 0, None
        for start, part in self._parts():
            bad = (part.tokens >= rows) | torch.isin(part.tokens, stray)
            count += int(bad.sum())
            if first is None and bad.any():
                row, column = (int(index) for index in bad.nonzero()[0])
                source = self.domains[int(part.domain[row])]
                first = (int(part.tokens[row, column]), f"block {start + row}, token {column}", source)
        if first is None:
            return
        number, place, source = first
        described = unlike.get(number, f"one of them has {rows} rows")
        where = f"{place} of source {source!r}" if source else place
        raise DataError(
            f"{what}: {count} of the tokens do not mean the same to {' and '.join(names)}; the first is {number} "
            f"({described}), in {where}. Leave such text out, or use models that both know the token"
        )

    def _parts(self) -> Iterator[tuple[int, Blocks]]:
        """Some blocks at a time, with the index of the first, so that a memory-mapped file is never read whole."""
        for start in range(0, len(self), _TOGETHER):
            yield start, self[start : start + _TOGETHER]

    def by_domain(self) -> dict[str, Blocks]:
        """The blocks of each source that has any."""
        parts = {name: self[self.domain == index] for index, name in enumerate(self.domains)}
        return {name: blocks for name, blocks in parts.items() if len(blocks)}
