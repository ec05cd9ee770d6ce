"""Every model family against transformers: reading, computing, pruning, writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import hf_logits
from support.families import SIZES, family_model, some_units
from support.pruning import live, logits, one_process, tokens

from nemo_minitron import axes
from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
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
    assert torch.equal(hf_logits(tmp_path / "again", IDS), hf_logits(source, IDS))


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


def sizes(chunk: Any) -> dict[str, dict[str, Any]]:
    """Numbers and tuples that the modules keep, and the fields of their configurations."""
    found = {
        name: {k: v for k, v in vars(part).items() if isinstance(v, int | float | tuple | str)}
        for name, part in chunk.named_modules()
    }
    return found | {"config": {k: v for k, v in vars(chunk.config).items() if not callable(v)}}
