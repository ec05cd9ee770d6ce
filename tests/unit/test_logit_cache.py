"""The logit cache: what is stored, what comes back, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.config import LossConfig
from nemo_minitron.distillation.losses.kernels import TopTokens
from nemo_minitron.distillation.teachers.cached import cached_loss
from nemo_minitron.distillation.teachers.logit_cache import (
    LogitCache,
    Manifest,
    decode_logits,
    decode_top,
    encode,
    sample_keys,
    write_shard,
)
from nemo_minitron.errors import ConfigError, DataError

SEQUENCE = 6
COMPACT = {"values": "compact", "error_bound": 0.125}
FORMS: list[dict[str, Any]] = [{}, COMPACT]
BOTH = pytest.mark.parametrize("form", FORMS, ids=["plain", "compact"])


def manifest(**changes: Any) -> Manifest:
    values = {
        "teacher": "a", "tokenizer": "b", "vocab_size": 100, "sequence_length": SEQUENCE, "k": 4,
        "values": "bfloat16", "dtype": "float32",
    }  # fmt: skip
    return Manifest(**{**values, **changes})


def distribution(vocabulary: int, *, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocabulary)
    return (spread * torch.randn(SEQUENCE, vocabulary, generator=generator, dtype=torch.float64)).log_softmax(-1)


def top_of(log_p: torch.Tensor, k: int) -> TopTokens:
    best = log_p.topk(k, -1)
    rest = log_p.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
    return TopTokens(best.indices, best.values, rest)


def filled(directory: Path, made: Manifest, shards: int = 2, each: int = 3) -> list[bytes]:
    """A cache of random samples; their keys."""
    made.write(directory)
    tokens = torch.arange(shards * each * SEQUENCE).view(-1, SEQUENCE)
    keys = sample_keys(tokens, torch.zeros_like(tokens))
    sample = encode(made, top_of(distribution(made.vocab_size), made.k or 1))
    for shard in range(shards):
        write_shard(directory, made, [(key, sample) for key in keys[shard * each : (shard + 1) * each]])
    return keys


@pytest.mark.parametrize("values", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("vocabulary", [100, 70_000, 300_000])
def test_what_comes_back_is_a_distribution(values: str, vocabulary: int, tmp_path: Path) -> None:
    """Tokens of any vocabulary exactly, the ghost's mass exactly, the others within the rounding of their values."""
    made = manifest(vocab_size=vocabulary, values=values, k=8)
    made.write(tmp_path)
    top = top_of(distribution(vocabulary), 8)
    write_shard(tmp_path, made, [(b"k" * 32, encode(made, top))])
    found = decode_top(LogitCache(tmp_path).read(b"k" * 32))
    assert torch.equal(found.tokens, top.tokens)
    torch.testing.assert_close(found.log_rest, top.log_rest.float(), rtol=1e-6, atol=0)
    total = found.log_probabilities.double().exp().sum(-1) + found.log_rest.double().exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
    spread = (top.log_probabilities[:, 0] - top.log_probabilities[:, -1])[:, None]
    size = top.log_probabilities.abs().amax(-1, keepdim=True)
    # half a step of the value itself, and as much of the scaling
    step = {"float32": 1e-6 * size, "float16": 2**-10 * size, "bfloat16": 2**-7 * size, "int8": spread / 255}[values]
    assert ((found.log_probabilities - top.log_probabilities).abs() <= step + 1e-5).all()


