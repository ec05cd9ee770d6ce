"""NeMo 2's own training API on the CPU layer: checkpoints by a monitored loss, its own progress printer, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_distributed

SEQUENCE, BATCH = 16, 4


def train_case(out: str, steps: int, tensor: int = 1, pipeline: int = 1) -> dict[int, float]:
    """``llm.train`` of a tiny Llama to ``steps``, going on from what ``out`` holds; the loss of each step on rank 0."""
    import lightning.pytorch as pl
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl
    from nemo.collections import llm

    from nemo_minitron.architecture import Architecture
    from nemo_minitron.checkpoints.formats.nemo2.config import nemo_config
    from nemo_minitron.distillation.training.blocks_module import BlockDataModule
    from nemo_minitron.shape import ModelShape

    losses: dict[int, float] = {}

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            losses[trainer.global_step] = float(trainer.callback_metrics["reduced_train_loss"])

    blocks = torch.randint(0, 120, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(0)).repeat(12, 1)
    shape = ModelShape(4, 64, 96, 4, 2, 16, 128, tied_embeddings=True)
    config = nemo_config(shape, Architecture(max_position_embeddings=SEQUENCE), dtype="float32", multiple=64, rows=128)
    optimizer = nl.MegatronOptimizerModule(
        config=OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True)
    )
    trainer = nl.Trainer(
        accelerator="cpu",
        devices=tensor * pipeline,
        max_steps=steps,
        strategy=nl.MegatronStrategy(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            pipeline_dtype=torch.float32,
            process_group_backend="gloo",
            ckpt_async_save=False,
        ),
        plugins=nl.MegatronMixedPrecision(precision="32"),
        val_check_interval=3,
        # Lightning counts micro-batches; a part of a global batch would leave a pipeline stage waiting for the rest.
        limit_val_batches=2 * BATCH,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=[],
    )
    trainer.callbacks.append(Keep())
    # What made every rank hang: a monitored loss, and NeMo's printer, which is on where the progress bar is.
    checkpoint = nl.ModelCheckpoint(
        save_top_k=1, monitor="reduced_train_loss", save_last=True, every_n_train_steps=3, save_optim_on_train_end=True
    )
    llm.train(
        llm.LlamaModel(config, optim=optimizer),
        BlockDataModule(blocks, blocks[:8], steps=12, micro_batch_size=1, global_batch_size=BATCH),
        trainer,
        log=nl.NeMoLogger(log_dir=out, name="run", ckpt=checkpoint, use_datetime_version=False),
        resume=nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True),
    )
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_training_saves_and_goes_on(layout: dict[str, int], tmp_path: Path) -> None:
    """Six steps, then three more from the checkpoint in new processes, equal nine steps in one go."""

    def train(name: str, steps: int) -> dict[int, float]:
        return run_distributed(train_case, 2, tmp_path, timeout=120, out=str(tmp_path / name), steps=steps, **layout)[0]

    straight = train("straight", 9)
    first, second = train("resumed", 6), train("resumed", 9)
    assert sorted(straight) == list(range(1, 10))
    assert sorted(first) == list(range(1, 7))
    assert sorted(second) == [7, 8, 9]
    for step, loss in {**first, **second}.items():
        assert loss == pytest.approx(straight[step], rel=1e-6), step
    assert straight[9] < straight[1]
    kept = sorted(path.name for path in (tmp_path / "straight/run/checkpoints").iterdir())
    assert len(kept) == 2, kept  # the best and the last
    assert not any(name.endswith("-unfinished") for name in kept)
