"""What ``sft`` and ``dpo`` refuse before anything is trained, and what they plan."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from support.chats import SPECIAL, chat_checkpoint, chat_tokenizer, chats, preferences, write_jsonl

from nemo_minitron.alignment.settings import check_model
from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.config import ChatDataConfig, DpoConfig, ParallelLayout, SftConfig
from nemo_minitron.errors import CheckpointError, ConfigError, DataError, ShapeError
from nemo_minitron.stages import dpo, sft
from nemo_minitron.stages.shared.chats import load_chats, load_preferences, shorter, tokens_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(chat_checkpoint(tmp_path_factory.mktemp("model")))


def test_bad_lines_are_all_named(tmp_path: Path) -> None:
    good = json.dumps(chats(1)[0])
    lines = [
        good,
        "{oops",
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}),
        json.dumps({"messages": [{"role": "robot", "content": "a"}]}),
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as found:
        load_chats(ChatDataConfig(path=str(path)))
    text = str(found.value)
    assert "3 bad lines" in text
    assert "line 2: not JSON" in text
    assert "line 3: message 2: its answer is empty" in text
    assert "line 4: message 1: unknown role 'robot'" in text
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [*preferences(1), {"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(DataError, match="line 2: chosen and rejected are the same"):
        load_preferences(ChatDataConfig(path=str(pairs)))


def test_splits(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "chats.jsonl", chats(20))
    train, held_out = load_chats(ChatDataConfig(path=str(path), held_out_fraction=0.25))
    assert (len(train), len(held_out)) == (15, 5)
    other = write_jsonl(tmp_path / "other.jsonl", chats(3))
    train, held_out = load_chats(ChatDataConfig(path=str(path), validation=str(other)))
    assert (len(train), len(held_out)) == (20, 3)
    one = write_jsonl(tmp_path / "one.jsonl", chats(1))
    with pytest.raises(DataError, match="1 samples leave none to validate on"):
        load_chats(ChatDataConfig(path=str(one)))


def test_templates_and_tokens_that_the_model_lacks(checkpoint: Checkpoint, tmp_path: Path) -> None:
    rows, _ = load_chats(ChatDataConfig(path=str(write_jsonl(tmp_path / "chats.jsonl", chats(6)))))
    plain = tmp_path / "plain"
    chat_tokenizer(plain, special=("<|endoftext|>", *SPECIAL[7:]))
    without = dataclasses.replace(checkpoint, tokenizer=plain)
    with pytest.raises(DataError, match=r"template=chatml: .*no special token <\|im_start\|>, <\|im_end\|>"):
        tokens_of(rows, without, ChatDataConfig(template="chatml"))
    with pytest.raises(DataError, match="carries no chat template"):
        tokens_of(rows, without, ChatDataConfig(template="own"))
    small = dataclasses.replace(checkpoint, shape=checkpoint.shape.replace(vocab_size=5))
    with pytest.raises(DataError, match="the model's vocabulary only 5 entries"):
        tokens_of(rows, small, ChatDataConfig(template="nemotron"))
    done, template = tokens_of(rows, checkpoint, ChatDataConfig(template="llama3"))
    assert template.name == "llama3"
    assert [chat for chat, _ in done] == rows
    assert all(sample.lengths == (len(sample.ids),) and any(sample.trained) for _, (sample,) in done)


def test_long_samples_are_refused_by_line_or_left_out() -> None:
    items, where = ["a", "b", "c"], ["x.jsonl, line 1", "x.jsonl, line 2", "x.jsonl, line 3"]
    data = ChatDataConfig(max_length=8)
    with pytest.raises(DataError, match=r"2 of 3 samples .*max_length=8 (?s:.*)line 2: 10 tokens\n  x.jsonl, line 3"):
        shorter(items, [9, 10, 30], where, data)
    drop = dataclasses.replace(data, long="drop")
    assert shorter(items, [9, 10, 30], where, drop) == ["a"]
    with pytest.raises(DataError, match="all 3 samples are longer"):
        shorter(items, [10, 10, 30], where, drop)


def test_models_that_aligner_cannot_hold(checkpoint: Checkpoint) -> None:
    check_model(checkpoint, ParallelLayout(tensor=2, pipeline=2), max_length=256)
    mixture = dataclasses.replace(
        checkpoint, architecture=dataclasses.replace(checkpoint.architecture, family="mixtral")
    )
    with pytest.raises(CheckpointError, match="trains llama, qwen2, nemotron models, this is a mixtral model"):
        check_model(mixture, ParallelLayout(), max_length=256)
    with pytest.raises(CheckpointError, match="carries no tokenizer"):
        check_model(dataclasses.replace(checkpoint, tokenizer=None), ParallelLayout(), max_length=256)
    with pytest.raises(ConfigError, match=r"max_length=257: .* context of 256 tokens"):
        check_model(checkpoint, ParallelLayout(), max_length=257)
    with pytest.raises(ShapeError, match="tensor"):
        check_model(checkpoint, ParallelLayout(tensor=3), max_length=256)
    deep = dataclasses.replace(checkpoint, shape=checkpoint.shape.replace(num_layers=6))
    with pytest.raises(ShapeError, match=r"6 layers make stages of \[2, 2, 1, 1\]"):
        check_model(deep, ParallelLayout(pipeline=4), max_length=256)


def test_all_faults_of_a_configuration() -> None:
    layout = ParallelLayout(pipeline=2, virtual_pipeline=2)
    config = DpoConfig(
        loss="kto", beta=0.0, global_batch_size=3, micro_batch_size=2, lr=1e-6, min_lr=1e-5, save_every=10,
        validate_every=4, preference_loss_weight=0.0, formats=["onnx"], parallel=layout, rounds=2, rounds_data=["a"],
        chosen_reward=-1.0,
    )  # fmt: skip
    found = "\n".join(config.faults())
    for fault in (
        "loss=kto", "beta=0.0", "global_batch_size=3", "min_lr=1e-05", "save_every=10", "loss is left", "'onnx'",
        "virtual_pipeline=2", "rounds_data: names 1 files for rounds=2", "chosen_reward=-1.0",
    ):  # fmt: skip
        assert fault in found
    assert SftConfig().faults() == []
    assert DpoConfig(reference="other", rounds_data=["a"], model="m").inputs() == {
        "model": "m", "rounds_data.1": "a", "reference": "other",
    }  # fmt: skip


def test_plans(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", preferences(4))
    data = ChatDataConfig(path=str(path))
    plan = dpo.plan(DpoConfig(model=str(checkpoint.path), output="out", data=data, reference="first", formats=["hf"]))
    assert [item.path for item in plan.writes] == ["out/model", "out/hf"]
    assert plan.faults == []
    unknown = ChatDataConfig(package="llamafactory-dpo")
    plan = sft.plan(SftConfig(model=str(checkpoint.path), output="out", data=unknown))
    assert plan.faults == ["data.package=llamafactory-dpo: carries no such data; known: llamafactory-sft"]
