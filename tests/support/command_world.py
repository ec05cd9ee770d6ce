"""The models and files that the commands of README and guides read, where the shipped configurations look for them.

SmolLM2-135M's shape, in files without content: a dry run reads sizes and never a weight.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from support.chats import chats, preferences
from support.checkpoints import tiny_tokenizer
from support.text import sentences, write_jsonl

__all__ = ["hollow_model", "make_world"]

SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


def hollow_model(path: Path, **changes: Any) -> Path:
    """A Llama of SmolLM2's sizes whose weights are a hole in a file: all zero, and no disk."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**(SMOLLM2 | changes), architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    config.save_pretrained(path)
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            begin, end = end, end + 4 * tensor.numel()
            header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    tiny_tokenizer(path, size=SMOLLM2["vocab_size"])
    return path


def make_world(folder: Path, configs: Path) -> None:
    """Below ``folder``: the shipped configurations, text, and the outputs of ``runs/example`` and ``runs/demo``."""
    (folder / "configs").symlink_to(configs)
    for name in ("corpus/text.jsonl", "data/mine.jsonl"):
        write_jsonl(_new(folder / name), sentences(400, 40, 0))
    chat_lines = "".join(json.dumps(record) + "\n" for record in chats(24))
    pair_lines = "".join(json.dumps(record) + "\n" for record in preferences(24))
    (folder / "data/pairs.jsonl").write_text(pair_lines, encoding="utf-8")
    for name in (
        "data/chats.jsonl",
        "prompts.jsonl",
        "runs/example/answers/answers.jsonl",
        "runs/example/steerlm/labels/labelled.jsonl",
    ):
        _new(folder / name).write_text(chat_lines, encoding="utf-8")
    for name in (
        "tasks",
        "runs/mine",
        "runs/other",
        "runs/example/attribute_model",
        "runs/example/steerlm/attribute_model",
    ):
        (folder / name).mkdir(parents=True)
    teacher, pruned = hollow_model(folder / "teacher"), hollow_model(folder / "pruned", num_hidden_layers=28)
    for name in ("mine", "SmolLM2-135M-Instruct"):
        _new(folder / "models" / name).symlink_to(teacher)
    for run in ("example", "demo"):
        _new(folder / "runs" / run / "teacher").symlink_to(teacher)
        _new(folder / "runs" / run / "corrected/model").symlink_to(teacher)
        for name in ("pruned", "distilled/model", "sft/model", "steerlm/sft/model", "export/plain"):
            _new(folder / "runs" / run / name).symlink_to(pruned)
    _measurements(folder / "runs/example", teacher)


def _measurements(run: Path, teacher: Path) -> None:
    """Scores, depth scores, frequencies and the best shape, as if the stages had measured them."""
    import torch

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.checkpoints.tokenizer.trimming import write_frequencies
    from nemo_minitron.importance import DepthScores, Measurement, Scores
    from nemo_minitron.search import Sizes

    checkpoint = open_checkpoint(teacher)
    shape = checkpoint.shape
    layers, generator = shape.num_layers, torch.Generator().manual_seed(0)

    def some(*sizes: int) -> torch.Tensor:
        return torch.rand(sizes, generator=generator, dtype=torch.float64)

    best = Sizes.of(shape)._replace(num_layers=28)
    found = {"format_version": 1, "best": best.name, "candidates": [{"name": best.name, "sizes": best._asdict()}]}
    _new(run / "search" / "search.json").write_text(json.dumps(found))
    Scores(
        ffn=some(layers, shape.ffn_hidden_size),
        heads=some(layers, shape.num_attention_heads),
        groups=some(layers, shape.num_query_groups),
        hidden=some(shape.hidden_size),
        layers=some(layers),
        shape=shape,
        samples=1,
        tokens=16,
        sequence="mean",
        batch="l2",
    ).save(run / "scores")
    for name in ("depth", "tokens"):
        (run / name).mkdir()
    runs = [tuple(range(first, first + length)) for length in (1, 4, 6) for first in range(layers - length + 1)]
    DepthScores({(): Measurement(2.0)} | {run: Measurement(2.0 + len(run)) for run in runs}, shape, 1, 16).save(
        run / "depth"
    )
    assert checkpoint.tokenizer is not None
    write_frequencies(
        [1] * shape.vocab_size, run / "tokens/frequencies.tsv", tokenizer=checkpoint.tokenizer, comment="made up"
    )


def _new(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
