"""The compact form of the logit cache: what comes back, how far it is off, how large it is."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.checkpoints import tiny_checkpoint
from support.text import sentences, write_jsonl

from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.config import CacheConfig, DataConfig, SourceConfig
from nemo_minitron.distillation.losses.common import CommonTokens
from nemo_minitron.distillation.losses.kernels import Columns, TopTokens, top_k_kl
from nemo_minitron.distillation.teachers import packing
from nemo_minitron.distillation.teachers.logit_cache import (
    LogitCache,
    Manifest,
    decode_top,
    encode,
    sample_keys,
    write_shard,
)
from nemo_minitron.distillation.teachers.packing import Grid, TokenOrder, pack, unpack
from nemo_minitron.errors import DataError
from nemo_minitron.jobs.records import hashed_settings
from nemo_minitron.planning.disk import logits_bytes
from nemo_minitron.stages import cache

KEY = b"k" * 32
BOUNDS = st.floats(2.0**-10, 1.0)


def manifest(**changes: Any) -> Manifest:
    values = {
        "teacher": "a", "tokenizer": "b", "vocab_size": 500, "sequence_length": 64, "k": 16, "values": "compact",
        "dtype": "float32", "error_bound": 0.125,
    }  # fmt: skip
    return Manifest(**{**values, **changes})


def distribution(positions: int, vocabulary: int, *, spread: float, seed: int = 0) -> torch.Tensor:
    """``[s, V]`` float64 log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(positions, vocabulary, generator=generator, dtype=torch.float64)).log_softmax(-1)


def top_of(log_p: torch.Tensor, k: int) -> TopTokens:
    best = log_p.topk(k, -1)
    return TopTokens(best.indices, best.values, log_p.scatter(-1, best.indices, -torch.inf).logsumexp(-1))


def stored(directory: Path, made: Manifest, top: TopTokens) -> TopTokens:
    """Written, read and decoded."""
    made.write(directory)
    write_shard(directory, made, [(KEY, encode(made, top))])
    return decode_top(LogitCache(directory).read(KEY))


