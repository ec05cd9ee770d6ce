"""Distillation under any layout against one process, and against a plain loop in torch and transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.distributed import run_distributed
from support.states import watch

SEQUENCE, STEPS, BATCH = 32, 10, 6
INTERMEDIATE: dict[str, Any] = {"hidden": "mse", "embedding": "cosine", "relation_heads": 6, "balance": "dynamic"}


LOSSES = {
    "kl": {"kind": "forward_kl"},
    "hot kl": {"kind": "forward_kl", "temperature": 2.0},
    "reverse": {"kind": "reverse_kl"},
    "js": {"kind": "jensen_shannon", "beta": 0.3, "temperature": 0.5},
    "top 4": {"kind": "top_k", "k": 4},
    "hot top 3 with labels": {"kind": "top_k", "k": 3, "temperature": 2.0, "label_weight": 0.4},
    "kl with labels": {"kind": "forward_kl", "label_weight": 0.4},
}
VOCABULARIES = (96, 67, 5)  # padded to 96, 72, 8: at TP 4 there are ranks of which a part, or all, is padding


def losses_case() -> dict[str, Any]:
    """Loss and gradient of every case, computed from this rank's columns."""
    import torch.distributed as dist

    from nemo_minitron.config import LossConfig
    from nemo_minitron.distillation.losses import kernels, vocabulary_parallel
    from nemo_minitron.distillation.losses.vocabulary_parallel import (
        vocabulary_parallel_forward_kl,
        vocabulary_parallel_loss,
        vocabulary_parallel_top_k,
    )

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    vocabulary_parallel.CHUNK_BYTES["cpu"] = 1000  # several chunks of unequal size
    kernels.BLOCK_BYTES["cpu"] = 500
    found: dict[str, Any] = {}
    for vocab in VOCABULARIES:
        student, teacher, mask, labels = loss_inputs(vocab)
        columns = student.shape[-1] // world
        mine = slice(rank * columns, (rank + 1) * columns)
        for name, settings in LOSSES.items():
            loss = LossConfig(**settings)
            top = vocabulary_parallel_top_k(
                teacher[..., mine], dist.group.WORLD, vocab_size=vocab, k=loss.k, temperature=loss.temperature
            ) if loss.kind == "top_k" else None  # fmt: skip
            for how, given in (("", teacher[..., mine]), ("/tokens", top)):
                if given is None:
                    continue
                leaf = student[..., mine].clone().requires_grad_()
                losses = vocabulary_parallel_loss(
                    leaf * 1, given, dist.group.WORLD, vocab_size=vocab, loss=loss,
                    labels=labels if vocab == 96 or loss.label_weight else None, inplace=vocab == 67,
                )  # fmt: skip
                ((losses.total * mask).sum() / mask.sum()).backward()
                found[f"{vocab}/{name}{how}"] = (losses.total.detach(), leaf.grad)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
        vocabulary_parallel_forward_kl(student[..., mine], teacher[..., mine], dist.group.WORLD, vocab_size=vocab)
    found["reductions"] = reduce.call_count
    return found


