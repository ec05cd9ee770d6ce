"""``minitron chat``: a conversation over a pipe with models of several formats, its commands, its refusals."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.run_dir import write_run
from typer.testing import CliRunner

from nemo_minitron.cli.app import app
from nemo_minitron.cli.chat import ChatOptions, _changed, model_of
from nemo_minitron.config import Sampling
from nemo_minitron.errors import CheckpointError, ConfigError

#: Talks to each model in turn, in one process, with the same lines.
TALK = """
import dataclasses, io, sys
from nemo_minitron.cli.chat import ChatOptions, talk
from nemo_minitron.config import Sampling
from nemo_minitron.runtime.groups import destroy
lines = sys.stdin.read()
for path in sys.argv[1:]:
    options = ChatOptions(Sampling(max_new_tokens=6, greedy=True), template="chatml", device="cpu", threads=1)
    answers = io.StringIO()
    talk(path, options, source=io.StringIO(lines), target=answers)
    print("==", answers.getvalue().encode().hex())
    print("==", file=sys.stderr)
    destroy()
import os
sys.stdout.flush(); sys.stderr.flush(); os._exit(0)
"""

LINES = ["w1 w2", "/what", "w7", "/reset", "w1 w2", "/system w9", "/set max_new_tokens=2 top_k=x", "w1 w2",
         "/set max_new_tokens=2", "", "w1 w2", "w3 " * 70, "/quit", "w5"]  # fmt: skip


@pytest.mark.slow
def test_a_conversation_with_models_of_several_formats(tmp_path: Path) -> None:
    import torch
    from support.checkpoints import hf_logits, tiny_checkpoint

    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
    from nemo_minitron.data import load_tokenizer
    from nemo_minitron.data.chat.conversations import Message
    from nemo_minitron.data.chat.templates import choose_template, end_ids, prompt_ids

    path = tiny_checkpoint(tmp_path / "hf")
    for form, place in (("nemo2", "distilled/model"), ("nemo", "model.nemo")):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        write_checkpoint(open_checkpoint(path), tmp_path / place, form)
    models = [str(path), str(tmp_path / "distilled"), str(tmp_path / "model.nemo")]
    done = subprocess.run(
        [sys.executable, "-c", TALK, *models], input="\n".join(LINES), capture_output=True, text=True, timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shown = [bytes.fromhex(line[3:]).decode() for line in done.stdout.splitlines() if line.startswith("== ")]
    remarks = done.stderr.split("==\n")[0]
    assert shown[0] == shown[1] == shown[2]

    tokenizer = load_tokenizer(path)
    template = choose_template(tokenizer, "chatml")
    ends = end_ids(tokenizer, template)

    def answer(turns: list[Message], most: int) -> str:
        ids = prompt_ids(turns, tokenizer, template)
        start = len(ids)
        while len(ids) - start < most and (len(ids) == start or ids[-1] not in ends):
            ids.append(int(hf_logits(path, torch.tensor([ids]))[0, -1].argmax()))
        text = tokenizer.decode([token for token in ids[start:] if token not in ends], skip_special_tokens=True)
        return text.strip()

    first = answer([Message("user", "w1 w2")], 6)
    said = [Message("user", "w1 w2"), Message("assistant", first), Message("user", "w7")]
    with_system = [Message("system", "w9"), Message("user", "w1 w2")]
    long = answer(with_system, 6)
    again = [*with_system, Message("assistant", long), Message("user", "w1 w2")]
    expected = [first, answer(said, 6), first, long, answer(again, 2)]
    assert [line.strip() for line in shown[0].splitlines()] == expected
    assert "/what is no command; /help shows them" in remarks
    assert "top_k=x: is no value of top_k" in remarks
    assert "leave no room for an answer in a context of 64" in remarks
    assert "cut off after 2 tokens (/set max_new_tokens=N)" in remarks
    assert "Traceback" not in done.stderr


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    def refused(*words: str) -> str:
        done = CliRunner().invoke(app, ["chat", *words], input="")
        assert done.exit_code == 2, (done.output, done.exception)
        return done.stderr

    assert "temperature=0.0: must be above 0" in refused(str(tmp_path), "--temperature", "0")
    assert "--device=tpu: must be one of auto, cpu, cuda" in refused(str(tmp_path), "--device", "tpu")
    assert (
        refused(str(tmp_path))
        == f"minitron: {tmp_path}: holds neither a model nor a run that made one; name a checkpoint\n"
    )


def test_settings_of_a_conversation() -> None:
    changed = _changed(Sampling(), "temperature=0.5 greedy=true top_k=3")
    assert (changed.temperature, changed.greedy, changed.top_k) == (0.5, True, 3)
    assert _changed(changed, "top_k=null").top_k is None
    for words, message in (
        ("", "no setting is given"),
        ("heat=2", "heat=2: is none of the settings max_new_tokens=VALUE"),
        ("top_p=2", "top_p=2: must be at most 1"),
        ("max_new_tokens=1.5", "is no value of max_new_tokens"),
        ("temperature=true", "is no value of temperature"),
    ):
        with pytest.raises(ConfigError, match=message):
            _changed(Sampling(), words)
    assert ChatOptions(threads=0, seed=-1, max_length=0).faults() == [
        "--threads=0: must be above 0", "--max-length=0: must be above 0", "--seed=-1: must be 0 or more",
    ]  # fmt: skip


def test_a_run_stands_for_the_model_that_it_was_for(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=20)
    (run / "distilled/model/config.json").write_text("{}")
    assert model_of(str(run)) == str(run / "distilled/model")
    assert model_of(str(run / "distilled")) == str(run / "distilled/model")
    assert model_of(str(run / "export")) == str(run / "export/hf")
    assert model_of("owner/name") == "owner/name"  # opening looks into the Hub's cache
    with pytest.raises(CheckpointError, match="neither a model nor a run"):
        model_of(str(run / "scores"))


def test_text_appears_as_whole_characters() -> None:
    from nemo_minitron.serving.chat import _Stream

    class Bytes:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode(errors="replace")

    shown = io.StringIO()
    stream = _Stream(Bytes(), (0,), shown.write)
    pieces = []
    tokens = [*"aé日".encode(), 0]
    for length in range(1, len(tokens) + 1):
        stream.take(tokens[:length])
        pieces.append(shown.getvalue())
    assert pieces == ["a", "a", "aé", "aé", "aé", "aé日", "aé日"]
    stream = _Stream(Bytes(), (0,), shown.write)
    stream.finish([0xC3])  # cut off within a character: what there is of it
    assert stream.text == "\N{REPLACEMENT CHARACTER}"
