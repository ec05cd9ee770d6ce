"""What expert parallelism is refused with, before anything starts; outputs of earlier releases keep their identity."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_minitron import axes
from nemo_minitron.architecture import Architecture
from nemo_minitron.checkpoints import Checkpoint
from nemo_minitron.config import ParallelLayout, load
from nemo_minitron.distillation.compatibility import check_context, check_model
from nemo_minitron.errors import ConfigError, ShapeError
from nemo_minitron.jobs.records import hashed_settings
from nemo_minitron.planning import MemoryCost, Workload
from nemo_minitron.shape import ModelShape

DATA = "data: {sources: [{name: a, path: a.txt}], sequence_length: 64}\n"
DISTILL = f"student: s\nteacher: t\noutput: o\n{DATA}global_batch_size: 4\n"
MIXTURE = ModelShape(
    num_layers=4, hidden_size=32, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=4, head_dim=8,
    vocab_size=100, num_moe_experts=6,
)  # fmt: skip


@pytest.fixture
def write(tmp_path: Path):
    def file(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return file


def faults_of(stage: str, path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(stage, path, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.expert=0"], "parallel.expert=0: must be above 0"),
        (
            ["parallel.expert=2"],
            "expert=2: the experts are shared out over data-parallel replicas; set parallel.data=1 to",
        ),
        (["parallel.expert=2", "parallel.data=2", "parallel.context=2"], "is not offered with parallel.context=2"),
        (["parallel.expert=2", "parallel.data=2", "parallel.tensor=2"], "only with sequence parallelism"),
        (
            ["parallel.expert=2", "parallel.data=2", "teacher_placement=own_layout", "teacher_parallel.data=2"],
            "parallel.expert=2: is not offered with teacher_placement=own_layout",
        ),
        (["parallel.expert=2", "parallel.data=2", "teacher_correction.lr=1e-5"], "not offered with teacher_correction"),
        (
            ["teacher_placement=own_ranks", "teacher_parallel.data=2", "teacher_parallel.expert=2"],
            "teacher_parallel.expert=2: only score, distill and correct share experts out",
        ),
    ],
)
def test_a_distillation_that_cannot_share_experts_out(write, overrides: list[str], message: str) -> None:
    assert message in faults_of("distill", write(DISTILL), *overrides)


@pytest.mark.parametrize("stage", ["generate", "depth", "evaluate"])
def test_stages_that_do_not_share_experts_out(write, stage: str) -> None:
    models = "models: {a: m}\n" if stage == "evaluate" else "model: m\n"
    more = DATA if stage != "generate" else "prompts: [a]\n"
    found = faults_of(stage, write(f"{models}output: o\n{more}parallel: {{data: 2, expert: 2}}\n"))
    assert "parallel.expert=2: only score, distill and correct share experts out, by parallel.expert" in found


def test_stages_that_share_experts_out(write) -> None:
    sharing = "parallel: {data: 4, expert: 2}\n"
    for stage, models in (("distill", "student: s\nteacher: t\n"), ("correct", "model: m\n")):
        config = load(stage, write(f"{models}output: o\n{DATA}global_batch_size: 4\n{sharing}"))
        assert config.processes == 4
    assert load("score", write(f"model: m\noutput: o\n{DATA}{sharing}")).layout.expert == 2


def test_in_code_it_is_refused_too() -> None:
    with pytest.raises(ConfigError, match="parallel.expert=2: is not offered with a teacher on own_ranks"):
        check_context(ParallelLayout(data=2, expert=2), placement="own_ranks")
    check_context(ParallelLayout(data=2, expert=2))


def test_layouts_are_checked_with_the_model() -> None:
    def check(shape: ModelShape, layout: ParallelLayout) -> None:
        topk = 2 if shape.num_moe_experts else None
        architecture = Architecture(
            max_position_embeddings=64, family="mixtral" if topk else "llama", moe_router_topk=topk
        )
        check_model(Checkpoint(shape, architecture, None, None, Path("m"), "hf"), layout, 64)  # type: ignore[arg-type]

    check(MIXTURE, ParallelLayout(data=3, expert=3))
    with pytest.raises(ShapeError, match=r"num_moe_experts=6 cannot be shared out .*=4; it fits .* in \[1, 2, 3, 6\]"):
        check(MIXTURE, ParallelLayout(data=4, expert=4))
    with pytest.raises(ShapeError, match="parallel.expert=2: the model has no experts to share out"):
        check(MIXTURE.replace(num_moe_experts=None), ParallelLayout(data=2, expert=2))


def test_outputs_of_earlier_releases_keep_their_identity(write) -> None:
    settings = hashed_settings(load("distill", write(DISTILL)))
    assert "expert" not in settings["parallel"]
    assert "expert" not in settings["teacher_parallel"]
    shared = hashed_settings(load("distill", write(DISTILL), ["parallel.data=2", "parallel.expert=2"]))
    assert shared["parallel"]["expert"] == 2


def test_memory_of_a_rank() -> None:
    """A rank has a half of the experts and all else; the optimizer's state of all is spread over all replicas."""
    table = axes.family("mixtral")
    alone, shared = (
        MemoryCost(table, MIXTURE, Workload.on(ParallelLayout(data=4, expert=expert), training=True), topk=2)
        for expert in (1, 2)
    )
    experts = 4 * 6 * 3 * 96 * 32
    before, after = alone.fullest(MIXTURE), shared.fullest(MIXTURE)
    assert before.weights - after.weights == experts / 2 * 2
    assert before.gradients - after.gradients == experts / 2 * 4
    assert before.optimizer == after.optimizer