def test_fewer_tokens_join_the_ghost() -> None:
    log_p = distribution(50)
    made = manifest(vocab_size=50, values="float32", k=9)
    found, expected = decode_top(encode(made, top_of(log_p, 9)), k=3), top_of(log_p, 3)
    assert torch.equal(found.tokens, expected.tokens)
    for ours, theirs in ((found.log_probabilities, expected.log_probabilities), (found.log_rest, expected.log_rest)):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "tolerance"), [("float32", 1e-6), ("float16", 2**-11), ("bfloat16", 2**-8), ("int8", 0.05)]
)
def test_a_cache_of_all_tokens_keeps_them_in_order(values: str, tolerance: float) -> None:
    log_p = distribution(40)
    found = decode_logits(encode(manifest(vocab_size=40, values=values, k=None), log_probabilities=log_p))
    torch.testing.assert_close(found.double(), log_p, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("vocabulary", "k", "values", "expected"),
    [
        (49_152, 64, "float16", 260), (49_152, 64, "int8", 204), (49_152, 128, "bfloat16", 516),
        (49_152, 128, "int8", 396), (128_256, 64, "bfloat16", 324), (128_256, 64, "int8", 268),
        (128_256, 128, "bfloat16", 644), (128_256, 128, "int8", 524),
    ],
)  # fmt: skip
def test_bytes_per_token_are_those_on_the_disk(
    vocabulary: int, k: int, values: str, expected: int, tmp_path: Path
) -> None:
    sequence, samples = 256, 4
    made = manifest(vocab_size=vocabulary, k=k, values=values, sequence_length=sequence)
    assert made.bytes_per_token == expected + 40 / sequence
    ids = torch.randint(vocabulary, (sequence, k))
    sample = encode(made, TopTokens(ids, -torch.rand(sequence, k), torch.full((sequence,), -3.0)))
    path = write_shard(tmp_path, made, [(bytes([index]) * 32, sample) for index in range(samples)])
    assert path.stat().st_size == pytest.approx(made.bytes_per_token * sequence * samples, rel=0.01)


def test_keys_are_of_what_a_sample_holds() -> None:
    tokens = torch.arange(12).view(2, 6)
    none = torch.zeros(2, 6, dtype=torch.int32)
    first, second = sample_keys(tokens, none)
    assert first != second
    assert sample_keys(tokens.flip(0), none) == [second, first]
    packed = none.clone()
    packed[:, 3:] = 3
    assert set(sample_keys(tokens, packed)).isdisjoint({first, second})


@BOTH
def test_random_access_and_what_is_missing(form: dict[str, Any], tmp_path: Path) -> None:
    keys = filled(tmp_path, manifest(**form))
    cache = LogitCache(tmp_path)
    assert len(cache) == len(keys)
    cache.read(keys[4])
    cache.require(keys, what="the blocks")
    strange = sample_keys(torch.full((1, SEQUENCE), 7), torch.zeros(1, SEQUENCE))
    with pytest.raises(DataError, match="a cache of other data"):
        cache.read(strange[0])
    with pytest.raises(DataError, match="lacks 1 of the 7 samples of the blocks"):
        cache.require([*keys, *strange], what="the blocks")


