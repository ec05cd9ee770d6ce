"""What the GPU tier measures of live models, in processes of its own; the very same on the CPU is the reference.

``python -m support.tier_cases FUNCTION DEVICE WORLD FOLDER RANK SETTINGS`` is what :func:`support.tier.run_cases` runs.
Everything returned is on the CPU.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from support.pruning import live, random_checkpoint, random_kept, tokens

from nemo_minitron.architecture import Architecture
from nemo_minitron.shape import ModelShape

#: Sizes that Transformer Engine's kernels take too.
SHAPE = ModelShape(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=16,
    vocab_size=251,
)
TARGET = SHAPE.replace(
    num_layers=3, hidden_size=48, ffn_hidden_size=96, num_query_groups=2, num_attention_heads=4, vocab_size=251
)
SEQUENCE = 32
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "nemotron": {"rotary_percent": 0.5},
    "mixtral": {"moe_router_topk": 2},
}
CRITERIA = (("mean", "l2"), ("l2", "mean"), ("variance", "l1"))


def shape_of(family: str, shape: ModelShape = SHAPE) -> ModelShape:
    """The sizes of a family's model."""
    return shape.replace(num_moe_experts=4) if family == "mixtral" else shape


def checkpoint_of(family: str, shape: ModelShape = SHAPE, *, seed: int = 0) -> Any:
    """A random model in memory whose states keep their size from layer to layer."""

    def smaller(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            if tensor.ndim > 1:
                tensor.mul_(0.25)

    architecture = Architecture(family=family, max_position_embeddings=128, **FAMILIES[family])
    return random_checkpoint(shape_of(family, shape), seed=seed, change=smaller, architecture=architecture)


def kept_of(family: str) -> Any:
    """Units that stay when every axis is pruned."""
    return random_kept(shape_of(family), shape_of(family, TARGET))


def model_case(groups: Any, families: list[str], dtype: str) -> dict[str, dict[str, Any]]:
    """Of each family: forward pass, losses, gradients, scores, depth scores, live pruning, answers.

    Returns:
        family -> name -> tensor of this rank. Logits and losses are of whole vocabularies.
    """
    return {family: _measured(groups, family, getattr(torch, dtype)) for family in families}


def _measured(groups: Any, family: str, dtype: torch.dtype) -> dict[str, Any]:
    from nemo_minitron.checkpoints.live import canonical_parameters
    from nemo_minitron.distillation.losses.vocabulary_parallel import vocabulary_parallel_cross_entropy
    from nemo_minitron.importance import score_criteria
    from nemo_minitron.importance.depth import layer_importance
    from nemo_minitron.pruning import DepthPrune, WidthPrune
    from nemo_minitron.runtime.forward import block_losses

    checkpoint = checkpoint_of(family)
    shape, vocab = checkpoint.shape, checkpoint.shape.vocab_size
    chunks = live(checkpoint, groups, dtype=dtype)
    blocks = tokens(6, SEQUENCE + 1, vocab=vocab)
    found: dict[str, Any] = {"logits": whole_logits(chunks[0], blocks[:, :-1], groups, vocab)}
    found["losses"] = block_losses(chunks, groups, blocks, 2, vocab_size=vocab)

    ids = blocks.to(next(chunks[0].parameters()).device)
    output = chunks[0](ids[:, :-1], positions_of(ids[:, :-1]), None)
    labels = ids[:, 1:]
    loss = vocabulary_parallel_cross_entropy(output.contiguous(), labels, groups.tp, vocab_size=vocab)
    loss.mean().backward()
    found |= {
        f"gradient of {name}": parameter.grad.float().cpu()
        for name, parameter in canonical_parameters(chunks[0])
        if parameter.grad is not None
    }
    for parameter in chunks[0].parameters():
        parameter.grad = None

    how = {"shape": shape, "micro_batch_size": 2}
    for estimator, criteria in (("activation", CRITERIA), ("taylor", (("sum", "l2"),))):
        for criterion, scores in zip(
            criteria, score_criteria(chunks, blocks, groups, criteria=criteria, estimator=estimator, **how), strict=True
        ):
            for part in ("ffn", "heads", "groups", "hidden", "layers", "experts"):
                if (tensor := getattr(scores, part)) is not None:
                    found[f"{estimator} scores, {'-'.join(criterion)}, of {part}"] = tensor
    depth = layer_importance(chunks, blocks, groups, greedy=2, block_lengths=[2], **how)
    measured = sorted(depth.measured.items())
    found["layers left out"] = torch.tensor([sum(10**n for n in layers) for layers, _ in measured])
    found["losses without layers"] = torch.tensor([one.loss for _, one in measured], dtype=torch.float64)
    if dtype is torch.float32:
        found |= _answers(chunks, groups, vocab)

    kept = kept_of(family)
    WidthPrune(kept, groups=groups)(DepthPrune(kept, groups=groups)(chunks[0]))
    found |= {f"pruned {name}": parameter.detach().float().cpu() for name, parameter in canonical_parameters(chunks[0])}
    found["pruned logits"] = whole_logits(chunks[0], blocks[:, :-1], groups, vocab)
    return found


def _answers(chunks: list[Any], groups: Any, vocab: int) -> dict[str, torch.Tensor]:
    """Greedy and drawn answers to prompts of different lengths, with a cache of keys and values."""
    from nemo_minitron.generation import Sampling, generate_tokens

    prompts = [tokens(1, length, seed=length, vocab=vocab)[0].tolist() for length in (3, 7, 8)]
    found = {}
    for name, sampling, seed in (
        ("greedy", Sampling(max_new_tokens=6, greedy=True), 1234),
        ("drawn", Sampling(max_new_tokens=6, temperature=0.7, top_k=20, top_p=0.9), 5),
    ):
        answers = generate_tokens(
            chunks, groups, prompts, sampling=sampling, seed=seed, ends=[], vocab_size=vocab, batch_size=3
        )
        found[f"{name} answers"] = torch.tensor([answer.tokens for answer in answers])
        found[f"{name} log-probabilities"] = torch.tensor([answer.logprobs for answer in answers])
    return found


def positions_of(ids: torch.Tensor) -> torch.Tensor:
    """``[b, s]`` positions."""
    return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)


