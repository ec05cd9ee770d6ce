"""Intermediate losses in one process: the formulae against first principles, layer maps, settings, the balance."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.architecture import Architecture
from nemo_minitron.axes import KeptUnits
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.checkpoints.model_record import write_model_record
from nemo_minitron.config import IntermediateConfig, ParallelLayout, load
from nemo_minitron.distillation.losses.layer_maps import layer_maps, layer_ranks, proportional
from nemo_minitron.distillation.losses.states import attention_relations, hidden_cosine, hidden_mse
from nemo_minitron.errors import ConfigError
from nemo_minitron.pruning.kept import save_kept
from nemo_minitron.shape import ModelShape
from nemo_minitron.stages.distill import plan

SHAPE = ModelShape(8, 48, 64, 6, 2, 16, 100)


def normal(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hidden_losses_token_by_token() -> None:
    student, teacher, projection = normal(2, 3, 4), normal(2, 3, 6, seed=1), normal(6, 4, seed=2)
    mse, cosine = hidden_mse(student, teacher, projection), hidden_cosine(student, teacher, projection)
    for index in ((0, 0), (1, 2)):
        ours, theirs = projection @ student[index], teacher[index]
        assert mse[index] == pytest.approx(((ours - theirs) ** 2).sum().item() / 6)
        assert cosine[index] == pytest.approx(1 - (ours @ theirs / ours.norm() / theirs.norm()).item())
    with pytest.raises(ValueError, match="differ"):
        hidden_mse(student, teacher)


def test_attention_relations_row_by_row() -> None:
    """Different numbers and widths of heads; a row sees the tokens before it; the teacher gets no gradient."""
    student = tuple(normal(1, 5, c, seed=c).requires_grad_() for c in (12, 4, 4))
    teacher = tuple(normal(1, 5, c, seed=c).requires_grad_() for c in (24, 8, 8))
    masked = torch.ones(1, 5, 5, dtype=torch.bool).triu(diagonal=1)
    found = attention_relations(student, teacher, heads=2, masked=masked)
    for row in range(5):
        expected = 0.0
        for ours, theirs in zip(student, teacher, strict=True):
            for head in range(2):
                p, q = (
                    torch.softmax(
                        torch.stack([h[0, row] @ h[0, other] / h.shape[-1] ** 0.5 for other in range(row + 1)]), 0
                    )
                    for h in (x.chunk(2, -1)[head] for x in (theirs, ours))
                )
                expected += ((p * (p.log() - q.log())).sum() / 2).item()
        assert found[0, row].item() == pytest.approx(expected, abs=1e-12)
    found.sum().backward()
    assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in student)
    assert all(x.grad is None for x in teacher)
    leaves = tuple(x.detach().requires_grad_() for x in student)
    assert torch.autograd.gradcheck(lambda *x: attention_relations(x, teacher, heads=2, masked=masked), leaves)
    with pytest.raises(ValueError, match="12 channels cannot be split into 5 relation heads"):
        attention_relations(student, teacher, heads=5, masked=masked)


def test_a_model_that_equals_its_teacher_has_no_loss() -> None:
    state = normal(2, 3, 8)
    masked = torch.zeros(1, 3, 3, dtype=torch.bool)
    for loss in (hidden_mse(state, state), hidden_cosine(state, state)):
        torch.testing.assert_close(loss, torch.zeros_like(loss))
    relations = attention_relations((state,) * 3, (state,) * 3, heads=4, masked=masked)
    torch.testing.assert_close(relations, torch.zeros_like(relations))


def test_layers_map_by_share_of_the_depth_or_by_what_was_kept() -> None:
    assert proportional(4, 8) == {0: 1, 1: 3, 2: 5, 3: 7}
    assert proportional(5, 8) == {0: 1, 1: 2, 2: 4, 3: 5, 4: 7}
    assert list(proportional(32, 32).values()) == list(range(32))
    five = SHAPE.replace(num_layers=5)
    config = IntermediateConfig(hidden="mse", relation_heads=2)
    assert layer_maps(config, five, SHAPE, kept_layers=(0, 2, 4, 5, 7)).hidden == {0: 0, 1: 2, 2: 4, 3: 5, 4: 7}
    assert layer_maps(config, five, SHAPE).attention == {4: 7}
    explicit = layer_maps(IntermediateConfig(hidden="mse", layers={4: 7}), five, SHAPE)
    assert (explicit.hidden, explicit.attention) == ({4: 7}, {})


def test_layers_live_where_the_stages_are() -> None:
    five = SHAPE.replace(num_layers=5)
    assert layer_ranks(five, ParallelLayout(pipeline=2)) == [0, 0, 0, 1, 1]
    assert layer_ranks(five, ParallelLayout(pipeline=2, virtual_pipeline=2)) == [0, 0, 1, 0, 1]


def test_every_fault_of_the_maps_is_named() -> None:
    config = IntermediateConfig(
        hidden="mse", relation_heads=5, layers={0: 8, 5: 1}, attention_layers={-1: 0}
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        layer_maps(config, SHAPE.replace(num_layers=5), SHAPE, tensor=2)
    assert caught.value.faults == [
        "intermediate.layers: the student has no layer 5; its layers are 0 to 4",
        "intermediate.layers: the teacher has no layer 8; its layers are 0 to 7",
        "intermediate.attention_layers: the student has no layer -1; its layers are 0 to 4",
        "intermediate.relation_heads=5: is not a multiple of parallel.tensor=2",
        "intermediate.relation_heads=5: does not divide the 96 channels of the student's queries",
        "intermediate.relation_heads=5: does not divide the 32 channels of the student's keys",
        "intermediate.relation_heads=5: does not divide the 96 channels of the teacher's queries",
        "intermediate.relation_heads=5: does not divide the 32 channels of the teacher's keys",
    ]


REST = "student: s\nteacher: t\noutput: o\ndata: {sources: [{name: a, path: a.txt}]}\n"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("intermediate: {hidden: l1}", "intermediate.hidden=l1: must be one of mse, cosine"),
        ("intermediate: {balance: dynamic}", "there is no intermediate loss to balance"),
        ("intermediate: {layers: {0: 1}}", "is of the loss hidden, which is not asked for"),
        ("intermediate: {hidden: mse, layers: {}}", "maps no layer"),
        ("intermediate: {hidden: mse, layers: {0: x}}", "intermediate.layers"),
        ("intermediate: {embedding: mse, embedding_weight: 0}", "intermediate.embedding_weight=0.0: must be above 0"),
        ("intermediate: {relation_heads: 0}", "intermediate.relation_heads=0: must be above 0"),
        ("global_batch_size: 3\nparallel: {pipeline: 2, virtual_pipeline: 2}", "makes 3 micro-batches a rank"),
    ],
)
def test_settings_that_cannot_be(line: str, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "distill.yaml"
    file.write_text(f"{REST}{line}\n")
    with pytest.raises(ConfigError) as caught:
        load("distill", file)
    assert fault in str(caught.value)
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize("cut_from_it", [True, False])
def test_a_plan_tells_the_layers_and_knows_what_the_student_kept(cut_from_it: bool, tmp_path: Path) -> None:
    five = SHAPE.replace(num_layers=5)
    for name, shape in (("s", five), ("t", SHAPE)):
        (tmp_path / name).mkdir()
        made = Checkpoint(shape, Architecture(), None, None, tmp_path / name, "hf")  # type: ignore[arg-type]
        write_model_record(made, tmp_path / name, dtype="float32", form="hf")
    source = SHAPE if cut_from_it else SHAPE.replace(hidden_size=64)
    kept = KeptUnits.everything(source)
    fields = {n: getattr(kept, n)[:5] for n in ("ffn", "groups", "heads")}
    save_kept(dataclasses.replace(kept, layers=(0, 2, 4, 5, 7), **fields), source, tmp_path / "s/kept.json")
    file = tmp_path / "distill.yaml"
    file.write_text(
        REST.replace("student: s", f"student: {tmp_path}/s").replace("teacher: t", f"teacher: {tmp_path}/t")
    )
    found = plan(load("distill", file, ["intermediate.hidden=mse"]))
    pairs = "0-0, 1-2, 2-4, 3-5, 4-7" if cut_from_it else "0-1, 1-2, 2-4, 3-5, 4-7"
    assert f"hidden loss of the layers (student-teacher) {pairs}" in found.notes
    found = plan(load("distill", file, ["intermediate={hidden: mse, layers: {5: 0}}"]))
    assert "intermediate.layers: the student has no layer 5; its layers are 0 to 4" in found.faults


def test_layers_can_be_given_in_the_file_and_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "distill.yaml"
    file.write_text(f"{REST}intermediate:\n  hidden: mse\n  layers: {{1: 3, 3: 7}}\n")
    config: Any = load("distill", file)
    assert config.intermediate.layers == {1: 3, 3: 7}
    config = load("distill", file, ["intermediate.layers={0: 2}", "intermediate.hidden=cosine"])
    assert (config.intermediate.layers, config.intermediate.hidden) == ({0: 2}, "cosine")
    assert config.intermediate.weights() == {"hidden": 1.0}
    assert config.parallel == ParallelLayout()
