"""The most bytes that an optimizer step of Megatron's holds, and what the planner estimates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from support.memory import StorageWatch

from nemo_minitron import axes
from nemo_minitron.architecture import Architecture
from nemo_minitron.planning import MemoryCost, Workload
from nemo_minitron.shape import ModelShape


@dataclass(frozen=True)
class Sizes:
    """Of a training step: both models, and what runs through them."""

    student: ModelShape
    teacher: ModelShape
    batch: int
    length: int
    micro_batches: int


SMALL = Sizes(ModelShape(4, 96, 256, 8, 4, 16, 500), ModelShape(5, 128, 320, 8, 4, 16, 500), 2, 64, 3)
#: Some 3 GiB in float32: beside them what CUDA's libraries allocate for themselves is small.
LARGE = Sizes(ModelShape(12, 1024, 2816, 16, 8, 64, 32000), ModelShape(14, 1280, 3456, 20, 10, 64, 32000), 2, 512, 3)
CONSTANTS: dict[str, dict[str, Any]] = {"nemotron": {"rotary_percent": 0.5}}


class _Peak:
    """Bytes, by the operations on the CPU, by the allocator on CUDA."""

    def __init__(self, device: torch.device, watch: StorageWatch | None, before: int) -> None:
        self._device, self._watch, self._before = device, watch, before

    def restart(self) -> None:
        """Forget the most bytes so far."""
        if self._watch is None:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._watch.peak = 0

    @property
    def bytes(self) -> int:
        """The most that were held at once."""
        if self._watch is None:
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return self._watch.peak


@contextmanager
def _watched(models: list[torch.nn.Module], before: int) -> Iterator[_Peak]:
    """Counts what the models hold and all that is made from here on."""
    device = next(models[0].parameters()).device
    if device.type == "cuda":
        yield _Peak(device, None, before)
        return
    watch = StorageWatch([tensor for model in models for tensor in (*model.parameters(), *model.buffers())])
    with watch:
        yield _Peak(device, watch, 0)


def peak_of_a_step(
    name: str,
    groups: Any,
    dtype: torch.dtype,
    *,
    distilled: bool,
    recompute: str,
    chunked: bool = False,
    sizes: Sizes = SMALL,
) -> int:
    """Bytes, of the second step: the optimizer's state is there from the first on."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from nemo_minitron.config import LossConfig
    from nemo_minitron.distillation.losses import vocabulary_parallel
    from nemo_minitron.distillation.losses.fused_head import OutputHead, fused_head_loss, without_output_layer
    from nemo_minitron.runtime.model import build_model

    vocab = sizes.student.vocab_size
    architecture = Architecture(family=name, max_position_embeddings=sizes.length, **CONSTANTS.get(name, {}))
    before = torch.cuda.memory_allocated()  # 0 on the CPU
    (model,) = build_model(sizes.student, architecture, groups, dtype=dtype, initialize=True)
    (teacher,) = (
        build_model(sizes.teacher, architecture, groups, dtype=dtype, initialize=True) if distilled else (None,)
    )
    if recompute != "none":
        model.config.recompute_granularity = recompute
        model.config.recompute_method, model.config.recompute_num_layers = "uniform", 1
        for layer in model.decoder.layers:
            layer.self_attention.checkpoint_core_attention = recompute == "selective"
    models = [model] if teacher is None else [model, teacher.requires_grad_(False)]
    device = next(model.parameters()).device
    with _watched(models, before) as held:
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
        ids = torch.randint(0, vocab, (sizes.micro_batches, sizes.batch, sizes.length)).to(device)
        positions = torch.arange(sizes.length, device=device).expand(sizes.batch, sizes.length)
        mask = torch.ones(1, 1, sizes.length, sizes.length, dtype=torch.bool, device=device).triu(1)
        for _ in range(2):
            held.restart()
            wrapped.zero_grad_buffer()
            optimizer.zero_grad()
            if teacher is not None:
                teacher.post_process = False
                with torch.no_grad():
                    waiting = [teacher(one, positions, mask) for one in ids]
            for index, one in enumerate(ids):
                with without_output_layer(model) if chunked else nullcontext([]) as weights:
                    logits = wrapped(one, positions, mask)
                if weights:
                    loss = fused_head_loss(
                        OutputHead(logits.transpose(0, 1), weights[0]),
                        None if teacher is None else OutputHead(waiting[index], teacher.output_layer.weight),
                        groups.tp,
                        vocab_size=vocab,
                        loss=None if teacher is None else LossConfig(),
                        token_weights=torch.ones(sizes.length, sizes.batch, device=device),
                        labels=one.T if teacher is None else None,
                    ).total
                elif teacher is None:
                    loss = vocabulary_parallel.vocabulary_parallel_cross_entropy(
                        logits, one, groups.tp, vocab_size=vocab, inplace=True
                    ).sum()
                else:
                    with torch.no_grad():
                        target = teacher.output_layer(waiting[index])[0].transpose(0, 1).contiguous()
                    loss = vocabulary_parallel.vocabulary_parallel_loss(
                        logits, target, groups.tp, vocab_size=vocab, loss=LossConfig(), inplace=True
                    ).total.sum()
                    del target
                loss.backward()
                del logits, loss
            wrapped.finish_grad_sync()
            optimizer.step()
            waiting = []
        return held.bytes


def modelled(
    name: str,
    dtype: torch.dtype,
    *,
    distilled: bool,
    recompute: str,
    data: int,
    chunked: bool = False,
    sizes: Sizes = SMALL,
    fused: bool = False,
) -> float:
    """What the planner estimates for the step of :func:`peak_of_a_step`."""
    work = Workload(
        training=True,
        batch_size=sizes.batch,
        sequence_length=sizes.length,
        bytes=dtype.itemsize,
        recompute=recompute,
        chunked=chunked,
        fused=fused,
        data=data,
        micro_batches=sizes.micro_batches,
    )
    table = axes.family(name)
    rotary = CONSTANTS.get(name, {}).get("rotary_percent", 1.0)
    teacher = (table, sizes.teacher) if distilled else None
    return MemoryCost(table, sizes.student, work, rotary=rotary, teacher=teacher)(sizes.student)


def shrink_buffers(rows: int, vocab: int) -> None:
    """Let the losses' buffers be small beside the logits of a small model; with plain layers no estimate has them."""
    from nemo_minitron.distillation.losses import kernels, vocabulary_parallel

    vocabulary_parallel.CHUNK_BYTES = dict.fromkeys(("cpu", "cuda"), 4 * rows * vocab * 4)
    kernels.BLOCK_BYTES = dict.fromkeys(("cpu", "cuda"), rows * vocab * 4)


def estimate_and_peak(
    groups: Any, dtype: torch.dtype, *, distilled: bool, recompute: str, large: bool, fused: bool
) -> dict[str, float]:
    """Bytes of the planner and of a step, by "estimate" and "peak".

    Args:
        groups: of one process.
        dtype: of the weights.
        distilled: with a teacher.
        recompute: Megatron's granularity.
        large: sizes for a device, otherwise for a test.
        fused: the layers are Transformer Engine's.
    """
    sizes = LARGE if large else SMALL
    if not fused:
        shrink_buffers(16, sizes.student.vocab_size)
    how: dict[str, Any] = {"distilled": distilled, "recompute": recompute, "sizes": sizes}
    return {
        "estimate": modelled("llama", dtype, data=1, fused=fused, **how),
        "peak": float(peak_of_a_step("llama", groups, dtype, **how)),
    }
