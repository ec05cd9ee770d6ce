"""Conversations as batches and pairs, schedules, and the tokenizer that an aligned model carries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.chats import chat_tokenizer, chats

from nemo_minitron.alignment.batches import Sample, collate, pack
from nemo_minitron.alignment.export import templated_tokenizer
from nemo_minitron.alignment.pairs import IGNORED, Pair, Pairs
from nemo_minitron.alignment.settings import total_steps, validation_batch, vocabulary_rows
from nemo_minitron.config import AlignmentSchedule
from nemo_minitron.data.chat.conversations import parse_chat
from nemo_minitron.data.chat.templates import TEMPLATES, choose_template, render
from nemo_minitron.errors import DataError


def sample(*ids: int, trained: int = 2) -> Sample:
    """The last ``trained`` tokens are answers."""
    return Sample(list(ids), [number >= len(ids) - trained for number in range(len(ids))], (len(ids),))


def test_a_batch_shifts_labels_and_masks_the_rest() -> None:
    batch = collate(4, masked=False)([sample(5, 6, 7, 8, 9), sample(1, 2, 3)])
    assert batch["tokens"].tolist() == [[5, 6, 7, 8], [1, 2, 0, 0]]
    assert batch["labels"].tolist() == [[6, 7, 8, 9], [2, 3, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3]
    assert "attention_mask" not in batch


def test_packed_conversations_do_not_see_each_other_nor_predict_each_other() -> None:
    (row,) = pack([sample(1, 2, 3), sample(5, 6, 7, 8)], 8)
    assert row.lengths == (4, 3)
    batch = collate(8, masked=True)([row])
    assert batch["tokens"][0].tolist() == [5, 6, 7, 1, 2, 0, 0, 0]
    assert batch["labels"][0].tolist() == [6, 7, 8, 2, 3, 0, 0, 0]
    assert batch["loss_mask"][0].tolist() == [0, 1, 1, 1, 1, 0, 0, 0]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    seen = ~batch["attention_mask"][0, 0]
    assert seen[:3, :3].equal(torch.ones(3, 3, dtype=torch.bool).tril())
    assert seen[3:5, 3:5].equal(torch.ones(2, 2, dtype=torch.bool).tril())
    assert not seen[3:5, :3].any()
    assert seen.any(-1).all(), "a row of nothing would be a softmax of nothing"


def test_packing_loses_nothing_and_overfills_no_row() -> None:
    lengths = [3, 9, 5, 5, 2, 7, 4, 9, 3]
    samples = [sample(*range(start, start + length)) for start, length in zip(range(0, 900, 100), lengths, strict=True)]
    rows = pack(samples, 8)
    assert sorted(token for row in rows for token in row.ids) == sorted(token for one in samples for token in one.ids)
    assert all(len(row.ids) - len(row.lengths) <= 8 for row in rows)
    assert len(rows) == 5, "38 inputs in rows of 8"
    assert pack(samples, 8) == rows


def test_a_pair_is_padded_to_its_longer_answer() -> None:
    item = Pairs([Pair(sample(1, 2, 3, 4), sample(1, 2, 9, trained=1), 1.0, -0.5)])[0]
    assert item["chosen"].tolist() == [1, 2, 3]
    assert item["chosen_labels"].tolist() == [IGNORED, 3, 4]
    assert item["rejected"].tolist() == [1, 2, 0]
    assert item["rejected_labels"].tolist() == [IGNORED, 9, IGNORED]
    assert (item["chosen_length"], item["rejected_length"]) == (3, 2)
    assert (item["chosen_reward"], item["rejected_reward"]) == (1.0, -0.5)


def test_steps_and_batches_of_a_schedule() -> None:
    schedule = AlignmentSchedule(epochs=3, global_batch_size=8, micro_batch_size=2, warmup_steps=2)
    assert total_steps(schedule, 30) == 9
    with pytest.raises(DataError, match="7 training samples do not fill one global batch of 8"):
        total_steps(schedule, 7)
    with pytest.raises(DataError, match="warmup_steps=2 leaves nothing of the 2 steps"):
        total_steps(AlignmentSchedule(steps=2, global_batch_size=8, warmup_steps=2), 30)
    # All of them if that can be, in large batches; never more than in training.
    assert validation_batch(schedule, 12, 1) == 6
    assert validation_batch(schedule, 16, 2) == 8
    assert validation_batch(schedule, 13, 1) == 6
    with pytest.raises(DataError, match="3 held-out samples do not fill one micro-batch of 2 on 2"):
        validation_batch(schedule, 3, 2)
    assert [vocabulary_rows(129, tensor) for tensor in (1, 2, 4, 3)] == [256, 256, 256, 384]


@pytest.mark.parametrize("name", [*TEMPLATES])
def test_the_exported_tokenizer_says_what_training_read(name: str, tmp_path: Path) -> None:
    """Loaded anew by transformers, without being told of the template."""
    from transformers import AutoTokenizer

    chat_tokenizer(tmp_path / "before")
    before = AutoTokenizer.from_pretrained(tmp_path / "before")
    template = choose_template(before, name)
    after = AutoTokenizer.from_pretrained(templated_tokenizer(tmp_path / "before", template, tmp_path / "after"))
    for row in chats(4):
        ids, answers = render(parse_chat(row), before, template)
        assert after.apply_chat_template(row["messages"]) == ids
        assert any(answers)
        last = max(index for index, answer in enumerate(answers) if answer)
        assert ids[last] == after.eos_token_id, "generation must stop where an answer ends"
    assert json.loads((tmp_path / "before" / "tokenizer_config.json").read_text()).get("chat_template") is None


@pytest.mark.parametrize("name", ["own", "own:rag", "chatml"])
def test_the_exported_tokenizer_keeps_its_other_templates(name: str, tmp_path: Path) -> None:
    """Unless the training's is none of them; what was trained with is the default."""
    from transformers import AutoTokenizer

    chat_tokenizer(tmp_path / "before")
    before = AutoTokenizer.from_pretrained(tmp_path / "before")
    named = {"default": "D {{ messages[0]['content'] }}", "rag": "R {{ messages[0]['content'] }}", "tool_use": "T"}
    before.chat_template = named
    before.save_pretrained(tmp_path / "before")
    template = choose_template(before, name)
    after = AutoTokenizer.from_pretrained(templated_tokenizer(tmp_path / "before", template, tmp_path / "after"))
    if name == "chatml":
        assert after.chat_template == template.jinja
    else:
        assert after.chat_template == named | {"default": template.jinja}