def by_id(top: TopTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-probabilities, tokens ascending."""
    order = top.tokens.argsort(-1)
    return top.tokens.gather(-1, order), top.log_probabilities.double().gather(-1, order)


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 300), st.integers(0, 18), st.booleans(), BOUNDS,
    st.sampled_from([0.0, 3.0, 80.0, 900.0]),
)  # fmt: skip
@example(0, 3, 1, 0, False, 0.125, 3.0)  # k = 1, and a vocabulary of one
@example(0, 3, 300, 3, True, 0.125, 3.0)  # a vocabulary that is smaller than k
@example(1, 5, 128, 18, True, 2.0**-10, 900.0)
@settings(max_examples=120, deadline=None)
def test_what_was_packed_comes_back(
    seed: int, positions: int, k: int, size: int, ordered: bool, error_bound: float, spread: float
) -> None:
    """Any k and vocabulary, ties (a spread of 0), and positions of fewer tokens."""
    dice = np.random.default_rng(seed)
    vocabulary = max(1, int(2**size * dice.uniform(0.5, 1)))
    grid = Grid(error_bound)
    tokens = np.full((positions, k), -1, np.int32)
    for row in tokens:
        count = dice.integers(1, min(k, vocabulary) + 1) if ordered else min(k, vocabulary)
        places = np.sort(dice.choice(k, count, replace=False))
        row[places] = dice.choice(vocabulary, count, replace=False)
    values = -spread * dice.random((positions, k)).astype(np.float32)
    order = TokenOrder.of([tokens], vocabulary)
    if ordered:  # also where it is not worth storing
        order = TokenOrder._sorted(np.frombuffer(dice.bytes(vocabulary), np.uint8))
    assert sorted(order.tokens) == list(range(vocabulary))
    packed = np.frombuffer(pack(tokens, values, order.ranks(), grid), np.uint8)
    read = TokenOrder.read(order.stored, vocabulary)
    found, log_p = unpack(packed, read, grid, positions=positions, k=k)
    assert (found.shape, log_p.shape, found.dtype, log_p.dtype) == (tokens.shape, tokens.shape, np.int32, np.float32)
    rounded = grid.values(grid.levels(values))
    for ours, theirs, mine, given_values in zip(found, tokens, log_p, rounded, strict=True):
        expected = {int(token): value for token, value in zip(theirs, given_values, strict=True) if token >= 0}
        assert {int(token): value for token, value in zip(ours, mine, strict=True) if token >= 0} == expected
        assert np.isneginf(mine[ours < 0]).all()
        assert (np.diff(order.ranks()[ours[ours >= 0]]) > 0).all()


@given(st.lists(st.floats(-4000, 0, width=32), min_size=1, max_size=50), BOUNDS)
@example([-5.0, -4.99, -5.01, 0.0, -0.0], 0.125)
@settings(deadline=None)
def test_no_log_probability_is_farther_off_than_the_bound(values: list[float], error_bound: float) -> None:
    """A quarter of it above exp(-5); what is on the grid already stays; order stays."""
    exact, grid = np.array(values, np.float32), Grid(error_bound)
    found = grid.values(grid.levels(exact))
    error = np.abs(found.astype(np.float64) - exact)
    rounding = 1e-6 * np.abs(exact)
    assert (error <= np.where(exact > -5, error_bound / 4, error_bound) + rounding).all()
    assert (grid.values(grid.levels(found)) == found).all()
    assert (np.diff(found[exact.argsort(kind="stable")]) >= 0).all()


@pytest.mark.parametrize("error_bound", [0.5, 0.125, 1 / 64, 2.0**-10])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0, 30.0])
def test_the_distribution_that_is_read(error_bound: float, spread: float, tmp_path: Path) -> None:
    """Against float64: tokens and the ghost's mass are exact, all others within the bounds that are stated."""
    log_p = distribution(64, 500, spread=spread)
    top = top_of(log_p, 16)
    found = stored(tmp_path, manifest(error_bound=error_bound), top)
    (tokens, ours), (same, exact) = by_id(found), by_id(top)
    assert torch.equal(tokens, same)
    assert found.full
    torch.testing.assert_close(found.log_rest, top.log_rest.float(), rtol=1e-6, atol=1e-6)
    rest = found.log_rest.double()
    total = ours.exp().sum(-1) + rest.exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=2e-6)
    assert ((ours - exact).abs() <= 2 * error_bound + 1e-5 * (1 + exact.abs())).all()
    kl = (exact.exp() * (exact - ours)).sum(-1) + top.log_rest.exp() * (top.log_rest - rest)
    assert (kl <= error_bound**2 / 2 + 1e-6).all()
    # Pinsker: the gradient by the student's logits, q - p, is off by no more in sum
    assert ((ours.exp() - exact.exp()).abs().sum(-1) <= error_bound + 1e-5).all()


def test_the_loss_and_its_gradient(group: dist.ProcessGroup, tmp_path: Path) -> None:
    """Of the kernel, from what is read, against the same formula in float64 from what was written."""
    log_p, k, error_bound = distribution(64, 500, spread=3.0), 16, 0.125
    logits = 2 * torch.randn(64, 500, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    top = top_of(log_p, k)
    columns = Columns.of(500, 500, group)
    exact, gradient = top_k_kl(top, logits, columns)
    for name, made in {
        "all": manifest(error_bound=error_bound),
        "fewer": manifest(error_bound=error_bound, top_p=0.8),
    }.items():
        found = stored(tmp_path / name, made, top)
        expected, expected_gradient = exact, gradient
        if name == "fewer":
            assert not found.full
            expected, expected_gradient = top_k_kl(_reaching(top, 0.8), logits, columns)
        loss, ours = top_k_kl(found, logits, columns)
        # |d KL| <= sum |dp| max |log p/q|, and what normalising adds
        assert ((loss - expected).abs() <= error_bound * 8).all(), name
        assert (loss.mean() - expected.mean()).abs() <= 2e-3 * expected.mean(), name
        assert ((ours - expected_gradient).abs().sum(-1) <= error_bound + 1e-5).all(), name


def _reaching(top: TopTokens, top_p: float) -> TopTokens:
    """The likeliest tokens up to a probability, one position at a time in float64; the others join the ghost."""
    tokens, log_p, rest = top.tokens.clone(), top.log_probabilities.clone(), top.log_rest.exp()
    for row in range(len(tokens)):
        reached, kept = 0.0, 0
        while kept < tokens.shape[1] and reached < top_p:
            reached += math.exp(log_p[row, kept])
            kept += 1
        rest[row] += log_p[row, kept:].exp().sum()
        tokens[row, kept:], log_p[row, kept:] = -1, -torch.inf
    return TopTokens(tokens, log_p, rest.log(), full=False)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_top_p(top_p: float, spread: float, tmp_path: Path) -> None:
    """As few tokens as reach it, k at most; the others are in the ghost's mass."""
    top = top_of(distribution(64, 500, spread=spread), 16)
    expected = _reaching(top, top_p)
    found = stored(tmp_path, manifest(top_p=top_p), top)
    (tokens, log_p), (same, exact) = by_id(found), by_id(expected)
    assert torch.equal(tokens, same)
    assert found.full == bool((same >= 0).all())
    assert ((log_p - exact).abs()[same >= 0] <= 0.25).all()
    torch.testing.assert_close(found.log_rest.double(), expected.log_rest, rtol=1e-5, atol=1e-5)
    total = found.log_probabilities.double().exp().sum(-1) + found.log_rest.double().exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=2e-6)