@torch.no_grad()
def whole_logits(chunk: Any, ids: torch.Tensor, groups: Any, vocab: int) -> torch.Tensor:
    """``[b, s, V]`` float32 on the CPU, gathered over the tensor-parallel ranks."""
    import torch.distributed as dist

    ids = ids.to(next(chunk.parameters()).device)
    mine = chunk.eval()(ids, positions_of(ids), None).float().contiguous()
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(groups.tp))]
    dist.all_gather(everyone, mine, group=groups.tp)
    return torch.cat(everyone, -1)[..., :vocab].cpu()


def step_case(groups: Any, dtypes: list[str], kinds: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Three optimizer steps of distillation by Megatron's own schedule and optimizer, without NeMo.

    Returns:
        ``dtype/kind`` -> the losses ``[3]``, and the student's parameters after the last step.
    """
    return {f"{dtype}/{kind}": _steps(groups, dtype, kind) for dtype in dtypes for kind in kinds}


def _steps(groups: Any, dtype: str, kind: str) -> dict[str, torch.Tensor]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from nemo_minitron.checkpoints.live import canonical_parameters
    from nemo_minitron.config import LossConfig
    from nemo_minitron.distillation.losses.vocabulary_parallel import vocabulary_parallel_loss

    precision = getattr(torch, dtype)
    (teacher,) = live(checkpoint_of("llama", seed=1), groups, dtype=precision)
    (student,) = live(checkpoint_of("llama", TARGET), groups, dtype=precision)
    teacher.eval().requires_grad_(False)
    student.config.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(
        student.config, DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True), student
    )
    options = OptimizerConfig(
        optimizer="adam", lr=1e-3, bf16=precision is torch.bfloat16, use_distributed_optimizer=True
    )
    optimizer = get_megatron_optimizer(options, [wrapped], use_gloo_process_groups=False)
    loss = LossConfig(kind=kind, k=16, label_weight=0.25)
    vocab, device = SHAPE.vocab_size, next(student.parameters()).device
    blocks = tokens(6, SEQUENCE + 1, vocab=vocab).to(device)

    def forward_step(batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        inputs, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        positions = positions_of(inputs)
        with torch.no_grad():
            target = teacher(inputs, positions, None).contiguous()

        def reduced(logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            taken = vocabulary_parallel_loss(
                logits.contiguous(), target, groups.tp, vocab_size=vocab, loss=loss, labels=labels
            )
            mean = taken.total.mean()
            return mean, {"loss": mean.detach().clone()}

        return model(inputs, positions, None), reduced

    losses = []
    for _ in range(3):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        found = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(blocks.split(2)),
            model=wrapped,
            num_microbatches=3,
            seq_length=SEQUENCE,
            micro_batch_size=2,
            forward_only=False,
        )
        optimizer.step()
        losses.append(torch.stack([one["loss"] for one in found]).mean().float().cpu())
    after = {f"after {name}": weight.detach().float().cpu() for name, weight in canonical_parameters(student)}
    return {"losses": torch.stack(losses), **after}


def intermediate_case(groups: Any, dtypes: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Losses between states inside teacher and student, attached to the live student by hooks.

    Returns:
        dtype -> means of the losses, and gradients of the student's parameters.
    """
    return {dtype: _intermediate(groups, dtype) for dtype in dtypes}


def _intermediate(groups: Any, dtype: str) -> dict[str, torch.Tensor]:
    from nemo_minitron.checkpoints.live import canonical_parameters
    from nemo_minitron.config import IntermediateConfig
    from nemo_minitron.distillation.losses.balance import Balance
    from nemo_minitron.distillation.losses.layer_maps import layer_maps
    from nemo_minitron.distillation.losses.state_hooks import Plan, StudentLosses, TeacherStates

    precision = getattr(torch, dtype)
    (teacher,) = live(checkpoint_of("llama", seed=1), groups, dtype=precision)
    (student,) = live(checkpoint_of("llama", TARGET), groups, dtype=precision)
    config = IntermediateConfig(hidden="mse", embedding="cosine", relation_heads=4, balance="dynamic")
    teacher_shape, student_shape = shape_of("llama"), shape_of("llama", TARGET)
    maps = layer_maps(config, student_shape, teacher_shape, tensor=groups.layout.tensor, kept_layers=None)
    plan = Plan.of(config, maps, student_shape, teacher_shape, groups)
    balance = Balance(list(config.weights()), dynamic=True)
    student.config.calculate_per_token_loss = True
    losses = StudentLosses(plan, student, groups, balance)
    device = next(student.parameters()).device
    ids = tokens(2, SEQUENCE, vocab=SHAPE.vocab_size).to(device)
    masked = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool, device=device).triu(1)
    states = TeacherStates(plan, [teacher.requires_grad_(False)], groups)
    with states.recorded(), torch.no_grad():
        teacher(ids, positions_of(ids), None)
    (held,) = states.exchanged(1, 2, SEQUENCE)
    counted = (torch.arange(SEQUENCE, device=device) % 5 > 0).float().expand(2, SEQUENCE)
    batch = {"tokens": ids, "position_ids": positions_of(ids), "attention_mask": masked, "loss_mask": counted}
    balance.begin(groups)
    with losses.micro_batch(batch, held):
        output = student(ids, positions_of(ids), None)
    (output.float() * 0).sum().backward()
    balance.add_logits(counted.sum(), counted.sum())
    balance.end(groups, training=True)
    found = {f"mean {name}": torch.tensor(value) for name, value in balance.means.items()}
    found |= {
        f"gradient of {name}": parameter.grad.float().cpu()
        for name, parameter in canonical_parameters(student)
        if parameter.grad is not None
    }
    return found