def test_a_cache_of_another_teacher_or_length_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, manifest())
    cache = LogitCache(tmp_path)
    cache.check(sequence_length=SEQUENCE, teacher=None)
    with pytest.raises(DataError) as caught:
        cache.check(sequence_length=SEQUENCE + 1, teacher="d")
    for name in ("sequence_length is 6", "teacher is a"):
        assert name in str(caught.value)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[:-40])
    elif how == "headless":
        path.write_bytes(b"")
    else:
        header = 8 + int.from_bytes(data[:8], "little")
        data[(header + len(data)) // 2] ^= 4
        path.write_bytes(data)


@BOTH
@pytest.mark.parametrize("how", ["truncated", "headless"])
def test_damaged_shards_are_named_all_at_once(how: str, form: dict[str, Any], tmp_path: Path) -> None:
    filled(tmp_path, manifest(**form))
    for path in tmp_path.glob("shard-*"):
        damage(path, how)
    with pytest.raises(DataError, match="2 damaged shards; run `minitron cache` again") as caught:
        LogitCache(tmp_path)
    assert str(caught.value).count("cannot be read") == 2


@BOTH
def test_flipped_bits_are_found_when_read(form: dict[str, Any], tmp_path: Path) -> None:
    keys = filled(tmp_path, manifest(**form), shards=1)
    damage(next(tmp_path.glob("shard-*")), "flipped")
    cache = LogitCache(tmp_path)
    with pytest.raises(DataError, match="does not have the checksum it was written with"):
        for key in keys:
            cache.read(key)


@BOTH
@pytest.mark.parametrize("how", ["truncated", "headless", "flipped"])
def test_repair_leaves_what_is_whole(how: str, form: dict[str, Any], tmp_path: Path) -> None:
    """As after a killed writer: its half file goes, damaged shards go, the others stay."""
    keys = filled(tmp_path, manifest(**form))
    (tmp_path / ".shard-x.safetensors.partial.1").write_bytes(b"half")
    damage(min(tmp_path.glob("shard-*")), how)
    cache = LogitCache(tmp_path, repair=True)
    assert len(cache) == 3
    assert sum(key in cache for key in keys) == 3
    assert len(list(tmp_path.glob("*shard-*"))) == 1
    assert len(LogitCache(tmp_path)) == 3


@BOTH
@pytest.mark.parametrize("other", [{"teacher": "other"}, {"values": "int8", "error_bound": None}, COMPACT | {"k": 5}])
def test_shards_of_another_cache_are_refused(form: dict[str, Any], other: dict[str, Any], tmp_path: Path) -> None:
    filled(tmp_path / "a", manifest(**form))
    filled(tmp_path / "b", manifest(**{**form, **other}), shards=1)
    stranger = next((tmp_path / "b").glob("shard-*"))
    stranger.rename(tmp_path / "a" / f"shard-{'0' * 20}.safetensors")
    with pytest.raises(DataError, match="belongs to another cache"):
        LogitCache(tmp_path / "a")


def made_manifest(version: int, **changes: Any) -> str:
    return json.dumps(dataclasses.asdict(manifest(**changes)) | {"version": version, "bytes_per_token": 1})


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", '{"version": 9}', '{"version": 1}', '{"version": 1, "k": 3, "bytes_per_token": 1, "x": 2}',
        made_manifest(1, **COMPACT), made_manifest(2), made_manifest(2, **COMPACT | {"k": None}),
        made_manifest(2, values="compact"), made_manifest(2, values="compact", error_bound=1e-9),
        made_manifest(2, values="compact", error_bound="0.125"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_read(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        LogitCache(tmp_path)


def test_a_directory_that_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no logit cache"):
        LogitCache(tmp_path)


def test_a_shard_that_cannot_be_written(tmp_path: Path) -> None:
    keys = filled(tmp_path, manifest())
    sample = LogitCache(tmp_path).read(keys[0])
    with pytest.raises(DataError, match="cannot be written .*what was written before is whole"):
        write_shard(tmp_path / "gone", manifest(), [(keys[0], sample)])


def test_a_manifest_of_before_the_compact_form_is_as_it_was(tmp_path: Path) -> None:
    """File and digest, so that its shards stay its own."""
    made = manifest()
    made.write(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert content == {
        "version": 1, "teacher": "a", "tokenizer": "b", "vocab_size": 100, "sequence_length": 6, "k": 4,
        "values": "bfloat16", "dtype": "float32", "temperature": 1.0, "bytes_per_token": 26.67,
    }  # fmt: skip
    assert made.digest == "ac7c6e2599aaa88d"
    assert Manifest.read(tmp_path) == made
    compact = manifest(**COMPACT, top_p=0.9)
    compact.write(tmp_path)
    assert Manifest.read(tmp_path) == compact
    assert compact.differences(made) == [
        "values=compact, not bfloat16",
        "error_bound=0.125, not None",
        "top_p=0.9, not None",
    ]


def test_manifests_tell_what_differs() -> None:
    ours = manifest()
    assert ours.differences(manifest()) == []
    assert ours.differences(manifest(k=5, values="int8")) == ["k=4, not 5", "values=bfloat16, not int8"]
    assert ours.digest != dataclasses.replace(ours, k=5).digest


def test_losses_that_a_cache_holds() -> None:
    assert cached_loss(LossConfig(), manifest()) == LossConfig("top_k", k=4)
    assert cached_loss(LossConfig("top_k", k=2, label_weight=0.5), manifest()).k == 2
    hot = LossConfig("jensen_shannon", temperature=2.0)
    assert cached_loss(hot, manifest(k=None)) is hot
    with pytest.raises(ConfigError) as caught:
        cached_loss(hot, manifest())
    assert len(caught.value.faults) == 2
    with pytest.raises(ConfigError, match=r"loss\.k=64: the cache has 4 tokens"):
        cached_loss(LossConfig("top_k"), manifest())