@pytest.mark.parametrize("common", [None, CommonTokens(400), CommonTokens(500, tuple(range(0, 500, 3)))])
def test_fewer_tokens_are_the_likeliest(common: CommonTokens | None, tmp_path: Path) -> None:
    """As from a cache in float32: a token that is left out instead is no likelier by more than two steps."""
    top = top_of(distribution(64, 500, spread=3.0), 16)
    exact = decode_top(encode(manifest(values="float32", error_bound=None), top), k=5, common=common)
    made = manifest()
    made.write(tmp_path)
    write_shard(tmp_path, made, [(KEY, encode(made, top))])
    found = decode_top(LogitCache(tmp_path).read(KEY), k=5, common=common)
    ours, theirs = (t.log_probabilities.double().sort(-1, descending=True).values for t in (found, exact))
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    there = theirs.isfinite()
    assert ((ours - theirs)[there].abs() <= 0.3).all()
    assert (found.log_rest - exact.log_rest).abs().max() <= 0.3
    total = found.log_probabilities.double().exp().sum(-1) + found.log_rest.double().exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=2e-6)


def realistic(vocabulary: int, k: int, positions: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """``[n, k]`` likeliest tokens and their log-probabilities, with the statistics of SmolLM2-135M on prose.

    Zipf's law and normal noise, made sharper; the sizes of noise and sharpness are such that the entropy of the tokens
    (12.0 to 12.7 bits; SmolLM2's 12.0), the distance of the first from the last (7.2 nats; 7.1) and the least
    log-probability (-8.4; -8.2) come out. Only those above a threshold are drawn.
    """
    dice = np.random.default_rng(seed)
    prior = -np.log(np.arange(vocabulary) + 10.0)[dice.permutation(vocabulary)]

    def above(threshold: float) -> np.ndarray:
        return torch.special.ndtr(torch.from_numpy((prior - threshold) / 2.3)).numpy()

    low, high = prior.min(), prior.max() + 12.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle).sum() > 1.6 * k + 20 else (low, middle)
    chance = above(low)
    tokens = np.repeat(np.arange(vocabulary), dice.binomial(positions, chance))
    pairs = np.unique(tokens * positions + dice.integers(positions, size=len(tokens)))
    tokens, place = pairs // positions, pairs % positions
    noise = torch.special.ndtri(torch.from_numpy(1 - dice.random(len(tokens)) * chance[tokens])).numpy()
    logits = 1.6 * (prior[tokens] + 2.3 * noise)
    order = np.lexsort((-logits, place))
    first = np.searchsorted(place[order], np.arange(positions + 1))
    assert np.diff(first).min() >= k
    chosen = order[first[:-1, None] + np.arange(k)]
    log_p = torch.from_numpy(logits[chosen]).log_softmax(-1) + math.log(0.91)
    return torch.from_numpy(tokens[chosen]), log_p


