"""Whatever becomes of a file that is read, a reader refuses it by one line with its path, or takes no harm.

Every file of every input is cut, emptied, flipped in single bits, replaced by a directory, by another file, and by text
that is nested or stands for more than it says. ``MINITRON_FUZZ=<seed>:<changes of a file>`` tries others.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.checkpoints import tiny_checkpoint, tiny_tokenizer
from support.pruning import random_checkpoint

from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.formats.torch_dist.writer import write_torch_dist
from nemo_minitron.config import EvaluateConfig, PruneConfig, load, load_pipeline
from nemo_minitron.data.chat.conversations import parse_chat, read_records
from nemo_minitron.distillation.teachers.manifest import Manifest
from nemo_minitron.errors import MinitronError
from nemo_minitron.importance import Scores, magnitude_scores
from nemo_minitron.jobs.output import Output
from nemo_minitron.pruning.kept import load_kept, save_kept
from nemo_minitron.units import KeptUnits

#: A line, or a line and a list of bad records below it.
LINES = re.compile(r"[^\n]+(\n  [^\n]+)*")
SEED, CHANGES = (int(part) for part in os.environ.get("MINITRON_FUZZ", "11:6").split(":"))
ALIASES = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def flipped(content: bytes, dice: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(dice.choice((1, 1, 8))):
        if changed:
            changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


#: What becomes of a file's content; None: a directory stands there.
WAYS: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "cut": lambda content, dice: content[: dice.randrange(max(1, len(content)))],
    "empty": lambda content, dice: b"",
    "flipped": flipped,
    "a directory": lambda content, dice: None,
    "foreign": lambda content, dice: dice.choice((b"\0\1\2" * 99, b"PK\3\4" + content, b"\x80\4.", b"\xff\xfe", b"0")),
    "JSON of another kind": lambda content, dice: dice.choice((b"[]", b"{}", b"null", b'"a"', b"[{}]", b'{"a": [{}]}')),
    "nested": lambda content, dice: dice.choice((b"[", b'{"a":', b"- ")) * dice.choice((150, 900, 20_000)),
    "aliases": lambda content, dice: ALIASES.encode(),
    "half": lambda content, dice: content.replace(b"1", b"null", 1),
    "numbers": lambda content, dice: content.replace(b"2", dice.choice((b"-3", b"1e400", b"9" * 5000, b"0")), 1),
}


def read_weights(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.weights.names():
        checkpoint.weights.tensor(name)


def hugging_face(path: Path) -> Path:
    return tiny_checkpoint(path)


def own(path: Path) -> Path:
    write_checkpoint(open_checkpoint(tiny_checkpoint(path.with_name("source"))), path, "hf", max_shard_size=40_000)
    return path


def nemo1(path: Path) -> Path:
    write_checkpoint(open_checkpoint(tiny_checkpoint(path.with_name("source"))), path / "model.nemo", "nemo")
    return path


def nemo2(path: Path) -> Path:
    source = open_checkpoint(tiny_checkpoint(path.with_name("source")))
    write_torch_dist(source, path / "weights", prefix="module.", dtype="float32", vocab_rows=256, common={})
    tiny_tokenizer(path / "context" / "my_tokenizer")
    config = {
        "_target_": "nemo.collections.llm.gpt.model.llama.LlamaConfig", "num_layers": 3, "hidden_size": 48,
        "ffn_hidden_size": 76, "num_attention_heads": 6, "num_query_groups": 2, "kv_channels": 12,
        "share_embeddings_and_output_weights": False, "layernorm_epsilon": 1e-5, "vocab_size": None,
        "rotary_base": 20000, "seq_length": 64,
        "normalization": "RMSNorm", "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    }  # fmt: skip
    model = {"config": config, "tokenizer": {"pretrained_model_name": "my_tokenizer"}}
    (path / "context" / "model.yaml").write_text(yaml.safe_dump(model))
    return path


def torch_files(path: Path) -> Path:
    tiny_checkpoint(path)
    from safetensors.torch import load_file

    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(tensors, path / "pytorch_model.bin")
    return path


def scores(path: Path) -> Path:
    magnitude_scores(random_checkpoint()).save(path)
    return path


def kept(path: Path) -> Path:
    path.mkdir()
    shape = random_checkpoint().shape
    save_kept(KeptUnits.everything(shape), shape, path / "kept.json")
    return path


def record(path: Path) -> Path:
    config = PruneConfig(name="p", output=str(path), model="teacher")
    path.mkdir()
    (path / "table").write_text("1, 2")
    Output(config).begin()
    Output(config).finish({"a": 1}, 1.0)
    return path


def read_record(path: Path) -> None:
    Output(PruneConfig(name="p", output=str(path), model="teacher")).state()
    reader = Output(EvaluateConfig(name="e", output=str(path.with_name("e")), models={"a": str(path)}))
    reader.state()
    reader.check_inputs()


def settings(path: Path) -> Path:
    path.mkdir()
    prune = {"name": "p", "output": "out", "model": "teacher", "scores": "scores", "target": {"ffn_hidden_size": 64}}
    (path / "prune.yaml").write_text(yaml.safe_dump(prune))
    stages = [{"stage": "import", "name": "teacher", "source": "x"}, {"stage": "export", "name": "e", "model": "y"}]
    (path / "pipeline.yaml").write_text(yaml.safe_dump({"name": "n", "output": "run", "stages": stages}))
    return path


def read_settings(path: Path) -> None:
    load("prune", path / "prune.yaml")
    load_pipeline(path / "pipeline.yaml")


def chats(path: Path) -> Path:
    path.mkdir()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (path / "chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(3)))
    return path


#: How an input is made, and how it is read.
DOORS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "hf": (hugging_face, read_weights),
    "hf of our own": (own, read_weights),
    "hf with a torch file": (torch_files, read_weights),
    "nemo": (nemo1, lambda path: read_weights(path / "model.nemo")),
    "nemo2": (nemo2, read_weights),
    "scores": (scores, Scores.load),
    "kept units": (kept, lambda path: load_kept(path / "kept.json")),
    "record": (record, read_record),
    "settings": (settings, read_settings),
    "chats": (chats, lambda path: read_records(path / "chats.jsonl", parse_chat)),
    "manifest": (lambda path: made_manifest(path), Manifest.read),
}


def made_manifest(path: Path) -> Path:
    path.mkdir()
    values = {
        field.name: {"int": 1, "str": "a", "float": 1.0, "bool": True}.get(str(field.type))
        for field in dataclasses.fields(Manifest)
    }
    (path / "manifest.json").write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("door", list(DOORS))
def test_a_changed_file_is_refused_by_one_line_or_does_no_harm(tmp_path, door):
    make, read = DOORS[door]
    place = make(tmp_path / "input")
    files = sorted(file for file in tmp_path.glob("input/**/*") if file.is_file())
    files += sorted(tmp_path.glob("logs/**/*.json"))
    dice = random.Random(f"{SEED} {door}")
    faults: list[str] = []
    crashes: list[str] = []
    for file in files:
        content = file.read_bytes()
        ways = [*WAYS, *["flipped"] * CHANGES, *["cut"] * (CHANGES // 2)]
        for way in ways if len(files) < 12 else dice.sample(ways, max(8, CHANGES)):
            what = f"seed {SEED}: {way} {file.relative_to(tmp_path)}"
            changed = WAYS[way](content, dice)
            file.unlink()
            if changed is None:
                file.mkdir()
            else:
                file.write_bytes(changed)
            started = time.monotonic()
            try:
                read(place)
            except MinitronError as error:
                said = getattr(error, "faults", [str(error)])
                faults += said
                crashes += [f"{what}: {fault!r}" for fault in said if not LINES.fullmatch(fault)]
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                crashes.append(f"{what}: {error!r}, {last.filename}:{last.lineno}: {str(changed)[:80]}")
            if time.monotonic() - started > 10:
                crashes.append(f"{what}: took {time.monotonic() - started:.0f} s")
            if changed is None:
                file.rmdir()
            file.write_bytes(content)
    assert not crashes, "\n".join(crashes)
    assert faults or door == "record"
    if door != "manifest":
        read(place)
