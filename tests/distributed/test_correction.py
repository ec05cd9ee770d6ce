"""Training on the labels alone, of a teacher before it teaches, against a plain loop in torch and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.distributed import run_distributed

SEQUENCE, STEPS, BATCH = 32, 6, 4


def blocks() -> torch.Tensor:
    return torch.randint(6, 131, (STEPS * BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))


def correct_case(model: str, out: str, layout: dict[str, Any]) -> None:
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.distillation.recipe import Schedule, correct
    from nemo_minitron.runtime.groups import ParallelLayout

    schedule = Schedule(
        steps=STEPS, micro_batch_size=1, global_batch_size=BATCH, lr=1e-3, min_lr=1e-4, warmup_steps=2,
        validate_every=3, validation_batches=2, save_every=100,
    )  # fmt: skip
    correct(
        open_checkpoint(model),
        blocks(),
        blocks()[: 2 * BATCH],
        layout=ParallelLayout(**layout),
        schedule=schedule,
        directory=Path(out),
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8, "intermediate_size": 72}
    tiny_checkpoint(folder, tied=True, num_hidden_layers=5, seed=1, **sizes)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [{}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2, "virtual_pipeline": 2}], ids=str
)
def test_correction_equals_a_plain_torch_loop(layout: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """Loss, gradient norm and validation of every step, and the weights after the last."""
    from transformers import AutoModelForCausalLM

    from nemo_minitron.checkpoints import open_checkpoint

    world = max([1, *(size for size in layout.values())])
    run_distributed(correct_case, world, tmp_path, timeout=150, model=str(model), out=str(tmp_path), layout=layout)
    measured = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    reference, data = AutoModelForCausalLM.from_pretrained(model), blocks()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in reference.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in reference.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )

    def cross_entropy(batch: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(reference(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())

    steps = iter([line for line in measured if "split" not in line])
    validations = iter([line for line in measured if "split" in line])
    for index in range(STEPS):
        line = next(steps)
        loss = cross_entropy(data[index * BATCH : (index + 1) * BATCH])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        for parameters in optimizer.param_groups:
            parameters["lr"] = line["lr"]
        optimizer.step()
        assert line["step"] == index + 1
        assert "kl" not in line
        assert line["lm_loss"] == pytest.approx(loss.item(), rel=2e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=2e-4)
        if line["step"] in (3, 6):
            with torch.no_grad():
                expected = cross_entropy(data[: 2 * BATCH]).item()
            assert next(validations)["lm_loss"] == pytest.approx(expected, rel=2e-5)
    weights = open_checkpoint(next((tmp_path / "checkpoints").glob("*-last"))).weights
    embedding = reference.get_input_embeddings().weight.detach()
    trained = weights.tensor("embedding.word_embeddings.weight")
    torch.testing.assert_close(trained[: len(embedding)], embedding, rtol=1e-3, atol=2e-5)