def memory_case(groups: Any, runs: list[tuple[str, bool, str]], large: bool) -> list[dict[str, float]]:
    """Most bytes of an optimizer step, and what the planner says of it.

    Args:
        groups: of one process.
        runs: dtype, whether a teacher is there, and what is computed again, of each.
        large: sizes for a device.
    """
    from support.peak import estimate_and_peak

    found = []
    for dtype, distilled, recompute in runs:
        found.append(
            estimate_and_peak(
                groups,
                getattr(torch, dtype),
                distilled=distilled,
                recompute=recompute,
                large=large,
                fused=os.environ["MINITRON_LAYER_SPEC"] == "transformer_engine",
            )
        )
        gc.collect()
    return found


def _main() -> None:
    function, device, world, folder, rank, settings = sys.argv[1:]
    from nemo_minitron.runtime import cpu

    torch.set_num_threads(1)
    cpu.prepare(device)
    from nemo_minitron.runtime.groups import ParallelLayout, initialize

    groups = initialize(ParallelLayout(tensor=int(world)))
    result = globals()[function](groups, **json.loads(settings))
    torch.save(result, Path(folder) / f"result{rank}.pt")
    sys.stdout.flush()
    os._exit(0)  # shutting down NCCL and Megatron takes seconds and has nothing left to test


if __name__ == "__main__":
    _main()
