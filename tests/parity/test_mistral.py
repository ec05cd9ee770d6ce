"""Mistral's sliding window, in every layer: logits, gradients, pruning, generation and the formats."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from support.checkpoints import tiny_tokenizer
from support.families import SIZES, some_units, windowed_model
from support.pruning import assert_greedy, live, logits, one_process, tokens

from nemo_minitron.architecture import SLIDING
from nemo_minitron.checkpoints import open_checkpoint, verify, write_checkpoint
from nemo_minitron.errors import CheckpointError, ShapeError
from nemo_minitron.pruning import DepthPrune, WidthPrune, prune_weights
from nemo_minitron.runtime.groups import ParallelLayout

IDS = tokens(2, 12, vocab=SIZES["vocab_size"])


@pytest.fixture(scope="module")
def groups():
    with one_process() as made:
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return windowed_model(tmp_path_factory.mktemp("mistral") / "model")


def eager(path: Path, dtype: torch.dtype = torch.float32):
    """Transformers' model, with the mask of its own that has the window."""
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(path, torch_dtype=dtype, attn_implementation="eager")
    assert type(loaded).__name__ == "MistralForCausalLM"
    return loaded.eval()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours[..., : SIZES["vocab_size"]], theirs[..., : SIZES["vocab_size"]]
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_logits_and_gradients_of_transformers(model, groups, tmp_path):
    """Against float64; other windows, and none, differ."""
    from nemo_minitron.checkpoints.live import canonical_parameters

    checkpoint = open_checkpoint(model)
    assert (checkpoint.architecture.layer_types, checkpoint.architecture.sliding_window) == ((SLIDING,) * 3, 5)
    theirs = eager(model, torch.float64)
    output = theirs(IDS, labels=IDS)
    output.loss.backward()
    (chunk,) = live(checkpoint, groups)
    ours = chunk(IDS, torch.arange(12).expand_as(IDS), None)
    assert relative(ours.detach(), output.logits.detach()) < 1e-5
    rows = ours[:, :-1, : SIZES["vocab_size"]].flatten(0, 1)
    torch.nn.functional.cross_entropy(rows, IDS[:, 1:].flatten()).backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.float().save_pretrained(tmp_path / "gradients")
    (expected,) = live(open_checkpoint(tmp_path / "gradients"), groups)
    gradients = dict(canonical_parameters(expected))
    for name, parameter in canonical_parameters(chunk):
        difference = (parameter.grad - gradients[name]).abs().max() / gradients[name].abs().max()
        assert float(difference) < 1e-4, name

    for change in (
        {"sliding_window": 4},
        {"sliding_window": 6},
        {"layer_types": None, "sliding_window": None},
    ):
        other = dataclasses.replace(checkpoint, architecture=dataclasses.replace(checkpoint.architecture, **change))
        assert relative(logits(live(other, groups), IDS), output.logits.detach()) > 1e-3, change


def test_pruned_models_keep_the_window(model, groups, tmp_path):
    """Offline and live; transformers' Mistral computes the same from what is written."""
    checkpoint = open_checkpoint(model)
    kept = some_units(checkpoint.shape)
    offline = prune_weights(checkpoint, kept)
    assert offline.architecture.layer_types == (SLIDING,) * 2
    (pruned,), (built,) = live(checkpoint, groups), live(offline, groups)
    WidthPrune(kept)(DepthPrune(kept)(pruned))
    assert torch.equal(logits([pruned], IDS), logits([built], IDS))
    write_checkpoint(offline, tmp_path / "pruned", "hf")
    content = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert (content["architectures"], content["model_type"]) == (["MistralForCausalLM"], "mistral")
    assert (content["sliding_window"], content["num_hidden_layers"]) == (5, 2)
    with torch.no_grad():
        assert relative(logits([pruned], IDS), eager(tmp_path / "pruned")(IDS).logits) < 1e-5
    (tmp_path / "pruned" / "minitron.json").unlink()
    assert open_checkpoint(tmp_path / "pruned").architecture == offline.architecture


@pytest.mark.slow
def test_transformers_verifies_an_export(model, tmp_path):
    """With the loader of `minitron export`, on texts longer than the window."""
    source = open_checkpoint(model)
    assert verify(source, write_checkpoint(source, tmp_path / "again", "hf")).relative < 1e-6


def test_generation_beyond_the_window(model, groups):
    """Each token is the one that transformers chooses from the whole text."""
    theirs = eager(model)
    prompts = [IDS[0, :3].tolist(), IDS[1, :9].tolist()]
    assert_greedy(live(open_checkpoint(model), groups), groups, theirs, prompts, vocab=SIZES["vocab_size"])


def test_context_parallelism_is_refused(model):
    from nemo_minitron.distillation.compatibility import check_model

    with pytest.raises(ShapeError, match="parallel.context=2: is not offered for this model of the family 'llama'"):
        check_model(open_checkpoint(model), ParallelLayout(context=2), 8)


def test_a_nemo_file_cannot_hold_the_window(model, tmp_path):
    tiny_tokenizer(model)
    with pytest.raises(CheckpointError, match=r"a .nemo cannot hold sliding windows \(5 tokens\)"):
        write_checkpoint(open_checkpoint(model), tmp_path / "model.nemo", "nemo")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}])
def test_nemo2_has_a_class_of_its_own(scaling, tmp_path):
    """NeMo's Mistral opens and computes what is written; its window counts the tokens before a query's own."""
    source = open_checkpoint(windowed_model(tmp_path / "model", rope_scaling=scaling))
    assert source.architecture.rotary_scaling == scaling
    written = write_checkpoint(source, tmp_path / "nemo2", "nemo2")
    assert verify(source, written).relative < 1e-4
    context = yaml.safe_load((tmp_path / "nemo2" / "context" / "model.yaml").read_text())
    assert context["_target_"].endswith("mistral.MistralModel")
    assert context["config"]["_target_"].endswith("mistral.MistralConfig7B")
    assert context["config"]["window_size"] == [4, 0]
    (tmp_path / "nemo2" / "minitron.json").unlink()
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    assert open_checkpoint(tmp_path / "nemo2").architecture == dataclasses.replace(source.architecture, **ids)
