"""The callback that scores during NeMo 2's own validation, at TP 2 x PP 2, against scoring by itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.distributed import run_distributed

SEQUENCE, BATCH = 16, 4
CRITERIA = [("mean", "l2"), ("max", "l1")]


def callback_case(out: str) -> dict[str, Any]:
    """``llm.train`` for three steps, on four ranks, validating after the second and at the end."""
    import lightning.pytorch as pl
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl
    from nemo.collections import llm

    from nemo_minitron.architecture import Architecture
    from nemo_minitron.checkpoints.formats.nemo2.config import nemo_config
    from nemo_minitron.distillation.training.blocks_module import BlockDataModule
    from nemo_minitron.importance import ScoreDuringValidation, score_criteria
    from nemo_minitron.importance.callback import _layout, _megatron_chunks
    from nemo_minitron.runtime.groups import current
    from nemo_minitron.shape import ModelShape

    blocks = torch.randint(0, 120, (16, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))
    validation = blocks[:8]
    shape = ModelShape(4, 64, 96, 4, 2, 16, 128, tied_embeddings=True)
    config = nemo_config(shape, Architecture(max_position_embeddings=SEQUENCE), dtype="float32", multiple=64, rows=128)
    found: dict[str, Any] = {"expected": [], "hooks": []}
    scoring = ScoreDuringValidation(Path(out) / "scores", shape, criteria=CRITERIA)

    class Compare(pl.Callback):
        """After the scoring callback: what scoring by itself says of the same weights, and what is left on them."""

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            found["hooks"].append(self.count(trainer))

        def count(self, trainer: pl.Trainer) -> int:
            (chunk,) = _megatron_chunks(trainer)
            return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in chunk.modules())

        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            found["hooks"].append(self.count(trainer))
            chunks = _megatron_chunks(trainer)
            again = score_criteria(chunks, validation, current(_layout(chunks)), criteria=CRITERIA, shape=shape)
            found["expected"].append((again, [scoring.scores[criterion] for criterion in CRITERIA]))

    trainer = nl.Trainer(
        accelerator="cpu",
        devices=4,
        max_steps=3,
        strategy=nl.MegatronStrategy(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            sequence_parallel=True,
            pipeline_dtype=torch.float32,
            process_group_backend="gloo",
            ckpt_async_save=False,
        ),
        plugins=nl.MegatronMixedPrecision(precision="32"),
        val_check_interval=2,
        limit_val_batches=2 * BATCH,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        callbacks=[scoring, Compare()],
    )

    optimizer = nl.MegatronOptimizerModule(
        config=OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True)
    )
    model = llm.LlamaModel(config, optim=optimizer)
    data = BlockDataModule(blocks, validation, steps=3, micro_batch_size=1, global_batch_size=BATCH)
    log = nl.NeMoLogger(log_dir=out, name="run", use_datetime_version=False)
    llm.train(model, data, trainer, log=log)
    found["errors"] = refused(scoring, trainer, shape)
    return found


def refused(scoring: Any, trainer: Any, shape: Any) -> list[str]:
    """Messages for a trainer that runs no Megatron model, another model's shape, and no criteria."""
    from nemo_minitron.errors import MinitronError

    scoring_of_another = type(scoring)(scoring.output, shape.replace(num_layers=5, hidden_size=32))
    messages = []
    for attempt in (
        lambda: scoring.on_validation_start(SimpleNamespace(sanity_checking=False, strategy=object()), None),
        lambda: scoring_of_another.on_validation_start(trainer, None),
        lambda: type(scoring)(scoring.output, shape, criteria=[]),
    ):
        try:
            attempt()
        except MinitronError as error:
            messages.append(str(error))
    return messages


@pytest.mark.slow
def test_scores_of_a_validation_equal_scoring_by_itself(tmp_path: Path) -> None:
    from nemo_minitron.importance import Scores

    results = run_distributed(callback_case, 4, tmp_path, timeout=180, out=str(tmp_path))
    for found in results:
        other_strategy, other_shape, no_criteria = found["errors"]
        assert "object runs no Megatron GPT model; use nemo.lightning.MegatronStrategy" in other_strategy
        assert "num_layers=5: the model that is validated has 4" in other_shape
        assert "hidden_size=32" in other_shape
        assert "criteria: none is given" in no_criteria
        # After the second step and at the end; nothing stays on the model.
        assert len(found["expected"]) == 2
        assert found["hooks"] == [found["hooks"][0]] * 3
        for again, scored in found["expected"]:
            for one, other in zip(scored, again, strict=True):
                assert (one.samples, one.tokens) == (8, 8 * SEQUENCE)
                for name in ("ffn", "heads", "groups", "hidden", "layers"):
                    torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-6, atol=1e-9)
    written = Scores.load(tmp_path / "scores"), Scores.load(tmp_path / "scores" / "criteria" / "max-l1")
    for one, other in zip(written, results[0]["expected"][-1][1], strict=True):
        assert torch.equal(one.ffn, other.ffn)
        assert torch.equal(one.layers, other.layers)
