"""Token blocks ``[n, sequence_length + 1]`` from a mixture of sources, split by document, the same on every machine.

Documents of a source are ordered by a hash of the seed and their text. In this order the first documents fill the
held-out split and the next the calibration split, up to their share of the characters; all others are training data.
No document is in two splits, and a text that several sources carry counts for the first source only. Within a split,
documents are packed into blocks that do not overlap (:mod:`~nemo_minitron.data.packing`); a document is closed by EOS.
Blocks are cached in ``cache_dir/blocks/<split>-<hash>``.

Memory: the table of a source's documents. Tokens are read from, and blocks written to, memory-mapped files; the
returned blocks are memory-mapped too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from filelock import FileLock

from nemo_minitron.config import DataConfig, SourceConfig
from nemo_minitron.config.parts.text import ORIGINS
from nemo_minitron.data.blocks import Blocks
from nemo_minitron.data.packing import Packing, best_fit, best_fit_begun, stream, stream_begun
from nemo_minitron.data.splits import SPLITS, deal, seen_in
from nemo_minitron.data.streams import TokenStream, source_state, titles_of, token_stream
from nemo_minitron.data.tokenizer import load_tokenizer, tokenizer_files_digest
from nemo_minitron.errors import DataError
from nemo_minitron.jobs import skipped
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.atomic import write_aside
from nemo_minitron.runtime.files import read_json_lines
from nemo_minitron.runtime.masks import FILLING
from nemo_minitron.runtime.progress import progress_bar

__all__ = ["build_blocks", "build_domain_blocks"]

logger = logging.getLogger(__name__)

_FORMAT = 3  # of a kept directory; raise it when the same configuration would give other tokens


@dataclass(frozen=True)
class _Array:
    """A file ``<name>.npy`` of a kept directory: one row a block.

    Attributes:
        dtype: of its numbers.
        beyond: a row has ``sequence_length + beyond`` numbers. None: a row is a single number.
    """

    dtype: type[np.generic]
    beyond: int | None

    def shape(self, blocks: int, sequence_length: int) -> tuple[int, ...]:
        """``[n, s + beyond]``, or ``[n]``."""
        return (blocks,) if self.beyond is None else (blocks, sequence_length + self.beyond)


_ARRAYS = {
    "tokens": _Array(np.int64, 1),
    "domain": _Array(np.int64, None),
    "segments": _Array(np.int32, 1),
    "loss_mask": _Array(np.bool_, 0),
}
_CONTENT = "content.json"  # names of domains and arrays, lowest and highest id


def build_blocks(
    config: DataConfig,
    tokenizer_dir: str | Path | None,
    split: str,
    *,
    blocks: int | None = None,
    vocab_size: int | None = None,
    max_length: int | None = None,
) -> Blocks:
    """Token blocks of one split, in the shuffled order of ``config.seed``.

    Args:
        config: sources, block length, seed, cache.
        tokenizer_dir: directory with the tokenizer of the model.
        split: one of :data:`~nemo_minitron.data.SPLITS`.
        blocks: how many, drawn from the sources by weight; the other sources replace a source that runs out. None
            takes as many as keep the weights exact without repeating a block.
        vocab_size: rows of the model's embedding, against which the ids are checked; None does not check.
        max_length: longest sequence of the model; None does not check.

    Returns:
        Blocks of ``[n, sequence_length + 1]`` tokens.

    Raises:
        DataError: for unreadable sources, too little text, sequences that are too long for the model, or a tokenizer
            that does not fit.
    """
    return _build(config, tokenizer_dir, split, blocks, vocab_size, max_length)


def build_domain_blocks(
    config: DataConfig,
    tokenizer_dir: str | Path | None,
    split: str,
    *,
    blocks: int | None = None,
    vocab_size: int | None = None,
    max_length: int | None = None,
) -> dict[str, Blocks]:
    """The blocks of :func:`build_blocks`, by the name of their source."""
    return _build(config, tokenizer_dir, split, blocks, vocab_size, max_length).by_domain()


def _build(
    config: DataConfig,
    tokenizer_dir: str | Path | None,
    split: str,
    blocks: int | None,
    vocab_size: int | None,
    max_length: int | None,
) -> Blocks:
    if split not in SPLITS:
        raise DataError(f"split {split!r} is not known; known: {', '.join(SPLITS)}")
    if blocks is not None and blocks < 1:
        raise DataError(f"{blocks} blocks of the {split} split were asked for; ask for at least 1")
    if max_length is not None and config.sequence_length > max_length:
        raise DataError(
            f"data.sequence_length={config.sequence_length}: the model reads {max_length} tokens at most; lower it"
        )
    return _cached_blocks(config, tokenizer_dir, split, blocks, vocab_size)


def _cached_blocks(
    config: DataConfig, tokenizer_dir: str | Path | None, split: str, blocks: int | None, vocab_size: int | None
) -> Blocks:
    """The blocks of a split: from the cache, or made now, by one process at a time.

    Arguments as of :func:`build_blocks`, checked.
    """
    tokenizer = load_tokenizer(tokenizer_dir)  # Before the cache: a missing tokenizer is an error at once.
    folder = _folder(config, Path(str(tokenizer_dir)), split, blocks)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        cached = _read(folder)
        if cached is None:
            packed = [_Packed(source, token_stream(source, config, tokenizer)) for source in config.all_sources()]
            begin = tokenizer.bos_token_id
            if config.begin_pieces and begin is None:
                raise DataError(
                    f"data.begin_pieces=true: the tokenizer {tokenizer_dir} names no first token (bos_token); set "
                    "it to false"
                )
            _make(config, packed, split, blocks, (begin, tokenizer.eos_token_id), folder)
            cached = _read(folder)
    if cached is None:
        raise DataError(f"{folder}: what was just written cannot be read back; look at the disk")
    if config.skip:
        skipped.restore(read_json_lines(folder / skipped.FILE_NAME))
    blocks_found, ids = cached
    _check_ids(blocks_found, ids, str(tokenizer_dir), vocab_size)
    return blocks_found


def _check_ids(blocks: Blocks, ids: tuple[int, int], tokenizer_dir: str, vocab_size: int | None) -> None:
    """Every id, from the lowest to the highest, has an embedding."""
    lowest, highest = ids
    if lowest >= 0 and (vocab_size is None or highest < vocab_size):
        return
    bad = lowest if lowest < 0 else highest
    domain = int(blocks.domain[(blocks.tokens == bad).any(dim=1)][0])
    raise DataError(
        f"source {blocks.domains[domain]!r} with the tokenizer {tokenizer_dir}: gives the id {bad}, the model's "
        f"vocabulary only has {vocab_size} entries; use the tokenizer that belongs to the model"
    )


@dataclass
class _Packed:
    """A source, its tokens, and how they fill blocks.

    Attributes:
        tokens: tokens of the split, before they are packed.
        packing: blocks of the split in which a label counts, in the order in which they are taken.
        dropped: number of blocks in which no label counts.
    """

    source: SourceConfig
    stream: TokenStream
    tokens: int = 0
    packing: Packing | None = None
    dropped: int = 0

    @property
    def available(self) -> int:
        return 0 if self.packing is None else len(self.packing)

    def pack(self, documents: np.ndarray, config: DataConfig, split: str) -> None:
        """Pack the documents of a split, by their numbers in the source."""
        size = config.sequence_length + 1
        lengths = self.stream.table.lengths[documents]
        self.tokens = int(lengths.sum())
        # Scores average over all positions of a block, where filling would count.
        fits = config.packing == "best_fit" and split != "calibration"
        if config.begin_pieces:
            packing = best_fit_begun(lengths, size) if fits else stream_begun(lengths, size)
        else:
            packing = best_fit(lengths, size) if fits else stream(lengths, size)
        packing = replace(packing, document=documents[packing.document])
        counts = packing.labels() > 0 if config.documents == "mask" else np.ones(len(packing), dtype=bool)
        if self.stream.answers is not None:
            counts &= self._learned(packing, masked=config.documents == "mask")
        kept = np.nonzero(counts)[0]
        if fits:  # the longest documents come first: whoever takes some blocks is to get all kinds
            kept = np.random.default_rng([config.seed, len(kept)]).permutation(kept)
        self.packing, self.dropped = packing.take(kept), len(packing) - len(kept)
        if self.dropped:
            logger.warning(
                "source %r: %d of %d blocks of the %s split hold no label that counts, and are left out",
                self.source.name, self.dropped, len(packing), split,
            )  # fmt: skip

    def _learned(self, packing: Packing, *, masked: bool) -> np.ndarray:
        """``[n]`` bool: blocks with a label that is learned."""
        mask = np.zeros(len(packing), dtype=bool)
        for block in range(len(packing)):
            for piece in range(packing.first[block], packing.first[block + 1]):
                start, length = packing.start[piece], packing.length[piece]
                learned = self.stream.answers(packing.document[piece], start, start + length)
                # the first token of a document, or of the block, is no label
                begun = packing.begun is not None and bool(packing.begun[piece])
                skip = not begun and (masked or piece == packing.first[block])
                mask[block] |= bool(learned[int(skip) :].any())
        return mask

    def fill(self, block: int, row: dict[str, np.ndarray], begin: int | None, end: int) -> None:
        """Write a block into its row of each array; ``begin`` and ``end`` are the ids of first and last token."""
        packing = self.packing
        assert packing is not None
        at = 0
        for number, piece in enumerate(range(packing.first[block], packing.first[block + 1])):
            document, start, length = (int(x[piece]) for x in (packing.document, packing.start, packing.length))
            if packing.begun is not None and packing.begun[piece]:
                row["tokens"][at] = begin
                if "segments" in row:
                    row["segments"][at] = number
                if "loss_mask" in row and at:
                    row["loss_mask"][at - 1] = False  # nobody learns that a piece is cut here
                at += 1
            row["tokens"][at : at + length] = self.stream.tokens(document, start, start + length)
            if "segments" in row:
                row["segments"][at : at + length] = number
            if "loss_mask" in row and self.stream.answers is not None:
                learned = self.stream.answers(document, start, start + length)
                row["loss_mask"][max(at - 1, 0) : at + length - 1] = learned[1 if at == 0 else 0 :]
            elif "loss_mask" in row:
                row["loss_mask"][max(at - 1, 0) : at + length - 1] = True
            at += length
        row["tokens"][at:] = end
        if "segments" in row:
            row["segments"][at:] = FILLING
        if "loss_mask" in row:
            row["loss_mask"][max(at - 1, 0) :] = False


def _make(
    config: DataConfig,
    packed: list[_Packed],
    split: str,
    blocks: int | None,
    ends: tuple[int | None, int],
    folder: Path,
) -> None:
    import torch

    begin, end = ends
    taken: list[np.ndarray] = []
    for part in packed:
        table = part.stream.table
        new = ~seen_in(table.keys, taken)
        taken.append(table.keys)
        numbers = np.nonzero(new)[0]
        dealt = deal(type(table)(*(column[numbers] for column in table)), config)
        part.pack(numbers[dealt[split]], config, split)
        _check_enough(part, config, split)
    counts = _quotas([part.source.weight for part in packed], [part.available for part in packed], blocks)
    length = config.sequence_length
    if blocks is not None and sum(counts) < blocks:
        raise DataError(
            f"{blocks} blocks of the {split} split were asked for, the sources hold {sum(counts)} of {length + 1} "
            "tokens; ask for fewer, add text, or lower sequence_length"
        )
    domain = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([np.arange(count) for count in counts])
    # Not the global generator: the order must not depend on what ran before.
    order = torch.randperm(len(domain), generator=torch.Generator().manual_seed(config.seed)).numpy()

    wanted = ["tokens", "domain", *(["segments"] if config.documents == "mask" else [])]
    wanted += ["loss_mask"] if any(part.stream.answers is not None for part in packed) else []
    # Under the caller's lock.
    with write_aside(folder, overwrite=True, error=DataError, alone=True) as aside:
        aside.mkdir()
        arrays = {}
        for name in wanted:
            shape = _ARRAYS[name].shape(len(order), length)
            arrays[name] = np.lib.format.open_memmap(aside / f"{name}.npy", "w+", _ARRAYS[name].dtype, shape)
        arrays["domain"][:] = domain[order]
        lowest, highest = end, end
        with progress_bar(f"cutting {split} blocks", len(order)) as advance:
            for row, block in enumerate(order):
                rows = {name: array[row] for name, array in arrays.items() if array.ndim == 2}
                packed[domain[block]].fill(int(place[block]), rows, begin, end)
                lowest, highest = min(lowest, int(rows["tokens"].min())), max(highest, int(rows["tokens"].max()))
                advance(1)
        for array in arrays.values():
            array.flush()
        del arrays
        content = {"domains": [part.source.name for part in packed], "arrays": wanted, "ids": [lowest, highest]}
        (aside / _CONTENT).write_text(json.dumps(content), encoding="utf-8")
        if config.skip:
            titles = [title for part in packed for title in titles_of(part.source)]
            (aside / skipped.FILE_NAME).write_text(skipped.as_text(skipped.entries(titles)))
    if config.packing == "best_fit" and split != "calibration":
        share = 1 - sum(part.packing.tokens for part in packed if part.packing) / max(
            1, sum(part.available for part in packed) * (length + 1)
        )
        logger.info("%s split: %.1f %% of the blocks is filling", split, 100 * share)


def _check_enough(part: _Packed, config: DataConfig, split: str) -> None:
    """Refuse a source that has no block.

    Raises:
        DataError: saying what to change.
    """
    if part.available:
        return
    name, length = part.source.name, config.sequence_length + 1
    if part.dropped:
        raise DataError(
            f"source {name!r}: none of the {part.dropped} blocks of its {split} split holds a label that counts, all "
            "tokens are masked; raise sequence_length, so that answers and their questions share a block, or check "
            "the answers"
        )
    raise DataError(
        f"source {name!r}: its {split} split has {part.tokens} tokens, less than one block of "
        f"sequence_length + 1 = {length}; give it more text"
        + (f", a larger {split}_fraction" if split != "train" else "")
        + " or a smaller sequence_length"
    )


def _quotas(weights: list[float], available: list[int], blocks: int | None) -> list[int]:
    """How many blocks each source gives."""
    if blocks is None:
        total = sum(weights)
        whole = min(has * total / weight for weight, has in zip(weights, available, strict=True))
        return [max(1, min(has, round(whole * w / total))) for w, has in zip(weights, available, strict=True)]
    counts = [0] * len(weights)
    active = list(range(len(weights)))
    while active and (missing := blocks - sum(counts)):
        total = sum(weights[i] for i in active)
        exact = {i: missing * weights[i] / total for i in active}
        share = {i: math.floor(exact[i]) for i in active}
        # Largest remainders first; equal ones in the order of the sources.
        for i in sorted(active, key=lambda i: share[i] - exact[i])[: missing - sum(share.values())]:
            share[i] += 1
        asked = {i: counts[i] + share[i] for i in active}
        for i in active:
            counts[i] = min(asked[i], available[i])
        active = [i for i in active if asked[i] <= available[i]]
    return counts


# ---------------------------------------------------------------------------------------------------------------- cache


def _folder(config: DataConfig, tokenizer_dir: Path, split: str, blocks: int | None) -> Path:
    """A name that changes with everything that the blocks depend on."""
    apart = ["sources", "blend", "cache_dir", "workers", *([] if config.skip else ["on_bad_record"])]
    apart += [] if config.begin_pieces else ["begin_pieces"]
    settings = {field: value for field, value in asdict(config).items() if field not in apart}
    origins = [
        [
            *(getattr(s, name) for name in ("name", "package", "text_key", "weight", "max_characters", "template")),
            [getattr(s, origin) is not None for origin in ORIGINS],
            source_state(s, config.cache_dir),
        ]
        for s in config.all_sources()
    ]
    key = [_FORMAT, settings, origins, tokenizer_files_digest(tokenizer_dir), split, blocks]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return Path(config.cache_dir) / "blocks" / f"{split}-{digest}"


def _read(folder: Path) -> tuple[Blocks, tuple[int, int]] | None:
    """A kept directory, and its lowest and highest id; None where there is none, or a damaged one, which is removed."""
    import torch

    if not folder.is_dir():
        return None
    try:
        content = parse_json((folder / _CONTENT).read_text(encoding="utf-8"))
        # Copy on write: whoever changes a block changes no file.
        arrays = {
            name: torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False))
            for name in content["arrays"]
        }
        lowest, highest = content["ids"]
        return Blocks(domains=tuple(content["domains"]), **arrays), (int(lowest), int(highest))
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: is damaged (%s); it is made anew", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None
