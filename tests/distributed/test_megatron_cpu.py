"""Training a Megatron-core GPTModel on the CPU layer: one process against TP 2 x PP 2 in losses and gradients."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.distributed import run_distributed

from nemo_minitron import axes
from nemo_minitron.runtime.groups import ParallelLayout

STEPS = 4
MICRO_BATCHES = 2


def train(cases: dict[str, tuple[str, ParallelLayout]]) -> dict[str, Any]:
    """Some steps of Megatron's own training loop for each case, a checkpoint and a layout.

    Returns:
        By case: the loss of each step (on the last stage), this rank's gradients of the first step by canonical name as
        Megatron's optimizer sees them, and the rank's place.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from nemo_minitron.checkpoints import load_into, open_checkpoint
    from nemo_minitron.checkpoints.live import canonical_parameters
    from nemo_minitron.runtime.groups import initialize
    from nemo_minitron.runtime.model import build_model

    def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses.float().mean()
        return loss, {"loss": loss.detach().clone()}  # the schedule divides the loss in place

    def forward(batches: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        ids = next(batches)
        tokens, labels = ids[:, :-1], ids[:, 1:]
        positions = torch.arange(tokens.shape[1], device="cuda").expand_as(tokens)
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device="cuda").triu(1)[None, None]
        return model(tokens, positions, mask, labels=labels), mean_loss

    results = {}
    for case, (path, layout) in cases.items():
        groups = initialize(layout)
        checkpoint = open_checkpoint(path)
        chunks = build_model(checkpoint.shape, checkpoint.architecture, groups, initialize=True)
        load_into(chunks, checkpoint, groups)
        config = chunks[0].config
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=False)
        model = [DistributedDataParallel(config, ddp, chunk) for chunk in chunks]
        optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=1e-2, weight_decay=0.0, clip_grad=1.0, use_distributed_optimizer=True),
            model,
        )
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = optimizer.scale_loss
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(checkpoint.shape.vocab_size, (2 * MICRO_BATCHES, 17), generator=generator)
        losses: list[float] = []
        gradients: dict[str, torch.Tensor] = {}
        norms: list[float] = []
        for step in range(STEPS):
            for chunk in model:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            reduced = get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter(ids.chunk(MICRO_BATCHES)),
                model=model if len(model) > 1 else model[0],
                num_microbatches=MICRO_BATCHES,
                seq_length=ids.shape[1] - 1,
                micro_batch_size=2,
                forward_only=False,
            )
            if step == 0:
                gradients = {
                    name: parameter.main_grad.clone()
                    for chunk in chunks
                    for name, parameter in canonical_parameters(chunk)
                }
            done, norm, _ = optimizer.step()
            assert done
            norms.append(float(norm))
            if reduced:
                losses.append(float(torch.stack([part["loss"] for part in reduced]).mean()))
        results[case] = {
            "losses": losses,
            "gradients": gradients,
            "norms": norms,
            "tp_rank": groups.tp_rank,
            "pp_rank": groups.pp_rank,
        }
    return results


def gathered(results: list[dict[str, Any]], checkpoint: Any, world: int) -> dict[str, torch.Tensor]:
    """Global gradients out of every rank's shards, by canonical name."""
    table, shape = checkpoint.family, checkpoint.shape
    rows = {entry.name: entry.row for entry in axes.parameters(table, shape)}
    found: dict[str, torch.Tensor] = {}
    for result in sorted(results, key=lambda result: result["tp_rank"]):
        for name, shard in result["gradients"].items():
            # A tied output layer on the last stage is the embedding's copy; both must hold the one gradient.
            row = rows[name if name in rows else "embedding.word_embeddings.weight"]
            dim = row.tensor_parallel_dim
            if dim is None:
                # every rank must hold the same
                assert torch.allclose(found.setdefault(name, shard), shard, rtol=1e-5, atol=1e-7), name
                continue
            size = shard.shape[dim] * world
            places = (
                torch.arange(shard.shape[dim]) + result["tp_rank"] * shard.shape[dim]
                if row.axes[dim] is axes.Axis.VOCAB
                else axes.shard_rows(row.axes[dim], size, rank=result["tp_rank"], world=world)
            )
            whole = found.setdefault(
                name, shard.new_full([size if d == dim else n for d, n in enumerate(shard.shape)], torch.nan)
            )
            whole.index_copy_(dim, places, shard)
    return found


@pytest.mark.slow
def test_training_under_tp2_pp2_equals_one_process(tmp_path: Path) -> None:
    """Tied embeddings (one gradient from the first and last stage), and untied ones with sequence parallelism."""
    from nemo_minitron.checkpoints import open_checkpoint

    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    paths = {
        name: str(tiny_checkpoint(tmp_path / name, tied=name == "tied", tokenizer=False, **sizes))
        for name in ("tied", "untied")
    }
    plain, split = ParallelLayout(), partial(ParallelLayout, tensor=2, pipeline=2)
    ours = {"tied": split(), "untied": split(sequence_parallel=True)}
    (one,) = run_distributed(
        train, 1, tmp_path, timeout=90, cases={name: (path, plain) for name, path in paths.items()}
    )
    four = run_distributed(
        train, 4, tmp_path, timeout=120, cases={name: (path, ours[name]) for name, path in paths.items()}
    )

    for name, path in paths.items():
        reference, ranks = one[name], [rank[name] for rank in four]
        assert len(reference["losses"]) == STEPS
        assert reference["losses"][-1] < reference["losses"][0] - 0.1
        for rank in ranks:
            assert (
                rank["losses"] == pytest.approx(reference["losses"], abs=1e-5)
                if rank["pp_rank"] == 1
                else rank["losses"] == []
            )
            assert rank["norms"] == pytest.approx(reference["norms"], rel=1e-4)
        expected = gathered([reference], open_checkpoint(path), 1)
        found = gathered(ranks, open_checkpoint(path), 2)
        if name == "tied":
            expected["output_layer.weight"] = expected["embedding.word_embeddings.weight"]
        assert found.keys() == expected.keys()
        for parameter, gradient in expected.items():
            # float32, sums in another order: relative to the largest entry of the gradient
            worst = float((found[parameter] - gradient).abs().max() / gradient.abs().max())
            assert worst < 1e-4, f"{name}: gradient of {parameter} is off by {worst:.1e}"
