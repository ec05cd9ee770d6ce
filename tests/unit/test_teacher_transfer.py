"""Who sends what: every rank of the student gets all that it needs, once, and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from nemo_minitron.distillation.teachers.documents import block_starts, model_inputs, starts_of_positions
from nemo_minitron.distillation.teachers.placement import Transfer, deliver
from nemo_minitron.runtime.groups import ParallelLayout
from nemo_minitron.shape import ModelShape, padded_vocab

SEQUENCE, ROWS = 12, 2
LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tensor=2),
    ParallelLayout(tensor=3, data=2),
    ParallelLayout(tensor=2, pipeline=2, data=3),
    ParallelLayout(tensor=4, sequence_parallel=True),
    ParallelLayout(tensor=2, pipeline=3, sequence_parallel=True),
]


def shape(vocabulary: int, hidden: int = 8) -> ModelShape:
    return ModelShape(
        num_layers=6, hidden_size=hidden, ffn_hidden_size=24, num_attention_heads=12, num_query_groups=12,
        head_dim=2, vocab_size=vocabulary,
    )  # fmt: skip


class Post:
    """Carries the messages of ranks that run one after the other in this process."""

    def __init__(self) -> None:
        self.boxes: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.here = 0

    def exchange(self, sends: list[tuple[torch.Tensor, int]], receives: list[tuple[torch.Tensor, int]]) -> None:
        for tensor, rank in sends:
            self.boxes.setdefault((self.here, rank), []).append(tensor.clone())
        for tensor, rank in receives:
            tensor.copy_(self.boxes[rank, self.here].pop(0))


@pytest.mark.parametrize("teacher", LAYOUTS, ids=str)
@pytest.mark.parametrize("student", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("vocabulary", "student_rows", "hidden"),
    [(5, None, 8), (300, None, 8), (300, 420, 400), (420, 300, 500), (300, 310, 400)],
    ids=["logits", "hidden", "more rows", "fewer rows", "a few more"],
)
def test_every_rank_gets_its_part(
    vocabulary: int, student_rows: int | None, hidden: int, student: ParallelLayout, teacher: ParallelLayout
) -> None:
    """Ranks of its own: delivered tensors equal the parts of whole ones, in the student's partition."""
    transfer = Transfer(shape(vocabulary, hidden), student, teacher, student_rows)
    rows = student_rows or vocabulary
    copies = 1 if student.sequence_parallel else student.tensor
    assert transfer.hidden is (hidden * copies <= vocabulary)
    micro_batches = 3
    count = micro_batches * student.data
    width = hidden if transfer.hidden else padded_vocab(vocabulary, tensor=1)
    whole = torch.randn(count, SEQUENCE, ROWS, width)

    def part(extent: Any, size: int, layout: ParallelLayout, tensor: int, number: int) -> torch.Tensor:
        first, last = extent(tensor, SEQUENCE)
        if transfer.hidden:
            return whole[number, first:last]
        columns = padded_vocab(size, tensor=layout.tensor) // layout.tensor
        found = torch.zeros(SEQUENCE, ROWS, columns)
        found[..., : last - first] = whole[number, ..., first:last]
        return found

    post, run = Post(), Counter()
    arguments = {
        "micro_batches": micro_batches, "micro_batch_size": ROWS, "sequence": SEQUENCE, "like": torch.empty(0),
    }  # fmt: skip
    for data in range(teacher.data):
        numbers = transfer.replica(data, count)
        run.update(numbers)
        for tensor in range(teacher.tensor):
            post.here = teacher.rank(tensor=tensor, data=data, pipeline=teacher.pipeline - 1)
            results = {number: part(transfer.held, vocabulary, teacher, tensor, number) for number in numbers}
            deliver(transfer, post, results, teacher_rank=post.here, student_rank=None, **arguments)
    assert run == Counter(range(count))
    for data in range(student.data):
        for tensor in range(student.tensor):
            post.here = student.rank(tensor=tensor, data=data, pipeline=student.pipeline - 1)
            found = deliver(transfer, post, {}, teacher_rank=None, student_rank=post.here, **arguments)
            assert len(found) == micro_batches
            for index, one in enumerate(found):
                expected = part(transfer.needed, rows, student, tensor, data * micro_batches + index)
                assert torch.equal(one, expected)
    if not transfer.hidden:
        needed = {c for rank in range(student.tensor) for c in range(*transfer.needed(rank, SEQUENCE))}
        assert needed == set(range(min(rows, vocabulary)))
    assert not any(post.boxes.values())


def test_ranks_are_numbered_as_megatron_does() -> None:
    layout = ParallelLayout(tensor=2, pipeline=2, data=3)
    places = [(p, d, t) for p in range(2) for d in range(3) for t in range(2)]
    assert [layout.rank(tensor=t, data=d, pipeline=p) for p, d, t in places] == list(range(12))


def test_documents_survive_the_way() -> None:
    """Blocks -> starts -> a batch -> starts, and the mask that the blocks' own segments give."""
    from nemo_minitron.data.blocks import Blocks
    from nemo_minitron.runtime.masks import attention_mask

    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0, 0, 1, 1, -1, -1, -1]], dtype=torch.int32)
    blocks = Blocks(torch.arange(14).view(2, 7), torch.zeros(2, dtype=torch.int64), ("",), segments)
    tokens, starts = block_starts(blocks)
    assert starts.tolist() == [[0, 0, 0, 3, 3, 3], [0, 0, 2, 2, 4, 4]]
    batch = model_inputs(tokens, starts)
    assert torch.equal(batch["attention_mask"], attention_mask(segments[:, :-1]))
    assert torch.equal(starts_of_positions(batch["position_ids"]), starts)
    plain, none = block_starts(blocks.tokens)
    assert torch.equal(plain, tokens)
    assert model_inputs(plain, none)["attention_mask"].shape == (1, 1, 6, 6)
