"""Streamed passes give what a live model gives, in every family and in both precisions."""

from __future__ import annotations

import pytest
import torch
from support.families import CLASSES, family_model, windowed_model
from support.pruning import live, one_process, tokens

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.data.blocks import Blocks
from nemo_minitron.importance import score_criteria
from nemo_minitron.importance.streamed import score_streamed
from nemo_minitron.runtime.forward import block_losses
from nemo_minitron.streamed import Pass, StreamedModel

BLOCKS = tokens(5, 13)
CRITERIA = [("mean", "l2"), ("l2", "mean")]


@pytest.fixture(scope="module")
def groups():
    with one_process() as given:
        yield given


def losses(model, blocks, size=2):
    run = Pass(model, Blocks.of(blocks), size)
    run.embed()
    for layer in range(model.shape.num_layers):
        run.through(model.layer(layer))
    return run.losses()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", [*sorted(CLASSES), "windowed"])
def test_every_family(groups, tmp_path, family, dtype):
    path = windowed_model(tmp_path / "m") if family == "windowed" else family_model(family, tmp_path / "m")
    checkpoint = open_checkpoint(path)
    shape = checkpoint.shape
    model = StreamedModel(checkpoint, groups, dtype=dtype)
    streamed = score_streamed(model, BLOCKS, criteria=CRITERIA, micro_batch_size=2)
    means = losses(model, BLOCKS)
    chunks = live(checkpoint, groups, dtype=dtype)
    expected = score_criteria(chunks, BLOCKS, groups, criteria=CRITERIA, shape=shape, micro_batch_size=2)
    for ours, theirs in zip(streamed, expected, strict=True):
        for name in ("ffn", "heads", "groups", "hidden", "layers", *(["experts"] if shape.num_moe_experts else [])):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        means, block_losses(chunks, groups, BLOCKS, 2, vocab_size=shape.vocab_size), rtol=1e-5, atol=1e-6
    )
