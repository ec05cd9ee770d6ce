"""Reads on a thread: their order, how many there are, errors, the end; and the teacher that reads a cache so."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_minitron.config import LossConfig
from nemo_minitron.distillation.losses.kernels import TopTokens
from nemo_minitron.distillation.teachers.cached import CachedTeacher
from nemo_minitron.distillation.teachers.logit_cache import (
    LogitCache,
    Manifest,
    decode_top,
    encode,
    sample_keys,
    write_shard,
)
from nemo_minitron.distillation.teachers.read_ahead import ReadAhead
from nemo_minitron.errors import DataError

SEQUENCE, VOCABULARY = 6, 50


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@given(st.integers(1, 5), st.lists(st.integers(0, 6), min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_reads_are_done_in_order_and_a_few_ahead(ahead: int, steps: list[int]) -> None:
    """Of several steps, one after another."""
    reads: ReadAhead[int] = ReadAhead(ahead)
    done: list[int] = []
    most: list[int] = []
    asked = 0

    def read(number: int) -> int:
        assert threading.current_thread() in threads()
        done.append(number)
        most.append(len(done) - asked)
        return number * number

    try:
        for step, count in enumerate(steps):
            numbers = range(10 * step, 10 * step + count)
            done.clear()
            asked = 0
            pending = reads.begin([lambda number=number: read(number) for number in numbers])  # type: ignore[misc]
            for asked, entry in enumerate(pending, 1):
                assert entry.result() == numbers[asked - 1] ** 2
            assert done == list(numbers)
        assert max(most, default=0) <= ahead
        assert len(threads()) == (1 if any(steps) else 0)
    finally:
        reads.close()
    assert threads() == []


@given(st.permutations(range(6)))
@settings(deadline=None, max_examples=30)
def test_results_do_not_depend_on_the_order_they_are_asked_in(order: list[int]) -> None:
    reads: ReadAhead[int] = ReadAhead(2)
    pending = reads.begin([lambda number=number: -number for number in range(6)])  # type: ignore[misc]
    assert [pending[number].result() for number in order] == [-number for number in order]
    assert [entry.result() for entry in pending] == [-number for number in range(6)]  # read again
    reads.close()


def test_an_error_is_raised_where_the_result_is_asked_for() -> None:
    def fail() -> int:
        raise DataError("this sample is damaged")

    reads: ReadAhead[int] = ReadAhead()
    pending = reads.begin([lambda: 0, fail, lambda: 2])
    assert (pending[0].result(), pending[2].result()) == (0, 2)
    for _ in range(2):
        with pytest.raises(DataError, match="this sample is damaged"):
            pending[1].result()
    reads.close()


def test_closing_drops_what_waits_and_ends_the_thread() -> None:
    reads: ReadAhead[int] = ReadAhead(3)
    working, may_end, done = threading.Event(), threading.Event(), []

    def read() -> int:
        working.set()
        assert may_end.wait(20)
        done.append(1)
        return 1

    reads.begin([read, read, read])
    assert working.wait(20)
    threading.Timer(0.05, may_end.set).start()
    reads.close()
    assert done == [1]
    assert threads() == []
    with pytest.raises(RuntimeError, match="closed"):
        reads.begin([read])
    reads.close()


def test_there_is_no_thread_before_the_first_read() -> None:
    reads: ReadAhead[int] = ReadAhead()
    assert reads.begin([]) == []
    assert threads() == []
    reads.close()


def test_a_teacher_reads_its_cache_ahead(tmp_path: Path) -> None:
    """Its micro-batches are those of the samples; a damaged one is refused at its loss, the others are not."""
    from support.pruning import one_process

    manifest = Manifest("m", "t", VOCABULARY, SEQUENCE, 8, "compact", "float32", error_bound=0.125)
    manifest.write(tmp_path)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (5, 2, SEQUENCE), generator=generator)
    samples = []
    for sample in tokens.flatten(0, 1):
        best = torch.randn(SEQUENCE, VOCABULARY, generator=generator).log_softmax(-1).topk(8, -1)
        rest = torch.log(-torch.expm1(best.values.logsumexp(-1)))
        samples += [
            (*sample_keys(sample[None], 0 * sample[None]), encode(manifest, TopTokens(best.indices, best.values, rest)))
        ]
    paths = [write_shard(tmp_path, manifest, samples[first : first + 2]) for first in range(0, 10, 2)]
    cache = LogitCache(tmp_path)
    read = [cache.read(key) for key, _ in samples]
    expected = [
        decode_top({name: torch.stack([read[n][name], read[n + 1][name]], 1) for name in read[n]}, k=8)
        for n in range(0, 10, 2)
    ]
    batches = [{"tokens": ids, "position_ids": torch.arange(SEQUENCE).expand(2, -1)} for ids in tokens]

    content = bytearray(paths[3].read_bytes())
    content[-3] ^= 8
    paths[3].write_bytes(content)
    with one_process() as groups:
        teacher = CachedTeacher(LogitCache(tmp_path), groups, LossConfig("top_k", k=8))
        assert threads() == []
        for _ in range(2):
            for place, kept in enumerate(teacher.run(batches)):
                if place == 3:
                    with pytest.raises(DataError, match=f"{paths[3].name}: sample . does not have the checksum"):
                        teacher.logits(kept)
                    continue
                found = teacher.logits(kept)
                assert isinstance(found, TopTokens)
                assert torch.equal(found.tokens, expected[place].tokens)
                assert torch.equal(found.log_probabilities, expected[place].log_probabilities)
                assert torch.equal(found.log_rest, expected[place].log_rest)
        assert len(threads()) == 1
        teacher.close()
    assert threads() == []
