"""Several teachers: their settings, who runs which micro-batch, identities and plans."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.config import DataConfig, DistillConfig, SourceConfig, TeacherConfig, load, teacher_shares
from nemo_minitron.config.parts import ParallelLayout
from nemo_minitron.data.blocks import Blocks
from nemo_minitron.distillation.compatibility import check_pair
from nemo_minitron.distillation.teachers.several import OneOfSeveral, SeveralTeachers, numbered_by_source
from nemo_minitron.errors import CheckpointError, ConfigError, DataError
from nemo_minitron.jobs.output import Output
from nemo_minitron.jobs.records import identity_of
from nemo_minitron.runtime.environment import ordered_kernels
from nemo_minitron.shape import ModelShape

DATA = "student: s\noutput: o\ndata: {sources: [{name: math, path: a.txt}, {name: chat, path: b.txt}]}\n"
TEXT = DataConfig(sources=[SourceConfig(name="math", path="a.txt"), SourceConfig(name="chat", path="b.txt")])


def read(folder: Path, text: str) -> DistillConfig:
    path = folder / "several.yaml"
    path.write_text(DATA + text)
    return load("distill", path)  # type: ignore[return-value]


def config(*teachers: TeacherConfig, **settings: Any) -> DistillConfig:
    return DistillConfig(student="s", output="o", data=TEXT, teachers=list(teachers), **settings)


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        (
            "[{name: a, model: m, weight: 1}, {name: b, model: n, weight: 3}]",
            {"a": {"math": 0.25, "chat": 0.25}, "b": {"math": 0.75, "chat": 0.75}},
        ),
        (
            "[{name: a, model: m, sources: [math]}, {name: b, model: n, default: true}]",
            {"a": {"math": 1.0}, "b": {"chat": 1.0}},
        ),
        (
            "[{name: a, model: m}, {name: b, model: n, sources: [math], weight: 0}]",
            {"a": {"math": 1.0, "chat": 1.0}, "b": {"math": 0.0}},
        ),
    ],
)
def test_the_share_of_each_teacher_in_the_loss_of_each_source(
    tmp_path: Path, text: str, shares: dict[str, dict[str, float]]
) -> None:
    found = read(tmp_path, f"teachers: {text}")
    assert found.teacher_shares() == shares
    assert found.inputs() == {"student": "s", "teachers.a": "m", "teachers.b": "n"}


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("teachers: [{name: a, model: m, weight: -1}]", ["teachers[0].weight=-1.0: must be 0 or more, and finite"]),
        ("teachers: [{name: a, model: m, weight: .nan}]", ["teachers[0].weight=nan: must be 0 or more"]),
        ("teachers: [{name: a, model: m, weight: .inf}]", ["teachers[0].weight=inf: must be 0 or more"]),
        (
            "teachers: [{name: a, model: m, weight: 0}, {name: b, model: n, weight: 0}]",
            ["all teachers of the source 'math' have weight 0", "all teachers of the source 'chat' have weight 0"],
        ),
        ("teachers: [{name: a, model: m}, {name: a, model: n}]", ["teachers: the name 'a' is given twice"]),
        ("teachers: [{name: '', model: m}]", ["teachers[0].name: is empty"]),
        (
            "teachers: [{name: a, model: m, sources: [math, maths]}]",
            [
                "teachers: a teaches 'maths', which no source of data is called; they are math, chat",
                "teachers: none teaches the source 'chat'; name it in a teacher's sources, or give a teacher default",
            ],
        ),
        (
            "teachers: [{name: a, model: m, sources: [math, math, chat]}]",
            ["teachers: a names the source 'math' twice"],
        ),
        (
            "teachers: [{name: a, model: m}, {name: b, model: n, default: true}]",
            ["teachers: b has default=true, and other teachers teach every source; leave it out"],
        ),
        (
            "teachers: [{name: a, model: m}, {name: b, model: n, default: true, sources: [math]}]",
            ["teachers[1].default=true: teaches what no other teacher does", "teachers: b has default=true"],
        ),
        ("teacher: t\nteachers: [{name: a, model: m}]", ["teacher: teachers are given too; leave out one of the two"]),
        (
            "teacher_cache: c\nlogits: chunks\nteacher_placement: own_layout\nteacher_parallel: {data: 2}\n"
            "teacher_correction: {lr: 1.0e-5}\nintermediate: {hidden: mse}\nteachers: [{name: a, model: m}]",
            ["teacher_cache=c: is of a single", "logits=chunks: is of a single teacher",
             "teacher_placement=own_layout: is of", "teacher_parallel: is of",
             "teacher_correction.lr=1e-05: is of", "intermediate: is of a single teacher; leave it out, or give one"],
        ),
        (
            "teachers: [{name: a, model: m, placement: own_ranks}]",
            ["teachers[0].placement=own_ranks: is offered for a single teacher alone (teacher, teacher_placement)"],
        ),
        ("teachers: [{name: a, model: m, placement: there}]", ["teachers[0].placement=there: must be one of shared"]),
        (
            "teachers: [{name: a, model: m, parallel: {tensor: 2}}]",
            ["teachers[0].parallel: placement=shared has the student's layout"],
        ),
        (
            "teachers: [{name: a, model: m, placement: own_layout, parallel: {tensor: 2, context: 2}}]",
            ["teachers[0].parallel.context=2: a teacher in its own layout shares none out",
             "teachers[0].placement=own_layout: its parallel makes 4 ranks of the 1 that parallel makes"],
        ),
        (
            "parallel: {context: 2}\nteachers: [{name: a, model: m, placement: own_layout, parallel: {tensor: 2}}]",
            ["teachers[0].placement=own_layout: is not offered with parallel.context=2; use placement=shared"],
        ),
        (
            "parallel: {data: 4}\nglobal_batch_size: 4\nteachers: [{name: a, model: m, placement: own_layout, "
            "parallel: {pipeline: 2, virtual_pipeline: 2, data: 2}}]",
            ["teachers[0].parallel.virtual_pipeline=2: a teacher only runs forward"],
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_all_at_once(tmp_path: Path, text: str, faults: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, text)
    assert len(refused.value.faults) == len(faults)
    for fault in faults:
        assert any(fault in found for found in refused.value.faults), fault


@given(
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=4),
    named=st.lists(st.sets(st.sampled_from("xyz")), min_size=4, max_size=4),
    default=st.integers(-1, 3),
)
def test_shares_of_every_source_add_up_to_one(weights: list[float], named: list[set[str]], default: int) -> None:
    """Unless something is wrong, which is then said."""
    teachers = [
        TeacherConfig(str(i), "m", weight, sources=[] if i == default else sorted(of), default=i == default)
        for i, (weight, of) in enumerate(zip(weights, named, strict=False))
    ]
    shares, faults = teacher_shares(teachers, ["x", "y", "z"])
    if not faults:
        for source in "xyz":
            assert sum(share.get(source, 0.0) for share in shares.values()) == pytest.approx(1)
    for teacher in teachers:
        if teacher.sources:
            assert set(shares[teacher.name]) <= set(teacher.sources)


class Source:
    """Keeps which micro-batches it was given."""

    states = None

    def __init__(self, name: str) -> None:
        self.name, self.ran = name, []  # type: ignore[var-annotated]

    def run(self, batches: Any) -> list[str]:
        self.ran.append([int(batch["number"]) for batch in batches])
        return [f"{self.name}{int(batch['number'])}" for batch in batches]

    def logits(self, kept: str) -> str:
        return kept.upper()


def several(
    shares: dict[str, dict[str, float]], names: list[str], **layout: int
) -> tuple[SeveralTeachers, list[Source]]:
    groups: Any = SimpleNamespace(layout=ParallelLayout(**layout), is_last_stage=True)
    teachers: Any = [OneOfSeveral(name, None, share) for name, share in shares.items()]  # type: ignore[arg-type]
    sources = [Source(name) for name in shares]
    return SeveralTeachers(teachers, sources, names, groups), sources  # type: ignore[arg-type]


def batches(*sources: list[int]) -> list[dict[str, torch.Tensor]]:
    return [{"source": torch.tensor(of), "number": torch.tensor(number)} for number, of in enumerate(sources)]


def test_a_teacher_runs_the_micro_batches_that_it_teaches_in() -> None:
    shares = {"a": {"math": 1.0}, "b": {"chat": 1.0, "code": 0.5}, "c": {"code": 0.5}}
    teachers, sources = several(shares, ["math", "chat", "code"])
    kept = teachers.run(batches([0, 0], [0, 1], [1, 2], [0, 0]))
    assert [source.ran for source in sources] == [[[0, 1, 3]], [[1, 2]], [[2]]]
    assert [part.kept for part in kept] == [
        ["a0", None, None],
        ["a1", "b1", None],
        [None, "b2", "c2"],
        ["a3", None, None],
    ]
    scored = [
        {name: (one.logits(), one.weights.tolist()) for name, one in teachers.scored(part).items()} for part in kept
    ]
    assert scored[1:3] == [
        {"a": ("A1", [1.0, 0.0]), "b": ("B1", [0.0, 1.0])},
        {"b": ("B2", [1.0, 0.5]), "c": ("C2", [0.0, 0.5])},
    ]
    teachers.run(batches([0, 0]))
    assert sources[1].ran == [[1, 2]]  # not called with nothing


def test_a_virtual_pipeline_runs_all_micro_batches_or_none() -> None:
    """Megatron's interleaved schedule takes multiples of the pipeline's stages."""
    teachers, sources = several(
        {"a": {"math": 1.0}, "b": {"chat": 1.0}, "c": {"code": 1.0}}, ["math", "chat", "code"], pipeline=2,
        virtual_pipeline=2,
    )  # fmt: skip
    kept = teachers.run(batches([0], [1], [0], [0]))
    assert [source.ran for source in sources] == [[[0, 1, 2, 3]], [[0, 1, 2, 3]], []]
    assert [list(teachers.scored(part)) for part in kept] == [["a"], ["b"], ["a"], ["a"]]


def test_blocks_are_numbered_by_the_teachers_sources() -> None:
    blocks = Blocks(torch.zeros(4, 9, dtype=torch.int64), torch.tensor([0, 2, 0, 2]), ("x", "y", "z"))
    assert numbered_by_source(blocks, ["z", "x"], "the text").domain.tolist() == [1, 0, 1, 0]
    with pytest.raises(
        DataError, match="the text: has blocks of the source 'x', which no teacher teaches; the teachers'"
    ):
        numbered_by_source(blocks, ["z", "y"], "the text")


def test_a_teacher_of_another_vocabulary_is_named() -> None:
    shape = ModelShape(
        num_layers=2, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2, num_query_groups=2, head_dim=8,
        vocab_size=99,
    )  # fmt: skip
    student, teacher = (
        Checkpoint(sizes, Architecture(max_position_embeddings=64), None, None, Path(name), "hf")  # type: ignore[arg-type]
        for sizes, name in ((shape, "s"), (shape.replace(vocab_size=100), "t"))
    )
    with pytest.raises(CheckpointError, match=r"student s has a vocabulary of 99 and teacher math t of 100"):
        check_pair(student, teacher, ParallelLayout(), 8, name="teacher math")


def test_identities(tmp_path: Path) -> None:
    """The paths of teachers do not count, their shares do; where they run may change in a resume."""
    pair = TeacherConfig(name="a", model="m"), TeacherConfig(name="b", model="n", weight=2.0)
    settings = identity_of(config(*pair))["settings"]
    assert settings["teachers"][1] == {
        "name": "b", "weight": 2.0, "sources": [], "default": False, "placement": "shared",
        "parallel": identity_of(config(*pair))["settings"]["parallel"],
    }  # fmt: skip
    assert "teachers" not in identity_of(DistillConfig(student="s", teacher="t", output="o", data=TEXT))["settings"]
    moved = [dataclasses.replace(teacher, model=f"elsewhere/{teacher.model}") for teacher in pair]
    assert identity_of(config(*moved))["settings"] == settings

    begun = dataclasses.replace(config(*pair), output=str(tmp_path / "out"))
    output = Output(begun)
    output.path.mkdir()
    output.begin()
    for changes, refused in (
        ({"placement": "own_layout", "parallel": ParallelLayout(data=2)}, []),
        ({"weight": 3.0}, ["teachers.1.weight: 2.0 then, 3.0 now"]),
    ):
        changed = dataclasses.replace(begun, teachers=[pair[0], dataclasses.replace(pair[1], **changes)])  # type: ignore[arg-type]
        faults = Output(changed).resume_faults()
        assert len(faults) == len(refused)
        assert all(fault in found for fault, found in zip(refused, faults, strict=True))


def test_layouts_of_teachers_order_kernels() -> None:
    own = TeacherConfig(name="a", model="m", placement="own_layout", parallel=ParallelLayout(tensor=2))
    assert ordered_kernels(config(own, parallel=ParallelLayout(data=2)))
    assert not ordered_kernels(config(TeacherConfig(name="a", model="m")))


@pytest.mark.parametrize("placement", ["shared", "own_layout"])
def test_the_plan_has_the_memory_of_all_teachers(tmp_path: Path, placement: str) -> None:
    from nemo_minitron import axes
    from nemo_minitron.jobs.plans import human_bytes
    from nemo_minitron.planning import MemoryCost, Workload
    from nemo_minitron.stages import distill

    student = ModelShape(
        num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=4, head_dim=8,
        vocab_size=256,
    )  # fmt: skip
    shapes = {"s": student, "m": student.replace(num_layers=6), "n": student.replace(num_layers=9, hidden_size=64)}
    for name, shape in shapes.items():
        (tmp_path / name).mkdir()
        record = {"shape": shape.to_dict(), "architecture": dataclasses.asdict(Architecture())}
        (tmp_path / name / "minitron.json").write_text(json.dumps(record))
    layout = ParallelLayout(data=2)
    second = TeacherConfig(
        name="b", model=str(tmp_path / "n"), sources=["chat"], placement=placement,
        parallel=ParallelLayout() if placement == "shared" else ParallelLayout(tensor=2),
    )  # fmt: skip
    made = config(
        TeacherConfig(name="a", model=str(tmp_path / "m"), sources=["math"]), second, parallel=layout,
        micro_batch_size=1, global_batch_size=4, precision="32",
    )  # fmt: skip
    made = dataclasses.replace(made, student=str(tmp_path / "s"), output=str(tmp_path / "o"))
    assert not made.faults()
    plan = distill.plan(made)
    family = axes.family("llama")
    work = Workload.on(
        layout, training=True, batch_size=1, sequence_length=TEXT.sequence_length, bytes=4, micro_batches=2
    )
    one = MemoryCost(family, student, work, teacher=(family, shapes["m"]))(student)
    if placement == "own_layout":
        alone = Workload.on(ParallelLayout(tensor=2), batch_size=0, bytes=4)
        expected = one + MemoryCost(family, shapes["n"], alone)(shapes["n"])
    else:
        both = MemoryCost(family, student, work, teacher=(family, shapes["m"]), further=[(family, shapes["n"])])
        expected = both(student)
        gradient = 256 * 4 * TEXT.sequence_length
        waiting = 64 * 4 * TEXT.sequence_length * 2
        weights = axes.parameter_count(family, shapes["n"]) * 4
        assert expected - one == pytest.approx(weights + waiting + gradient)
    assert plan.costs["memory of a rank"] == f"about {human_bytes(expected)}"
    assert {"teacher a", "teacher b"} <= {read.what for read in plan.reads}
    assert "teacher b: its share of the loss, by source: chat 1" in plan.notes
