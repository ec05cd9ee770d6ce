"""Attribute models on disk, journals of labels, configurations, and what the report shows of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nemo_minitron.alignment.attribute_model import load_attribute_model, save_attribute_model, to_values
from nemo_minitron.config import AttributesConfig, ChatDataConfig, load
from nemo_minitron.config.stages.steering import ReinforceConfig, RewardConfig, Steerlm2Config, SteerlmConfig
from nemo_minitron.data.chat.attributes import SCHEMAS, AttributeSchema
from nemo_minitron.data.chat.labelled import labelled_chats
from nemo_minitron.errors import CheckpointError, ConfigError, DataError, MissingDependency

SCHEMA = AttributeSchema("own", ("wit", "length"), 4)


def test_an_attribute_model_is_read_as_it_was_written(tmp_path: Path) -> None:
    weight, bias = torch.randn(2, 8), torch.tensor([1.0, 2.0])
    save_attribute_model(tmp_path, SCHEMA, "chatml", derived=True, weight=weight, bias=bias)
    found = load_attribute_model(tmp_path)
    assert (found.schema, found.template, found.derived) == (SCHEMA, "chatml", True)
    torch.testing.assert_close(found.weight, weight)
    torch.testing.assert_close(found.bias, bias)
    assert found.model == tmp_path / "model"
    assert to_values(torch.tensor([[-1.0, 2.4], [9.0, 2.6]]), SCHEMA) == [
        {"wit": 0, "length": 2}, {"wit": 4, "length": 3},
    ]  # fmt: skip
    assert SCHEMAS["helpsteer"].restricted({"verbosity", "wit"}).names == ("verbosity",)


def test_a_damaged_attribute_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no attributes.json; name the output of `minitron reward`"):
        load_attribute_model(tmp_path)
    save_attribute_model(tmp_path, SCHEMA, "own", derived=False, weight=torch.ones(3, 8), bias=torch.ones(3))
    with pytest.raises(CheckpointError, match="3 outputs for 2 attributes"):
        load_attribute_model(tmp_path)
    for name, content in (("head.safetensors", b"x"), ("attributes.json", b"{")):
        save_attribute_model(tmp_path, SCHEMA, "own", derived=False, weight=torch.ones(2, 8), bias=torch.ones(2))
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="not a readable attribute model"):
            load_attribute_model(tmp_path)


def test_predictions_that_a_killed_labelling_saved_are_kept(tmp_path: Path) -> None:
    from nemo_minitron.stages.label import _append, _key, _saved

    key = _key(torch.ones(1, 2), [[1, 2], [3]])
    assert key != _key(torch.ones(1, 2), [[1, 2], [4]])
    assert key != _key(torch.zeros(1, 2), [[1, 2], [3]])
    journal = tmp_path / "scores.jsonl"
    assert _saved(journal, key) == []
    journal.write_text(json.dumps({"key": key}) + "\n")
    _append(journal, [[1.0, 2.0], [3.0, 4.0]])
    with journal.open("a") as stream:
        stream.write("[5.0, ")
    assert _saved(journal, key) == [[1.0, 2.0], [3.0, 4.0]]
    assert _saved(journal, "another") == []


def data(tmp_path: Path, *rows: dict[str, object]) -> ChatDataConfig:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ChatDataConfig(path=str(path), held_out_fraction=0.34)


def test_labelled_conversations(tmp_path: Path) -> None:
    chats = [{"prompt": f"q{n}", "response": "word " * (n + 1), "attributes": {"verbosity": n % 5}} for n in range(6)]
    found = labelled_chats(data(tmp_path, *chats), AttributesConfig(), pairs=False)
    assert (len(found.train), len(found.held_out), found.preferred) == (4, 2, [None, None])
    for chat in (*found.train, *found.held_out):
        assert chat.attributes == {"verbosity": int(chat.prompt[0].content[1:]) % 5}
    del chats[1]["attributes"]
    with pytest.raises(DataError, match="line 2: has no attributes"):
        labelled_chats(data(tmp_path, *chats), AttributesConfig(), pairs=False)
    chats[0]["attributes"] = {"verbosity": 7}
    with pytest.raises(DataError, match="line 1: verbosity=7: must lie from 0 to 4"):
        labelled_chats(data(tmp_path, *chats), AttributesConfig(derive=True), pairs=False)
    own = AttributesConfig(schema="own", names=["wit"], derive=True)
    with pytest.raises(DataError, match="nothing gives values of wit"):
        labelled_chats(data(tmp_path, *({"prompt": "a", "response": f"b{n}"} for n in range(3))), own, pairs=False)

    pairs = [{"prompt": f"q{n}", "chosen": "yes " * n + "yes", "rejected": "no"} for n in range(6)]
    found = labelled_chats(data(tmp_path, *pairs), AttributesConfig(derive=True), pairs=True)
    assert found.preferred == [True, False] * 2
    for chat, chosen in zip(found.held_out, found.preferred, strict=True):
        assert chat.attributes["helpfulness"] == chat.attributes["correctness"] == (4 if chosen else 0)
        assert chat.attributes.keys() == {"helpfulness", "correctness", "complexity", "verbosity"}


def test_configurations_are_refused_with_all_their_faults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"

    def faults(stage: str, text: str) -> str:
        path.write_text("model: m\noutput: o\ndata: {path: d.jsonl}\n" + text)
        with pytest.raises(ConfigError) as caught:
            load(stage, path)
        return str(caught.value)

    told = faults("reward", "pairs: true\nformats: [hf]\nattributes: {schema: own}\n")
    for fault in ("pairs=true: the values", "formats: a reward model", "names: schema=own needs"):
        assert fault in told
    assert "schema=helpsteer has its own" in faults("reward", "attributes: {names: [wit]}\n")
    assert "'wit' is given twice" in faults("reward", "attributes: {schema: own, names: [wit, wit]}\n")
    told = faults("reinforce", "samples_per_prompt: 1\nglobal_batch_size: 3\nmax_new_tokens: 2000\n"
                  "validation_prompts: 3\nmicro_batch_size: 2\nparallel: {data: 2}\nweights: {wit: 1}\n")  # fmt: skip
    for fault in ("give exactly one of reward and rule", "weights: are of the attributes",
                  "the baseline needs at least 2", "does not divide the 8 answers", "leaves no room for a prompt",
                  "parallel.data=2",
                  "validation_prompts=3: is not a multiple"):  # fmt: skip
        assert fault in told, fault
    assert "parallel.sequence_parallel=true" in faults("reward", "parallel: {tensor: 2, sequence_parallel: true}\n")
    assert "must be one of short, long, ends" in faults("reinforce", "rule: kind\n")
    told = faults("steerlm2", "base: b\nattribute_model: a\nsamples_per_prompt: 1\ndeviation: 0\n")
    assert "weights need at least 2 answers" in told
    assert "deviation=0" in told
    told = faults("steerlm", "reward: {path: p, package: q, lr: 0}\nlr: 1.0e-4\n")
    assert "give one of path and package" in told
    assert "reward: lr=0" in told


def test_the_stages_that_steerlm_leads() -> None:
    from dataclasses import replace

    config = SteerlmConfig(model="m", output="o", data=ChatDataConfig(package="llamafactory-sft"), lr=2e-5)
    config.reward.package, config.reward.lr = "llamafactory-dpo", 1e-6
    reward, labels, sft = config.reward_stage(), config.label_stage(), config.sft_stage()
    assert (reward.data.package, reward.lr, reward.model, reward.output) == (
        "llamafactory-dpo", 1e-6, "m", "o/attribute_model",
    )  # fmt: skip
    assert (labels.reward, labels.data.package) == ("o/attribute_model", "llamafactory-sft")
    assert (sft.data.path, sft.data.package, sft.data.labelled, sft.lr) == ("o/labels/labelled.jsonl", None, True, 2e-5)
    assert replace(config, attribute_model="a").label_stage().reward == "a"
    assert config.layout.world_size == 1
    assert (RewardConfig.STAGE, Steerlm2Config.STAGE, ReinforceConfig.STAGE) == ("reward", "steerlm2", "reinforce")


def test_tensorrt_llm_is_stood_for_only_within_the_block() -> None:
    import importlib
    import sys

    from nemo_minitron.runtime.cpu.tensorrt_llm import optional

    name = "nemo_aligner.utils.trt_llm"
    assert name not in sys.modules
    with optional():
        stand_in = sys.modules[name]
        with pytest.raises(MissingDependency, match="needs the package tensorrt_llm"):
            stand_in.GPTGenerateTRTLLM(model_cfg=None)
    assert name not in sys.modules
    assert importlib.util.find_spec("tensorrt_llm") is None


def test_the_report_shows_alignment(tmp_path: Path) -> None:
    from nemo_minitron.report.alignment import alignment_tables
    from nemo_minitron.report.collect import Run, StageRun

    def stage(kind: str, metrics: dict[str, object]) -> StageRun:
        return StageRun(kind, kind, tmp_path, 0, {"metrics": metrics})

    pair = {"accuracy": 0.5, "margin": -0.01}
    run = Run(tmp_path, "r")
    run.stages = [
        stage("sft", {"samples": 1200, "steps": 72, "first_validation_loss": 3.2, "last_validation_loss": 2.1234}),
        stage("dpo", {"pairs": [80], "held_out": [20],
                      "rounds": [{"before": pair, "after": {"accuracy": 0.75, "margin": 0.4}}]}),
        stage("reward", {"attributes": {"verbosity": {"mse": 0.5, "mse_of_mean": 2.0, "correlation": None}}}),
        stage("reinforce", {"steps": 6, "first": {"reward": 1.0}, "last": {"reward": 1.5}, "kl": 0.25}),
        stage("distill", {}),
    ]  # fmt: skip
    tables = alignment_tables(run)
    assert [table.rows for table in tables] == [
        [["sft", "1,200", "72", "3.200", "2.123"]],
        [["dpo", "1", "80", "20", "50%", "75%", "-0.010", "0.400"]],
        [["reward", "verbosity", "0.500", "2.000", "–"]],
        [["reinforce", "6", "1.000", "1.500", "0.250"]],
    ]
    assert all(len(table.headings) == len(table.rows[0]) for table in tables)
    assert run.remarks == []
    run.stages = [stage("sft", {"steps": 3})]
    assert alignment_tables(run) == []
    assert "the metrics of sft are incomplete" in run.remarks[0]


def test_a_base_model_must_know_the_tokens_of_prompts_and_answers(tmp_path: Path) -> None:
    """Its rows and added tokens may differ, as a plan says; a token that it does not know is refused by name."""
    from support.steering import tiny_chat_model

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.checkpoints.tokenizer.comparison import Vocabulary, compare
    from nemo_minitron.config import ChatDataConfig, Steerlm2Config
    from nemo_minitron.stages import steerlm2

    model, base = tiny_chat_model(tmp_path / "model"), tiny_chat_model(tmp_path / "base", rows=272)
    path = tmp_path / "base" / "tokenizer.json"
    content = json.loads(path.read_text())
    added = content["added_tokens"]
    gone = added.pop()
    content["model"]["vocab"].pop(gone["content"], None)
    path.write_text(json.dumps(content))
    config = Steerlm2Config(
        model=model, base=base, attribute_model="a", output=str(tmp_path / "o"), data=ChatDataConfig(path="chats.jsonl")
    )
    (note,) = [note for note in steerlm2.plan(config).notes if "model and base model" in note]
    assert "260 and 272 rows" in note and f"({gone['id']} is {gone['content']!r} to model, unknown to base" in note
    common = compare(Vocabulary.of("model", open_checkpoint(model)), Vocabulary.of("base", open_checkpoint(base)))
    sampler = steerlm2._Sampler(config, open_checkpoint(model), None, None, common)
    with pytest.raises(DataError, match=rf"base: does not know token {gone['id']} of prompts and answers \('"):
        sampler._log_likelihoods(None, [[3, 4]], [[5, gone["id"]]])  # type: ignore[arg-type]
    config.base = tiny_chat_model(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(path.read_text().replace('"b":', '"bb":'))
    assert any("have different tokenizers" in fault for fault in steerlm2.plan(config).faults)
