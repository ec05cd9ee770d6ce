"""Families whose tables go beyond Llama's, loaded and pruned under tensor and pipeline parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import hf_logits
from support.distributed import run_distributed
from support.families import SIZES, family_model, some_units
from support.pruning import live, tokens

FAMILIES = ("qwen2", "qwen3", "nemotron", "mixtral", "qwen3_moe", "gemma3")
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2},
    "tp2-sp": {"tensor": 2, "sequence_parallel": True},
    "pp2": {"pipeline": 2},
}
IDS = tokens(2, 12, vocab=SIZES["vocab_size"])


def prune_everywhere(folder: str) -> dict[str, Any]:
    """Per layout and family: parameters in which live and offline pruning differ; logits before, and after, of TP."""
    import torch.distributed as dist

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.pruning import DepthPrune, WidthPrune, prune_weights
    from nemo_minitron.runtime.groups import ParallelLayout, initialize

    def whole(chunk: Any) -> torch.Tensor:
        with torch.no_grad():
            part = chunk.eval()(IDS, torch.arange(IDS.shape[1]).expand_as(IDS), None)
        parts = [torch.empty_like(part) for _ in range(2)]
        dist.all_gather(parts, part.contiguous(), group=groups.tp)
        return torch.cat(parts, -1)

    found: dict[str, Any] = {}
    for layout, options in LAYOUTS.items():
        groups = initialize(ParallelLayout(**options))
        for family in FAMILIES:
            checkpoint = open_checkpoint(Path(folder, family))
            kept = some_units(checkpoint.shape)
            (chunk,), (built,) = live(checkpoint, groups), live(prune_weights(checkpoint, kept), groups)
            before = whole(chunk) if groups.layout.tensor > 1 else None
            WidthPrune(kept)(DepthPrune(kept)(chunk))
            ours, theirs = dict(chunk.named_parameters()), dict(built.named_parameters())
            differences = sorted(ours.keys() ^ theirs.keys())
            differences += [name for name in ours.keys() & theirs.keys() if not torch.equal(ours[name], theirs[name])]
            after = whole(chunk) if groups.layout.tensor > 1 else None
            found[f"{layout} {family}"] = {"differences": differences, "before": before, "after": after}
    return found


@pytest.mark.slow
def test_families_under_parallel_layouts(tmp_path):
    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
    from nemo_minitron.pruning import prune_weights

    expected = {}
    for family in FAMILIES:
        checkpoint = open_checkpoint(family_model(family, tmp_path / family))
        pruned = prune_weights(checkpoint, some_units(checkpoint.shape))
        write_checkpoint(pruned, tmp_path / f"{family}-pruned", "hf")
        expected[family] = (hf_logits(tmp_path / family, IDS), hf_logits(tmp_path / f"{family}-pruned", IDS))
    for rank in run_distributed(prune_everywhere, 2, tmp_path, folder=str(tmp_path)):
        for case, result in rank.items():
            assert result["differences"] == [], case
            if result["before"] is not None:
                for found, logits in zip((result["before"], result["after"]), expected[case.split()[1]], strict=True):
                    difference = (found[..., : logits.shape[-1]] - logits).abs().max()
                    assert difference <= 1e-4 * logits.abs().max(), case
