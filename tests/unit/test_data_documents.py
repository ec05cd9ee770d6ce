"""Blocks of several documents: masks, positions, labels that count; and models that keep to them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.pruning import SHAPE, live, one_process, random_checkpoint

from nemo_minitron.data.blocks import Blocks
from nemo_minitron.errors import DataError
from nemo_minitron.runtime.masks import attention_mask, counted_labels, document_positions, documents_masked

# Two blocks of 11 + 1: of three documents with filling, and of two.
SEGMENTS = torch.tensor([[0] * 4 + [1] * 4 + [2] * 2 + [-1] * 2, [0] * 7 + [1] * 5], dtype=torch.int32)


@pytest.fixture(scope="module")
def groups() -> Iterator[object]:
    with one_process() as found:
        yield found


def blocks(segments: torch.Tensor = SEGMENTS, **changes: object) -> Blocks:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, SHAPE.vocab_size, segments.shape, generator=generator)
    return Blocks(ids, torch.tensor([0, 1]), ("a", "b"), segments, **changes)


def documents(block: Blocks) -> list[torch.Tensor]:
    """The documents of all blocks, one by one."""
    return [
        row[numbers == number]
        for row, numbers in zip(block.tokens, block.segments, strict=True)
        for number in numbers.unique().tolist()
        if number >= 0
    ]


def test_masks_positions_and_labels() -> None:
    segments = SEGMENTS[:1]
    mask = attention_mask(segments)
    assert mask.shape == (1, 1, 12, 12)
    for i in range(12):
        for j in range(12):
            assert bool(mask[0, 0, i, j]) == (j > i or segments[0, i] != segments[0, j])
    assert document_positions(segments).tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 0, 1]]
    assert counted_labels(segments).int().tolist() == [[1, 1, 1, 0, 1, 1, 1, 0, 1, 0, 0]]


def test_blocks_are_indexed_joined_and_measured() -> None:
    whole = blocks(loss_mask=torch.arange(22).view(2, 11) % 2 == 0)
    assert [len(whole), whole.sequence_length, len(whole[1]), len(whole[-1:]), len(whole[torch.tensor([1, 0, 1])])] == [
        2, 11, 1, 1, 3,
    ]  # fmt: skip
    assert [len(one) for one in whole] == [1, 1]
    counted = counted_labels(SEGMENTS) & whole.loss_mask
    assert torch.equal(whole.counted(), counted)
    assert whole.labels == int(counted.sum())
    assert len(whole.text()) == 21
    plain = Blocks.of(whole.tokens)
    assert (plain.counted(), plain.labels) == (None, 22)
    assert Blocks.of(whole) is whole
    joined = Blocks.cat([whole[:1], plain, whole[1:]])
    assert joined.domains == ("a", "b", "")
    assert joined.domain.tolist() == [0, 2, 2, 1]
    assert torch.equal(joined[torch.tensor([0, 3])].counted(), counted)
    assert bool(joined[1:3].counted().all())
    assert {name: len(part) for name, part in joined.by_domain().items()} == {"a": 1, "b": 1, "": 2}
    contents = {part.content() for part in (whole, plain, whole[:1], blocks(), blocks(SEGMENTS.clamp(max=0)))}
    assert len(contents) == 5


@pytest.mark.slow  # imports NeMo
def test_a_block_without_a_label_is_refused() -> None:
    from nemo_minitron.distillation.training.blocks_module import BlockDataset

    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(DataError, match=r"1 of 2 blocks \(the first is block 1\) have no label that counts"):
        BlockDataset(blocks(loss_mask=mask))
    with pytest.raises(DataError, match="2 of 2 blocks"):
        blocks(torch.arange(12, dtype=torch.int32).expand(2, 12)).check_labels("data")


@pytest.mark.slow
def test_samples_of_packed_blocks() -> None:
    from nemo_minitron.distillation.training.blocks_module import BlockDataset

    whole = blocks(loss_mask=torch.arange(22).view(2, 11) % 3 > 0)
    dataset = BlockDataset(whole, 5)
    sample = dataset[1]
    assert torch.equal(sample["attention_mask"], attention_mask(SEGMENTS[1, :-1]))
    assert torch.equal(sample["position_ids"], document_positions(SEGMENTS[1, :-1]))
    assert torch.equal(sample["loss_mask"], whole.counted()[1].float())
    plain = BlockDataset(whole.tokens)[0]
    assert plain["attention_mask"].shape == (1, 11, 11)
    assert (plain["loss_mask"].sum(), plain["position_ids"].tolist()) == (11, list(range(11)))
    assert {key: value.shape for key, value in plain.items()} == {key: value.shape for key, value in sample.items()}


@torch.no_grad()
def test_a_packed_block_is_its_documents_each_alone(groups) -> None:
    """Logits of Megatron's model; without the mask they differ, so that the test can fail."""
    (model,) = chunks = live(random_checkpoint(), groups)
    whole = blocks()
    inputs = whole.tokens[:, :-1]
    segments = SEGMENTS[:, :-1]

    def run(ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return model(ids, positions, mask)

    with documents_masked(chunks):
        packed = run(inputs, document_positions(segments), attention_mask(segments))
    joined = run(inputs, torch.arange(11).expand(2, 11), None)
    worst = 0.0
    for row in range(2):
        for number in range(int(segments[row].max()) + 1):
            mine = segments[row] == number
            ids = inputs[row, mine][None]
            alone = run(ids, torch.arange(ids.shape[1])[None], None)
            torch.testing.assert_close(packed[row, mine], alone[0], rtol=1e-5, atol=1e-5)
            worst = max(worst, float((joined[row, mine] - alone[0]).abs().max()))
    assert worst > 1e-2


def test_losses_and_scores_keep_to_the_documents(groups) -> None:
    """Held-out loss, loss without layers and scores of packed blocks, against the documents one by one."""
    from nemo_minitron.evaluation import held_out_loss
    from nemo_minitron.importance import layer_importance, score_criteria
    from nemo_minitron.runtime.forward import block_losses

    chunks, whole = live(random_checkpoint(), groups), blocks()
    alone = [
        (block_losses(chunks, groups, one[None], 1, vocab_size=SHAPE.vocab_size), len(one) - 1)
        for one in documents(whole)
    ]
    expected = float(sum(loss * count for loss, count in alone)) / sum(count for _, count in alone)
    found = held_out_loss(chunks, groups, whole, 2, vocab_size=SHAPE.vocab_size)
    assert found.overall.loss == pytest.approx(expected, abs=1e-5)
    assert found.overall.tokens == sum(count for _, count in alone) == whole.labels
    by_domain = held_out_loss(chunks, groups, whole.by_domain(), 1, vocab_size=SHAPE.vocab_size)
    assert by_domain.overall.loss == pytest.approx(expected, abs=1e-5)
    assert {name: mean.tokens for name, mean in by_domain.domains.items()} == {"a": 7, "b": 10}
    depth = layer_importance(chunks, whole, groups, shape=SHAPE, micro_batch_size=2)
    assert depth.measured[()].loss == pytest.approx(expected, abs=1e-5)
    assert depth.tokens == whole.labels

    # Scores: a sample is a block, so compare by sums, which do not mind how documents are dealt to blocks.
    with pytest.raises(DataError, match="filled up"):
        score_criteria(chunks, whole, groups, criteria=[("l1", "l1")], shape=SHAPE)
    full = whole[1]
    options = {"criteria": [("l1", "l1")], "shape": SHAPE}
    (packed,) = score_criteria(chunks, full, groups, **options)
    # the last label of the block is no input: leave it out of the documents too
    parts = [
        score_criteria(chunks, one[None], groups, **options)[0] for one in (full.tokens[0, :8], full.tokens[0, 7:12])
    ]
    for name in ("ffn", "heads", "hidden"):
        torch.testing.assert_close(
            getattr(packed, name), sum(getattr(part, name) for part in parts), rtol=1e-5, atol=1e-5
        )
    taylor = {"criteria": [("sum", "l1")], "shape": SHAPE, "estimator": "taylor"}
    (packed,) = score_criteria(chunks, full, groups, **taylor)
    masked = Blocks.of(full.tokens[:, :7])
    (first,) = score_criteria(chunks, masked, groups, **taylor)
    assert not torch.allclose(packed.ffn, first.ffn)
    learned = full.counted() & (torch.arange(11) < 6)  # the labels of the first document alone
    only = Blocks(full.tokens, full.domain, full.domains, full.segments, learned)
    (packed,) = score_criteria(chunks, only, groups, **taylor)
    torch.testing.assert_close(packed.ffn, first.ffn, rtol=1e-4, atol=1e-7)
