"""What context parallelism is refused with, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints.base import Checkpoint
from nemo_minitron.config import ParallelLayout, load, load_pipeline
from nemo_minitron.distillation.compatibility import check_context, check_model
from nemo_minitron.errors import ConfigError, ShapeError
from nemo_minitron.shape import ModelShape

DATA = "data: {sequence_length: 64, sources: [{name: a, path: a.txt}]}\n"
DISTILL = f"student: s\nteacher: t\noutput: o\n{DATA}parallel: {{context: 4}}\n"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return path

    return write


def faults_of(stage: str, path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(stage, path, overrides)
    return "\n".join(error.value.faults)


@pytest.mark.parametrize("stage", ["distill", "correct"])
def test_the_trainings_on_text_take_it(write: Any, stage: str) -> None:
    models = "student: s\nteacher: t\n" if stage == "distill" else "model: m\n"
    config = load(stage, write(f"{models}output: o\n{DATA}parallel: {{context: 4, data: 2, tensor: 2}}\n"))
    assert config.processes == config.layout.world_size == 16


@pytest.mark.parametrize("stage", ["score", "cache", "evaluate"])
def test_other_stages_refuse_it_by_the_line(write: Any, stage: str) -> None:
    models = {"cache": "teacher: t\n", "evaluate": "models: {a: m}\n"}.get(stage, "model: m\n")
    found = faults_of(stage, write(f"{models}output: o\n{DATA}parallel:\n  context: 2\n"))
    assert "parallel.context=2: only the trainings distill and correct share sequences out" in found
    assert found.startswith(("line 4: ", "line 5: "))


def test_a_layout_of_the_student_to_be_refuses_it(write: Any) -> None:
    found = faults_of("prune", write("model: m\nscores: s\noutput: o\nstudent_layout: {context: 2}\n"))
    assert "student_layout.context=2: only the trainings" in found


def test_a_pipelines_stages_refuse_it_one_by_one(write: Any) -> None:
    stages = "stages: [{stage: score, model: m}, {stage: correct, model: m}]"
    path = write(f"name: p\noutput: o\ndefaults: {{parallel: {{context: 2}}, data: {DATA[6:].strip()}}}\n{stages}\n")
    with pytest.raises(ConfigError) as error:
        load_pipeline(path)
    assert sum("only the trainings" in fault for fault in error.value.faults) == 1


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("parallel.context=0", "parallel.context=0: must be above 0"),
        (
            "data.sequence_length=60",
            "sequence_length=60: cannot be split over parallel.context=4; set a multiple of 8",
        ),
        ("data.documents=mask", "parallel.context=4: Transformer Engine's attention takes no masks of documents"),
        ("teacher_placement=own_layout", "parallel.context=4: sequences are shared out over the student's ranks"),
        ("teacher_placement=own_ranks", "set teacher_placement=shared, or use a teacher_cache"),
    ],
)
def test_what_cannot_go_with_it(write: Any, override: str, fault: str) -> None:
    assert fault in faults_of("distill", write(DISTILL), override)


def test_a_teacher_elsewhere_has_none(write: Any) -> None:
    text = DISTILL.replace("{context: 4}", "{}") + "teacher_placement: own_ranks\nteacher_parallel: {context: 2}\n"
    assert "teacher_parallel.context=2: only the trainings" in faults_of("distill", write(text))


def test_with_a_cache_or_losses_inside_the_models_it_goes(write: Any) -> None:
    load("distill", write(DISTILL), ["teacher_cache=c"])
    load("distill", write(DISTILL), ["intermediate={hidden: mse, relation_heads: 2, balance: dynamic}"])


def test_with_sequence_parallelism_a_rank_needs_twice_tensor_runs(write: Any) -> None:
    layout = ["parallel.tensor=2", "parallel.sequence_parallel=true"]
    load("distill", write(DISTILL), layout)
    found = faults_of("distill", write(DISTILL), *layout, "data.sequence_length=72")
    assert "over parallel.context=4 and parallel.tensor=2; set a multiple of 16" in found
    assert ParallelLayout(tensor=0, sequence_parallel=True).sequence_faults(64) == []  # the fault is another


def test_in_code_it_is_refused_too() -> None:
    layout = ParallelLayout(context=2)
    check_context(ParallelLayout(), documents=True, placement="own_ranks")
    check_context(layout)
    with pytest.raises(ConfigError) as caught:
        check_context(layout, documents=True, placement="own_layout")
    for what in ("blocks of several documents", "a teacher on own_layout"):
        assert what in str(caught.value)


def test_lengths_and_mixtures_are_checked_with_the_model() -> None:
    shape = ModelShape(
        num_layers=2, hidden_size=32, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=4, head_dim=8,
        vocab_size=100, num_moe_experts=4,
    )  # fmt: skip
    architecture = Architecture(max_position_embeddings=64, family="mixtral", moe_router_topk=2)
    model = Checkpoint(shape, architecture, weights=None, tokenizer=None, path=Path("m"), format="hf")  # type: ignore[arg-type]
    with pytest.raises(ShapeError) as caught:
        check_model(model, ParallelLayout(context=2), 30)
    assert len(caught.value.faults) == 2
    assert "data.sequence_length=30: cannot be split over parallel.context=2" in str(caught.value)
    assert "of a mixture is of whole sequences" in str(caught.value)


def test_ranks_lie_in_megatrons_order() -> None:
    layout = ParallelLayout(tensor=2, context=3, data=2, pipeline=2)
    places = [(t, c, d, p) for p in range(2) for d in range(2) for c in range(3) for t in range(2)]
    assert [layout.rank(tensor=t, context=c, data=d, pipeline=p) for t, c, d, p in places] == list(range(24))
    assert layout.world_size == 24
