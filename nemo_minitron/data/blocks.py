"""Token blocks ``[n, sequence_length + 1]`` from a mixture of sources, split by document, the same on every machine.

Documents of a source are ordered by a hash of the seed and their text. In this order the first fill the held-out
split, the next the calibration split, up to their share of the characters; the rest trains. No document is on two
sides, and a text that several sources carry counts for the first of them only. Within a split, documents are joined,
each closed by EOS, and cut into blocks; attention may reach across an EOS, as in pre-training. Input and label of a
block are ``block[:-1]`` and ``block[1:]``; blocks do not overlap.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.config import DataConfig, SourceConfig
from nemo_minitron.data import packages, prose, sources
from nemo_minitron.data.sources import Document, read_source, source_files
from nemo_minitron.data.tokenizer import encode, load_tokenizer, tokenizer_fingerprint
from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    import torch

__all__ = ["SPLITS", "Blocks", "build_blocks", "build_domain_blocks", "split_documents"]

SPLITS = ("train", "calibration", "held_out")

_FORMAT = 1  # of a cached file; raise it when the same configuration would give other tokens


@dataclass(frozen=True)
class Blocks:
    """Token blocks, which documents they hold, which labels count, and where they come from.

    ``len()`` is the number of blocks; an index (int, slice or tensor) gives those blocks, as ``Blocks``.

    Attributes:
        tokens: ``[n, s + 1]`` int64; input and label of a block are ``[:-1]`` and ``[1:]``.
        domain: ``[n]`` int64, index into ``domains``.
        domains: names of the sources.
        segments: ``[n, s + 1]`` int32, number of a token's document within the block, -1 for what fills the block up;
            None where each block is one text.
        loss_mask: ``[n, s]`` bool, labels (tokens 1 to s) that are to be learned; None for all.
    """

    tokens: torch.Tensor
    domain: torch.Tensor
    domains: tuple[str, ...]
    segments: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None

    @classmethod
    def of(cls, blocks: torch.Tensor | Blocks) -> Blocks:
        """Plain ``[n, s + 1]`` tokens as blocks of one text each; blocks as they are."""
        import torch

        if isinstance(blocks, Blocks):
            return blocks
        return cls(blocks, torch.zeros(len(blocks), dtype=torch.int64), ("",))

    @classmethod
    def cat(cls, parts: Sequence[Blocks]) -> Blocks:
        """Blocks of several, one after the other. They have one length; domains of one name are one."""
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
        """Inputs, and labels, of a block."""
        return self.tokens.shape[1] - 1

    def counted(self) -> torch.Tensor | None:
        """``[n, s]`` bool, the labels that count: those to be learned, of the document of their input. None for all."""
        from nemo_minitron.runtime.masks import counted_labels

        if self.segments is None:
            return self.loss_mask
        within = counted_labels(self.segments)
        return within if self.loss_mask is None else within & self.loss_mask

    @property
    def labels(self) -> int:
        """How many labels count."""
        counted = self.counted()
        return len(self) * self.sequence_length if counted is None else int(counted.sum())

    def text(self) -> torch.Tensor:
        """``[m]`` int64: the tokens of all inputs, without what fills blocks up."""
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
        """Refuse blocks that hold no label that counts: their loss would be nought by nought.

        Raises:
            DataError: naming how many and the first.
        """
        counted = self.counted()
        if counted is None:
            return
        empty = (~counted.any(dim=1)).nonzero().flatten()
        if len(empty):
            raise DataError(
                f"{what}: {len(empty)} of {len(self)} blocks (the first is block {int(empty[0])}) have no label that "
                "counts, all their tokens are masked; leave them out, or check the answers in the data"
            )

    def by_domain(self) -> dict[str, Blocks]:
        """The blocks of each source that has any."""
        found = {name: self[self.domain == index] for index, name in enumerate(self.domains)}
        return {name: blocks for name, blocks in found.items() if len(blocks)}


def build_blocks(
    config: DataConfig,
    tokenizer_dir: str | Path | None,
    split: str,
    *,
    blocks: int | None = None,
    vocab_size: int | None = None,
) -> Blocks:
    """Token blocks of one split, in the shuffled order of ``config.seed``.

    Args:
        config: sources, block length, seed, cache.
        tokenizer_dir: directory with the tokenizer of the model.
        split: one of :data:`SPLITS`.
        blocks: how many; drawn from the sources by weight, a source that runs out is made up for by the others. None
            takes as many as keep the weights exact without repeating a block.
        vocab_size: rows of the model's embedding, to check the ids against; None does not check.

    Returns:
        Blocks of ``[n, sequence_length + 1]`` tokens.

    Raises:
        DataError: for unreadable sources, too little text, or a tokenizer that does not fit.
    """
    return _build(config, tokenizer_dir, split, blocks, vocab_size)


def build_domain_blocks(
    config: DataConfig,
    tokenizer_dir: str | Path | None,
    split: str,
    *,
    blocks: int | None = None,
    vocab_size: int | None = None,
) -> dict[str, Blocks]:
    """The blocks of :func:`build_blocks`, by the name of their source."""
    return _build(config, tokenizer_dir, split, blocks, vocab_size).by_domain()


def split_documents(documents: Sequence[Document], config: DataConfig) -> dict[str, list[Document]]:
    """Deal one source's documents to the splits. Every document goes to exactly one.

    A split's share is of the characters, and is overshot by one document at most. A document longer than a whole
    split's share goes to training, so that few long documents do not upset the shares; a split that would stay
    empty gets the shortest document of the split that has most.
    """
    order = sorted(
        documents,
        key=lambda d: hashlib.sha256(f"{config.seed}\0{d.text}".encode()).digest(),
    )
    total = sum(len(document.text) for document in order)
    shares = {
        "held_out": config.held_out_fraction * total,
        "calibration": config.calibration_fraction * total,
    }
    found: dict[str, list[Document]] = {split: [] for split in SPLITS}
    filled = dict.fromkeys(shares, 0)
    for document in order:
        size = len(document.text)
        place = next(
            (s for s, share in shares.items() if filled[s] < share and size <= share),
            "train",
        )
        found[place].append(document)
        if place in filled:
            filled[place] += size
    for split in (*shares, "train"):
        donor = max(SPLITS, key=lambda name: len(found[name]))
        if not found[split] and len(found[donor]) > 1:
            shortest = min(found[donor], key=lambda document: len(document.text))
            found[donor].remove(shortest)
            found[split].append(shortest)
    return found


# ---------------------------------------------------------------------------------------------------------------- build


def _build(
    config: DataConfig,
    tokenizer_dir: str | Path | None,
    split: str,
    blocks: int | None,
    vocab_size: int | None,
) -> Blocks:
    if split not in SPLITS:
        raise DataError(f"split {split!r} is not known; known: {', '.join(SPLITS)}")
    if blocks is not None and blocks < 1:
        raise DataError(f"{blocks} blocks of the {split} split were asked for; ask for at least 1")
    tokenizer = load_tokenizer(tokenizer_dir)  # Before the cache: a missing tokenizer is an error at once.
    cached = _cache_path(config, Path(str(tokenizer_dir)), split, blocks)
    found = _read(cached)
    if found is None:
        found = _tokenise(config, tokenizer, split, blocks, vocab_size)
        _write(found, cached)
    elif vocab_size is not None and (highest := int(found.tokens.max())) >= vocab_size:
        raise DataError(
            f"{tokenizer_dir}: gives the id {highest}, the model's vocabulary only has {vocab_size} entries; "
            "use the tokenizer that belongs to the model"
        )
    return found


class _Stream:
    """The blocks of one source and split, tokenised as far as they are asked for."""

    def __init__(
        self,
        texts: list[str],
        length: int,
        tokens: Callable[[list[str]], Iterator[list[int]]],
    ) -> None:
        self._tokens = tokens(texts)
        self._length = length
        self._rest: list[int] = []
        self.blocks: list[list[int]] = []
        self.exhausted = False
        self.seen = 0  # tokens

    def reach(self, count: int | None) -> int:
        """Tokenise until there are ``count`` blocks (None: all of them); how many there are."""
        while not self.exhausted and (count is None or len(self.blocks) < count):
            ids = next(self._tokens, None)
            if ids is None:
                self.exhausted = True
                break
            self.seen += len(ids)
            self._rest += ids
            whole = len(self._rest) // self._length * self._length
            self.blocks += [self._rest[start : start + self._length] for start in range(0, whole, self._length)]
            self._rest = self._rest[whole:]
        return len(self.blocks)


def _tokenise(
    config: DataConfig,
    tokenizer: object,
    split: str,
    blocks: int | None,
    vocab_size: int | None,
) -> Blocks:
    import torch

    length = config.sequence_length + 1
    seen: set[str] = set()
    streams: list[_Stream] = []
    for source in config.sources:
        documents = [d for d in read_source(source, config.cache_dir) if d.text not in seen]
        seen.update(document.text for document in documents)
        texts = [document.text for document in split_documents(documents, config)[split]]
        streams.append(
            _Stream(
                texts,
                length,
                lambda texts: encode(tokenizer, texts, vocab_size=vocab_size),
            )
        )
    for source, stream in zip(config.sources, streams, strict=True):
        if not stream.reach(1):
            raise DataError(
                f"source {source.name!r}: its {split} split has {stream.seen} tokens, less than one block of "
                f"sequence_length + 1 = {length}; give it more text"
                + (f", a larger {split}_fraction" if split != "train" else "")
                + " or a smaller sequence_length"
            )
    counts = _quotas([source.weight for source in config.sources], streams, blocks)
    if blocks is not None and sum(counts) < blocks:
        raise DataError(
            f"{blocks} blocks of the {split} split were asked for, the sources hold {sum(counts)} of {length} tokens; "
            "ask for fewer, add text, or lower sequence_length"
        )
    tokens = torch.tensor(
        [b for stream, n in zip(streams, counts, strict=True) for b in stream.blocks[:n]],
        dtype=torch.int64,
    )
    domain = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    # Not the global generator: the order must not depend on what ran before.
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(config.seed))
    return Blocks(tokens[order], domain[order], tuple(source.name for source in config.sources))


def _quotas(weights: list[float], streams: list[_Stream], blocks: int | None) -> list[int]:
    """How many blocks each source gives."""
    if blocks is None:
        total = sum(weights)
        whole = min(stream.reach(None) * total / weight for weight, stream in zip(weights, streams, strict=True))
        return [max(1, min(len(s.blocks), round(whole * w / total))) for w, s in zip(weights, streams, strict=True)]
    counts = [0] * len(weights)
    active = list(range(len(weights)))
    while active and (missing := blocks - sum(counts)):
        total = sum(weights[i] for i in active)
        exact = {i: missing * weights[i] / total for i in active}
        share = {i: math.floor(exact[i]) for i in active}
        # Largest remainders first; equal ones in the order of the sources.
        for i in sorted(active, key=lambda i: share[i] - exact[i])[: missing - sum(share.values())]:
            share[i] += 1
        for i in active:
            counts[i] = min(counts[i] + share[i], streams[i].reach(counts[i] + share[i]))
        active = [i for i in active if not streams[i].exhausted or len(streams[i].blocks) > counts[i]]
    return counts


# ---------------------------------------------------------------------------------------------------------------- cache


def _source_state(source: SourceConfig) -> object:
    """What a source's text depends on."""
    if source.package in packages.PACKAGES:
        return packages.PACKAGES[source.package].sha256
    if source.package is not None:
        if source.package not in sources.PACKAGE_TEXTS:
            return source.package  # An unknown one: reading it says so.
        return [prose.RULES, prose.versions(source.package)]
    digest = hashlib.sha256()
    for path in source_files(source):
        digest.update(f"{path.suffix}:{path.stat().st_size}:".encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _cache_path(config: DataConfig, tokenizer_dir: Path, split: str, blocks: int | None) -> Path:
    """A file name that changes with everything that the tokens depend on."""
    settings = {field: value for field, value in asdict(config).items() if field not in ("sources", "cache_dir")}
    origins = [[s.name, s.package, s.text_key, s.weight, s.max_characters, _source_state(s)] for s in config.sources]
    key = json.dumps(
        [
            _FORMAT,
            settings,
            origins,
            tokenizer_fingerprint(tokenizer_dir),
            split,
            blocks,
        ],
        sort_keys=True,
    )
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    return Path(config.cache_dir) / "blocks" / f"{split}-{digest}.safetensors"


def _read(path: Path) -> Blocks | None:
    """A cached file; None where there is none, or a damaged one that is better made anew."""
    import torch
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tokens = file.get_tensor("tokens").to(torch.int64)
            return Blocks(
                tokens,
                file.get_tensor("domain"),
                tuple(json.loads(file.metadata()["domains"])),
            )
    except (SafetensorError, KeyError, OSError):
        path.unlink(missing_ok=True)
        return None


def _write(found: Blocks, path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    # Several ranks may build the same file at once: each writes its own aside, and the last rename wins.
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        tensors = {"tokens": found.tokens.to(torch.int32), "domain": found.domain}
        save_file(tensors, aside, metadata={"domains": json.dumps(found.domains)})
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
