"""Blocks: contents, splits, mixture, cache, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from support.text import sentences, write_jsonl, write_tokenizer

from nemo_minitron.config import DataConfig, SourceConfig
from nemo_minitron.data import SPLITS, Document, build_blocks, build_domain_blocks, read_source
from nemo_minitron.data.splits import DocumentTable, deal, order_key
from nemo_minitron.errors import DataError


def split_documents(documents: list[Document], config: DataConfig) -> dict[str, list[Document]]:
    """The documents themselves, as they are dealt by what the table says of them."""
    sizes = np.array([len(document.text) for document in documents])
    keys = b"".join(order_key(config.seed, document.text) for document in documents)
    table = DocumentTable(sizes, sizes, np.frombuffer(keys, np.uint8).reshape(-1, 32))
    return {split: [documents[number] for number in numbers] for split, numbers in deal(table, config).items()}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Two sources of 60 and 30 documents of 20 words, blocks of 16 + 1 tokens."""
    first = write_jsonl(tmp_path / "first.jsonl", sentences(60, 20, seed=1))
    second = write_jsonl(tmp_path / "second.jsonl", sentences(30, 20, seed=2))
    return DataConfig(
        sources=[
            SourceConfig(name="first", path=str(first)),
            SourceConfig(name="second", path=str(second)),
        ],
        sequence_length=16,
        calibration_fraction=0.2,
        held_out_fraction=0.2,
        cache_dir=str(tmp_path / "cache"),
    )


def test_blocks_are_the_documents_joined_by_eos(config: DataConfig, tokenizer: Path) -> None:
    config.sources = config.sources[:1]
    blocks = build_blocks(config, tokenizer, "train").tokens
    assert blocks.dtype == torch.int64
    assert blocks.shape[1] == 17
    documents = split_documents(read_source(config.sources[0], config.cache_dir), config)["train"]
    # The tokenizer numbers "w5" as 3 + 5; EOS is 0.
    stream = [i for document in documents for i in [*(3 + int(w[1:]) for w in document.text.split()), 0]]
    expected = {tuple(stream[start : start + 17]) for start in range(0, len(stream) - 16, 17)}
    assert {tuple(block) for block in blocks.tolist()} == expected
    assert len(blocks) == len(stream) // 17


def test_splits_share_no_document() -> None:
    config = DataConfig(calibration_fraction=0.1, held_out_fraction=0.1)
    documents = [Document(str(i), text) for i, text in enumerate(sentences(200, 30, seed=3))]
    dealt = split_documents(documents, config)
    assert sorted(d.title for split in SPLITS for d in dealt[split]) == sorted(d.title for d in documents)
    assert 18 <= len(dealt["held_out"]) <= 22
    assert 18 <= len(dealt["calibration"]) <= 22


def test_split_does_not_depend_on_the_order_of_documents() -> None:
    config = DataConfig()
    documents = [Document(str(i), text) for i, text in enumerate(sentences(50, 30, seed=3))]
    assert split_documents(documents, config) == split_documents(documents[::-1], config)
    assert split_documents(documents, config) != split_documents(documents, dataclasses.replace(config, seed=5))


def test_a_giant_document_does_not_take_over_a_split() -> None:
    config = DataConfig(calibration_fraction=0.1, held_out_fraction=0.1)
    documents = [
        Document("giant", "w1 " * 100_000),
        Document("a", "w2 " * 10),
        Document("b", "w3 " * 20),
    ]
    dealt = split_documents(documents, config)
    assert [d.title for d in dealt["train"]] == ["giant"]
    assert len(dealt["held_out"]) == len(dealt["calibration"]) == 1


