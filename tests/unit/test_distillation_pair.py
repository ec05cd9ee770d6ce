"""Pairs of models that cannot be teacher and student, refused with all their faults and the remedy."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.tokenizer.comparison import CommonVocabulary
from nemo_minitron.distillation.compatibility import check_model, check_pair
from nemo_minitron.errors import CheckpointError, DataError, ShapeError
from nemo_minitron.runtime.groups import ParallelLayout
from nemo_minitron.shape import ModelShape

SIZES = {
    "num_layers": 6, "hidden_size": 32, "ffn_hidden_size": 96, "num_attention_heads": 6, "num_query_groups": 6,
    "head_dim": 8, "vocab_size": 100,
}  # fmt: skip


def model(name: str, longest: int = 64, **changes: Any) -> Checkpoint:
    shape = ModelShape(**{**SIZES, **changes})
    architecture = Architecture(max_position_embeddings=longest)
    return Checkpoint(shape, architecture, weights=None, tokenizer=None, path=Path(name), format="hf")  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "pipeline": 3}, {"tensor": 3, "data": 4}])
def test_models_of_different_width_and_depth_fit(layout: dict[str, Any]) -> None:
    student = model("student", num_layers=3, hidden_size=16, ffn_hidden_size=48)
    check_pair(student, model("teacher"), ParallelLayout(**layout), 64)


def test_rows_may_differ_only_with_tokenizers_to_say_what_they_mean() -> None:
    with pytest.raises(
        CheckpointError, match=r"student s has a vocabulary of 99 and teacher t of 100, and the student"
    ):
        check_pair(model("s", vocab_size=99), model("t"), ParallelLayout(), 8)
    assert check_pair(model("s"), model("t"), ParallelLayout(), 8).whole


def test_sequences_must_fit_both_contexts() -> None:
    with pytest.raises(DataError, match=r"sequence_length=65: the student reads 64 tokens at most"):
        check_pair(model("s"), model("t", longest=128), ParallelLayout(), 65)


def test_every_fault_of_the_layout_is_named() -> None:
    with pytest.raises(ShapeError) as caught:
        check_pair(
            model("s", num_layers=1, ffn_hidden_size=63),
            model("t", num_layers=3),
            ParallelLayout(tensor=2, pipeline=2, virtual_pipeline=2),
            8,
        )
    assert len(caught.value.faults) == 3
    text = str(caught.value)
    assert "student: ffn_hidden_size=63 cannot be split over parallel.tensor=2" in text
    assert "it fits parallel.tensor in [1, 3, 7, 9, 21, 63]" in text
    assert "student: num_layers=1 cannot fill 4 stages (parallel.pipeline, times virtual_pipeline)" in text
    assert "teacher: num_layers=3 cannot fill 4 stages" in text


def test_a_mixture_under_tensor_parallelism_wants_sequence_parallelism() -> None:
    pair = model("s", num_moe_experts=4), model("t", num_moe_experts=4)
    with pytest.raises(ShapeError, match=r"set parallel\.sequence_parallel=true"):
        check_pair(*pair, ParallelLayout(tensor=2), 8)
    check_pair(*pair, ParallelLayout(tensor=2, sequence_parallel=True), 8)


def test_a_model_by_itself_is_checked_in_the_same_way() -> None:
    check_model(model("m"), ParallelLayout(tensor=2, pipeline=3), 64)
    with pytest.raises(DataError, match=r"sequence_length=65: the model reads 64 tokens at most"):
        check_model(model("m"), ParallelLayout(), 65)
    with pytest.raises(ShapeError, match=r"model: num_layers=6 cannot fill 7 stages"):
        check_model(model("m"), ParallelLayout(pipeline=7), 8)
    with pytest.raises(ShapeError, match=r"set parallel\.sequence_parallel=true"):
        check_model(model("m", num_moe_experts=4), ParallelLayout(tensor=2), 8)


def test_tokenizers_must_agree_in_ordinary_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of one size, and yet other tokens; written in another way, and yet the same; one warning of all else."""
    content = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "ba": 3}, "merges": ["a b", "b a"]},
        "added_tokens": [{"id": 4, "content": "<eos>", "special": True}, {"id": 5, "content": "<pad>"}],
    }
    config = {"eos_token": "<eos>", "pad_token": "<pad>"}

    def written(name: str, change: Any = None, **options: Any) -> Path:
        changed = copy.deepcopy(content)
        if change is not None:
            change(changed)
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(changed))
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config | options))
        return tmp_path / name

    def pair(other: Path, **sizes: Any) -> CommonVocabulary:
        student = dataclasses.replace(model("s"), tokenizer=written(other.name + "-student"))
        return check_pair(student, dataclasses.replace(model("t", **sizes), tokenizer=other), ParallelLayout(), 8)

    pair(written("same"))
    pair(written("newer", lambda x: x["model"].update(merges=[["a", "b"], ["b", "a"]])))
    assert not caplog.records
    assert pair(written("fills otherwise", pad_token="<eos>")).cuts_alike
    assert "pad_token_id is 5 '<pad>' and 4 '<eos>': nothing of this changes the training" in caplog.text
    caplog.clear()
    common = pair(written("ends", lambda x: x["added_tokens"].append({"id": 7, "content": "<x>"}), eos_token="<pad>"))
    assert common.left_out == (7,) and common.ends_differ
    (record,) = caplog.records
    assert record.getMessage() == (
        "s: student and teacher have one tokenizer but for 1 added token known to teacher alone (7 is unknown to "
        "student, '<x>' to teacher); eos_token_id is 4 '<eos>' and 5 '<pad>': losses of the logits are over the first "
        "100 ids without 1 of them; text is cut with the student's tokenizer"
    )
    caplog.clear()
    assert pair(written("padded"), vocab_size=120).size == 100
    assert "for 100 and 120 rows: losses of the logits are over the first 100 ids" in caplog.text
    check_pair(dataclasses.replace(model("s"), tokenizer=written("alone")), model("t"), ParallelLayout(), 8)
    swapped = written("swapped", lambda x: x["model"]["vocab"].update(ab=3, ba=2))
    with pytest.raises(CheckpointError, match=r"2 tokens differ \('ab' has id 2 and id 3\).*do not mean the same"):
        pair(swapped)
    with pytest.raises(
        CheckpointError, match=r"student \(.*\) and teacher \(.*merges differ \('a b' has order 0 and order 1"
    ):
        pair(written("order", lambda x: x["model"].update(merges=["b a", "a b"])))
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        pair(written("damaged", lambda x: x.pop("model")))
