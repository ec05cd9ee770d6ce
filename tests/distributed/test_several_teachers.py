"""Several teachers: the weighted loss and the teachers of each source, under any layout, against plain formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.distributed import run_distributed
from support.families import family_model
from support.memory import StorageWatch
from support.training import blocks

STEPS, BATCH = 3, 4
SOURCES = ("math", "chat")
WEIGHTED = {"a": dict.fromkeys(SOURCES, 0.3), "b": dict.fromkeys(SOURCES, 0.7)}
BY_SOURCE = {"a": {"math": 1.0}, "b": {"chat": 1.0}}
LOSSES: dict[str, dict[str, Any]] = {
    "kl": {"kind": "forward_kl"},
    "hot kl with labels": {"kind": "forward_kl", "temperature": 2.0, "label_weight": 0.4},
    "js": {"kind": "jensen_shannon", "beta": 0.3},
    "top 4 with labels": {"kind": "top_k", "k": 4, "label_weight": 0.4},
}
#: Of the loss alone: the shares of three teachers in the loss of each of three sequences.
SHARES = {
    "sum": [[0.3, 0.3, 0.3], [0.5, 0.5, 0.5], [0.2, 0.2, 0.2]],
    "by source": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.25], [0.0, 0.0, 0.75]],
    "the last measures": [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]],
}
ROWS = 67


def of_domains() -> torch.Tensor:
    """``[n]``: in a step of four blocks there are one, three or none of the second source."""
    return torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0])


def text(count: int) -> Any:
    from nemo_minitron.data.blocks import Blocks

    return Blocks(blocks(count), of_domains()[:count], SOURCES)


def loss_inputs() -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """``[11, 3, V]`` logits in float64 of the student and of three teachers, an uneven mask, labels."""
    generator = torch.Generator().manual_seed(7)
    student, *teachers = 4 * torch.randn(4, 11, 3, ROWS, generator=generator, dtype=torch.float64)
    mask = (torch.rand(11, 3, generator=generator) > 0.4).double()
    return student, teachers, mask, torch.randint(ROWS, (11, 3), generator=generator)


def of_rank(whole: torch.Tensor) -> torch.Tensor:
    """A rank's columns, the padding filled with numbers that must not matter."""
    import torch.distributed as dist

    size = -(-whole.shape[-1] // (8 * dist.get_world_size())) * 8 * dist.get_world_size()
    filled = torch.nn.functional.pad(whole, (0, size - whole.shape[-1]), value=77.0)
    return filled.chunk(dist.get_world_size(), -1)[dist.get_rank()].contiguous()


def losses() -> dict[str, Any]:
    """Values and gradient of every case, from this rank's columns."""
    import torch.distributed as dist

    from nemo_minitron.config import LossConfig
    from nemo_minitron.distillation.losses.weighted import Scored, weighted_loss

    student, teachers, mask, labels = loss_inputs()
    results: dict[str, Any] = {}
    for shared, shares in SHARES.items():
        for name, settings in LOSSES.items():
            loss = LossConfig(**settings)
            leaf = of_rank(student).requires_grad_()
            scored = [
                Scored(lambda teacher=teacher: of_rank(teacher), torch.tensor(share, dtype=torch.float64))  # type: ignore[misc]
                for teacher, share in zip(teachers, shares, strict=True)
            ]
            result = weighted_loss(
                leaf * 1, scored, dist.group.WORLD, vocab_size=ROWS, loss=loss,
                labels=labels if loss.label_weight else None, inplace=shared != "sum",
            )  # fmt: skip
            ((result.total * mask).sum() / mask.sum()).backward()
            parts = torch.stack(result.divergences)
            results[f"{shared}/{name}"] = (result.total.detach(), result.divergence, parts, leaf.grad)
    return results


def memory(count: int) -> float:
    """The most that the loss from so many teachers holds above the student's logits, in logits of that size."""
    import torch.distributed as dist

    from nemo_minitron.config import LossConfig
    from nemo_minitron.distillation.losses import kernels
    from nemo_minitron.distillation.losses.weighted import Scored, weighted_loss

    logits = torch.randn(64, 2, 1024)
    leaf = logits.clone().requires_grad_()
    student, share = leaf * 1, torch.full((2,), 1 / count, dtype=torch.float64)
    with mock.patch.dict(kernels.BLOCK_BYTES, {"cpu": 10_000}), StorageWatch([leaf, student]) as watch:
        weighted_loss(
            student, [Scored(lambda: torch.randn(64, 2, 1024), share)] * count, dist.group.WORLD, vocab_size=1024,
            loss=LossConfig(), inplace=True,
        )  # fmt: skip
    return (watch.peak - watch.start) / (logits.nbytes)


def layouts() -> dict[str, Any]:
    from nemo_minitron.runtime.groups import ParallelLayout

    return {
        "one": ParallelLayout(),
        "tp": ParallelLayout(tensor=2),
        "pp": ParallelLayout(pipeline=2),
        "vpp": ParallelLayout(pipeline=2, virtual_pipeline=2),
        "cp": ParallelLayout(context=2),
        "dp": ParallelLayout(data=2),
        "ep": ParallelLayout(data=2, expert=2),
    }


def train(
    models: str,
    out: Path,
    layout: str,
    teachers: dict[str, dict[str, float]] | str,
    *,
    placed: dict[str, str] | None = None,
    stop_at: int | None = None,
    **schedule: Any,
) -> None:
    """Distil for some steps from several teachers, or from one by its name; the models are named as the teachers."""
    import os
    import signal

    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.distillation.recipe import Schedule, distill
    from nemo_minitron.distillation.several import distill_from_several
    from nemo_minitron.distillation.teachers.placement import TeacherPlacement
    from nemo_minitron.distillation.teachers.several import OneOfSeveral
    from nemo_minitron.distillation.training import metrics
    from nemo_minitron.runtime.groups import initialize

    destroy_num_microbatches_calculator()
    initialize(layouts()[layout])
    settings: dict[str, Any] = {
        "micro_batch_size": 1, "global_batch_size": BATCH, "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2,
        "validate_every": STEPS, "validation_batches": 1, "save_every": 100, "steps": STEPS, **schedule,
    }  # fmt: skip
    how: dict[str, Any] = {
        "layout": layouts()[layout], "directory": out, "schedule": Schedule(**settings),
    }  # fmt: skip
    student = open_checkpoint(Path(models) / "student")
    data = text(STEPS * BATCH), text(BATCH)
    advance = metrics.ProgressBar.on_train_batch_end

    def interrupted(self: Any, trainer: Any, *arguments: Any) -> None:
        advance(self, trainer, *arguments)
        if trainer.global_step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(metrics.ProgressBar, "on_train_batch_end", interrupted):
        if isinstance(teachers, str):
            distill(student, open_checkpoint(Path(models) / teachers), *data, **how)
            return
        each = []
        for name, shares in teachers.items():
            placement = TeacherPlacement()
            if name in (placed or {}):
                placement = TeacherPlacement("own_layout", layouts()[(placed or {})[name]])
            each.append(OneOfSeveral(name, open_checkpoint(Path(models) / name[0]), shares, placement))
        distill_from_several(student, each, *data, **how)


def one_process_case(models: str, out: str) -> dict[str, Any]:
    from nemo_minitron.distillation.teachers import frozen
    from nemo_minitron.errors import PreemptedError

    torch.distributed.init_process_group("gloo")
    folder = Path(out)
    train(models, folder / "one", "one", WEIGHTED)
    train(models, folder / "single", "one", "a")
    twice = {name: dict.fromkeys(SOURCES, share) for name, share in (("a", 0.3), ("a2", 0.7), ("b", 0.0))}
    train(models, folder / "twice the same", "one", twice)
    ran: list[int] = []
    run = frozen.Teacher.run

    def counted(self: Any, batches: Any) -> Any:
        ran.append(len(batches))
        return run(self, batches)

    with mock.patch.object(frozen.Teacher, "run", counted):
        train(models, folder / "by source", "one", BY_SOURCE)
    train(models, folder / "by source, mixed", "one", BY_SOURCE, micro_batch_size=2)
    with pytest.raises(PreemptedError):
        train(models, folder / "resumed", "one", BY_SOURCE, stop_at=2)
    train(models, folder / "resumed", "one", BY_SOURCE)
    train(f"{models}/mixtures", folder / "mixtures", "one", BY_SOURCE)
    return {"ran": ran, "losses": losses(), "memory": [memory(count) for count in (1, 2, 3, 4)]}


def two_processes_case(models: str, out: str) -> dict[str, Any]:
    torch.distributed.init_process_group("gloo")
    folder = Path(out)
    for layout in ("tp", "pp"):
        train(models, folder / layout, layout, WEIGHTED)
    for layout in ("pp", "vpp", "cp"):
        train(models, folder / f"{layout}, by source", layout, BY_SOURCE)
    train(models, folder / "dp on tp", "dp", BY_SOURCE, placed={"b": "tp"})
    train(models, folder / "tp on pp and dp", "tp", WEIGHTED, placed={"a": "pp", "b": "dp"})
    train(f"{models}/mixtures", folder / "mixtures, ep", "ep", BY_SOURCE)
    return {"losses": losses()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 72}
    tiny_checkpoint(folder / "a", tied=True, num_hidden_layers=4, seed=1, **sizes)
    tiny_checkpoint(folder / "b", num_hidden_layers=5, seed=3, **{**sizes, "hidden_size": 40})
    tiny_checkpoint(folder / "student", num_hidden_layers=4, seed=2, **{**sizes, "hidden_size": 32})
    for seed, name in enumerate(("a", "b", "student")):
        family_model("mixtral", folder / "mixtures" / name, seed=seed, num_hidden_layers=2, router_aux_loss_coef=0.01)
    return folder


def curve(directory: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name.startswith(("kl", "lm_loss", "grad_norm"))} for line in lines]