def test_text_in_two_sources_is_on_one_side_only(config: DataConfig, tokenizer: Path, tmp_path: Path) -> None:
    same = sentences(60, 20, seed=1)
    config.sources[1].path = str(write_jsonl(tmp_path / "both.jsonl", same + sentences(40, 20, seed=9)))
    rows = {
        split: {tuple(block.tolist()) for block in build_blocks(config, tokenizer, split).tokens} for split in SPLITS
    }
    windows = {split: {row[i : i + 6] for row in rows[split] for i in range(12)} for split in SPLITS}
    assert not windows["train"] & windows["held_out"]
    assert not windows["train"] & windows["calibration"]
    assert not windows["calibration"] & windows["held_out"]


def test_weights_set_the_mixture(config: DataConfig, tokenizer: Path) -> None:
    config.sources[0].weight = 3.0
    found = build_domain_blocks(config, tokenizer, "train", blocks=12)
    assert {name: len(blocks) for name, blocks in found.items()} == {
        "first": 9,
        "second": 3,
    }
    everything = build_domain_blocks(config, tokenizer, "train")
    assert len(everything["first"]) == pytest.approx(3 * len(everything["second"]), abs=2)


def test_a_source_that_runs_out_is_made_up_for(config: DataConfig, tokenizer: Path) -> None:
    config.sources[1].weight = 100.0
    found = build_domain_blocks(config, tokenizer, "train", blocks=50)
    assert sum(map(len, found.values())) == 50
    only = dataclasses.replace(config, sources=config.sources[1:])
    assert len(found["second"]) == len(build_blocks(only, tokenizer, "train"))  # all it has


def test_more_than_there_is_names_the_count(config: DataConfig, tokenizer: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"1000 blocks of the train split were asked for, the sources hold \d+",
    ):
        build_blocks(config, tokenizer, "train", blocks=1000)


def test_same_seed_same_blocks_other_seed_others(config: DataConfig, tokenizer: Path, tmp_path: Path) -> None:
    first = build_blocks(config, tokenizer, "train", blocks=20).tokens
    torch.manual_seed(99)
    torch.rand(10)
    again = build_blocks(
        dataclasses.replace(config, cache_dir=str(tmp_path / "other")),
        tokenizer,
        "train",
        blocks=20,
    ).tokens
    assert torch.equal(first, again)
    assert not torch.equal(
        first,
        build_blocks(dataclasses.replace(config, seed=7), tokenizer, "train", blocks=20).tokens,
    )


def kept(config: DataConfig, kind: str) -> list[Path]:
    return sorted(path for path in Path(config.cache_dir, kind).iterdir() if path.suffix != ".lock")


