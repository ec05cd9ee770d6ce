"""A teacher wherever it runs, and its logits from a cache, give the student the same training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.distributed import run_distributed

SEQUENCE, STEPS, BATCH, VOCABULARY = 16, 6, 4, 131


def packed_blocks() -> Any:
    """Blocks of two documents each."""
    from nemo_minitron.data.blocks import Blocks

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, VOCABULARY, (STEPS * BATCH, SEQUENCE + 1), generator=generator)
    cut = torch.randint(3, SEQUENCE - 3, (len(tokens), 1), generator=generator)
    segments = (torch.arange(SEQUENCE + 1) >= cut).to(torch.int32)
    return Blocks(tokens, torch.zeros(len(tokens), dtype=torch.int64), ("",), segments)


def train(
    models: str, out: Path, student: Any, *, loss: Any = None, teacher: str | None = "teacher", **placed: Any
) -> None:
    """Distil for some steps, in chunks where the teacher is elsewhere.

    NeMo takes groups that are there, so trainings may follow each other in one process.
    """
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.distillation.losses import fused_head
    from nemo_minitron.distillation.recipe import Schedule, distill
    from nemo_minitron.distillation.teachers.placement import TeacherPlacement
    from nemo_minitron.runtime.groups import initialize

    destroy_num_microbatches_calculator()
    fused_head.HEAD_BYTES["cpu"] = 5_000  # several chunks a micro-batch
    if placed.get("kind") != "own_ranks":
        initialize(student)
    distill(
        open_checkpoint(Path(models) / "student"),
        None if teacher is None else open_checkpoint(Path(models) / teacher),
        packed_blocks(),
        packed_blocks()[:BATCH],
        layout=student,
        schedule=Schedule(
            steps=STEPS, micro_batch_size=1, global_batch_size=BATCH, lr=1e-3, min_lr=1e-4, warmup_steps=2,
            validate_every=3, validation_batches=1, save_every=100, logits="chunks" if placed else "whole",
        ),
        loss=loss,
        directory=out,
        placement=TeacherPlacement(**placed),
    )  # fmt: skip


CACHES: dict[str, tuple[str, int | None, str]] = {
    "all": ("sp", None, "float32"),
    "all bf16": ("dp", None, "bfloat16"),
    "top": ("pp", 8, "float32"),
    "top int8": ("tp", 8, "int8"),
    "top compact": ("tp", 8, "compact"),
}
"""Name -> the layout that it is written in, k and values."""


def write_cache(models: str, directory: Path, layout: Any, k: int | None, values: str) -> None:
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.checkpoints.fingerprint import model_fingerprint
    from nemo_minitron.checkpoints.tokenizer.trimming import tokenizer_fingerprint
    from nemo_minitron.distillation.teachers.cache_filling import fill_cache, open_for_writing
    from nemo_minitron.distillation.teachers.documents import block_starts
    from nemo_minitron.distillation.teachers.frozen import Teacher
    from nemo_minitron.distillation.teachers.logit_cache import Manifest
    from nemo_minitron.runtime.groups import initialize

    checkpoint = open_checkpoint(Path(models) / "teacher")
    groups = initialize(layout)
    if groups.is_main:
        # as caches were before they kept the tokenizer
        fingerprints = model_fingerprint(checkpoint), tokenizer_fingerprint(checkpoint.tokenizer)
        error_bound = 0.125 if values == "compact" else None
        Manifest(*fingerprints, VOCABULARY, SEQUENCE, k, values, "float32", error_bound=error_bound).write(directory)
    torch.distributed.barrier()
    cache = open_for_writing(directory, is_main=groups.is_main)
    arguments = {"micro_batch_size": 3, "samples_per_shard": 5, "progress": lambda count: None}
    tokens, starts = block_starts(packed_blocks())
    teacher = Teacher.load(checkpoint, groups)
    assert fill_cache(teacher, groups, cache, tokens[:7], starts[:7], **arguments) == 7
    # resumed, with the samples of one writer damaged
    cache = open_for_writing(directory, is_main=groups.is_main)
    assert fill_cache(teacher, groups, cache, tokens, starts, **arguments) == len(tokens) - 7


def layouts() -> dict[str, Any]:
    from nemo_minitron.runtime.groups import ParallelLayout

    return {
        "tp": ParallelLayout(tensor=2),
        "pp": ParallelLayout(pipeline=2),
        "dp": ParallelLayout(data=2),
        "sp": ParallelLayout(tensor=2, sequence_parallel=True),
    }


def placements_case(models: str, out: str) -> None:
    """On two ranks, one training after the other."""
    from nemo_minitron.config import LossConfig
    from nemo_minitron.distillation.teachers import placement

    torch.distributed.init_process_group("gloo")
    top = LossConfig("top_k", k=8)

    def run(name: str, student: str, **how: Any) -> None:
        train(models, Path(out) / name, layouts()[student], **how)

    for name, (layout, k, values) in CACHES.items():
        write_cache(models, Path(out) / "caches" / name, layouts()[layout], k, values)
    for student in ("tp", "pp", "dp", "sp"):
        run(student, student)
    for student, teacher in (("tp", "pp"), ("pp", "tp"), ("dp", "tp"), ("sp", "dp"), ("tp", "sp")):
        run(f"{student} on {teacher}", student, kind="own_layout", layout=layouts()[teacher])
    # A vocabulary that is small beside the hidden states: its logits are sent.
    placement.Transfer.hidden = property(lambda self: False)  # type: ignore[assignment]
    run("dp on tp, logits", "dp", kind="own_layout", layout=layouts()["tp"])
    run("tp, top", "tp", loss=top)
    for student, cache, loss in (
        ("pp", "all", None),
        ("tp", "all bf16", None),
        ("tp, top", "top", top),
        ("tp, top", "top int8", None),
        ("tp, top", "top compact", None),
    ):
        run(
            f"{student} from {cache}",
            student.split(",")[0],
            teacher=None,
            loss=loss,
            cache=Path(out) / "caches" / cache,
        )


def own_ranks_case(models: str, out: str) -> int:
    """On four ranks: two of the student, then two of the teacher; returns the steps that this rank has served."""
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.distillation.teachers.own_ranks import becomes_teacher, serve_teacher

    student, teacher = layouts()["tp"], layouts()["pp"]
    if not becomes_teacher(student, teacher):
        train(models, Path(out) / "tp on ranks", student, kind="own_ranks", layout=teacher)
        return 0
    checkpoint = open_checkpoint(Path(models) / "teacher")
    return serve_teacher(checkpoint, student, teacher, dtype=torch.float32, timeout_minutes=5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 72}
    tiny_checkpoint(folder / "teacher", tied=True, num_hidden_layers=3, seed=1, **sizes)
    tiny_checkpoint(folder / "student", num_hidden_layers=2, seed=2, **{**sizes, "hidden_size": 32})
    return folder


def curve(directory: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("kl", "lm_loss", "grad_norm") if key in line} for line in lines]


def assert_same(run: Path, expected: Path, **tolerance: float) -> None:
    """KL and gradient norm of every step, KL and language-model loss of every validation."""
    found, reference = curve(run), curve(expected)
    assert len(found) == len(reference) == STEPS + 2
    for ours, theirs in zip(found, reference, strict=True):
        assert ours == pytest.approx(theirs, **tolerance), run.name


@pytest.mark.slow
@pytest.mark.timeout(900)  # two launches of NeMo and 19 trainings
def test_every_placement_gives_the_same_training(models: Path, tmp_path: Path) -> None:
    """Against a teacher in the student's ranks and layout, with whole logits; caches within the rounding of what they
    keep.
    """
    runs = tmp_path / "runs"
    run_distributed(placements_case, 2, tmp_path, timeout=400, models=str(models), out=str(runs))
    for run in ("tp on pp", "pp on tp", "dp on tp", "sp on dp", "tp on sp", "dp on tp, logits"):
        assert_same(runs / run, runs / run.split()[0], rel=1e-5)
    assert_same(runs / "pp from all", runs / "pp", rel=1e-5)
    assert_same(runs / "tp from all bf16", runs / "tp", rel=1e-3)
    assert_same(runs / "tp, top from top", runs / "tp, top", rel=1e-5)
    assert_same(runs / "tp, top from top int8", runs / "tp, top", rel=1e-3)
    assert_same(runs / "tp, top from top compact", runs / "tp, top", rel=5e-3)
    run_distributed(own_ranks_case, 4, tmp_path, timeout=400, models=str(models), out=str(runs))
    assert_same(runs / "tp on ranks", runs / "tp", rel=1e-5)