@pytest.mark.parametrize(("vocabulary", "plain"), [(49_152, 396), (128_256, 524)])
def test_bytes_a_token(vocabulary: int, plain: float, tmp_path: Path) -> None:
    """At k = 128 no more than 200, the file with all that is in it; the estimate is within a tenth."""
    sequence, samples, k = 256, 32, 128
    tokens, log_p = realistic(vocabulary, k, sequence * samples)
    log_rest = torch.full((sequence,), math.log(0.09))
    made = manifest(vocab_size=vocabulary, k=k, sequence_length=sequence)
    rows = zip(tokens.split(sequence), log_p.split(sequence), strict=True)
    encoded = [encode(made, TopTokens(ids, values, log_rest)) for ids, values in rows]
    path = write_shard(tmp_path, made, [(bytes([number]) * 32, sample) for number, sample in enumerate(encoded)])
    size = path.stat().st_size / (sequence * samples)
    assert size <= 200
    assert size <= plain / 2
    assert made.bytes_per_token == pytest.approx(size, rel=0.1)
    assert Manifest(**{**dataclasses.asdict(made), "values": "int8"}).bytes_per_token > plain


def test_the_estimate_is_never_above_what_even_ids_take() -> None:
    for vocabulary in (2, 131, 49_152, 262_144):
        for k in (1, 4, 128):
            size = logits_bytes(vocabulary, min(k, vocabulary - 1), "compact", error_bound=0.125)
            assert 4 < size < 8 + k * (math.log2(vocabulary) + 12) / 8
    assert logits_bytes(49_152, 128, "compact", error_bound=1 / 64) > logits_bytes(
        49_152, 128, "compact", error_bound=0.125
    )


def test_a_cache_that_an_earlier_release_wrote(tmp_path: Path) -> None:
    """File by file as it was, made by hand: it opens, and gives its tokens."""
    (tmp_path / "manifest.json").write_text(
        '{"version": 1, "teacher": "a", "tokenizer": "b", "vocab_size": 70000, "sequence_length": 2, "k": 2, '
        '"values": "int8", "dtype": "float32", "temperature": 1.0, "bytes_per_token": 40.0}'
    )
    (key,) = sample_keys(torch.tensor([[3, 4]]), torch.zeros(1, 2))
    shard = {
        "keys": torch.tensor([list(key)], dtype=torch.uint8),
        "crc": torch.tensor([3197754809]),
        "tokens_low": torch.tensor([[[7, 9], [4465, 3]]], dtype=torch.uint16),
        "tokens_high": torch.tensor([[[0, 0], [1, 0]]], dtype=torch.uint8),
        "values": torch.tensor([[[255, 0], [255, 0]]], dtype=torch.uint8),
        "offset": torch.tensor([[-2.0, -3.0]]),
        "scale": torch.tensor([[1 / 255, 2 / 255]]),
        "log_rest": torch.tensor([[-1.0, -2.0]]),
    }
    save_file(shard, tmp_path / "shard-1.safetensors", metadata={"manifest": "f720edb218fa00ee"})
    top = decode_top(LogitCache(tmp_path).read(key))
    assert top.tokens.tolist() == [[7, 9], [70001, 3]]
    torch.testing.assert_close(
        top.log_probabilities.diff(dim=-1)[:, 0], torch.tensor([-1.0, -2.0]), rtol=1e-6, atol=1e-6
    )


@pytest.fixture(scope="module")
def packed() -> tuple[bytes, TokenOrder]:
    tokens, log_p = realistic(5000, 20, 32)
    ids = tokens.numpy().astype(np.int32)
    order = TokenOrder.of([ids], 5000)
    return pack(ids, log_p.float().numpy(), order.ranks(), Grid(1 / 32)), order


def test_zlib_reads_what_isal_reads(packed: tuple[bytes, TokenOrder], monkeypatch: pytest.MonkeyPatch) -> None:
    """The package isal is optional."""
    content = np.frombuffer(packed[0], np.uint8)

    def read() -> tuple[Any, Any]:
        return unpack(content, packed[1], Grid(1 / 32), positions=32, k=20)

    first = read()
    monkeypatch.setattr(packing, "inflating", zlib)
    for ours, theirs in zip(read(), first, strict=True):
        assert (ours == theirs).all()
    with pytest.raises(ValueError, match="cannot be inflated"):
        packing._inflated(b"\xff" * 9, 20)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_other_bytes_are_refused_or_do_no_harm(packed: tuple[bytes, TokenOrder], data: st.DataObject) -> None:
    """Their checksum is checked first; whoever made one for other bytes gets a ValueError, or tokens in range."""
    content = bytearray(packed[0])
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    try:
        tokens, values = unpack(np.frombuffer(bytes(content), np.uint8), packed[1], Grid(1 / 32), positions=32, k=20)
    except ValueError:
        return
    assert tokens.shape == values.shape == (32, 20)
    assert ((tokens >= -1) & (tokens < 5000)).all()


