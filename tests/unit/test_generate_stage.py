"""The stage ``generate``: its file, going on after a stop, its plan, its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import tiny_checkpoint
from support.distributed import run_distributed
from support.text import write_tokenizer

from nemo_minitron.config import GenerateConfig, ParallelLayout, PromptsConfig, Sampling, load
from nemo_minitron.errors import ConfigError, DataError
from nemo_minitron.stages import generate

LINES = [
    {"messages": [{"role": "system", "content": "w9"}, {"role": "user", "content": "w1 w2"}]},
    {"prompt": "w3 w4 w5 w6 w7"},
    {"instruction": "w1", "input": "w2", "output": "w3"},
]


def make_config(tmp_path: Path, model: Path, output: str = "answers", **settings: Any) -> GenerateConfig:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return GenerateConfig(
        model=str(model),
        prompts=PromptsConfig(path=str(path)),
        output=str(tmp_path / output),
        sampling=Sampling(max_new_tokens=6, temperature=0.9),
        samples=3,
        batch_size=2,
        **settings,
    )


def run_stage(config: GenerateConfig) -> dict[str, Any]:
    """One rank of the stage."""
    return generate.run(config)


def run_stopped_and_again(config: GenerateConfig, whole: GenerateConfig) -> list[dict[str, Any]]:
    """The stage in one go, then stopped after its second batch with half a line written, then started again."""
    from nemo_minitron.runtime.journal import Journal

    found = [generate.run(whole)]
    append = Journal.append

    def stopping(journal: Journal, results: list[dict[str, Any]]) -> None:
        append(journal, results)
        if Journal.entries(journal.path) >= 4:
            with journal.path.open("a") as stream:
                stream.write('{"request": 1, "tok')
            raise KeyboardInterrupt

    Journal.append = stopping  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        generate.run(config)
    Journal.append = append  # type: ignore[method-assign]
    assert not Path(config.output).exists()
    assert any("4 answers of an earlier run" in note for note in generate.plan(config).notes)
    return [*found, generate.run(config)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def answers(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(path) / "answers.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_answers_have_the_form_of_training_data_and_survive_a_stop(model: Path, tmp_path: Path) -> None:
    from nemo_minitron.data.chat.conversations import read_chats

    config = make_config(tmp_path, model, attributes={"verbosity": 1}, system="w8")
    whole = make_config(tmp_path, model, "whole", attributes={"verbosity": 1}, system="w8")
    first, again = run_distributed(run_stopped_and_again, 1, tmp_path, config=config, whole=whole)[0]
    lines = answers(config.output)
    assert lines == answers(whole.output)
    assert (first["resumed"], again["resumed"], again["answers"], again["prompts"]) == (0, 4, 9, 3)
    assert first["tokens"] == again["tokens"] == sum(line["tokens"] for line in lines)
    assert again["tokens_per_second"] > 0
    assert not list(tmp_path.glob(".answers*"))
    assert [(line["prompt_index"], line["sample"]) for line in lines] == [(i, j) for i in range(3) for j in range(3)]
    assert [[m["role"] for m in line["messages"]] for line in lines] == [["system", "user", "assistant"]] * 9
    assert [line["messages"][0]["content"] for line in lines[::3]] == ["w9", "w8", "w8"]
    assert lines[6]["messages"][1]["content"] == "w1\nw2"  # the answer that stood there is another now
    assert all(line["finish"] == ("length" if line["tokens"] == 6 else "stop") for line in lines)
    assert all(line["logprob"] < 0 for line in lines)
    chats = read_chats(Path(config.output) / "answers.jsonl")
    assert [chat.attributes for chat in chats] == [{"verbosity": 1}] * 9
    assert len({line["messages"][-1]["content"] for line in lines}) > 3  # samples differ
    # Neither the layout nor the batch changes the answers.
    laid = make_config(
        tmp_path, model, "laid", parallel=ParallelLayout(data=2), attributes={"verbosity": 1}, system="w8"
    )
    laid.batch_size = 1
    run_distributed(run_stage, 2, tmp_path, config=laid)
    theirs = answers(laid.output)
    assert [{**line, "logprob": 0} for line in lines] == [{**line, "logprob": 0} for line in theirs]
    assert [line["logprob"] for line in lines] == pytest.approx([line["logprob"] for line in theirs], abs=1e-4)


# -------------------------------------------------------------------------------------------------------------- prompts


def test_prompts_come_from_every_form(tmp_path: Path) -> None:
    from nemo_minitron.generation.prompts import read_prompts

    text = tmp_path / "prompts.txt"
    text.write_text("w1 w2\n\n  w3\n")
    chats = read_prompts(PromptsConfig(path=str(text)), system="w0")
    assert [[tuple(message.identity()) for message in chat.messages] for chat in chats] == [
        [("system", "w0"), ("user", "w1 w2")],
        [("system", "w0"), ("user", "w3")],
    ]
    assert chats[1].where == f"{text}, line 3"
    assert len(read_prompts(PromptsConfig(texts=["a", "b", "c"], limit=2))) == 2
    text.write_text("\n \n")
    with pytest.raises(DataError, match="is empty"):
        read_prompts(PromptsConfig(path=str(text)))
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(PromptsConfig(path=str(tmp_path / "none.txt")))
    text.write_bytes(b"w1\nw\xfe\n")
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_prompts(PromptsConfig(path=str(text)))
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": ""}\n{"prompt": "w1"}\n{"messages": [{"role": "judge", "content": "x"}]}\n')
    with pytest.raises(DataError, match=r"(?s)2 bad lines.*line 1: prompt is empty.*line 3:.*unknown role 'judge'"):
        read_prompts(PromptsConfig(path=str(lines)))


def test_prompts_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    from nemo_minitron.data import load_tokenizer
    from nemo_minitron.generation.prompts import encode_prompts, read_prompts

    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "plain"))
    chats = read_prompts(PromptsConfig(texts=["w0 w1", "w1 " * 9, "w2", "w3 " * 8]))
    with pytest.raises(DataError, match=r"(?s)2 bad items.*item 2: 9 tokens leave no room.*item 4: 8 tokens"):
        encode_prompts(chats, tokenizer, "none", title="prompts.texts", max_length=8)
    prompts, ends = encode_prompts(chats, tokenizer, "none", title="", max_length=64)
    assert (prompts[0], ends) == ((chats[0], [3, 4]), (0,))
    kept, _ = encode_prompts(chats, tokenizer, "none", title="prompts.texts", max_length=8, skip=True)
    assert [chat for chat, _ in kept] == [chats[0], chats[2]]
    with pytest.raises(DataError, match="no chat template; set template to one of chatml"):
        encode_prompts(chats, tokenizer, "own", title="", max_length=64)
    chats = read_prompts(PromptsConfig(texts=["w0"]), system="w1")
    with pytest.raises(DataError, match="item 1: has several messages"):
        encode_prompts(chats, tokenizer, "none", title="", max_length=64)


# ----------------------------------------------------------------------------------------------- configuration and plan


def test_settings_that_contradict_each_other_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "generate.yaml"
    path.write_text(
        "model: m\noutput: o\nprompts: {texts: ['', a], path: p}\nsamples: 2\ntemplate: none\nsystem: s\n"
        "attributes: {verbosity: -1}\nsampling: {greedy: true, top_p: 1.5, max_new_tokens: 0}\n"
    )
    with pytest.raises(ConfigError) as error:
        load("generate", path)
    text = str(error.value)
    for part in ("path and texts are both given", "texts[0]", "samples=2", "system: has no place", "verbosity=-1",
                 "top_p=1.5", "max_new_tokens=0"):  # fmt: skip
        assert part in text


def test_plan(tmp_path: Path, model: Path) -> None:
    config = make_config(tmp_path, tmp_path / "m", max_length=90)
    (tmp_path / "m").mkdir()
    shape = {
        "num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2, "num_query_groups": 2,
        "head_dim": 4, "vocab_size": 10,
    }  # fmt: skip
    record = {"shape": shape, "architecture": {"family": "llama", "max_position_embeddings": 64}}
    (tmp_path / "m" / "minitron.json").write_text(json.dumps(record))
    found = generate.plan(config)
    assert [item.what for item in found.reads] == ["model", "prompts"]
    assert found.costs["key-value cache of a rank"] == "at most 16.0 KiB"  # 2 rows x 64 tokens x 2 x 8 x 4 bytes x 2
    assert found.faults == ["max_length=90: the model's context holds 64 tokens"]
    config.prompts = PromptsConfig(package="nope")
    assert any("prompts.package=nope" in fault for fault in generate.plan(config).faults)
    config.prompts = PromptsConfig(package="llamafactory-sft")
    assert any("fetched with pip" in note for note in generate.plan(config).notes)


def test_attributes_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from nemo_minitron.cli import app as cli

    seen: list[Any] = []
    monkeypatch.setattr(cli, "_run_stage", lambda *args: seen.append(args))
    words = ["generate", "generate", "samples=2", "--attributes", "verbosity=1,complexity=2", "--dry-run"]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    assert seen[0][2] == ["samples=2", "attributes={verbosity: 1, complexity: 2}"]
    assert load("generate", "generate", seen[0][2]).attributes == {"verbosity": 1, "complexity": 2}
    refused = CliRunner().invoke(cli.app, ["generate", "generate", "--attributes", "verbosity"])
    assert refused.exit_code == 2
    assert "write verbosity=1" in refused.output
