"""The memory model against the most bytes that a real optimizer step holds: Megatron's DDP, distributed optimizer and
schedule, this suite's teacher and losses."""

from __future__ import annotations

import pytest
import torch
from support.memory import StorageWatch
from support.meta import rank_of_world

from nemo_minitron import axes
from nemo_minitron.planning import MemoryCost, Workload
from nemo_minitron.shape import Architecture, ModelShape

STUDENT = ModelShape(4, 96, 256, 8, 4, 16, 500)
TEACHER = ModelShape(5, 128, 320, 8, 4, 16, 500)
BATCH, LENGTH, MICRO_BATCHES = 2, 64, 3
CONSTANTS = {"nemotron": {"rotary_percent": 0.5}}


def peak_of_a_step(name: str, groups, dtype: torch.dtype, *, distilled: bool, recompute: str) -> int:
    """Bytes, of the second step: the optimizer's state is there from the first on."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from nemo_minitron.config import LossConfig
    from nemo_minitron.distillation import vocabulary_parallel as losses
    from nemo_minitron.runtime.model import build_model

    architecture = Architecture(family=name, max_position_embeddings=64, **CONSTANTS.get(name, {}))
    (model,) = build_model(STUDENT, architecture, groups, dtype=dtype, initialize=True)
    (teacher,) = build_model(TEACHER, architecture, groups, dtype=dtype, initialize=True) if distilled else (None,)
    if recompute != "none":
        model.config.recompute_granularity = recompute
        model.config.recompute_method, model.config.recompute_num_layers = "uniform", 1
        for layer in model.decoder.layers:
            layer.self_attention.checkpoint_core_attention = recompute == "selective"
    models = [model] if teacher is None else [model, teacher.requires_grad_(False)]
    watch = StorageWatch([tensor for one in models for tensor in (*one.parameters(), *one.buffers())])
    with watch:
        wrapped = DistributedDataParallel(
            model.config, DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True), model
        )
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=1e-3, bf16=dtype is torch.bfloat16, use_distributed_optimizer=True
            ),
            [wrapped],
            use_gloo_process_groups=False,
        )  # fmt: skip
        ids = torch.randint(0, 500, (MICRO_BATCHES, BATCH, LENGTH))
        positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
        mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
        for _ in range(2):
            watch.peak = 0
            wrapped.zero_grad_buffer()
            optimizer.zero_grad()
            if teacher is not None:
                teacher.post_process = False
                with torch.no_grad():
                    waiting = [teacher(one, positions, mask) for one in ids]
            for index, one in enumerate(ids):
                logits = wrapped(one, positions, mask)
                if teacher is None:
                    loss = losses.vocabulary_parallel_cross_entropy(
                        logits, one, groups.tp, vocab_size=500, inplace=True
                    ).sum()
                else:
                    with torch.no_grad():
                        target = teacher.output_layer(waiting[index])[0].transpose(0, 1).contiguous()
                    loss = losses.vocabulary_parallel_loss(
                        logits, target, groups.tp, vocab_size=500, loss=LossConfig(), inplace=True
                    ).total.sum()
                    del target
                loss.backward()
                del logits, loss
            wrapped.finish_grad_sync()
            optimizer.step()
            waiting = []
    return watch.peak


def modelled(name: str, dtype: torch.dtype, *, distilled: bool, recompute: str, data: int) -> float:
    work = Workload(
        training=True,
        batch_size=BATCH,
        sequence_length=LENGTH,
        bytes=dtype.itemsize,
        recompute=recompute,
        fused=False,
        data=data,
        micro_batches=MICRO_BATCHES,
    )
    table = axes.family(name)
    rotary = CONSTANTS.get(name, {}).get("rotary_percent", 1.0)
    return MemoryCost(table, STUDENT, work, rotary=rotary, teacher=(table, TEACHER) if distilled else None)(STUDENT)


@pytest.mark.slow
def test_within_ten_percent_of_what_a_step_holds(monkeypatch):
    """Weights, gradients, optimizer, activations and teacher together; in groups of fake processes, whose collectives
    move nothing and allocate as real ones do."""
    from nemo_minitron.distillation import divergences, vocabulary_parallel
    from nemo_minitron.runtime import cpu
    from nemo_minitron.runtime.groups import ParallelLayout

    # The losses' buffers are a constant beside real logits; beside these tiny ones they would be as large.
    monkeypatch.setattr(vocabulary_parallel, "CHUNK_BYTES", {"cpu": 16 * 512 * 4 * 4, "cuda": 0})
    monkeypatch.setattr(divergences, "BLOCK_BYTES", {"cpu": 16 * 512 * 4, "cuda": 0})
    full, half = torch.float32, torch.bfloat16
    cases = [("llama", full, True, recompute, 2) for recompute in ("none", "selective", "full")]
    cases += [
        ("llama", full, False, "none", 1),
        ("llama", half, True, "none", 2),
        ("nemotron", half, False, "none", 1),
        ("nemotron", full, False, "selective", 2),
        ("qwen3", full, True, "none", 1),
    ]
    if cpu.needed("auto"):
        cpu.activate()
    try:
        for name, dtype, distilled, recompute, data in cases:
            how = {"distilled": distilled, "recompute": recompute}
            with rank_of_world(ParallelLayout(data=data), 0) as groups:
                measured = peak_of_a_step(name, groups, dtype, **how)
            assert modelled(name, dtype, data=data, **how) == pytest.approx(measured, rel=0.1), (name, dtype, how, data)
    finally:
        cpu.deactivate()
