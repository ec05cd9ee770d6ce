"""Teacher and student that share a tokenizer but not every row, under any layout, against plain formulas."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.checkpoints import tiny_checkpoint, tiny_tokenizer
from support.distributed import run_distributed
from support.training import blocks

STEPS, BATCH = 3, 4
ROWS, TEACHER_ROWS, TOOL = 140, 300, 131
"""Rows of the models of the trainings; a token that the teacher alone knows, among the student's padding rows."""

LOSSES = {
    "kl": {"kind": "forward_kl"},
    "hot kl with labels": {"kind": "forward_kl", "temperature": 2.0, "label_weight": 0.4},
    "reverse": {"kind": "reverse_kl"},
    "js": {"kind": "jensen_shannon", "beta": 0.3, "temperature": 0.5},
    "top 4": {"kind": "top_k", "k": 4},
    "top 3 with labels": {"kind": "top_k", "k": 3, "temperature": 2.0, "label_weight": 0.4},
}
PAIRS: list[tuple[int, int, tuple[int, ...]]] = [
    (96, 104, (7, 50)),  # the student, the teacher, ids in the middle that are left out
    (104, 96, ()),
    (96, 96, (47, 48, 95)),
    (67, 5, (1,)),
    (5, 67, ()),
    (40, 150, ()),
]


