"""The student's own answers: settings, which sequences they are, their tensors and weights. Trainings are in
tests/distributed/test_on_policy.py.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import tiny_checkpoint

from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.tokenizer.comparison import CommonVocabulary
from nemo_minitron.config import DistillConfig, OnPolicyConfig, OnPolicyPrompts, Sampling, load
from nemo_minitron.distillation.own_answers import (
    OnPolicy,
    OwnAnswers,
    answer_weights,
    check_on_policy,
    own_sequence,
)
from nemo_minitron.errors import ConfigError, DataError
from nemo_minitron.generation import Answer
from nemo_minitron.jobs.records import hashed_settings
from nemo_minitron.stages import distill
from nemo_minitron.stages.shared.prompts import open_on_policy


@settings(max_examples=60, deadline=None)
@given(
    share=st.sampled_from(["0.0", "0.1", "0.3", "0.333", "0.5", "0.75", "1.0"]),
    batch=st.integers(1, 20),
    prompts=st.integers(1, 9),
)
def test_shares_are_exact_and_evenly_spread(share: str, batch: int, prompts: int) -> None:
    """Any share of any number of sequences, however they are counted; each prompt once in each pass."""
    own = OnPolicy(OnPolicyConfig(share=float(share)), [[number] for number in range(prompts)], ())
    samples = own.samples(0, 1000)
    assert len(samples) == Fraction(share) * 1000
    parts = [own.samples(first, min(first + batch, 1000)) for first in range(0, 1000, batch)]
    assert samples == [sample for part in parts for sample in part]
    assert max(map(len, parts)) <= own.most(batch) <= min(map(len, parts[:-1])) + 1
    asked = [own.prompt(sample)[0] for sample in samples]
    for start in range(0, len(asked) - prompts, prompts):
        assert sorted(asked[start : start + prompts]) == list(range(prompts))


def test_an_answer_as_a_sequence() -> None:
    answers = [Answer([7, 8, 2], [-0.5, -1.0, -2.0], "stop"), Answer([9], [-3.0], "length")]
    made = OwnAnswers.of(4, [3, 5], [[5, 6], [4, 4, 4, 4, 4, 4]], answers, 6)
    first, second = own_sequence(made, 0), own_sequence(made, 1)
    assert first["tokens"].tolist() == [5, 6, 7, 8, 2, 0]
    assert first["labels"].tolist() == [6, 7, 8, 2, 0, 0]
    assert first["loss_mask"].tolist() == [0, 1, 1, 1, 0, 0]
    assert made.logprobs[0].tolist() == [0, -0.5, -1.0, -2.0, 0, 0]
    assert second["loss_mask"].tolist() == [0, 0, 0, 0, 0, 1]  # the last label, which is no input
    assert second["labels"][-1] == 9
    assert first["attention_mask"].shape == (1, 6, 6)
    assert made.covers([5]) and not made.covers([5, 6])
    again = OwnAnswers(**made.state_dict())
    assert all(torch.equal(value, getattr(again, name)) for name, value in made.state_dict().items())


def test_weights_are_of_what_was_written_before() -> None:
    ratios = torch.tensor([[0.0, 0.1, -0.4, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64).T
    weights = answer_weights(ratios, clip=1.3)
    expected = torch.tensor([0.0, 0.0, 0.1, -0.3, 2.7], dtype=torch.float64).exp().clamp(1 / 1.3, 1.3)
    torch.testing.assert_close(weights[:, 0], expected, rtol=1e-12, atol=0)
    assert weights[:, 1].tolist() == [1.0] * 5


def test_what_the_teacher_cannot_judge_is_refused() -> None:
    whole = CommonVocabulary(("student", "teacher"), (100, 120))
    check_on_policy(whole, {"quantize": None})
    unlike = CommonVocabulary(("student", "teacher"), (100, 100), {7: "'a' and 'b'"})
    with pytest.raises(ConfigError) as caught:
        check_on_policy(unlike, {"a logit cache, which does not know the answers": True, "quantize": None})
    assert len(caught.value.faults) == 2
    assert "1 of the student's tokens (the first is id 7) do not mean the same to the teacher" in str(caught.value)
    with pytest.raises(ConfigError, match="no prompt for the student to answer"):
        OnPolicy(OnPolicyConfig(share=0.5), [], ())


BASE = {
    "student": "s", "teacher": "t", "output": "o", "steps": 4, "data": {"sources": [{"name": "a", "path": "a.txt"}]},
    "on_policy": {"share": 0.5, "prompts": {"texts": ["w1 w2", "w3"]}},
}  # fmt: skip


def read(tmp_path: Path, *overrides: str) -> DistillConfig:
    (tmp_path / "distill.yaml").write_text(json.dumps(BASE))
    config = load("distill", tmp_path / "distill.yaml", overrides)
    assert isinstance(config, DistillConfig)
    return config


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["on_policy.share=1.5"], "on_policy.share=1.5: must lie between 0 (off) and 1 (all sequences)"),
        (["on_policy.share=-0.1"], "on_policy.share=-0.1: must lie between 0 (off)"),
        (["on_policy.prompts.texts=null"], "on_policy.prompts.path: none is given for the student to answer"),
        (["on_policy.prompts.path=a.jsonl"], "on_policy.prompts.path: give exactly one of path, package, texts"),
        (["on_policy.refresh=0"], "on_policy.refresh=0: must be above 0"),
        (["on_policy.refresh=4", "on_policy.max_age=2"], "answers would be up to 3 steps older than the weights"),
        (["on_policy.clip=0.5"], "on_policy.clip=0.5: must be at least 1"),
        (["on_policy.stale=drop"], "on_policy.stale=drop: must be one of refuse, reweight"),
        (["on_policy.template=none", "on_policy.system=x"], "on_policy.system: has no place in plain text"),
        (["on_policy.sampling.top_p=2"], "on_policy.sampling.top_p=2.0: must be at most 1"),
        (["teacher_cache=c"], "with teacher_cache=c: a cache does not know the answers"),
        (["loss.label_weight=0.5"], "with loss.label_weight=0.5: the labels of its answers are the student's own"),
        (["teacher_correction.lr=1e-5"], "with teacher_correction.lr=1e-05: the teacher would be trained"),
        (["intermediate.hidden=mse"], "with intermediate: is not offered together"),
        (
            ["teacher=null", "teachers=[{name: a, model: a}, {name: b, model: b}]"],
            "with teachers: is not offered together",
        ),
        (
            ["logits=chunks", "on_policy.refresh=2", "on_policy.max_age=0", "on_policy.stale=reweight"],
            "with logits=chunks: the weights of stale answers are of whole logits",
        ),
        (["quantize=int4"], "with quantize=int4: is not offered together"),
        (["parallel.context=2"], "with parallel.context=2: answers are not generated"),
        (["parallel.expert=2", "parallel.data=2"], "with parallel.expert=2: answers are not generated"),
    ],
)
def test_faults_of_settings(overrides: list[str], fault: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, *overrides)
    assert any(fault in message for message in caught.value.faults), caught.value.faults


def test_off_by_default_and_in_no_identity(tmp_path: Path) -> None:
    """A share of 0 takes no prompts, and goes with what own answers do not; outputs of before keep their identity."""
    config = read(tmp_path, "on_policy.share=0", "on_policy.prompts.texts=null", "teacher_cache=c")
    assert config.on_policy == OnPolicyConfig()
    assert "on_policy" not in hashed_settings(config)
    assert "on_policy" in hashed_settings(read(tmp_path))
    assert "on_policy.prompts.path" not in config.inputs()
    named = read(tmp_path, "on_policy.prompts={path: a.jsonl}")
    assert named.inputs()["on_policy.prompts.path"] == "a.jsonl"


def test_reweighted_only_where_answers_get_stale() -> None:
    assert OnPolicyConfig(refresh=3, max_age=1, stale="reweight").reweighted
    assert not OnPolicyConfig(refresh=2, max_age=1, stale="reweight").reweighted
    assert not OnPolicyConfig(refresh=9).reweighted


def test_the_plan_and_the_prompts(tmp_path: Path) -> None:
    """A dry run names prompts, share and memory; prompts become tokens, with every end token of the model."""
    for name in ("student", "teacher"):
        written = open_checkpoint(tiny_checkpoint(tmp_path / f"hf-{name}"))
        write_checkpoint(written, tmp_path / name, "nemo2")
    (tmp_path / "prompts.txt").write_text("w1 w2 w3\nw4 w5\n")
    (tmp_path / "a.txt").write_text("w1 w2 w3")
    models = [f"{name}={tmp_path / name}" for name in ("student", "teacher")]
    source = f"data.sources=[{{name: a, path: {tmp_path / 'a.txt'}}}]"
    config = read(tmp_path, *models, source, "data.sequence_length=32")
    config.on_policy = OnPolicyConfig(
        share=0.25,
        prompts=OnPolicyPrompts(path=str(tmp_path / "prompts.txt")),
        template="none",
        sampling=Sampling(max_new_tokens=8),
        refresh=4,
    )
    plan = distill.plan(config)
    assert plan.faults == []
    assert any(read.what == "prompts" for read in plan.reads)
    assert any(
        note.startswith("25 % of the sequences are the student's own answers, of at most 8") for note in plan.notes
    )
    assert "key-value cache of a rank" in plan.costs
    own = open_on_policy(config, open_checkpoint(tmp_path / "student"))
    assert own is not None
    assert len(own.prompts) == 2 and own.ends == (2,)
    config.data.sequence_length = 3
    with pytest.raises(DataError, match="leave no room for an answer in a context of 4"):
        (tmp_path / "prompts.txt").write_text("w1 w2 w3 w4 w5\n")
        open_on_policy(config, open_checkpoint(tmp_path / "student"))