def test_a_shard_whose_content_is_no_sample(tmp_path: Path) -> None:
    """With checksums that hold: one line, with the place and the remedy."""
    made = manifest()
    made.write(tmp_path)
    path = write_shard(tmp_path, made, [(KEY, encode(made, top_of(distribution(64, 500, spread=2.0), 16)))])
    tensors = load_file(path)
    tensors["packed"] = tensors["packed"][:50].clone()
    tensors["ends"] = torch.tensor([50])
    crc = zlib.crc32(KEY)
    for name in ("log_rest", "order", "packed"):
        crc = zlib.crc32((tensors[name][0] if name == "log_rest" else tensors[name]).numpy().tobytes(), crc)
    tensors["crc"] = torch.tensor([crc])
    save_file(tensors, path, metadata={"manifest": made.digest})
    with pytest.raises(DataError, match=r"shard-\w+\.safetensors: sample 0 cannot be unpacked \(.*\); run `minitron"):
        LogitCache(tmp_path).read(KEY)
    save_file(tensors | {"ends": torch.tensor([51])}, path, metadata={"manifest": made.digest})
    with pytest.raises(DataError, match="the ends of its samples do not fit its size"):
        LogitCache(tmp_path)
    with pytest.raises(DataError, match="has no sample"):
        LogitCache(tmp_path, repair=True).read(KEY)


def config(**changes: Any) -> CacheConfig:
    return CacheConfig(**{"teacher": "t", "output": "o", "values": "compact", **changes})


def test_settings_of_the_compact_form() -> None:
    assert config(top_p=0.99, error_bound=0.01).faults() == []
    assert CacheConfig(teacher="t", output="o").faults() == []
    for changes, fault in {
        "k": ({"k": None}, "values=compact: codes the likeliest tokens alone"),
        "top_p": ({"top_p": 1.0}, "top_p=1.0: must be between 0 and 1"),
        "error_bound": ({"error_bound": 2.0}, "error_bound=2.0: must be from 0.0009765625 to 1.0 nats"),
        "plain top_p": ({"values": "int8", "top_p": 0.9}, "top_p=0.9: belongs to values=compact"),
        "plain error_bound": ({"values": "int8", "error_bound": 0.1}, "error_bound=0.1: belongs to values=compact"),
    }.values():
        (found,) = config(**changes).faults()
        assert fault in found


def test_identities_of_earlier_caches_stay() -> None:
    """Neither new setting is hashed at its default, and caches that were made without them keep their form."""
    plain = hashed_settings(CacheConfig(teacher="t", output="o"))
    assert not {"top_p", "error_bound"} & set(plain)
    assert plain["values"] == "float16"
    assert hashed_settings(config(error_bound=0.25)) == plain | {"values": "compact", "error_bound": 0.25}


def test_the_plan_says_that_it_is_an_estimate(tmp_path: Path) -> None:
    write_checkpoint(open_checkpoint(tiny_checkpoint(tmp_path / "source")), tmp_path / "teacher", "hf")
    text = write_jsonl(tmp_path / "text.jsonl", sentences(40, 30, 0))
    data = DataConfig(sources=[SourceConfig(name="text", path=str(text))], sequence_length=16)
    made = config(teacher=str(tmp_path / "teacher"), data=data, k=8)
    plan = cache.plan(made)
    size = logits_bytes(131, 8, "compact", error_bound=0.125) * made.tokens
    assert plan.costs["size on disk"].startswith("about ")
    (need,) = (need for need in plan.disk if need.what == "logits")
    assert (need.bytes, need.certain) == (size, size / 2)
    plan = cache.plan(dataclasses.replace(made, top_p=0.9))
    assert plan.costs["size on disk"].startswith("at most about ")
    (need,) = (need for need in plan.disk if need.what == "logits")
    assert (need.bytes, need.certain) == (size, 0.0)