def plain_first_step(models: Path, shares: dict[str, dict[str, float]]) -> dict[str, float]:
    """Losses and norm of the gradient of the first step, by transformers' models in float64."""
    from transformers import AutoModelForCausalLM

    inputs, domain = blocks(BATCH)[:, :-1], of_domains()[:BATCH]
    student = AutoModelForCausalLM.from_pretrained(models / "student", torch_dtype=torch.float64).eval()
    log_q = student(inputs).logits.log_softmax(-1)
    total, figures = torch.zeros(inputs.shape, dtype=torch.float64), {}
    for name, of_source in shares.items():
        teacher = AutoModelForCausalLM.from_pretrained(models / name, torch_dtype=torch.float64).eval()
        with torch.no_grad():
            log_p = teacher(inputs).logits.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        share = torch.tensor([of_source.get(source, 0.0) for source in SOURCES], dtype=torch.float64)[domain]
        total = total + share[:, None] * divergence
        taught = torch.tensor([source in of_source for source in SOURCES])[domain]
        figures[f"kl_{name}"] = divergence[taught].mean().item()
    total.mean().backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm().item()
    return {"kl": total.mean().item(), **figures, "grad_norm": norm}


def assert_losses(ranks: list[dict[str, Any]]) -> None:
    """Values and gradients against the plain formula in float64."""
    from nemo_minitron.config import LossConfig
    from nemo_minitron.distillation.losses import reference
    from nemo_minitron.distillation.losses.table import LOGIT_LOSSES

    student, teachers, mask, labels = loss_inputs()
    assert len(ranks[0]) == len(SHARES) * len(LOSSES)
    for key in ranks[0]:
        shared, name = key.split("/")
        loss, leaf = LossConfig(**LOSSES[name]), student.clone().requires_grad_()
        parts = torch.stack([LOGIT_LOSSES[loss.kind].expected(leaf, teacher, loss) for teacher in teachers])
        divergence = (torch.tensor(SHARES[shared], dtype=torch.float64)[:, None] * parts).sum(0)
        total = (1 - loss.label_weight) * divergence + loss.label_weight * reference.cross_entropy(leaf, labels)
        ((total * mask).sum() / mask.sum()).backward()
        assert leaf.grad is not None
        for rank in ranks:
            for ours, theirs in zip(rank[key][:3], (total, divergence, parts), strict=True):
                torch.testing.assert_close(ours, theirs.detach(), rtol=1e-11, atol=1e-13)
        gradient = torch.cat([rank[key][3] for rank in ranks], -1)
        torch.testing.assert_close(gradient[..., :ROWS], leaf.grad, rtol=1e-11, atol=1e-13)
        assert not gradient[..., ROWS:].any()


