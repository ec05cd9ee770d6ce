"""The memory model against the most bytes that a real optimizer step holds: Megatron's DDP, distributed optimizer and
schedule, this suite's teacher and losses."""

from __future__ import annotations

import pytest
import torch
from support.meta import rank_of_world
from support.peak import modelled, peak_of_a_step


@pytest.mark.slow
def test_within_ten_percent_of_what_a_step_holds(monkeypatch):
    """Weights, gradients, optimizer, activations and teacher together; in groups of fake processes, whose collectives
    move nothing and allocate as real ones do."""
    from nemo_minitron.distillation.losses import fused_head, kernels, vocabulary_parallel
    from nemo_minitron.planning import memory
    from nemo_minitron.runtime import cpu
    from nemo_minitron.runtime.groups import ParallelLayout

    # The losses' buffers are a constant beside real logits; beside these tiny ones they would be as large.
    monkeypatch.setattr(vocabulary_parallel, "CHUNK_BYTES", {"cpu": 16 * 512 * 4 * 4, "cuda": 0})
    monkeypatch.setattr(kernels, "BLOCK_BYTES", {"cpu": 16 * 512 * 4, "cuda": 0})
    estimated = {"cpu": memory.HEAD_BYTES[False], "cuda": memory.HEAD_BYTES[True]}
    assert estimated == fused_head.HEAD_BYTES
    monkeypatch.setattr(fused_head, "HEAD_BYTES", {"cpu": 32 * 512 * 4})
    monkeypatch.setattr(memory, "HEAD_BYTES", {False: 32 * 512 * 4})
    full, half = torch.float32, torch.bfloat16
    cases = [("llama", full, True, recompute, 2, False) for recompute in ("none", "selective", "full")]
    cases += [
        ("llama", full, False, "none", 1, False),
        ("llama", half, True, "none", 2, False),
        ("nemotron", half, False, "none", 1, False),
        ("nemotron", full, False, "selective", 2, False),
        ("qwen3", full, True, "none", 1, False),
        ("llama", full, True, "full", 2, True),
        ("llama", half, True, "full", 1, True),
        ("llama", full, False, "full", 1, True),
    ]
    cpu.prepare()
    try:
        for name, dtype, distilled, recompute, data, chunked in cases:
            how = {"distilled": distilled, "recompute": recompute, "chunked": chunked}
            with rank_of_world(ParallelLayout(data=data), 0) as groups:
                measured = peak_of_a_step(name, groups, dtype, **how)
            assert modelled(name, dtype, data=data, **how) == pytest.approx(measured, rel=0.1), (name, dtype, how, data)
    finally:
        cpu.deactivate()
