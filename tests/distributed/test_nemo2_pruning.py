"""Pruning as NeMo's ``model_transform``: its own ``llm.train`` at TP 2 x PP 2, and nothing of this suite's stages."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_hf_model
from support.distributed import next_port, run_distributed
from support.pruning import DictWeights

from nemo_minitron.axes import KeptUnits

SEQUENCE, BATCH = 16, 4
LAYOUT = {"tensor": 2, "pipeline": 2}
GUIDE = Path(__file__).resolve().parents[2] / "docs" / "nemo-plugin.md"


def train(
    run: str,
    weights: str,
    steps: int,
    *,
    shape: Any,
    transform: Any = None,
    on_model: bool = False,
    finetune: bool = False,
    kept: str | None = None,
    restore: bool = True,
) -> dict[str, Any]:
    """``llm.train`` from ``weights``: loss of each step, and what the optimizer holds at the end.

    With ``kept``, by the code of the guide. Without ``restore`` nothing is read from ``weights``.
    """
    import lightning.pytorch as pl
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl
    from nemo.collections import llm

    from nemo_minitron.architecture import Architecture
    from nemo_minitron.checkpoints.formats.nemo2.config import nemo_config
    from nemo_minitron.distillation.training.blocks_module import BlockDataModule
    from nemo_minitron.runtime.groups import ParallelLayout, destroy
    from nemo_minitron.runtime.model import pipeline_layer_layout

    losses: dict[int, float] = {}

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            losses[trainer.global_step] = float(trainer.callback_metrics["reduced_train_loss"])

    blocks = torch.randint(0, 120, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(0)).repeat(12, 1)
    config = nemo_config(shape, Architecture(max_position_embeddings=SEQUENCE), dtype="float32", multiple=64, rows=128)
    optimizer = nl.MegatronOptimizerModule(
        config=OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True)
    )
    trainer = nl.Trainer(
        accelerator="cpu",
        devices=4,
        max_steps=steps,
        strategy=nl.MegatronStrategy(
            tensor_model_parallel_size=LAYOUT["tensor"],
            pipeline_model_parallel_size=LAYOUT["pipeline"],
            # NeMo must be told of uneven stages; what the transform leaves, it lays out itself.
            pipeline_model_parallel_layout=pipeline_layer_layout(shape, ParallelLayout(pipeline=LAYOUT["pipeline"])),
            pipeline_dtype=torch.float32,
            process_group_backend="gloo",
            ckpt_async_save=False,
        ),
        plugins=nl.MegatronMixedPrecision(precision="32"),
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_progress_bar=False,
        callbacks=[],
    )
    trainer.callbacks.append(Keep())
    model = llm.LlamaModel(config, optim=optimizer)
    if on_model:
        model.model_transform = transform
    data = BlockDataModule(blocks, blocks[:4], steps=12, micro_batch_size=1, global_batch_size=BATCH)
    log = nl.NeMoLogger(
        log_dir=run,
        name="run",
        ckpt=nl.ModelCheckpoint(
            monitor=None, save_top_k=0, save_last=True, every_n_train_steps=steps, save_optim_on_train_end=True
        ),
        use_datetime_version=False,
    )
    if kept is not None:
        (code,) = (
            block for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S) if "llm.train(" in block
        )
        code = code.replace('"runs/demo/teacher"', repr(weights)).replace('"runs/kept.json"', repr(kept))
        exec(code, {"model": model, "data": data, "trainer": trainer, "log": log})
    else:
        (llm.finetune if finetune else llm.train)(
            model,
            data,
            trainer,
            log=log,
            resume=nl.AutoResume(
                restore_config=nl.RestoreConfig(path=weights) if restore else None,
                resume_if_exists=True,
                resume_ignore_no_checkpoint=True,
            ),
            **{"peft" if finetune else "model_transform": None if on_model else transform},
        )
    held = sum(parameter.numel() for parameter in trainer.strategy.model.parameters())
    moments = sum(
        entry["exp_avg"].numel()
        for one in trainer.strategy.optimizers[0].mcore_optimizer.chained_optimizers
        for entry in one.optimizer.state.values()
    )
    destroy()
    next_port()
    return {"losses": losses, "held": held, "moments": moments}


def cases(folder: str) -> dict[str, Any]:
    import fiddle as fdl
    import nemo_run as run

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.pruning import DepthPrune, PruneTransform, WidthPrune

    whole, pruned, kept = f"{folder}/whole", f"{folder}/pruned", f"{folder}/pruned/kept.json"
    refitted = f"{folder}/refitted"
    full = open_checkpoint(whole).shape
    small = open_checkpoint(pruned).shape
    recipe = run.Config(PruneTransform, kept=kept)
    return {
        "offline": train(f"{folder}/a", pruned, 6, shape=small),
        "transform": train(f"{folder}/b", whole, 3, shape=full, kept=kept),
        "resumed": train(f"{folder}/b", whole, 6, shape=full, kept=kept),
        "finetune": train(f"{folder}/d", whole, 3, shape=full, finetune=True, transform=fdl.build(recipe)),
        "plain": train(
            f"{folder}/c", whole, 3, shape=full, on_model=True,
            transform=lambda module: WidthPrune(kept)(DepthPrune(kept)(module)),
        ),
        "offline-refitted": train(f"{folder}/e", refitted, 2, shape=small),
        "refitted": train(
            f"{folder}/f", whole, 2, shape=full, restore=False, transform=PruneTransform(kept, weights=refitted)
        ),
    }  # fmt: skip


@pytest.mark.slow
def test_nemo_trains_what_the_transform_leaves(tmp_path: Path) -> None:
    """The losses of a model that NeMo's training prunes at its start are those of the one that was pruned before."""
    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
    from nemo_minitron.pruning import prune_weights, save_kept
    from nemo_minitron.shape import ModelShape

    shape = ModelShape(4, 64, 96, 8, 4, 8, 128, tied_embeddings=True)
    model = tiny_hf_model(
        tmp_path / "hf", tied=True, vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, head_dim=8, max_position_embeddings=SEQUENCE,
    )  # fmt: skip
    write_checkpoint(open_checkpoint(model), tmp_path / "whole", "nemo2")
    checkpoint = open_checkpoint(tmp_path / "whole")
    assert checkpoint.shape == shape
    kept = units(shape)
    write_checkpoint(prune_weights(checkpoint, kept), tmp_path / "pruned", "nemo2")
    save_kept(kept, shape, tmp_path / "pruned" / "kept.json")
    small = open_checkpoint(tmp_path / "pruned")
    other = {name: 1.25 * small.weights.tensor(name) for name in small.weights.names()}
    write_checkpoint(dataclasses.replace(small, weights=DictWeights(other)), tmp_path / "refitted", "nemo2")
    save_kept(kept, shape, tmp_path / "refitted" / "kept.json")
    ranks = run_distributed(cases, 4, tmp_path, timeout=240, folder=str(tmp_path))
    found = ranks[0]
    expected = found["offline"]["losses"]
    assert sorted(expected) == list(range(1, 7))
    assert expected[6] < expected[1]
    assert {**found["transform"]["losses"], **found["resumed"]["losses"]} == pytest.approx(expected, rel=1e-5)
    for name in ("plain", "finetune"):
        assert found[name]["losses"] == pytest.approx({step: expected[step] for step in (1, 2, 3)}, rel=1e-5)
    assert found["refitted"]["losses"] == pytest.approx(found["offline-refitted"]["losses"], rel=1e-5)
    assert found["refitted"]["losses"][1] != pytest.approx(expected[1], rel=1e-3)
    for rank in ranks:
        for name in ("transform", "resumed", "finetune", "plain", "refitted"):
            assert rank[name]["held"] == rank["offline"]["held"], name
            assert rank[name]["moments"] == rank["offline"]["moments"], name
    for run in "bcdf":
        written = list((tmp_path / run / "run/checkpoints").glob("*-last"))
        assert written
        for checkpoint in written:
            assert open_checkpoint(checkpoint).shape == kept.target(shape)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
    from nemo_minitron.errors import CheckpointError
    from nemo_minitron.pruning import PruneTransform, prune_weights, save_kept

    checkpoint = open_checkpoint(tiny_hf_model(tmp_path / "hf"))
    shape, everything = checkpoint.shape, KeptUnits.everything(checkpoint.shape)
    ffn = [(tuple(range(first, first + 40)),) * shape.num_layers for first in (0, 8)]
    kept, other = (dataclasses.replace(everything, ffn=units) for units in ffn)
    for name, chosen in (("kept", kept), ("other", other), ("whole", everything)):
        write_checkpoint(prune_weights(checkpoint, chosen), tmp_path / name, "nemo2")
        save_kept(chosen, shape, tmp_path / name / "kept.json")
    path = tmp_path / "kept/kept.json"
    assert PruneTransform(path, weights=tmp_path / "kept").weights == tmp_path / "kept"
    with pytest.raises(CheckpointError, match=r"weights=.*other: was made of other kept units"):
        PruneTransform(path, weights=tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"weights=.*whole: is of .* not of the pruned shape"):
        PruneTransform(path, weights=tmp_path / "whole")
    with pytest.raises(CheckpointError, match="nowhere"):
        PruneTransform(path, weights=tmp_path / "nowhere")


def units(shape: Any) -> KeptUnits:
    """Three layers of four over two stages, one of which changes its rank; nothing lies evenly over the ranks."""
    everything = KeptUnits.everything(shape)
    groups = ((0, 1), (1, 3), (2, 3))
    return KeptUnits(
        layers=(0, 2, 3),
        hidden=tuple(range(4, 52)),
        ffn=(tuple(range(64)), tuple(range(32, 96)), tuple(range(0, 96, 3)) + tuple(range(1, 96, 3))),
        groups=groups,
        heads=tuple(tuple(everything.heads[0][group] for group in kept) for kept in groups),
    )
