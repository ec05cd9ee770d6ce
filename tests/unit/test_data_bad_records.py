"""``on_bad_record``: bad records are refused all at once, or left out, counted and kept in ``skipped.jsonl``."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from support.chat import CHATML, byte_tokenizer
from support.chats import chat_checkpoint, preferences
from support.text import sentences, write_tokenizer

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.config import (
    AttributesConfig,
    ChatDataConfig,
    DataConfig,
    PromptsConfig,
    SftConfig,
    SourceConfig,
    TaskConfig,
    TokensConfig,
    load,
)
from nemo_minitron.data import build_blocks, read_source
from nemo_minitron.data.chat.conversations import iter_chats, read_chats
from nemo_minitron.data.chat.labelled import labelled_chats
from nemo_minitron.data.chat.preferences import Preference, read_preferences
from nemo_minitron.data.tasks import read_task
from nemo_minitron.errors import ConfigError, DataError
from nemo_minitron.jobs import local, skipped
from nemo_minitron.jobs.records import hashed_settings
from nemo_minitron.stages.shared.chats import load_chats, load_preferences, tokens_of

GOOD = {"prompt": "Hi", "response": "Hello"}
CALLED = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "name": "Eve"}]}
BAD = ["{oops", [1], {"prompt": 3, "response": "x"}, {"text": "of no form"}, {**GOOD, "rating": 3}]


@pytest.fixture(autouse=True)
def _nothing_left_out() -> None:
    skipped.forget()


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def test_bad_records_are_left_out_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = lines(tmp_path / "a.jsonl", GOOD, *BAD, GOOD)
    with pytest.raises(DataError, match=r"5 bad lines; correct or remove them, or set on_bad_record=skip to leave"):
        read_chats(path)
    assert skipped.entries() == []
    chats = read_chats(path, skip=True)
    assert [chat.where for chat in chats] == [f"{path}, line 1", f"{path}, line 7"]
    assert caplog.messages[-1].startswith(
        f"{path}: left out 5 of 7 records (on_bad_record=skip); the first is line 2: not JSON"
    )
    kept = skipped.entries()
    assert [(entry["file"], entry["place"]) for entry in kept] == [(str(path), f"line {n}") for n in range(2, 7)]
    assert [entry["record"] for entry in kept] == BAD
    for entry, reason in zip(kept, ("not JSON", "a JSON object is needed", "prompt is int", "is of no form", "unknown "
                                    "field rating=3"), strict=True):  # fmt: skip
        assert reason in entry["reason"]
    read_chats(path, skip=True)
    assert len(skipped.entries()) == 5  # what is read again counts once


def test_what_no_record_survives_is_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *BAD)
    with pytest.raises(DataError, match="a.jsonl: 5 bad lines; no record is left; correct the file:\n  line 1: not"):
        read_chats(path, skip=True)
    with pytest.raises(DataError, match=r"1 bad line; no record is left"):
        read_chats(lines(tmp_path / "b.jsonl", {"text": "x"}), skip=True)
    with pytest.raises(DataError, match="is empty"):
        read_chats(lines(tmp_path / "c.jsonl", ""), skip=True)
    with pytest.raises(DataError, match="cannot be read"):
        read_chats(tmp_path / "none.jsonl", skip=True)
    (tmp_path / "d.json").write_text('[{"prompt": "a", "response": "b"}, {oops]')
    with pytest.raises(DataError, match="not JSON"):  # where the next one begins is not known
        read_chats(tmp_path / "d.json", skip=True)


def test_many_bad_records(tmp_path: Path) -> None:
    """The first twenty faults are shown; of a kind only the first, with the number of the others."""
    records = [{**GOOD, f"zz{n % 40}": 1} for n in range(100)]
    with pytest.raises(DataError) as caught:
        read_chats(lines(tmp_path / "a.jsonl", *records))
    first, *faults, last = str(caught.value).splitlines()
    assert first.endswith(
        "a.jsonl: 100 bad lines; correct or remove them, or set on_bad_record=skip to leave them out:"
    )
    assert len(faults) == 20 and all(
        fault.startswith(f"  line {n}: unknown field zz{n - 1}=1") for n, fault in enumerate(faults, 1)
    )
    assert faults[0].endswith("(and 2 more like it)")
    assert last == "  and 20 more"


def test_pairs_prompts_and_tasks(tmp_path: Path) -> None:
    pair = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    tie = {"prompt": "Hi", "response_1": "a", "response_2": "b", "preference_strength": 0}
    path = lines(tmp_path / "a.jsonl", pair, tie, {**pair, "rejected": "a"})
    with pytest.raises(DataError, match=r"(?s)2 bad lines.*line 2: preference_strength=0 prefers neither"):
        read_preferences(path)
    assert len(read_preferences(path, skip=True)) == 1
    config = ChatDataConfig(path=str(lines(tmp_path / "b.jsonl", *preferences(8), tie)), on_bad_record="skip")
    assert sum(map(len, load_preferences(config))) == 8
    from nemo_minitron.generation.prompts import read_prompts

    for prompts in (PromptsConfig(path=str(lines(tmp_path / "c.jsonl", GOOD, {"prompt": ""}))),
                    PromptsConfig(path=str(tmp_path / "c.txt"))):  # fmt: skip
        (tmp_path / "c.txt").write_bytes(b"one\nt\xffo\n")
        with pytest.raises(DataError, match="1 bad line; correct or remove it"):
            read_prompts(prompts)
        assert len(read_prompts(dataclasses.replace(prompts, on_bad_record="skip"))) == 1
    question = {"prompt": "a", "choices": ["b", "c"], "answer": 0}
    task = TaskConfig(path=str(lines(tmp_path / "t.jsonl", question, {**question, "answer": 2})))
    with pytest.raises(DataError, match="line 2: answer=2"):
        read_task(task, cache_dir=tmp_path, seed=1)
    assert len(read_task(dataclasses.replace(task, on_bad_record="skip"), cache_dir=tmp_path, seed=1)) == 1
    assert [entry["place"] for entry in skipped.entries()] == [
        "line 2", "line 3", "line 9", "line 2", "line 2", "line 2",
    ]  # fmt: skip


def test_attribute_values(tmp_path: Path) -> None:
    rows = [{**GOOD, "prompt": f"q{n}", "attributes": {"verbosity": n}} for n in range(7)] + [GOOD]
    config = ChatDataConfig(path=str(lines(tmp_path / "a.jsonl", *rows)), held_out_fraction=0.2)
    with pytest.raises(DataError, match=r"3 bad lines(?s:.*)line 6: verbosity=5(?s:.*)line 8: has no attributes"):
        labelled_chats(config, AttributesConfig(), pairs=False)
    found = labelled_chats(dataclasses.replace(config, on_bad_record="skip"), AttributesConfig(), pairs=False)
    assert len(found.train) + len(found.held_out) == 5
    for chat in (*found.train, *found.held_out):
        assert chat.prompt[0].content == f"q{chat.attributes['verbosity']}"


def test_what_a_template_refuses(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(chat_checkpoint(tmp_path / "model"))
    data = ChatDataConfig(path=str(lines(tmp_path / "a.jsonl", CALLED, GOOD, CALLED)), template="chatml")
    chats = read_chats(str(data.path))
    with pytest.raises(DataError, match=r"2 bad lines(?s:.*)line 1: message 2: name: the template chatml does not wri"):
        tokens_of(chats, checkpoint, data)
    done, _ = tokens_of(chats, checkpoint, dataclasses.replace(data, on_bad_record="skip"))
    assert [chat.where[-6:] for chat, _ in done] == ["line 2"]
    pairs = [
        {"prompt": "Hi", "chosen": "a", "rejected": {"role": "assistant", "content": "b", "name": "Eve"}},
        {"prompt": "Hi", "chosen": "a", "rejected": "b"},
    ]
    read = read_preferences(lines(tmp_path / "b.jsonl", *pairs))
    skip = dataclasses.replace(data, on_bad_record="skip")
    both, _ = tokens_of(read, checkpoint, skip, chats=Preference.chats)
    assert [(pair.where[-6:], len(samples)) for pair, samples in both] == [("line 2", 2)]
    with pytest.raises(DataError, match="1 bad line; no record is left"):
        tokens_of(read[:1], checkpoint, skip, chats=Preference.chats)
    assert [(Path(entry["file"]).name, entry["place"]) for entry in skipped.entries()] == [
        ("a.jsonl", "line 1"), ("a.jsonl", "line 3"), ("b.jsonl", "line 1"),
    ]  # fmt: skip


def test_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": 5}, {"body": "x"}, "{", {"text": "two"})
    source = SourceConfig(name="mine", path=str(path))
    with pytest.raises(DataError, match=r"source 'mine': .*a.jsonl, line 2: text_key='text' is no string; it has text"):
        read_source(source, tmp_path)
    assert [document.text for document in read_source(source, tmp_path, skip=True)] == ["one", "two"]
    assert "left out 3 of 5 records" in caplog.messages[-1]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None], "n": [1, 2]}), tmp_path / "b.parquet")
    table = SourceConfig(name="mine", path=str(tmp_path / "b.parquet"))
    assert [document.text for document in read_source(table, tmp_path, skip=True)] == ["one"]
    for changed, fault in (({"text_key": "body"}, "no column 'body'"), ({"text_key": "n"}, "2 bad rows; no record is")):
        with pytest.raises(DataError, match=fault):
            read_source(dataclasses.replace(table, **changed), tmp_path, skip=True)
    with pytest.raises(DataError, match="5 bad lines; no record is left"):
        read_source(dataclasses.replace(source, text_key="none"), tmp_path, skip=True)
    # A source that ends early says what it left out until then.
    assert len(read_source(dataclasses.replace(source, max_characters=3), tmp_path, skip=True)) == 1


def test_conversations_are_streamed(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", GOOD, GOOD, "{oops", GOOD)
    chats = iter_chats(path)
    assert next(chats).answer == next(chats).answer == "Hello"
    with pytest.raises(DataError, match="line 3: not JSON"):
        next(chats)


# --------------------------------------------------------------------------------------------------------------- caches


def test_cached_blocks_remember_what_was_left_out(tmp_path: Path) -> None:
    rows: list[object] = [{"text": text} for text in sentences(60, 40, seed=1)]
    path = lines(tmp_path / "a.jsonl", *rows, "{oops")
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    config = DataConfig(
        sources=[SourceConfig(name="mine", path=str(path))], sequence_length=16, cache_dir=str(tmp_path / "cache"),
        on_bad_record="skip",
    )  # fmt: skip
    with pytest.raises(DataError, match="line 61: not JSON"):
        build_blocks(dataclasses.replace(config, on_bad_record="refuse"), tokenizer, "train")
    first = build_blocks(config, tokenizer, "train")
    for split in ("train", "train", "held_out"):  # the blocks of the cache, then its tokens
        kept = skipped.entries()
        assert [entry["place"] for entry in kept] == ["line 61"]
        skipped.forget()
        assert skipped.entries() == []
        again = build_blocks(config, tokenizer, split)
        assert split != "train" or again.content() == first.content()
    whole = lines(tmp_path / "a.jsonl", *rows)
    plain = build_blocks(dataclasses.replace(config, on_bad_record="refuse"), tokenizer, "train")
    assert whole == path and plain.content() == first.content()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_conversations_that_the_template_refuses_as_text(tmp_path: Path, workers: int) -> None:
    rows = [{"prompt": f"q {n}" * 9, "response": f"a {n}" * 9} for n in range(30)]
    path = lines(tmp_path / "a.jsonl", *rows, CALLED, "{oops")
    tokenizer = byte_tokenizer(tmp_path / "tokenizer", CHATML)
    config = DataConfig(
        sources=[SourceConfig(name="mine", chat=str(path), template="chatml")], sequence_length=32, workers=workers,
        cache_dir=str(tmp_path / "cache"), calibration_fraction=0.2, held_out_fraction=0.2,
    )  # fmt: skip
    with pytest.raises(DataError, match="line 32: not JSON"):
        build_blocks(config, tokenizer, "train")
    skip = dataclasses.replace(config, on_bad_record="skip")
    build_blocks(skip, tokenizer, "train")
    found = {entry["place"]: entry["reason"] for entry in skipped.entries()}
    assert found["line 31"].startswith("message 2: name: the template chatml does not write it")
    assert found.keys() == {"line 31", "line 32"}
    lines(path, *rows, CALLED)
    with pytest.raises(DataError, match=rf"{path}, line 31: message 2: name: the template chatml"):
        build_blocks(config, tokenizer, "train")


# -------------------------------------------------------------------------------------------------------------- stages


def test_results_of_a_stage(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({**GOOD, "prompt": f"q{n}"} for n in range(6)), *BAD)
    config = SftConfig(
        model="m", output=str(tmp_path / "out"), data=ChatDataConfig(path=str(path), on_bad_record="skip")
    )

    def run(config: SftConfig) -> dict[str, Any]:
        Path(config.output).mkdir(exist_ok=True)
        load_chats(config.data)
        return {"steps": 1}

    module: Any = types.SimpleNamespace(run=run)
    file = tmp_path / "out" / "skipped.jsonl"
    assert skipped.run_module(module, config, rank=1) == {"steps": 1}
    assert not file.exists()
    assert skipped.run_module(module, config, rank=0) == {"steps": 1, "skipped_records": 5}
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [entry["place"] for entry in kept] == [f"line {n}" for n in range(7, 12)]
    assert kept[1] == {"file": str(path), "place": "line 8", "record": [1],
                       "reason": "a JSON object is needed, not list"}  # fmt: skip
    # A run that goes on and reads nothing keeps the list.
    idle: Any = types.SimpleNamespace(run=lambda config: {"steps": 2})
    assert skipped.run_module(idle, config, rank=0) == {"steps": 2, "skipped_records": 5}
    lines(path, *({**GOOD, "prompt": f"q{n}"} for n in range(6)))
    clean = dataclasses.replace(config, output=str(tmp_path / "clean"))
    assert skipped.run_module(module, clean, rank=0) == {"steps": 1, "skipped_records": 0}
    assert not (tmp_path / "clean" / "skipped.jsonl").exists()
    refuse = dataclasses.replace(clean, data=ChatDataConfig(path=str(path)), output=str(tmp_path / "refuse"))
    assert skipped.run_module(module, refuse, rank=0) == {"steps": 1}
    assert skipped.skipped_path("a/b.nemo") == Path("a/b.nemo.skipped.jsonl")


@pytest.mark.slow
def test_a_stage_writes_what_it_left_out(tmp_path: Path) -> None:
    """``minitron tokens``, in processes of its own; again from the cache."""
    from support.checkpoints import tiny_checkpoint

    path = lines(tmp_path / "a.jsonl", *({"text": text} for text in sentences(80, 40, seed=1)), "{oops", {"text": 1})
    model = tiny_checkpoint(tmp_path / "model")
    for name in ("first", "second"):
        config = TokensConfig(
            model=str(model), output=str(tmp_path / name),
            data=DataConfig(
                sources=[SourceConfig(name="mine", path=str(path))], sequence_length=16,
                cache_dir=str(tmp_path / "cache"), on_bad_record="skip",
            ),
        )  # fmt: skip
        record = local.run_stage(config)
        assert record["metrics"]["skipped_records"] == 2
        kept = [json.loads(line) for line in (tmp_path / name / "skipped.jsonl").read_text().splitlines()]
        assert [(entry["place"], entry["record"]) for entry in kept] == [("line 81", "{oops"), ("line 82", {"text": 1})]
    with pytest.raises(DataError, match="line 81: not JSON"):
        local.run_stage(
            dataclasses.replace(
                config, output=str(tmp_path / "third"), data=dataclasses.replace(config.data, on_bad_record="refuse")
            )
        )


def test_the_setting_is_no_part_of_earlier_identities(tmp_path: Path) -> None:
    from nemo_minitron.config import DepthConfig, GenerateConfig

    for config, groups in (
        (SftConfig(model="m", output="o"), ("data",)),
        (GenerateConfig(model="m", output="o"), ("prompts",)),
        (DepthConfig(model="m", output="o"), ("data", "task")),
    ):
        settings = hashed_settings(config)
        for group in groups:
            assert "on_bad_record" not in settings[group]
            skip = dataclasses.replace(getattr(config, group), on_bad_record="skip")
            changed = hashed_settings(dataclasses.replace(config, **{group: skip}))
            assert changed == settings | {group: settings[group] | {"on_bad_record": "skip"}}
    path = tmp_path / "sft.yaml"
    path.write_text("model: m\noutput: o\ndata: {path: p, on_bad_record: drop}\n")
    with pytest.raises(ConfigError, match="on_bad_record='drop'|on_bad_record=drop"):
        load("sft", path)