def assert_same(run: Path, expected: Path, *, without: tuple[str, ...] = (), rel: float = 2e-5) -> None:
    ours, theirs = curve(run), curve(expected)
    assert len(ours) == len(theirs) == STEPS + 1
    for left, right in zip(ours, theirs, strict=True):
        assert {name: left[name] for name in left if name not in without} == pytest.approx(right, rel=rel), run.name


@pytest.mark.slow
@pytest.mark.timeout(900)  # two launches of NeMo and 16 trainings
def test_several_teachers_under_any_layout(models: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    (one,) = run_distributed(one_process_case, 1, tmp_path, timeout=400, models=str(models), out=str(runs))
    two = run_distributed(two_processes_case, 2, tmp_path, timeout=400, models=str(models), out=str(runs))
    assert_losses([one["losses"]])
    assert_losses([rank["losses"] for rank in two])

    for run, shares in (("one", WEIGHTED), ("by source", BY_SOURCE)):
        expected = plain_first_step(models, shares)
        assert {name: curve(runs / run)[0][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    # Two equal teachers are one, whatever their weights; a third of weight 0 is measured and changes nothing.
    assert_same(runs / "twice the same", runs / "single", without=("kl_a", "kl_a2", "kl_b"))
    for line in curve(runs / "twice the same"):
        assert line["kl_a"] == line["kl_a2"] == pytest.approx(line["kl"], rel=1e-6)
        assert line["kl_b"] != line["kl_a"]

    # One teacher's logits, and beside the gradient in the student's logits one more, two at most.
    assert one["memory"] == pytest.approx([1, 2, 3, 3], abs=0.1)
    for layout in ("tp", "pp", "tp on pp and dp"):
        assert_same(runs / layout, runs / "one")
    for run in ("pp, by source", "vpp, by source", "cp, by source", "dp on tp", "by source, mixed"):
        assert_same(runs / run, runs / "by source")
    assert_same(runs / "mixtures, ep", runs / "mixtures", rel=1e-4)
    # Each teacher ran the micro-batches of its sources alone, in three steps and a validation on the first step's text.
    counts = [int((step == source).sum()) for step in of_domains().split(BATCH) for source in (0, 1)]
    assert one["ran"] == [count for count in [*counts, *counts[:2]] if count]
    # The third step has no block of the second source.
    assert ["kl_b" in line for line in curve(runs / "by source")] == [True, True, False, True]
    assert curve(runs / "resumed") == curve(runs / "by source")


def stages_case(models: str, out: str, texts: dict[str, str]) -> list[Any]:
    """From text of two sources: the stage, and what it refuses."""
    import dataclasses

    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    from nemo_minitron.config import DataConfig, DistillConfig, SourceConfig, TeacherConfig
    from nemo_minitron.errors import MinitronError
    from nemo_minitron.stages import distill

    data = DataConfig(
        sources=[SourceConfig(name=name, path=path) for name, path in texts.items()], sequence_length=16,
        held_out_fraction=0.3, cache_dir=str(Path(out) / "data"),
    )  # fmt: skip
    config = DistillConfig(
        student=f"{models}/student", output=f"{out}/taught", data=data, steps=STEPS, global_batch_size=BATCH,
        validation_batches=1, validate_every=STEPS, save_every=STEPS, warmup_steps=1,
        teachers=[
            TeacherConfig(name="a", model=f"{models}/a", sources=["math"]),
            TeacherConfig(name="b", model=f"{models}/b", default=True),
        ],
    )  # fmt: skip
    assert not config.faults()
    results: list[Any] = [distill.run(config)]
    foreign = dataclasses.replace(
        config,
        output=f"{out}/foreign",
        teachers=[config.teachers[0], TeacherConfig(name="c", model=f"{models}/foreign", default=True)],
    )
    results.append(distill.plan(foreign).faults)
    destroy_num_microbatches_calculator()
    with pytest.raises(MinitronError) as refused:
        distill.run(foreign)
    return [*results, str(refused.value)]


@pytest.mark.slow
def test_the_stage_from_text(models: Path, tmp_path: Path) -> None:
    from support.text import sentences, write_jsonl

    from nemo_minitron.checkpoints import open_checkpoint

    tiny_checkpoint(models / "foreign", num_hidden_layers=2, seed=5)
    path = models / "foreign" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))
    texts = {
        name: str(write_jsonl(tmp_path / f"{name}.jsonl", sentences(80, 40, seed))) for seed, name in enumerate(SOURCES)
    }
    ((figures, faults, refused),) = run_distributed(
        stages_case, 1, tmp_path, models=str(models), out=str(tmp_path / "out"), texts=texts
    )
    assert figures["steps"] == STEPS
    assert figures["last_validation_kl"] > 0
    lines = curve(tmp_path / "out" / "taught")
    assert {"kl_a", "kl_b"} <= {name for line in lines for name in line}
    lineage = open_checkpoint(tmp_path / "out" / "taught" / "model").lineage["distilled"]
    assert lineage["teachers"] == [
        {"name": "a", "model": str(models / "a"), "shares": {"math": 1.0}},
        {"name": "b", "model": str(models / "b"), "shares": {"chat": 1.0}},
    ]
    assert "teacher c" in refused
    assert faults == [refused]
