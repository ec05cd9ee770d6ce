"""Held-out loss and generation on live Megatron models, against transformers on the same checkpoint, by layout."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_checkpoint, tokens
from support.distributed import run_distributed

BLOCKS = 5  # not a multiple of the micro-batch: the last one is padded
PROMPTS = ["w3 w4 w5", "w10"]

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "dp2": {"data": 2},
    "tp2-pp2": {"tensor": 2, "pipeline": 2},
    "pp2-vp2": {"pipeline": 2, "virtual_pipeline": 2},
}


def evaluate(path: str, layout: dict[str, Any], blocks: torch.Tensor, broken: bool = False) -> dict[str, Any]:
    """On each rank: loss by domain and generations of the checkpoint at ``path``."""
    from nemo_minitron.checkpoints import load_into, open_checkpoint
    from nemo_minitron.data import load_tokenizer
    from nemo_minitron.errors import MinitronError
    from nemo_minitron.evaluation import generate_megatron, held_out_loss
    from nemo_minitron.runtime.groups import ParallelLayout, initialize
    from nemo_minitron.runtime.model import build_model

    groups = initialize(ParallelLayout(**layout))
    checkpoint = open_checkpoint(path)
    chunks = build_model(checkpoint.shape, checkpoint.architecture, groups)
    load_into(chunks, checkpoint, groups)
    vocab = checkpoint.shape.vocab_size
    if broken:
        chunks[-1].decoder.layers[0].mlp.linear_fc2.weight.data[0, 0] = torch.nan
    done: list[int] = []
    domains = {"first": blocks[:2], "second": blocks[2:]}
    try:
        loss = held_out_loss(chunks, groups, domains, 2, vocab_size=vocab, progress=done.append)
    except MinitronError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    answers = generate_megatron(
        chunks, groups, load_tokenizer(checkpoint.tokenizer), PROMPTS, max_new_tokens=8, vocab_size=vocab
    )
    return {"loss": loss.to_dict(), "done": sum(done), "answers": [answer.to_dict() for answer in answers]}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return tiny_checkpoint(path, tied=request.param, num_hidden_layers=4)


def reference(path: Path, blocks: torch.Tensor) -> list[float]:
    """transformers' own loss of each block."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        return [float(model(block[None], labels=block[None]).loss) for block in blocks]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_equals_transformers_under_every_layout(checkpoint: Path, layout: dict[str, Any], tmp_path: Path) -> None:
    from nemo_minitron.evaluation import generate
    from nemo_minitron.runtime.groups import ParallelLayout

    blocks = tokens(rows=BLOCKS, length=17)
    expected = torch.tensor(reference(checkpoint, blocks), dtype=torch.float64)
    answers = [answer.to_dict() for answer in generate(checkpoint, PROMPTS, max_new_tokens=8)]
    world = ParallelLayout(**layout).world_size
    for result in run_distributed(evaluate, world, tmp_path, path=str(checkpoint), layout=layout, blocks=blocks):
        loss = result["loss"]
        assert loss["loss"] == pytest.approx(float(expected.mean()), abs=1e-5)
        assert loss["domains"]["first"]["loss"] == pytest.approx(float(expected[:2].mean()), abs=1e-5)
        assert loss["domains"]["second"]["loss"] == pytest.approx(float(expected[2:].mean()), abs=1e-5)
        assert loss["standard_error"] == pytest.approx(float(expected.std()) / BLOCKS**0.5, abs=1e-5)
        assert loss["perplexity"] == pytest.approx(float(expected.mean().exp()), rel=1e-5)
        assert loss["tokens"] == BLOCKS * 16
        assert result["done"] == BLOCKS
        assert result["answers"] == answers


@pytest.mark.slow
def test_non_finite_loss_is_refused_on_every_rank(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model", num_hidden_layers=4)
    found = run_distributed(
        evaluate, 2, tmp_path, path=str(path), layout={"pipeline": 2}, blocks=tokens(rows=3, length=17), broken=True
    )
    for result in found:
        assert result["error"].startswith("NonFiniteError: the held-out loss of 3 of 3 blocks is NaN or infinite")


def test_sequence_parallel_needs_a_multiple() -> None:
    from nemo_minitron.errors import ShapeError
    from nemo_minitron.evaluation import held_out_loss
    from nemo_minitron.runtime.groups import ParallelLayout

    groups = SimpleNamespace(layout=ParallelLayout(tensor=2, sequence_parallel=True))
    with pytest.raises(ShapeError, match=r"15 tokens cannot be split over parallel.tensor=2"):
        held_out_loss([], groups, tokens(rows=3, length=16), 1, vocab_size=5)  # type: ignore[arg-type]


def test_padding_rows_do_not_count() -> None:
    from nemo_minitron.runtime import cpu, groups
    from nemo_minitron.runtime.forward import mask_padding

    cpu.activate()
    try:
        groups.initialize(groups.ParallelLayout())
        logits = torch.zeros(2, 3, 10)
        assert torch.equal(mask_padding(logits.clone(), 10), logits)
        masked = mask_padding(logits, 7)
        assert torch.equal(masked.softmax(-1)[0, 0], torch.tensor([1 / 7] * 7 + [0] * 3))
    finally:
        groups.destroy()
        cpu.deactivate()


def test_no_blocks_is_refused() -> None:
    from nemo_minitron.errors import DataError
    from nemo_minitron.evaluation import held_out_loss

    empty = torch.zeros(0, 9, dtype=torch.int64)
    with pytest.raises(DataError, match="at least one block of 'b'"):
        held_out_loss([], None, {"a": tokens(), "b": empty}, 1, vocab_size=5)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="at least one block; none"):
        held_out_loss([], None, {}, 1, vocab_size=5)  # type: ignore[arg-type]


def test_generate_refuses_what_transformers_cannot_load(tmp_path: Path) -> None:
    from nemo_minitron.errors import CheckpointError
    from nemo_minitron.evaluation import generate

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        generate(tmp_path, ["x"], max_new_tokens=1)


def test_prompt_without_tokens_is_refused(tmp_path: Path) -> None:
    from support.text import write_tokenizer

    from nemo_minitron.data import load_tokenizer
    from nemo_minitron.errors import DataError
    from nemo_minitron.evaluation.generation import encode_prompt

    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "plain"))
    assert encode_prompt(tokenizer, "w0 w1") == [3, 4]
    with pytest.raises(DataError, match="gives no token"):
        encode_prompt(tokenizer, "")
    chat = load_tokenizer(write_tokenizer(tmp_path / "chat", chat=True))
    assert encode_prompt(chat, "w0 w1") == [2, 3, 4]