def test_cache_is_used_and_follows_the_content(
    config: DataConfig, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_blocks(config, tokenizer, "train", blocks=20).tokens.clone()
    made: list[str] = []
    from nemo_minitron.data import streams

    make = streams._make
    monkeypatch.setattr(streams, "_make", lambda source, *rest: (made.append(source.name), make(source, *rest)))

    def again(**changes: object) -> torch.Tensor:
        made.clear()
        return build_blocks(dataclasses.replace(config, **changes), tokenizer, "train", blocks=20).tokens.clone()

    assert torch.equal(first, again())
    # No setting of the mixture makes a source be tokenised again; another seed does, and another text.
    weighted = [dataclasses.replace(config.sources[0], weight=5.0), config.sources[1]]
    for changes in (
        {"sequence_length": 8},
        {"sources": weighted},
        {"sources": config.sources[::-1]},
        {"documents": "mask", "packing": "best_fit"},
        {"held_out_fraction": 0.1},
    ):
        again(**changes)
        assert made == []
    again(seed=5)
    assert made == ["first", "second"]
    (blocks,) = [
        path for path in kept(config, "blocks") if torch.equal(torch.from_numpy(np.load(path / "tokens.npy")), first)
    ]
    # Damaged files are made anew: of blocks, and of tokens, cut off or changed.
    file = blocks / "tokens.npy"
    file.write_bytes(file.read_bytes()[:-10])
    assert torch.equal(first, again())
    assert made == []
    for damage in (lambda data: data[:-4], lambda data: data[:40] + b"\1" + data[41:]):
        for folder in kept(config, "tokens"):
            (folder / "tokens.bin").write_bytes(damage((folder / "tokens.bin").read_bytes()))
        file.unlink()
        assert torch.equal(first, again())
        assert made == ["first", "second"]
    for folder in kept(config, "tokens"):
        (folder / "documents.safetensors").write_bytes(b"")
    file.unlink()
    assert torch.equal(first, again())
    write_jsonl(tmp_path / "first.jsonl", sentences(60, 20, seed=77))
    assert not torch.equal(first, again())
    assert made == ["first"]


def test_any_number_of_workers_gives_the_same(config: DataConfig, tokenizer: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "first.jsonl", sentences(700, 20, seed=1))  # three batches
    alone = build_blocks(config, tokenizer, "train", blocks=200)
    for workers in (1, 2):
        other = dataclasses.replace(config, cache_dir=str(tmp_path / f"cache{workers}"), workers=workers)
        assert build_blocks(other, tokenizer, "train", blocks=200).content() == alone.content()


def test_nothing_is_left_when_writing_fails(
    config: DataConfig, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", full)
        with pytest.raises(DataError, match="no space left"):
            build_blocks(config, tokenizer, "train", blocks=4)
    assert kept(config, "tokens") == kept(config, "blocks") == []
    # What a killed process left aside is cleared away by the next.
    build_blocks(config, tokenizer, "train", blocks=4)
    (tokens, *_), (blocks,) = kept(config, "tokens"), kept(config, "blocks")
    for folder in (tokens, blocks):
        folder.rename(folder.with_name(f".{folder.name}.partial.1"))
    build_blocks(config, tokenizer, "train", blocks=4)
    for kind in ("tokens", "blocks"):
        assert not [path for path in kept(config, kind) if ".partial." in path.name]


def test_empty_calibration_split(config: DataConfig, tokenizer: Path, tmp_path: Path) -> None:
    config.sources = [
        SourceConfig(
            name="one",
            path=str(write_jsonl(tmp_path / "one.jsonl", sentences(1, 400, seed=1))),
        )
    ]
    with pytest.raises(
        DataError,
        match=r"'one': its calibration split has 0 tokens.*calibration_fraction",
    ):
        build_blocks(config, tokenizer, "calibration")


def test_too_little_text_for_one_block(config: DataConfig, tokenizer: Path) -> None:
    config.sequence_length = 5000
    with pytest.raises(DataError, match=r"'first': its train split has \d+ tokens, less than one block"):
        build_blocks(config, tokenizer, "train")


@pytest.mark.parametrize("cached", [False, True])
def test_tokenizer_with_ids_beyond_the_vocabulary(config: DataConfig, tokenizer: Path, cached: bool) -> None:
    if cached:
        build_blocks(config, tokenizer, "train", blocks=30)
    with pytest.raises(DataError, match=r"the id \d+, the model's vocabulary only.* 100 entries"):
        build_blocks(config, tokenizer, "train", blocks=30, vocab_size=100)
    assert len(build_blocks(config, tokenizer, "train", blocks=30, vocab_size=123)) == 30


def test_tokenizer_without_eos(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no end-of-text token"):
        build_blocks(config, write_tokenizer(tmp_path / "no-eos", eos=False), "train")


def test_tokenizer_missing_or_damaged(config: DataConfig, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="carries no tokenizer"):
        build_blocks(config, None, "train")
    with pytest.raises(DataError, match="no tokenizer there"):
        build_blocks(config, tmp_path, "train")
    (tokenizer / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="the tokenizer cannot be read"):
        build_blocks(config, tokenizer, "train")


def test_unknown_split_and_no_blocks(config: DataConfig, tokenizer: Path) -> None:
    with pytest.raises(
        DataError,
        match="split 'test' is not known; known: train, calibration, held_out",
    ):
        build_blocks(config, tokenizer, "test")
    with pytest.raises(DataError, match="0 blocks"):
        build_blocks(config, tokenizer, "train", blocks=0)
