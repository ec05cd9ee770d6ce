"""Checkpoints written here are loaded by Megatron's own loader under any layout, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import load_with_megatron, tiny_checkpoint
from support.distributed import run_distributed

SIZES = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def exchange_case(models: str, out: str, tensor: int, pipeline: int) -> None:
    """Load what was written here with Megatron's loader and with ours; then let Megatron save it again."""
    from megatron.core import dist_checkpointing

    from nemo_minitron.checkpoints import load_into, open_checkpoint
    from nemo_minitron.runtime.groups import ParallelLayout, initialize
    from nemo_minitron.runtime.model import build_model

    groups = initialize(ParallelLayout(tensor=tensor, pipeline=pipeline))
    for name in ("tied", "untied"):
        checkpoint = open_checkpoint(Path(models) / f"{name}-nemo2")
        theirs, ours = (build_model(checkpoint.shape, checkpoint.architecture, groups) for _ in range(2))
        load_with_megatron(checkpoint.path / "weights", theirs)
        load_into(ours, checkpoint, groups)
        for (key, a), (_, b) in zip(theirs[0].named_parameters(), ours[0].named_parameters(), strict=True):
            rows = a.shape[0]
            if "embedding" in key or "output_layer" in key:  # padding rows are the loader's own affair
                rows = max(0, min(rows, checkpoint.shape.vocab_size - groups.tp_rank * rows))
            assert torch.equal(a[:rows], b[:rows]), key
        saved = Path(out) / name / "weights"
        if groups.is_main:
            saved.mkdir(parents=True)
        torch.distributed.barrier()
        dist_checkpointing.save(ours[0].sharded_state_dict(prefix="module."), str(saved))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint

    folder = tmp_path_factory.mktemp("models")
    for name in ("tied", "untied"):
        source = tiny_checkpoint(folder / name, tied=name == "tied", **SIZES)
        write_checkpoint(open_checkpoint(source), folder / f"{name}-nemo2", "nemo2")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tensor": 1, "pipeline": 2}, {"tensor": 2, "pipeline": 2}], ids=str)
def test_exchange_with_megatron(layout: dict[str, Any], models: Path, tmp_path: Path) -> None:
    """Equal bit for bit in both directions, whatever TP x PP is on Megatron's side."""
    import shutil

    from nemo_minitron.checkpoints import open_checkpoint

    world = layout["tensor"] * layout["pipeline"]
    run_distributed(
        exchange_case, world, tmp_path, timeout=150, models=str(models), out=str(tmp_path / "out"), **layout
    )
    for name in ("tied", "untied"):
        source = open_checkpoint(models / f"{name}-nemo2")
        saved = tmp_path / "out" / name
        for part in ("context", "minitron.json"):  # Megatron saves weights alone
            path = source.path / part
            (shutil.copytree if path.is_dir() else shutil.copy)(path, saved / part)
        found = open_checkpoint(saved).weights
        for key in source.weights.names():
            assert torch.equal(found.tensor(key), source.weights.tensor(key)), key
