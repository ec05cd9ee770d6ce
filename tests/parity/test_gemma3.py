"""Gemma 3's own: windows and types of layers, what pruning makes of them and of scaled embeddings, generation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import hf_logits
from support.families import SIZES, family_model, some_units
from support.pruning import DictWeights, assert_greedy, live, logits, one_process, tokens

from nemo_minitron.architecture import FULL, SLIDING
from nemo_minitron.axes import KeptUnits
from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.errors import ShapeError
from nemo_minitron.pruning import DepthPrune, prune_weights
from nemo_minitron.runtime.groups import ParallelLayout

IDS = tokens(2, 12, vocab=SIZES["vocab_size"])


@pytest.fixture(scope="module")
def groups():
    with one_process() as made:
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return family_model("gemma3", tmp_path_factory.mktemp("gemma3") / "model")


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if SIZES["vocab_size"] < max(ours.shape[-1], theirs.shape[-1]):  # logits of a padded vocabulary
        ours, theirs = ours[..., : SIZES["vocab_size"]], theirs[..., : SIZES["vocab_size"]]
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_every_constant_matters(model, groups):
    """Another window, base, scale or type of a layer gives other logits: the parity with transformers tests them."""
    checkpoint = open_checkpoint(model)
    assert checkpoint.architecture.layer_types == (SLIDING, FULL, SLIDING)
    expected = logits(live(checkpoint, groups), IDS)
    for change in (
        {"sliding_window": 6},
        {"sliding_window": 12},
        {"rotary_base_local": 20000.0},
        {"rotary_base": 500.0},
        {"query_pre_attn_scalar": None},
        {"layer_types": (FULL, SLIDING, SLIDING)},
    ):
        other = dataclasses.replace(checkpoint, architecture=dataclasses.replace(checkpoint.architecture, **change))
        assert relative(logits(live(other, groups), IDS), expected) > 1e-3, change


def test_a_window_reaches_its_own_token_and_those_before(model, groups):
    """In a model of sliding layers alone a token reaches no further than the windows of all layers together."""
    checkpoint = open_checkpoint(model)
    sliding = dataclasses.replace(checkpoint.architecture, layer_types=(SLIDING,) * 3, sliding_window=3)
    chunks = live(dataclasses.replace(checkpoint, architecture=sliding), groups)
    changed = IDS.clone()
    changed[:, 0] = (changed[:, 0] + 1) % SIZES["vocab_size"]
    moved = (logits(chunks, changed) - logits(chunks, IDS)).abs().amax(dim=(0, 2))
    # three layers of two tokens back each
    assert (moved[:7] > 1e-6).all() and (moved[7:] < 1e-6).all()


def test_documents_within_windows(model, groups):
    """Two documents in a block: the mask between them and the windows hold at once."""
    from nemo_minitron.runtime.masks import attention_mask, document_positions

    (chunk,) = live(open_checkpoint(model), groups)
    segments = torch.tensor([[0] * 4 + [1] * 8]).expand(2, -1)
    with torch.no_grad():
        both = chunk.eval()(IDS, document_positions(segments), attention_mask(segments))
    assert relative(both[:, 4:], logits([chunk], IDS[:, 4:])) < 1e-5
    assert relative(logits([chunk], IDS)[:, 4:], both[:, 4:]) > 1e-3


def depth(shape: Any, layers: tuple[int, ...]) -> KeptUnits:
    everything = KeptUnits.everything(shape)
    per_layer = {
        name: tuple(getattr(everything, name)[layer] for layer in layers) for name in ("ffn", "groups", "heads")
    }
    return dataclasses.replace(everything, layers=layers, **per_layer)


@pytest.mark.parametrize("layers", [(0, 1), (0, 2), (1, 2), (1,)])
def test_a_layer_keeps_its_type(layers, model, groups, tmp_path):
    """Offline, live and in the written configuration; transformers without ``layer_types`` refuses what no pattern
    gives, and computes the rest."""
    from nemo_minitron.checkpoints.formats.huggingface.loader import hf_logits as loader

    checkpoint = open_checkpoint(model)
    kept = depth(checkpoint.shape, layers)
    types = tuple(checkpoint.architecture.layer_types[layer] for layer in layers)
    offline = prune_weights(checkpoint, kept)
    assert offline.architecture.layer_types == types
    written = write_checkpoint(offline, tmp_path / "pruned", "hf")
    assert written.architecture.layer_types == types
    (pruned,) = live(checkpoint, groups)
    DepthPrune(kept)(pruned)
    assert pruned.config.layer_types == types
    # the layers themselves, run without the others
    (whole,) = live(checkpoint, groups)
    from nemo_minitron.importance import left_out

    with left_out([whole], [layer for layer in range(3) if layer not in layers]):
        expected = logits([whole], IDS)
    assert relative(logits([pruned], IDS), expected) < 1e-6
    assert relative(logits(live(written, groups), IDS), expected) < 1e-6
    assert relative(loader(tmp_path / "pruned", IDS, torch.float32).detach(), expected) < 1e-4
    content = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert content["layer_types"] == list(types)
    if layers == (1, 2):
        assert content["sliding_window_pattern"] is None
        with pytest.raises(TypeError):
            hf_logits(tmp_path / "pruned", IDS)


def test_embeddings_stay_as_they_are_when_the_width_is_pruned(model, groups):
    """Against the model whose channels are masked: sliced embeddings keep the residual stream's proportions, and
    embeddings that made up for the smaller factor would not.

    What is left are the inputs of the MLP and the logits, smaller by sqrt(H'/H): exact with those two norms scaled
    (test_families.py). Here the residual streams are compared, with the MLP's norm scaled."""
    checkpoint = open_checkpoint(model)
    shape = checkpoint.shape
    kept = dataclasses.replace(KeptUnits.everything(shape), hidden=some_units(shape).hidden)
    gone = sorted(set(range(shape.hidden_size)) - set(kept.hidden))
    masked = {name: checkpoint.weights.tensor(name).clone() for name in checkpoint.weights.names()}
    for name, tensor in masked.items():
        if "word_embeddings" in name:
            tensor[:, gone] = 0
        elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            tensor[gone] = 0
    (reference,) = live(dataclasses.replace(checkpoint, weights=DictWeights(masked)), groups)
    pruned = prune_weights(checkpoint, kept)
    ratio = (shape.hidden_size / len(kept.hidden)) ** 0.5
    tensors = {name: pruned.weights.tensor(name) for name in pruned.weights.names()}
    for name in tensors:
        if name.endswith("linear_fc1.layer_norm_weight"):
            tensors[name] = (tensors[name] + 1) * ratio - 1

    def stream(chunk: Any) -> torch.Tensor:
        states: list[torch.Tensor] = []
        handle = chunk.decoder.final_layernorm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
        logits([chunk], IDS)
        handle.remove()
        return states[0]

    expected = stream(reference)[..., list(kept.hidden)] / ratio
    sliced, folded = (
        stream(live(dataclasses.replace(pruned, weights=DictWeights(changed)), groups)[0])
        for changed in (
            tensors,
            {name: tensor * ratio if "word_embeddings" in name else tensor for name, tensor in tensors.items()},
        )
    )
    assert relative(sliced, expected) < 1e-4
    assert relative(folded, expected) > 1e-2


def test_generation_beyond_the_window(model, groups):
    """Keys and values are cached for whole texts, and a sliding layer looks at the last ones; each token is the one
    that transformers chooses from the whole text."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    prompts = [IDS[0, :3].tolist(), IDS[1, :9].tolist()]
    assert_greedy(live(open_checkpoint(model), groups), groups, theirs, prompts, vocab=SIZES["vocab_size"])


def test_context_parallelism_is_refused(model):
    from nemo_minitron.distillation.compatibility import check_model
    from nemo_minitron.runtime.device import Device
    from nemo_minitron.runtime.model import transformer_config

    checkpoint = open_checkpoint(model)
    with pytest.raises(ShapeError, match="parallel.context=2: is not offered"):
        check_model(checkpoint, ParallelLayout(context=2), 8)
    with pytest.raises(ShapeError, match="parallel.context=2: is not offered for this model of the family 'gemma3'"):
        transformer_config(
            checkpoint.shape, checkpoint.architecture, ParallelLayout(context=2), Device("cpu", 0, False)
        )


def test_half_precision_rounds_as_transformers(model, groups):
    """The factor of the embeddings is rounded to bfloat16, norms compute in float32: as in transformers."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        model, torch_dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    (chunk,) = live(open_checkpoint(model), groups, dtype=torch.bfloat16)
    embedded = chunk.embedding(IDS, torch.arange(12).expand_as(IDS)).transpose(0, 1)
    assert torch.equal(embedded, theirs.model.embed_tokens(IDS))
    layer, norm = chunk.decoder.layers[0], theirs.model.layers[0]
    assert torch.equal(layer.input_layernorm(embedded), norm.input_layernorm(embedded))
    with torch.no_grad():
        assert relative(logits([chunk], IDS).float(), theirs(IDS, use_cache=False).logits.float()) < 0.05


def test_a_list_of_types_without_any_pattern(tmp_path):
    """Current transformers write one for Qwen too, whose older configuration has no pattern."""
    from nemo_minitron.checkpoints.formats.huggingface.loader import hf_logits as loader

    path = family_model("qwen3", tmp_path / "model")
    content = json.loads((path / "config.json").read_text())
    expected = hf_logits(path, IDS)
    (path / "config.json").write_text(json.dumps(content | {"layer_types": [FULL] * 3}))
    with torch.no_grad():
        assert torch.equal(loader(path, IDS, torch.float32), expected)