def loss_inputs(vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[b, s, V]`` logits padded to a multiple of 8 columns, an uneven mask and labels, in float64."""
    generator = torch.Generator().manual_seed(vocab)
    padded = -(-vocab // 8) * 8
    student, teacher = 4 * torch.randn(2, 3, 11, padded, generator=generator, dtype=torch.float64)
    mask = (torch.rand(3, 11, generator=generator) > 0.4).double()
    mask[1] = 0
    return student, teacher, mask, torch.randint(vocab, (3, 11), generator=generator)


def reference_loss(
    settings: dict[str, Any], student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    from nemo_minitron.config import LossConfig
    from nemo_minitron.distillation.losses import reference
    from nemo_minitron.distillation.losses.table import LOGIT_LOSSES

    loss = LossConfig(**settings)
    divergence = LOGIT_LOSSES[loss.kind].expected(student, teacher, loss)
    return (1 - loss.label_weight) * divergence + loss.label_weight * reference.cross_entropy(student, labels)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_losses_and_gradients_equal_the_float64_reference(world: int, tmp_path: Path) -> None:
    """A loss is proven by its gradient: a sum over ranks that autograd sees would make it ``world`` times too large."""
    ranks = run_distributed(losses_case, world, tmp_path, timeout=120)
    for rank in ranks:
        assert rank.pop("reductions") == (0 if world == 1 else 2)  # for all tokens
    assert len(ranks[0]) == len(VOCABULARIES) * (len(LOSSES) + 2)
    for key in ranks[0]:
        vocab, settings = int(key.split("/")[0]), LOSSES[key.split("/")[1]]
        student, teacher, mask, labels = loss_inputs(vocab)
        leaf = student[..., :vocab].clone().requires_grad_()
        expected = reference_loss(settings, leaf, teacher[..., :vocab], labels)
        ((expected * mask).sum() / mask.sum()).backward()
        gradient = torch.cat([rank[key][1] for rank in ranks], -1)
        for rank in ranks:
            torch.testing.assert_close(rank[key][0], expected.detach(), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(gradient[..., :vocab], leaf.grad, rtol=1e-11, atol=1e-13)
        assert not gradient[..., vocab:].any()


def gathered_case() -> torch.Tensor | None:
    """What the peers do: autograd gathers the logits, every rank works out the same loss."""
    import torch.distributed as dist
    from torch.distributed.nn.functional import all_gather

    from nemo_minitron.distillation.losses.reference import forward_kl

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    student, teacher, mask, _ = loss_inputs(96)
    columns = student.shape[-1] // world
    leaf = student[..., rank * columns : (rank + 1) * columns].clone().requires_grad_()
    loss = forward_kl(torch.cat(all_gather(leaf), -1), teacher)
    ((loss * mask).sum() / mask.sum()).backward()
    return leaf.grad


@pytest.mark.slow
def test_the_proof_catches_a_gradient_that_is_counted_once_a_rank(tmp_path: Path) -> None:
    student, teacher, mask, _ = loss_inputs(96)
    leaf = student.clone().requires_grad_()
    ((reference_loss(LOSSES["kl"], leaf, teacher, torch.zeros_like(mask).long()) * mask).sum() / mask.sum()).backward()
    gathered = torch.cat(run_distributed(gathered_case, 2, tmp_path, timeout=120), -1)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gathered, leaf.grad, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gathered, 2 * leaf.grad)


def blocks() -> torch.Tensor:
    return torch.randint(6, 131, (STEPS * BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))


def schedule(**changes: Any) -> Any:
    from nemo_minitron.distillation.recipe import Schedule

    values = {
        "steps": STEPS, "micro_batch_size": 1, "global_batch_size": BATCH, "lr": 1e-3, "min_lr": 1e-4,
        "warmup_steps": 2, "validate_every": 5, "validation_batches": 2, "save_every": 4,
    }  # fmt: skip
    return Schedule(**{**values, **changes})


def distil_case(models: str, out: str, layout: dict[str, Any]) -> None:
    """Distil under a layout."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.config import IntermediateConfig
    from nemo_minitron.distillation.losses import fused_head
    from nemo_minitron.distillation.recipe import distill
    from nemo_minitron.runtime.groups import ParallelLayout

    unset_num_microbatches_calculator()  # of an earlier training in this process
    fused_head.HEAD_BYTES["cpu"] = 5_000  # several chunks a micro-batch
    logits = layout.pop("logits", "whole")
    student, teacher = open_checkpoint(Path(models) / "student"), open_checkpoint(Path(models) / "teacher")
    distill(
        student,
        teacher,
        blocks(),
        blocks()[: 2 * BATCH],
        layout=ParallelLayout(**layout),
        schedule=schedule(logits=logits),
        directory=Path(out),
        intermediate=IntermediateConfig(**INTERMEDIATE),
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and a student that is thinner and has fewer layers; six heads in six groups: TP may be 2 or 3."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8, "intermediate_size": 72}
    tiny_checkpoint(folder / "teacher", tied=True, num_hidden_layers=6, seed=1, **sizes)
    tiny_checkpoint(folder / "student", tied=True, num_hidden_layers=5, seed=2, **{**sizes, "hidden_size": 36})
    return folder


@pytest.fixture(scope="module")
def one_process(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted training in one process."""
    out = tmp_path_factory.mktemp("one")
    run_distributed(distil_case, 1, out, timeout=150, models=str(models), out=str(out), layout={})
    return out


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_one_process_equals_a_plain_torch_loop(models: Path, one_process: Path) -> None:
    """All losses of every step, gradient norm, validation: against AdamW on transformers' model, alpha included."""
    from transformers import AutoModelForCausalLM

    from nemo_minitron.distillation.losses.reference import forward_kl
    from nemo_minitron.distillation.losses.state_hooks import initial_projection

    student, teacher = (AutoModelForCausalLM.from_pretrained(models / which) for which in ("student", "teacher"))
    ours, theirs = watch(student), watch(teacher)
    projections = {layer: initial_projection(layer, 36, 48).requires_grad_() for layer in range(-1, 5)}
    matrices = [*(p for p in student.parameters() if p.ndim > 1), *projections.values()]
    vectors = [p for p in student.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    data, measured = blocks(), lines(one_process)
    training = [line for line in measured if "split" not in line]
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    alpha = 1.0
    for index, line in enumerate(training):
        batch = data[index * BATCH : (index + 1) * BATCH, :-1]
        loss = forward_kl(student(batch).logits, teacher(batch).logits).mean()
        parts = intermediate_losses(ours, theirs, projections)
        optimizer.zero_grad()
        (loss + alpha * sum(parts.values())).backward()
        norm = torch.nn.utils.clip_grad_norm_([*student.parameters(), *projections.values()], 1.0)
        assert {name: line[name] for name in (*parts, "alpha")} == pytest.approx(
            {**{name: part.item() for name, part in parts.items()}, "alpha": alpha}, rel=5e-5
        )
        alpha = (loss / sum(parts.values())).item()
        for parameters in optimizer.param_groups:
            parameters["lr"] = line["lr"]
        optimizer.step()
        assert line["kl"] == pytest.approx(loss.item(), rel=2e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=2e-4)
        if line["step"] in (5, 10):
            validation = next(v for v in measured if v.get("split") and v["step"] == line["step"])
            with torch.no_grad():
                held_out = data[: 2 * BATCH]
                logits = student(held_out[:, :-1]).logits
                kl = forward_kl(logits, teacher(held_out[:, :-1]).logits).mean()
                lm = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten())
            assert validation["kl"] == pytest.approx(kl.item(), rel=2e-5)
            assert validation["lm_loss"] == pytest.approx(lm.item(), rel=2e-5)
    assert training[0]["lr"] == pytest.approx(1e-3 / 3)
    assert training[2]["lr"] == pytest.approx(1e-3)


def intermediate_losses(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], projections: dict[int, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Five layers to six, as the uniform map has it; the attention relations of the last alone."""
    from nemo_minitron.distillation.losses.states import attention_relations, hidden_cosine, hidden_mse

    hidden = [
        hidden_mse(ours[f"layer {i}"], theirs[f"layer {j}"], projections[i]) for i, j in enumerate((0, 1, 3, 4, 5))
    ]
    masked = torch.ones(1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(diagonal=1)
    last, teachers = (tuple(states[f"{x} {i}"] for x in "qkv") for states, i in ((ours, 4), (theirs, 5)))
    return {
        "hidden": torch.stack(hidden).mean(),
        "embedding": hidden_cosine(ours["embedding"], theirs["embedding"], projections[-1]).mean(),
        "attention": attention_relations(last, teachers, heads=6, masked=masked).mean(),
    }


LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 2},
    {"tensor": 2, "sequence_parallel": True},
    {"tensor": 2, "logits": "chunks"},
    {"tensor": 2, "sequence_parallel": True, "logits": "chunks"},
    {"pipeline": 2},
    {"data": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"tensor": 3},
]


def distil_cases(models: str, out: str, layouts: list[dict[str, Any]]) -> None:
    """One after another in the same processes, most of whose time goes into importing NeMo."""
    for layout in layouts:
        distil_case(models, f"{out}/{LAYOUTS.index(layout)}", dict(layout))


@pytest.fixture(scope="module")
def parallel(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trainings under every layout."""
    out = tmp_path_factory.mktemp("parallel")
    # Groups of another layout in the same processes lose their connections under gloo.
    for layouts in (LAYOUTS[:4], *([layout] for layout in LAYOUTS[4:])):
        world = max(layouts[0].values())  # the first has numbers alone
        run_distributed(distil_cases, world, out, timeout=280, models=str(models), out=str(out), layouts=layouts)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_equal_one_process(layout: dict[str, Any], one_process: Path, parallel: Path) -> None:
    """Metrics of every step, and the weights after the last; at PP 2 the student's five layers split unevenly."""
    from nemo_minitron.checkpoints import open_checkpoint

    trained = parallel / str(LAYOUTS.index(layout))
    found, expected = lines(trained), lines(one_process)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("kl", "lm_loss", "grad_norm", "hidden", "embedding", "attention", "alpha"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (theirs["step"], key)
    weights, reference = (
        open_checkpoint(next((d / "checkpoints").glob("*-last"))).weights for d in (trained, one_process)
    )
    for tensor in reference.names():
        rows = min(len(reference.tensor(tensor)), len(weights.tensor(tensor)))  # padding differs with TP
        torch.testing.assert_close(weights.tensor(tensor)[:rows], reference.tensor(tensor)[:rows], rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_before_the_update(models: Path, tmp_path: Path) -> None:
    """Damaged weights: one message, no step counted, nothing saved."""
    from safetensors.torch import load_file, save_file

    damaged = tmp_path / "models"
    shutil.copytree(models, damaged)
    weights = load_file(damaged / "student/model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, damaged / "student/model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    with pytest.raises(
        AssertionError, match="NonFiniteError: the distillation loss of step 0 is nan; nothing was updated"
    ):
        run_distributed(distil_case, 1, tmp_path, timeout=150, models=str(damaged), out=str(out), layout={})
    assert lines(out) == []
    assert not list((out / "checkpoints").glob("*"))