def padded(rows: int, world: int) -> int:
    """As Megatron pads, to a smaller multiple."""
    return -(-rows // (8 * world)) * 8 * world


def logits(rows: int, teacher_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[3, 11, V]`` of student and teacher in float64, an uneven mask and labels."""
    generator = torch.Generator().manual_seed(1000 * rows + teacher_rows)
    student, teacher = (
        4 * torch.randn(3, 11, count, generator=generator, dtype=torch.float64) for count in (rows, teacher_rows)
    )
    mask = (torch.rand(3, 11, generator=generator) > 0.4).double()
    return student, teacher, mask, torch.randint(rows, (3, 11), generator=generator)


def of_rank(whole: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """A rank's columns, the padding filled with numbers that must not matter."""
    size = padded(whole.shape[-1], world)
    filled = torch.nn.functional.pad(whole, (0, size - whole.shape[-1]), value=77.0)
    return filled.chunk(world, -1)[rank].contiguous()


def losses_case() -> dict[str, Any]:
    """Loss and gradient of every case from this rank's columns, and how often columns were moved."""
    import torch.distributed as dist

    from nemo_minitron.config import LossConfig
    from nemo_minitron.distillation.losses import kernels, vocabulary_parallel
    from nemo_minitron.distillation.losses.common import CommonTokens
    from nemo_minitron.distillation.losses.vocabulary_parallel import vocabulary_parallel_loss

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    vocabulary_parallel.CHUNK_BYTES["cpu"] = 1000
    kernels.BLOCK_BYTES["cpu"] = 500
    results: dict[str, Any] = {}
    for number, (rows, teacher_rows, left_out) in enumerate(PAIRS):
        student, teacher, mask, labels = logits(rows, teacher_rows)
        for name, settings in LOSSES.items():
            for labelled in (False, True):
                loss = LossConfig(**settings)
                if loss.label_weight and not labelled:
                    continue
                leaf = of_rank(student, rank, world).requires_grad_()
                with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as moves:
                    losses = vocabulary_parallel_loss(
                        leaf * 1, of_rank(teacher, rank, world), dist.group.WORLD, vocab_size=rows, loss=loss,
                        labels=labels if labelled else None, inplace=labelled,
                        common=CommonTokens(min(rows, teacher_rows), left_out),
                    )  # fmt: skip
                ((losses.total * mask).sum() / mask.sum()).backward()
                result = (losses.total.detach(), losses.cross_entropy, leaf.grad, moves.call_count)
                results[f"{number}/{name}/{labelled}"] = result
    return results


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_losses_and_gradients_equal_the_float64_reference(world: int, tmp_path: Path) -> None:
    """Both distributions over the common tokens, labels over all of the student's."""
    from nemo_minitron.config import LossConfig
    from nemo_minitron.distillation.losses import reference
    from nemo_minitron.distillation.losses.table import LOGIT_LOSSES

    ranks = run_distributed(losses_case, world, tmp_path, timeout=120)
    assert len(ranks[0]) == len(PAIRS) * (2 * len(LOSSES) - 2)
    for key in ranks[0]:
        rows, teacher_rows, left_out = PAIRS[int(key.split("/")[0])]
        loss = LossConfig(**LOSSES[key.split("/")[1]])
        student, teacher, mask, labels = logits(rows, teacher_rows)
        kept = [token for token in range(min(rows, teacher_rows)) if token not in left_out]
        leaf = student.clone().requires_grad_()
        cross_entropy = reference.cross_entropy(leaf, labels)
        expected = (1 - loss.label_weight) * LOGIT_LOSSES[loss.kind].expected(leaf[..., kept], teacher[..., kept], loss)
        expected = expected + loss.label_weight * cross_entropy
        ((expected * mask).sum() / mask.sum()).backward()
        gradient = torch.cat([rank[key][2] for rank in ranks], -1)
        moved = world > 1 and padded(rows, world) != padded(teacher_rows, world)
        for rank in ranks:
            torch.testing.assert_close(rank[key][0], expected.detach(), rtol=1e-11, atol=1e-13)
            if rank[key][1] is not None:
                torch.testing.assert_close(rank[key][1], cross_entropy.detach(), rtol=1e-11, atol=1e-13)
            assert rank[key][3] == int(moved)
        torch.testing.assert_close(gradient[..., :rows], leaf.grad, rtol=1e-11, atol=1e-13)
        assert not gradient[..., rows:].any()


def repartition_case() -> bool:
    """Every pair of partitions, down to ranks that hold nothing of use; in bfloat16, as it is sent."""
    import torch.distributed as dist

    from nemo_minitron.distillation.losses.common import repartition

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for held in (1, 3, 8):
        for columns in (1, 2, 5, 8, 13):
            for rows in (0, 1, held * world - 1, held * world):
                whole = torch.randn(2, 3, held * world, generator=torch.Generator().manual_seed(held)).bfloat16()
                mine = whole[..., rank * held : (rank + 1) * held]
                expected = torch.zeros(2, 3, columns * world, dtype=torch.bfloat16)
                usable = min(rows, columns * world, held * world)
                expected[..., :usable] = whole[..., :usable]
                moved = repartition(mine, columns, rows, dist.group.WORLD)
                assert torch.equal(moved, expected[..., rank * columns : (rank + 1) * columns])
    return True


@pytest.mark.slow
def test_columns_get_to_their_ranks(tmp_path: Path) -> None:
    assert run_distributed(repartition_case, 3, tmp_path) == [True] * 3


def layouts() -> dict[str, Any]:
    from nemo_minitron.runtime.groups import ParallelLayout

    return {
        "one": ParallelLayout(),
        "tp": ParallelLayout(tensor=2),
        "sp": ParallelLayout(tensor=2, sequence_parallel=True),
        "pp": ParallelLayout(pipeline=2),
        "cp": ParallelLayout(context=2),
        "vpp": ParallelLayout(pipeline=2, virtual_pipeline=2),
    }


def train(models: str, out: Path, layout: str, *, teacher: str | None = "teacher", **how: Any) -> None:
    """Distil for some steps, in chunks in some layouts; trainings may follow each other in one process."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.config import CorrectionConfig
    from nemo_minitron.distillation.losses import fused_head
    from nemo_minitron.distillation.recipe import Schedule, distill
    from nemo_minitron.distillation.teachers.placement import TeacherPlacement
    from nemo_minitron.runtime.groups import initialize

    destroy_num_microbatches_calculator()
    fused_head.HEAD_BYTES["cpu"] = 5_000  # several chunks a micro-batch
    placed = how.pop("placed", {})
    if placed.get("kind") != "own_ranks":
        initialize(layouts()[layout])
    correction = how.pop("correction", None)
    distill(
        open_checkpoint(Path(models) / "student"),
        None if teacher is None else open_checkpoint(Path(models) / teacher),
        blocks(STEPS * BATCH),
        blocks(BATCH),
        layout=layouts()[layout],
        schedule=Schedule(
            steps=STEPS, micro_batch_size=1, global_batch_size=BATCH, lr=1e-3, min_lr=1e-4, warmup_steps=2,
            validate_every=3, validation_batches=1, save_every=100,
            logits="chunks" if layout in ("sp", "cp", "vpp") else "whole",
        ),
        directory=out,
        placement=TeacherPlacement(**placed),
        correction=None if correction is None else CorrectionConfig(**correction),
        **how,
    )  # fmt: skip


def write_cache(models: str, directory: Path, k: int | None, values: str) -> None:
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.checkpoints.fingerprint import model_fingerprint
    from nemo_minitron.checkpoints.tokenizer.files import copy_tokenizer
    from nemo_minitron.checkpoints.tokenizer.trimming import tokenizer_fingerprint
    from nemo_minitron.distillation.teachers.cache_filling import fill_cache, open_for_writing
    from nemo_minitron.distillation.teachers.documents import block_starts
    from nemo_minitron.distillation.teachers.frozen import Teacher
    from nemo_minitron.distillation.teachers.manifest import TOKENIZER, Manifest
    from nemo_minitron.runtime.groups import initialize

    checkpoint = open_checkpoint(Path(models) / "teacher")
    groups = initialize(layouts()["tp"])
    tokens, starts = block_starts(blocks(STEPS * BATCH))
    if groups.is_main:
        assert checkpoint.tokenizer is not None
        fingerprints = model_fingerprint(checkpoint), tokenizer_fingerprint(checkpoint.tokenizer)
        Manifest(*fingerprints, TEACHER_ROWS, tokens.shape[1], k, values, "float32").write(directory)
        copy_tokenizer(checkpoint.tokenizer, directory / TOKENIZER)
    torch.distributed.barrier()
    cache = open_for_writing(directory, is_main=groups.is_main)
    teacher = Teacher.load(checkpoint, groups)
    fill_cache(
        teacher, groups, cache, tokens, starts, micro_batch_size=3, samples_per_shard=5, progress=lambda count: None
    )


def one_process_case(models: str, out: str) -> None:
    from nemo_minitron.config import LossConfig

    torch.distributed.init_process_group("gloo")
    train(models, Path(out) / "one", "one")
    train(models, Path(out) / "one, labels", "one", loss=LossConfig("reverse_kl", label_weight=0.3))
    train(models, Path(out) / "one, learning", "one", correction={"lr": 1e-4, "min_lr": 1e-5})


def two_processes_case(models: str, out: str) -> str:
    from nemo_minitron.config import LossConfig
    from nemo_minitron.distillation.teachers import placement
    from nemo_minitron.errors import DataError

    torch.distributed.init_process_group("gloo")
    folder = Path(out)
    for name, k, values in (("all", None, "float32"), ("top", 8, "float32")):
        write_cache(models, folder / "caches" / name, k, values)
    for layout in ("tp", "sp", "pp", "cp", "vpp"):
        train(models, folder / layout, layout)
    train(models, folder / "tp, labels", "tp", loss=LossConfig("reverse_kl", label_weight=0.3))
    train(models, folder / "tp, learning", "tp", correction={"lr": 1e-4, "min_lr": 1e-5})
    own = {"kind": "own_layout", "layout": layouts()["pp"]}
    train(models, folder / "tp on pp", "tp", placed=own)
    train(models, folder / "pp on tp", "pp", placed={**own, "layout": layouts()["tp"]})
    cached = {"cache": folder / "caches" / "all"}
    train(models, folder / "tp from all", "tp", teacher=None, placed=cached)
    for layout in ("tp", "cp"):
        train(models, folder / f"{layout} from top", layout, teacher=None, placed={"cache": folder / "caches" / "top"})
    # A vocabulary that is small beside the hidden states: its logits are sent.
    placement.Transfer.hidden = property(lambda self: False)  # type: ignore[assignment]
    train(models, folder / "tp on pp, logits", "tp", placed=own)
    train(models, folder / "pp on tp, logits", "pp", placed={**own, "layout": layouts()["tp"]})
    text = blocks(STEPS * BATCH)
    text[5, 3] = TOOL
    with mock.patch(f"{__name__}.blocks", lambda count: text[:count]), pytest.raises(DataError) as refused:
        train(models, folder / "refused", "tp")
    torch.distributed.barrier()  # a rank that ends closes connections which another may still be opening
    return str(refused.value)


def own_ranks_case(models: str, out: str) -> int:
    """Two ranks of the student, then two of the teacher."""
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.distillation.teachers.own_ranks import becomes_teacher, serve_teacher

    student, teacher = layouts()["tp"], layouts()["pp"]
    if not becomes_teacher(student, teacher):
        train(models, Path(out) / "tp on ranks", "tp", placed={"kind": "own_ranks", "layout": teacher})
        return 0
    checkpoint = open_checkpoint(Path(models) / "teacher")
    return serve_teacher(checkpoint, student, teacher, dtype=torch.float32, timeout_minutes=5, student_rows=ROWS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 72}
    tiny_checkpoint(
        folder / "teacher", tied=True, num_hidden_layers=5, seed=1, vocab_size=TEACHER_ROWS, tokenizer=False, **sizes
    )
    tiny_checkpoint(
        folder / "student", num_hidden_layers=4, seed=2, vocab_size=ROWS, tokenizer=False,
        **{**sizes, "hidden_size": 32},
    )  # fmt: skip
    for name in ("teacher", "student"):
        tiny_tokenizer(folder / name)
    path = folder / "teacher" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": TOOL, "content": "<tool>"})
    path.write_text(json.dumps(content))
    return folder


def curve(directory: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    names = ("kl", "lm_loss", "grad_norm", "teacher_lm_loss")
    return [{name: line[name] for name in names if name in line} for line in lines]


def plain_first_step(models: Path, k: int | None = None) -> dict[str, float]:
    """Loss and norm of the gradient of the first step, by transformers' models in float64.

    With ``k``: from the k likeliest of all of the teacher's tokens. Those that the student does not share have no
    probability, and the others' mass is that of all tokens that are not among the k.
    """
    from transformers import AutoModelForCausalLM

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(models / name, torch_dtype=torch.float64).eval()
        for name in ("student", "teacher")
    )
    inputs = blocks(BATCH)[:, :-1]
    kept = torch.tensor([token for token in range(ROWS) if token != TOOL])
    log_q = student(inputs).logits[..., kept].log_softmax(-1)
    with torch.no_grad():
        whole = teacher(inputs).logits
    if k is None:
        log_p = whole[..., kept].log_softmax(-1)
        loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    else:
        log_p = whole.log_softmax(-1)
        best = log_p.topk(k, -1)
        rest = log_p.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
        shared = torch.zeros(TEACHER_ROWS, dtype=torch.bool)
        shared[kept] = True
        assert not shared[best.indices].all() and shared[best.indices].any()  # some are left out
        total = 0.0
        place = {int(token): index for index, token in enumerate(kept)}
        for row in range(BATCH):
            for at in range(inputs.shape[1]):
                tokens = best.indices[row, at][shared[best.indices[row, at]]]
                p = torch.cat([log_p[row, at, tokens], rest[row, at, None]]).log_softmax(-1)
                columns = torch.tensor([place[int(token)] for token in tokens], dtype=torch.int64)
                other = torch.ones(len(kept), dtype=torch.bool)
                other[columns] = False
                q = torch.cat([log_q[row, at, columns], log_q[row, at, other].logsumexp(-1, keepdim=True)])
                total = total + (p.exp() * (p - q)).sum()
        loss = total / inputs.numel()
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in student.parameters()]).norm()
    return {"kl": loss.item(), "grad_norm": norm.item()}


@pytest.mark.slow
@pytest.mark.timeout(900)  # three launches of NeMo and 18 trainings
def test_every_layout_placement_and_cache_gives_the_same_training(models: Path, tmp_path: Path) -> None:
    """The first step against plain float64; every layout against one process: rel 1e-5."""
    runs = tmp_path / "runs"
    where = {"models": str(models), "out": str(runs)}
    run_distributed(one_process_case, 1, tmp_path, timeout=300, **where)
    one = curve(runs / "one")
    assert len(one) == STEPS + 1
    expected = plain_first_step(models)
    assert {name: one[0][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    refused = run_distributed(two_processes_case, 2, tmp_path, timeout=600, **where)[0]
    run_distributed(own_ranks_case, 4, tmp_path, timeout=300, **where)
    same = (
        "tp",
        "sp",
        "pp",
        "cp",
        "vpp",
        "tp on pp",
        "pp on tp",
        "tp on pp, logits",
        "pp on tp, logits",
        "tp from all",
    )
    pairs = dict.fromkeys((*same, "tp on ranks"), "one")
    pairs |= {"tp, labels": "one, labels", "tp, learning": "one, learning", "cp from top": "tp from top"}
    for run, reference in pairs.items():
        for ours, theirs in zip(curve(runs / run), curve(runs / reference), strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5), run
    expected = plain_first_step(models, k=8)
    assert {name: curve(runs / "tp from top")[0][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert refused.startswith(
        "the training blocks: 1 of the tokens do not mean the same to student and teacher; the first is 131 "
        "(unknown to student, '<tool>' to teacher), in block 5, token 3. Leave such text out"
    )


def stages_case(models: str, out: str, text: str) -> list[str]:
    """From text: the teacher itself, a cache of all log-probabilities, one of the likeliest; and what is refused."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    from nemo_minitron.config import CacheConfig, DataConfig, DistillConfig, SourceConfig
    from nemo_minitron.errors import MinitronError
    from nemo_minitron.stages import cache, distill

    folder, schedule = Path(out), {"steps": STEPS, "global_batch_size": 2, "validation_batches": 1}
    data = DataConfig(
        sources=[SourceConfig(name="text", path=text)], sequence_length=16, held_out_fraction=0.3,
        cache_dir=str(folder / "data"),
    )  # fmt: skip
    foreign = SourceConfig(name="calls", path=text.replace("text.jsonl", "calls.jsonl"))
    calls = dataclasses.replace(data, sources=[foreign])
    teacher, student = f"{models}/teacher", f"{models}/student"
    for name, k in (("all", None), ("top", 8)):
        cache.run(
            CacheConfig(
                teacher=teacher,
                student=student,
                output=str(folder / name),
                data=data,
                k=k,
                values="float32",
                **schedule,
            )
        )
    errors = []
    for name, sources in (
        ("taught", {"teacher": teacher}),
        ("from all", {"teacher": None, "teacher_cache": str(folder / "all")}),
        ("from top", {"teacher": teacher, "teacher_cache": str(folder / "top")}),
        ("foreign text", {"teacher": teacher, "data": calls}),
    ):  # fmt: skip
        destroy_num_microbatches_calculator()
        config = DistillConfig(
            student=student, output=str(folder / name), validate_every=STEPS, save_every=STEPS, warmup_steps=1,
            **{"data": data, **schedule, **sources},
        )  # fmt: skip
        assert not config.faults()
        try:
            assert distill.run(config)["steps"] == STEPS
        except MinitronError as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


@pytest.mark.slow
def test_the_stages_from_text(models: Path, tmp_path: Path) -> None:
    """A base student and a teacher that ends texts with another token; one text has a token that the student added."""
    import shutil

    from support.text import sentences, write_jsonl

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.config import DataConfig, DistillConfig, SourceConfig
    from nemo_minitron.data.build import build_blocks
    from nemo_minitron.stages import distill

    pair = tmp_path / "pair"
    shutil.copytree(models, pair)
    settings = pair / "student" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"eos_token": "</s>"', '"eos_token": "<|im_end|>"'))
    path = pair / "student" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": TOOL, "content": "<call>"})
    path.write_text(json.dumps(content))
    text = write_jsonl(tmp_path / "text.jsonl", sentences(40, 30, 0))
    write_jsonl(tmp_path / "calls.jsonl", [f"<call> {sentence}" for sentence in sentences(40, 30, 0)])
    (errors,) = run_distributed(
        stages_case, 1, tmp_path, timeout=240, models=str(pair), out=str(tmp_path / "out"), text=str(text)
    )
    (error,) = errors
    assert error.startswith("DataError: the training blocks: ")
    assert "the first is 131 ('<call>' to student, '<tool>' to teacher), in block" in error
    assert "of source 'calls'" in error
    first, second = (curve(tmp_path / "out" / name) for name in ("taught", "from all"))
    for ours, theirs in zip(first, second, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert len(curve(tmp_path / "out" / "from top")) == len(first)
    trained = open_checkpoint(tmp_path / "out" / "taught" / "model")
    assert trained.shape.vocab_size == ROWS and trained.tokenizer is not None
    # Documents end as the student ends them; it was these blocks that were cached and trained on.
    data = DataConfig(
        sources=[SourceConfig(name="text", path=str(text))], sequence_length=16, held_out_fraction=0.3,
        cache_dir=str(tmp_path / "out" / "data"),
    )  # fmt: skip
    blocks = build_blocks(data, pair / "student", "train", blocks=2 * STEPS)
    assert (blocks.tokens == 5).any() and not (blocks.tokens == 2).any()
    config = DistillConfig(student=str(pair / "student"), teacher=str(pair / "teacher"), output="o", data=data)
    (note,) = [note for note in distill.plan(config).notes if "one tokenizer but for" in note]
    assert note.endswith(
        "eos_token_id is 5 '<|im_end|>' and 2 '</s>': losses of the logits are over the first 140 ids without 1 of "
        "them; text is cut with the student's tokenizer"
    )
