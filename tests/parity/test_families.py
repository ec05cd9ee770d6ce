"""Every model family against transformers: reading, computing, pruning, writing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.checkpoints import hf_logits, load_with_megatron
from support.families import SIZES, family_model, some_units
from support.pruning import DictWeights, live, logits, one_process, tokens

from nemo_minitron import axes
from nemo_minitron.checkpoints import Checkpoint, open_checkpoint, verify, write_checkpoint
from nemo_minitron.checkpoints.formats.torch_dist.reader import TorchDist, TorchDistWeights
from nemo_minitron.pruning import DepthPrune, WidthPrune, prune_weights

IDS = tokens(2, 11, vocab=SIZES["vocab_size"])
pytestmark = pytest.mark.parametrize("family", list(axes.FAMILIES))


@pytest.fixture(scope="module")
def groups():
    with one_process() as found:
        yield found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("families"), {}

    def model(family: str) -> Path:
        if family not in made:
            made[family] = family_model(family, folder / family)
        return made[family]

    return model


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    found = found[..., : expected.shape[-1]]
    assert expected.std() > 0.05
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def test_megatron_computes_what_transformers_computes(family, models, groups):
    checkpoint = open_checkpoint(models(family))
    assert checkpoint.family.name == family
    stored = load_file(models(family) / "model.safetensors")
    assert axes.parameter_count(checkpoint.family, checkpoint.shape) == sum(part.numel() for part in stored.values())
    assert close(logits(live(checkpoint, groups), IDS), hf_logits(models(family), IDS))


def test_writing_gives_back_every_bit(family, models, tmp_path):
    source = models(family)
    write_checkpoint(open_checkpoint(source), tmp_path / "again", "hf")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # the same products, of tensors that lie elsewhere in their file
    assert close(hf_logits(tmp_path / "again", IDS), hf_logits(source, IDS), 1e-6)


def test_every_axis_pruned_at_once(family, models, groups, tmp_path):
    """Offline and live give the same bits; transformers computes the same from what is written."""
    checkpoint = open_checkpoint(models(family))
    kept = some_units(checkpoint.shape)
    offline = prune_weights(checkpoint, kept)
    (pruned,), (built,) = live(checkpoint, groups), live(offline, groups)
    WidthPrune(kept)(DepthPrune(kept)(pruned))
    ours, theirs = dict(pruned.named_parameters()), dict(built.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
        assert vars(ours[name]) == vars(theirs[name]), name
    assert sizes(pruned) == sizes(built)
    write_checkpoint(offline, tmp_path / "pruned", "hf")
    expected = hf_logits(tmp_path / "pruned", IDS)
    assert close(logits([pruned], IDS), expected)
    assert torch.equal(logits([pruned], IDS), logits([built], IDS))
    assert open_checkpoint(tmp_path / "pruned").shape == kept.target(checkpoint.shape)


def test_units_that_do_nothing_can_go(family, models, groups):
    """Every unit that goes is made to do nothing first: neurons, heads, groups and layers write zeros, hidden channels
    are never written, an expert is never chosen. The logits must stay, and the killing must show (`close` is false)."""
    checkpoint = open_checkpoint(models(family))
    shape, table = checkpoint.shape, checkpoint.family
    kept = some_units(shape)
    # a layer norm's mean is of all channels: there the channels are only put into another order
    hidden = (0, *kept.hidden[1:]) if table.normalization == "RMSNorm" else tuple(reversed(range(shape.hidden_size)))
    kept = dataclasses.replace(kept, hidden=hidden)
    tensors = {name: checkpoint.weights.tensor(name).clone() for name in checkpoint.weights.names()}
    kill(tensors, checkpoint, kept)
    dead = dataclasses.replace(checkpoint, weights=DictWeights(tensors))
    pruned = prune_weights(dead, kept)
    expected = logits(live(dead, groups), IDS)
    if table.normalization == "RMSNorm":
        # exact where w' = w sqrt(H/H') and eps' = eps H/H': see docs/pruning.md
        ratio = shape.hidden_size / len(hidden)
        left = {name: pruned.weights.tensor(name) for name in pruned.weights.names()}
        epsilon, one = checkpoint.architecture.norm_epsilon, 1.0 if table.zero_centered_norm else 0.0
        if table.scaled_embedding:
            # The embeddings' factor shrinks with the width, as do the norms of what is added to them: the residual
            # stream keeps its proportions, and attention forgets a factor (QK norms). The MLP and the logits do not.
            scaled = [
                name for name in left if name.endswith(("linear_fc1.layer_norm_weight", "final_layernorm.weight"))
            ]
        else:
            scaled, epsilon = [k for k, v in left.items() if v.shape == (len(hidden),) and "norm" in k], epsilon * ratio
        left |= {name: (left[name] + one) * ratio**0.5 - one for name in scaled}
        architecture = dataclasses.replace(pruned.architecture, norm_epsilon=epsilon)
        pruned = dataclasses.replace(pruned, weights=DictWeights(left), architecture=architecture)
    (found,) = live(pruned, groups)
    for layer in found.decoder.layers if table.qk_layernorm and not table.scaled_embedding else ():
        layer.self_attention.q_layernorm.eps = layer.self_attention.k_layernorm.eps = 1e-6  # not of the hidden width
    assert close(logits([found], IDS), expected)
    assert not close(logits(live(checkpoint, groups), IDS), expected, 1e-2)


def kill(tensors: dict[str, torch.Tensor], checkpoint: Checkpoint, kept: axes.KeptUnits) -> None:
    shape, table = checkpoint.shape, checkpoint.family
    hidden = complement(kept.hidden, shape.hidden_size)
    position = {layer: index for index, layer in enumerate(kept.layers)}
    for entry in axes.parameters(table, shape):
        name, row, layer = entry.name, entry.row, entry.layer
        writes_hidden = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        if "word_embeddings" in name:
            tensors[name][:, hidden] = 0
        elif writes_hidden and layer not in position:
            tensors[name].zero_()
        elif writes_hidden:
            expert = row.expert
            if expert is not None and expert not in kept.experts[position[layer]]:
                continue
            place = None if expert is None else kept.experts[position[layer]].index(expert)
            rows = axes.axis_rows(row.axes[1], shape, kept, position[layer], place)
            tensors[name][:, complement(rows.tolist(), tensors[name].shape[1])] = 0
            tensors[name][hidden] = 0
    if table.expert:
        # channel 0 is positive for every token, and each expert that goes has a router that detests it
        tensors["embedding.word_embeddings.weight"][:, 0] = 3.0
        for name in tensors:
            if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                tensors[name][0] = 0
                tensors[name][hidden] = 0
            elif name.endswith("pre_mlp_layernorm.weight"):
                tensors[name][0] = 1
        for layer, index in position.items():
            gone = complement(kept.experts[index], shape.num_moe_experts)
            router = tensors[f"decoder.layers.{layer}.mlp.router.weight"]
            router[gone] = 0
            router[gone, 0] = -100


def complement(rows: Any, size: int) -> list[int]:
    return sorted(set(range(size)) - set(rows))


def test_megatrons_own_distributed_checkpoints(family, models, groups, tmp_path):
    """Megatron loads the tensors that we write, and we read those that Megatron writes."""
    from megatron.core import dist_checkpointing

    from nemo_minitron.checkpoints.formats.torch_dist.writer import write_torch_dist
    from nemo_minitron.runtime.model import build_model

    source = open_checkpoint(models(family))
    write_torch_dist(source, tmp_path / "ours", prefix="module.", dtype="float32", vocab_rows=256, common={})
    (chunk,) = build_model(source.shape, source.architecture, groups)
    load_with_megatron(tmp_path / "ours", [chunk])
    expected = hf_logits(models(family), IDS)
    assert close(logits([chunk], IDS), expected)

    (tmp_path / "theirs").mkdir()
    dist_checkpointing.save(chunk.sharded_state_dict(prefix="module."), str(tmp_path / "theirs"))
    for folder in ("ours", "theirs"):
        weights = TorchDistWeights(TorchDist(tmp_path / folder), source.shape, family, "module.")
        weights.check()
        for name in source.weights.names():
            assert torch.equal(weights.tensor(name), source.weights.tensor(name)), (folder, name)


@pytest.mark.slow
def test_nemo2_configurations(family, models, tmp_path):
    """NeMo's own class of the family is written, and named by distillations too; our record is not needed."""
    source = open_checkpoint(models(family))
    written = write_checkpoint(source, tmp_path / "nemo2", "nemo2")
    assert (written.shape, written.architecture) == (source.shape, source.architecture)
    if axes.family(family).expert or family == "gemma3":  # farthest from Llama, so NeMo itself opens these
        assert verify(source, written).relative < 1e-4
    (tmp_path / "nemo2" / "minitron.json").unlink()
    read = open_checkpoint(tmp_path / "nemo2")
    assert read.shape == source.shape.replace(vocab_size=256)  # no tokenizer: the padded rows
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    assert read.architecture == dataclasses.replace(source.architecture, **ids)
    config = yaml.safe_load((tmp_path / "nemo2" / "context" / "model.yaml").read_text())
    name = {"qwen3_moe": "Qwen3MoE"}.get(family, family.capitalize())
    of_size = "1B" if family == "gemma3" else ""
    assert config["_target_"].endswith(f".{name.removesuffix('MoE')}Model")
    assert config["config"]["_target_"].endswith(f".{name}Config{of_size}")

    from nemo_minitron.checkpoints.formats.nemo2.config import nemo_config
    from nemo_minitron.distillation.module import DistillationModel
    from nemo_minitron.runtime.groups import ParallelLayout

    made = nemo_config(source.shape, source.architecture, dtype="float32", multiple=128, rows=256)
    model = DistillationModel(made, source, source, ParallelLayout())
    assert model.__io__.__fn_or_cls__.__name__ == f"{name.removesuffix('MoE')}Model"


def sizes(chunk: Any) -> dict[str, dict[str, Any]]:
    """Numbers and tuples that the modules keep, and the fields of their configurations."""
    found = {
        name: {k: v for k, v in vars(part).items() if isinstance(v, int | float | tuple | str)}
        for name, part in chunk.named_modules()
    }
    return found | {"config": {k: v for k, v in vars(chunk.config).items() if not callable(v)}}
