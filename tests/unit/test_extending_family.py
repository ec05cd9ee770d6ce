"""The model family of docs/extending.md, from a package outside: opened, computed, pruned and written."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch
from support.checkpoints import hf_logits, tiny_tokenizer
from support.extending import install_example
from support.families import SIZES, some_units
from support.pruning import live, logits, one_process, tokens

from nemo_minitron import axes
from nemo_minitron.axes import KeptUnits
from nemo_minitron.checkpoints import open_checkpoint, verify, write_checkpoint
from nemo_minitron.errors import CheckpointError, ShapeError
from nemo_minitron.families import FAMILIES
from nemo_minitron.pruning import DepthPrune, WidthPrune, prune_weights

IDS = tokens(2, 11, vocab=SIZES["vocab_size"])


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The family of the page, registered in this process."""
    install_example("A model family", tmp_path / "site-packages")
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    entry = FAMILIES.register(importlib.import_module("stablelm").STABLELM)
    yield entry
    FAMILIES.unregister(entry.name)


@pytest.fixture
def model(family, tmp_path: Path) -> Path:
    """A random model by transformers, whose heads fill the hidden size, as this class wants it."""
    from transformers import StableLmConfig, StableLmForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "partial_rotary_factor": 0.5}
    made = StableLmForCausalLM(StableLmConfig(**SIZES | heads))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(std=0.2)
            if parameter.ndim == 1 and not name.endswith("bias"):
                parameter.add_(1.0)
    made.save_pretrained(tmp_path / "model")
    return tiny_tokenizer(tmp_path / "model")


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within 1e-4 of the largest logit."""
    assert expected.std() > 0.05
    return bool((found[..., : expected.shape[-1]] - expected).abs().max() <= 1e-4 * expected.abs().max())


def test_messages_name_it(family):
    with pytest.raises(ShapeError, match="known families: .*stablelm"):
        axes.family("gemma")


@pytest.mark.slow
def test_opened_pruned_and_written(model, tmp_path):
    checkpoint = open_checkpoint(model)
    assert (checkpoint.family.name, checkpoint.architecture.rotary_percent) == ("stablelm", 0.5)
    whole, some = KeptUnits.everything(checkpoint.shape), some_units(checkpoint.shape)
    # all that transformers' class can hold: it takes the width of heads from the hidden size
    layers = len(some.layers)
    kept = dataclasses.replace(
        whole, layers=some.layers, ffn=some.ffn, groups=whole.groups[:layers], heads=whole.heads[:layers]
    )
    pruned = prune_weights(checkpoint, kept)
    with one_process() as groups:
        (complete,), (expected,) = live(checkpoint, groups), live(pruned, groups)
        assert close(logits([complete], IDS), hf_logits(model, IDS))
        WidthPrune(kept)(DepthPrune(kept)(complete))
        assert torch.equal(logits([complete], IDS), logits([expected], IDS))
        write_checkpoint(pruned, tmp_path / "hf", "hf")
        assert close(logits([expected], IDS), hf_logits(tmp_path / "hf", IDS))
        # every axis at once, without transformers
        (narrow,), (offline,) = live(checkpoint, groups), live(prune_weights(checkpoint, some), groups)
        WidthPrune(some)(DepthPrune(some)(narrow))
        assert torch.equal(logits([narrow], IDS), logits([offline], IDS))

    write_checkpoint(open_checkpoint(tmp_path / "hf"), tmp_path / "nemo2", "nemo2")
    again = open_checkpoint(tmp_path / "nemo2")
    assert (again.shape, again.architecture.family) == (pruned.shape, "stablelm")
    assert verify(open_checkpoint(tmp_path / "hf"), again).loader == "nemo2"  # NeMo computes what transformers does
    (tmp_path / "nemo2" / "minitron.json").unlink()  # what NeMo's own description says must suffice
    described = open_checkpoint(tmp_path / "nemo2")
    assert (described.shape, described.architecture.family) == (pruned.shape, "stablelm")
    assert described.architecture.rotary_percent == 0.5
    for name in pruned.weights.names():
        assert torch.equal(again.weights.tensor(name), pruned.weights.tensor(name)), name
    with pytest.raises(CheckpointError, match="cannot hold a stablelm model"):
        write_checkpoint(pruned, tmp_path / "model.nemo", "nemo")
