"""Activations that are computed again change nothing but memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.distributed import run_distributed

from nemo_minitron.config import load
from nemo_minitron.errors import ConfigError

MODES = ("none", "selective", "full")


def trainings(models: str, out: str) -> dict[str, int]:
    """Three steps under each mode, one after the other in the same processes; how often something was recomputed."""
    from megatron.core.tensor_parallel.random import CheckpointFunction

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.config import Schedule
    from nemo_minitron.distillation.recipe import distill
    from nemo_minitron.runtime.groups import ParallelLayout

    calls = 0
    backward = CheckpointFunction.backward

    def counted(ctx, *args):
        nonlocal calls
        calls += 1
        return backward(ctx, *args)

    CheckpointFunction.backward = staticmethod(counted)
    found = {}
    blocks = torch.randint(6, 131, (12, 25), generator=torch.Generator().manual_seed(0))
    for mode in MODES:
        before = calls
        distill(
            open_checkpoint(Path(models) / "student"),
            open_checkpoint(Path(models) / "teacher"),
            blocks,
            blocks[:4],
            layout=ParallelLayout(tensor=2, sequence_parallel=True),
            schedule=Schedule(
                steps=3, micro_batch_size=2, global_batch_size=4, lr=1e-3, min_lr=1e-4, warmup_steps=1,
                validate_every=3, validation_batches=1, recompute=mode,
            ),
            directory=Path(out) / mode,
        )  # fmt: skip
        found[mode] = calls - before
    return found


@pytest.mark.slow
def test_the_same_training(tmp_path):
    from nemo_minitron.checkpoints import open_checkpoint

    tiny_checkpoint(tmp_path / "teacher", seed=1, num_hidden_layers=3)
    tiny_checkpoint(tmp_path / "student", seed=2, num_hidden_layers=2)
    counts = run_distributed(trainings, 2, tmp_path / "job", timeout=280, models=str(tmp_path), out=str(tmp_path))
    # of two layers, in three steps of two micro-batches
    assert counts == [{"none": 0, "selective": 12, "full": 12}] * 2
    found, weights = {}, {}
    for mode in MODES:
        found[mode] = [json.loads(line) for line in (tmp_path / mode / "metrics.jsonl").read_text().splitlines()]
        weights[mode] = open_checkpoint(next((tmp_path / mode / "checkpoints").glob("*-last"))).weights
    for mode in MODES[1:]:
        for ours, theirs in zip(found[mode], found["none"], strict=True):
            for key in {"kl", "lm_loss", "grad_norm"} & theirs.keys():
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (mode, key)
        for name in weights["none"].names():
            torch.testing.assert_close(weights[mode].tensor(name), weights["none"].tensor(name), rtol=1e-5, atol=1e-6)


def test_what_cannot_be():
    settings = ["student=a", "teacher=b"]
    assert load("distill", "distill", [*settings, "recompute=full"]).recompute == "full"
    with pytest.raises(ConfigError, match="recompute=full: intermediate losses are taken inside the layers"):
        load("distill", "distill", [*settings, "recompute=full", "intermediate.hidden=mse"])
    with pytest.raises(ConfigError, match="recompute=some: must be one of none, selective, full"):
        load("distill", "distill", [*settings, "recompute=some"])
