"""Arithmetic, traffic and layouts of a training, against sums done by hand; the plan's command and its faults."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import resource
import subprocess
import sys

import pytest
import yaml
from rich.console import Console

from nemo_minitron import axes
from nemo_minitron.architecture import Architecture
from nemo_minitron.cli.plan import read_cluster, read_subject, show_plan, trainings_of
from nemo_minitron.cli.plan_layouts import layout_name, own_cost
from nemo_minitron.config import ClusterConfig, ParallelLayout, load, load_pipeline
from nemo_minitron.errors import ConfigError, ShapeError
from nemo_minitron.planning import (
    ForwardFlops,
    Model,
    Training,
    best_layout,
    layout_cost,
    layout_costs,
    layout_faults,
    load_recipe,
    pipeline_stage_parameters,
    recipe_names,
)
from nemo_minitron.search import Sizes
from nemo_minitron.shape import ModelShape

STUDENT = Model(ModelShape(8, 512, 1024, 8, 4, 64, 1000))
TEACHER = Model(ModelShape(10, 768, 2048, 8, 4, 64, 1000))
CLUSTER = ClusterConfig()


def training(**changes: object) -> Training:
    base = Training("t", STUDENT, TEACHER, 10, 64, 2, 128, ParallelLayout(2, 1, 4, sequence_parallel=True))
    return dataclasses.replace(base, **changes)


def show(name: str, overrides: list[str], **how: object) -> str:
    out = io.StringIO()
    options = {"plot": None, "save": None, "rows": 5} | how
    show_plan(name, overrides, Console(file=out, width=80), **options)  # type: ignore[arg-type]
    return out.getvalue()


def test_parts_are_the_whole():
    for name in axes.FAMILIES:
        topk = 2 if axes.FAMILIES[name].expert else None
        for tied in (False, True):
            shape = STUDENT.shape.replace(tied_embeddings=tied, num_moe_experts=4 if topk else None)
            model = Model(shape, Architecture(family=name, moe_router_topk=topk))
            assert sum(model.parts().values()) == model.parameters
            assert ("output layer" in model.parts()) is not tied


def test_forward_flops_count_matrices_and_half_the_square_of_attention():
    flops = ForwardFlops.of(STUDENT, 128)
    attention = 512 * 64 * (8 + 2 * 4) + 512 * 64 * 8
    assert flops.layer == 2 * (attention + 3 * 512 * 1024)
    assert flops.core == 2 * (2 * 128 * 8 * 64) / 2
    assert flops.output == 2 * 512 * 1000
    assert flops.total == 8 * (flops.layer + flops.core) + flops.output
    expected = (3 * flops.total + ForwardFlops.of(TEACHER, 128).total) * 64 * 128
    assert training().flops_per_step == expected
    assert training().flops == 10 * expected
    experts = Model(STUDENT.shape.replace(num_moe_experts=4), Architecture(family="mixtral", moe_router_topk=2))
    assert ForwardFlops.of(experts, 128).layer == 2 * (attention + 2 * 3 * 512 * 1024 + 4 * 512)  # 2 of 4, and a router


def test_stage_parameters_of_every_rank_are_the_model():
    """Over all ranks each tensor is there once, cut where tensor parallelism cuts it; tied copies come on top."""
    for tied in (False, True):
        model = Model(STUDENT.shape.replace(vocab_size=1024, tied_embeddings=tied))
        for tensor, pipeline, virtual in ((1, 1, None), (2, 1, None), (4, 3, None), (2, 2, 2)):
            stages = pipeline_stage_parameters(model, tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual)
            names = [name for stage in stages for name in stage]
            copies = ["output_layer.weight"] if tied and pipeline > 1 else []
            assert sorted(names) == sorted(
                [*(entry.name for entry in axes.parameters(model.table, model.shape)), *copies]
            )
            held = sum(
                math.prod(size) * (tensor if axes.parameter(model.table, name).tensor_parallel_dim is not None else 1)
                for stage in stages
                for name, size in stage.items()
            )
            assert held == model.parameters + (1024 * 512 if copies else 0)
    first, second = pipeline_stage_parameters(model, tensor=1, pipeline=2, virtual_pipeline=2)
    assert {int(name.split(".")[2]) for name in first if "layers" in name} == {0, 1, 4, 5}
    assert {int(name.split(".")[2]) for name in second if "layers" in name} == {2, 3, 6, 7}
    with pytest.raises(ShapeError, match="num_query_groups=4 cannot be split over parallel.tensor=8"):
        pipeline_stage_parameters(model, tensor=8)


def test_traffic_of_a_step():
    """Against the sums of the module's text, for two micro-batches of 2 x 128 tokens on a rank."""
    layout = ParallelLayout(2, 2, 16)
    cost = layout_cost(training(layout=layout), layout, "none", CLUSTER)
    tokens, half = 2 * 128 * 2, 0.5  # bytes of a weight times tokens; (t - 1) / t
    # first stage: 4 student and 5 teacher layers, and the embeddings
    student, teacher = 512 * tokens, 768 * tokens
    micro_batch = 2 * half * ((4 * 4 + 1) * student + (5 * 2 + 1) * teacher)
    assert cost.sent["tensor"] == 2 * micro_batch
    assert cost.sent["pipeline"] == 2 * (2 * student + teacher)
    weights = max(
        sum(math.prod(shape) for shape in stage.values())
        for stage in pipeline_stage_parameters(STUDENT, tensor=2, pipeline=2)
    )
    assert cost.sent["data"] == weights * (4 + 2) * 15 / 16
    assert cost.bubble == pytest.approx((1 / 2) / (1 + 1 / 2))
    sequence = layout_cost(training(), dataclasses.replace(layout, sequence_parallel=True), "none", CLUSTER)
    # two all-gathers more a trained layer, each half of an all-reduce; half the message between stages
    assert sequence.sent["tensor"] - cost.sent["tensor"] == 2 * 2 * half * 4 * student
    assert sequence.sent["pipeline"] == cost.sent["pipeline"] / 2
    again = layout_cost(training(), layout, "full", CLUSTER)
    assert again.sent["tensor"] - cost.sent["tensor"] == 2 * 2 * half * 2 * 4 * student
    alone = layout_cost(training(), ParallelLayout(), "none", CLUSTER)
    assert set(alone.sent.values()) == {0.0}


def test_logits_in_chunks():
    """Of 4,096 tokens and 131,072 columns: a chunk's logits and the gradients in place of all logits."""
    student, teacher = (Model(model.shape.replace(vocab_size=131072)) for model in (STUDENT, TEACHER))
    whole = training(student=student, teacher=teacher, micro_batch_size=32, layout=ParallelLayout())
    before, after = (
        layout_cost(dataclasses.replace(whole, chunked=chunked), whole.layout, "none", CLUSTER).fullest
        for chunked in (False, True)
    )
    gradients = 131072 * 512 * (4 + 2) + 4096 * 512 * 2
    assert before.activations - after.activations == 2 * 2 * 4096 * 131072 - (2 * 256 * 2**20 + gradients)
    assert dataclasses.replace(after, activations=before.activations) == before
    stages = "stages.distilled.logits=chunks", "stages.corrected.logits=chunks"
    for overrides in ([], stages[:1], stages):
        found, _ = trainings_of(read_subject("llama-31-minitron-4b-width", list(overrides)))
        assert {one.name: one.chunked for one in found} == {
            "distilled": len(overrides) > 0, "corrected": len(overrides) > 1,
        }  # fmt: skip


def test_context_parallelism_divides_tokens():
    """Half of the tokens, and of all that depends on them; the ring of keys and values is new."""
    half = ParallelLayout(2, 2, 4, context=2)
    one, two = (layout_cost(training(), layout, "none", CLUSTER) for layout in (ParallelLayout(2, 2, 4), half))
    assert two.sent["tensor"] == one.sent["tensor"] / 2
    assert two.sent["pipeline"] == one.sent["pipeline"] / 2
    assert two.seconds["arithmetic"] == pytest.approx(one.seconds["arithmetic"] / 2)
    assert two.fullest.optimizer == one.fullest.optimizer / 2
    assert two.fullest.weights == one.fullest.weights
    buffers = 4 * 32 * 2**20  # of the loss, whatever the tokens
    assert two.ranks[0].activations == one.ranks[0].activations / 2
    assert two.ranks[1].activations - buffers == (one.ranks[1].activations - buffers) / 2
    # eight micro-batches of 2 x 128 tokens, half of whose keys and values go around, three times the student's
    ring = 8 * 0.5 * 2 * 128 * 2 / 2 * 2 * 4 * 64 * (4 * 3 + 5)
    assert (one.sent["context"], two.sent["context"]) == (0.0, ring)


def test_time_of_a_step():
    alone = layout_cost(training(teacher=None), ParallelLayout(), "none", CLUSTER)
    assert alone.mfu == pytest.approx(CLUSTER.mfu)
    assert alone.step_seconds == pytest.approx(training(teacher=None).flops_per_step / (989e12 * 0.4))
    assert alone.gpu_hours == pytest.approx(alone.step_seconds * 10 / 3600)
    full = layout_cost(training(teacher=None), ParallelLayout(), "full", CLUSTER)
    output = ForwardFlops.of(STUDENT, 128).output
    layers = ForwardFlops.of(STUDENT, 128).total - output
    assert full.step_seconds / alone.step_seconds == pytest.approx(
        (4 * layers + 3 * output) / (3 * layers + 3 * output)
    )
    single = layout_cost(training(teacher=None, bytes=4), ParallelLayout(), "none", CLUSTER)
    assert single.step_seconds == pytest.approx(2 * alone.step_seconds)
    # tensor groups beyond a node go over the network
    layout = ParallelLayout(4, 1, 1)
    near, far = (layout_cost(training(), layout, "none", ClusterConfig(gpus_per_node=n)) for n in (4, 2))
    assert far.seconds["tensor"] == pytest.approx(near.seconds["tensor"] * 450 / 50)
    # a virtual pipeline halves the bubble
    plain = layout_cost(training(), ParallelLayout(1, 4, 2), "none", CLUSTER)
    virtual = layout_cost(training(), ParallelLayout(1, 4, 2, virtual_pipeline=2), "none", CLUSTER)
    assert virtual.seconds["bubble"] == pytest.approx(plain.seconds["bubble"] / 2)


def test_the_best_layout_is_the_fastest_that_fits():
    cluster = ClusterConfig(gpus=8, memory_gib=0.31)
    costs = layout_costs(training(), cluster)
    sizes = [(cost.layout.tensor, cost.layout.pipeline, cost.layout.data) for cost in costs]
    own = (2, 1, 4)  # once as it is, once as it fits
    assert sorted(sizes) == sorted([*set(sizes), own])
    # 8 tensor ranks cannot split 4 groups; 8 pipeline stages are too many for nothing here
    assert set(sizes) == {
        (1, 1, 8),
        (1, 2, 4),
        (1, 4, 2),
        (1, 8, 1),
        (2, 1, 4),
        (2, 2, 2),
        (2, 4, 1),
        (4, 1, 2),
        (4, 2, 1),
    }
    assert [cost.step_seconds for cost in costs] == sorted(cost.step_seconds for cost in costs)
    best = best_layout(costs)
    assert best is not None
    assert best.fits
    assert best.fullest.total <= 0.9 * 0.31 * 2**30
    assert any(not cost.fits for cost in costs)
    assert all(cost.step_seconds >= best.step_seconds for cost in costs if cost.fits)
    for cost in costs:  # recomputation only where it is needed, or where nothing helps
        without = layout_cost(training(), cost.layout, "none", cluster)
        assert cost.recompute == ("none" if without.fits or cost == without else "full")
    assert best_layout(layout_costs(training(), ClusterConfig(gpus=8, memory_gib=0.01))) is None
    assert layout_costs(training(), ClusterConfig(gpus=11)) == []  # neither 64 sequences nor 8 layers go over 11
    assert "global_batch_size=64" in layout_faults(training(), ParallelLayout(1, 1, 7))[0]


def test_clusters_and_faults(tmp_path):
    assert read_cluster(["cluster.gpus=64", "steps=3", "cluster.gpu=a100"]) == ClusterConfig("a100", gpus=64)
    with pytest.raises(ConfigError) as error:
        read_cluster(["cluster.gpu=h1", "cluster.mfu=2", "cluster.gpuz=3"])
    assert len(error.value.faults) == 3
    assert "did you mean gpu?" in str(error.value)
    with pytest.raises(ConfigError, match="shipped recipes: llama-31-minitron-4b-depth"):
        read_subject("lama", [])
    with pytest.raises(ConfigError, match="did you mean smollm2-demo"):
        load_recipe("smollm-demo")
    with pytest.raises(ConfigError, match="is neither a pipeline nor a training"):
        read_subject("export", [])
    with pytest.raises(ConfigError) as error:
        trainings_of(read_subject("distill", [f"student={tmp_path}", f"teacher={tmp_path}"]))
    assert f"{tmp_path}: its sizes are not known before it is there" in error.value.faults[0]
    with pytest.raises(ConfigError, match="its suffix must be one of"):
        show("smollm2-demo", [], plot=tmp_path / "plan.txt")
    with pytest.raises(ConfigError, match=r"no stage is called distil; did you mean distilled"):
        read_subject("smollm2-demo", ["stages.distil.steps=3"])


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_a_pipeline(name, tmp_path):
    """What `--save` writes is read back as the same stages."""
    recipe = load_recipe(name)
    text = show(name, [], save=tmp_path / "pipeline.yaml")
    pipeline, stages = load_pipeline(tmp_path / "pipeline.yaml")
    assert "is saved with" not in text
    assert pipeline.output == recipe.output
    assert stages == recipe.stages
    assert {"evaluate", "report"} <= {stage.STAGE for stage in stages}
    content = yaml.safe_load((tmp_path / "pipeline.yaml").read_text())
    assert all(stage["output"].startswith("${output}/") for stage in content["stages"])


@pytest.mark.parametrize(
    ("name", "overrides", "gpus"),
    [
        ("llama-31-minitron-4b-width", ["stages.distilled.steps=500", "output=runs/mine"], 16),
        ("mistral-nemo-minitron-8b", ["cluster.gpu=b200"], 8),
        ("minitron-8b-4b", ["stages.minitron-8b.micro_batch_size=2", "cluster.memory_gib=192"], 64),
        ("smollm2-demo", ["stages.distilled.parallel.tensor=3", "stages.distilled.global_batch_size=4"], 3),
    ],
)
def test_what_is_saved_is_what_was_planned(name, overrides, gpus, tmp_path):
    """Cluster and settings included: planned again, the saved trainings have the same costs, by their own layouts."""
    overrides = [*overrides, f"cluster.gpus={gpus}"]
    cluster, path = read_cluster(overrides), tmp_path / "pipeline.yaml"
    before = show(name, overrides, save=path, rows=1)
    planned, saved = read_subject(name, overrides), read_subject(str(path), [])
    assert (saved.name, saved.output) == (planned.name, planned.output)
    again = dataclasses.replace(planned, stages=saved.stages)
    for old, new in zip(trainings_of(planned)[0], trainings_of(again)[0], strict=True):
        assert dataclasses.replace(new, layout=old.layout, recompute=old.recompute) == old
        wanted = own_cost(old, layout_costs(old, cluster)) or best_layout(layout_costs(old, cluster))
        assert wanted is not None
        assert (new.layout, new.recompute) == (wanted.layout, wanted.recompute)
        assert f"own layout  │ {layout_name(new.layout)}" not in before
    layouts = ("parallel", "student_layout", "recompute")
    for old, new in zip(planned.stages, saved.stages, strict=True):
        assert new.started <= gpus
        assert {f.name for f in dataclasses.fields(old) if getattr(old, f.name) != getattr(new, f.name)} <= {*layouts}
        assert new.faults() == []
    # the tables speak of the cluster alone
    headings = re.findall(r"GiB of the fullest rank, TP (\d+) x PP (\d+) x DP (\d+)", before)
    assert headings
    assert {math.prod(map(int, sizes)) for sizes in headings} == {gpus}


def test_pipelines_and_trainings_are_saved_too(tmp_path):
    """With what a pipeline's file says by interpolation and defaults, and a training as a pipeline of one stage."""
    (tmp_path / "own").mkdir()
    own = {"shape": STUDENT.shape.to_dict(), "architecture": STUDENT.architecture.to_dict()}
    (tmp_path / "own" / "minitron.json").write_text(json.dumps(own))
    settings = [f"model={tmp_path}/own", "output=runs/x/corrected", "steps=70"]
    show("correct", settings, save=tmp_path / "one.yaml")
    pipeline, (stage,) = load_pipeline(tmp_path / "one.yaml")
    assert (pipeline.output, stage.output) == ("runs/x", "runs/x/corrected")
    assert stage == dataclasses.replace(load("correct", "correct", settings), name=stage.name)
    content = {
        "output": "runs/y",
        "defaults": {"data": {"sources": [{"name": "a", "path": "a.txt"}]}},
        "stages": [
            {"stage": "correct", "model": f"{tmp_path}/own", "steps": 70},
            {"stage": "evaluate", "models": {"one": "${output}/correct/model"}},
            {"stage": "report"},
        ],
    }
    (tmp_path / "several.yaml").write_text(yaml.safe_dump(content))
    show(str(tmp_path / "several.yaml"), ["stages.correct.steps=50"], save=tmp_path / "saved.yaml")
    assert (
        load_pipeline(tmp_path / "saved.yaml")[1]
        == load_pipeline(tmp_path / "several.yaml", ["stages.correct.steps=50"])[1]
    )
    written = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert written["stages"][1]["models"] == {"one": "${output}/correct/model"}


def test_what_no_cluster_can_run_is_not_saved(tmp_path):
    with pytest.raises(ConfigError, match="corrected: no layout of the cluster fits; nothing is saved"):
        show("llama-31-minitron-4b-width", ["cluster.gpus=1"], save=tmp_path / "p.yaml")
    with pytest.raises(ConfigError, match="teacher_placement=own_layout is planned as if it were shared"):
        own = ["stages.distilled.teacher_placement=own_layout", "stages.distilled.teacher_parallel.tensor=3",
               "stages.distilled.parallel.tensor=3", "cluster.gpus=2"]  # fmt: skip
        show("smollm2-demo", own, save=tmp_path / "p.yaml")
    assert not (tmp_path / "p.yaml").exists()


def test_a_shape_that_a_search_is_to_find_is_not_planned(tmp_path):
    (tmp_path / "own").mkdir()
    own = {"shape": STUDENT.shape.to_dict(), "architecture": STUDENT.architecture.to_dict()}
    (tmp_path / "own" / "minitron.json").write_text(json.dumps(own))
    content = {
        "output": f"{tmp_path}/run",
        "defaults": {"data": {"sources": [{"name": "a", "path": "a.txt"}]}},
        "stages": [
            {"stage": "correct", "model": f"{tmp_path}/own"},
            {"stage": "prune", "model": f"{tmp_path}/own", "method": "random", "target": "${output}/search"},
            {"stage": "distill", "student": "${output}/prune", "teacher": f"{tmp_path}/own"},
        ],
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(content))
    found, notes = trainings_of(read_subject(str(path), []))
    assert [training.name for training in found] == ["correct"]
    assert notes[0].startswith("prune: its sizes are those that ")
    assert notes[1].startswith("distill: is not planned")
    sizes = Sizes.of(STUDENT.shape)._replace(num_layers=1)
    result = {"format_version": 1, "best": "b", "candidates": [{"name": "b", "sizes": sizes._asdict()}]}
    (tmp_path / "run" / "search").mkdir(parents=True)
    (tmp_path / "run" / "search" / "search.json").write_text(json.dumps(result))
    found, notes = trainings_of(read_subject(str(path), []))
    assert [training.student.shape.num_layers for training in found] == [STUDENT.shape.num_layers, 1]
    assert notes == []


def test_settings_of_the_cluster_without_their_prefix():
    with pytest.raises(ConfigError, match=r"did you mean cluster\.gpus=16\?"):
        read_subject("smollm2-demo", ["gpus=16"])


def test_tables(tmp_path):
    text = show("smollm2-demo", ["cluster.gpus=4", "stages.distilled.steps=30"], plot=tmp_path / "plan.png")
    assert "134,515,008" in text
    assert "15.4 k in 30 steps of 2 x 256" in text
    assert "best" in text
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert max(len(line) for line in text.splitlines()) <= 80
    none = show("minitron-8b-4b", ["cluster.gpus=8", "cluster.memory_gib=8", "cluster.price=2"])
    assert "none fits: the leanest layout needs" in none
    assert "too big" in none
    assert "no layout of 37 GPUs can split" in show("smollm2-demo", ["cluster.gpus=37"]).replace("\n", " ")


def test_checkpoints_that_are_there_are_planned_by_their_sizes(tmp_path):
    """An HF directory, and a NeMo 2 one; a student in a configuration of its own."""
    from nemo_minitron.checkpoints.formats.huggingface.config import to_hf

    (tmp_path / "hf").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "hf" / "config.json").write_text(
        json.dumps(to_hf(TEACHER.shape, TEACHER.architecture, dtype="float32"))
    )
    own = {"shape": STUDENT.shape.to_dict(), "architecture": STUDENT.architecture.to_dict()}
    (tmp_path / "own" / "minitron.json").write_text(json.dumps(own))
    settings = [f"student={tmp_path}/own", f"teacher={tmp_path}/hf/", "cluster.gpus=2", "steps=70"]
    (found,), notes = trainings_of(read_subject("distill", settings))
    assert (found.student, found.teacher, found.steps, found.bytes, notes) == (STUDENT, TEACHER, 70, 4, [])
    pair = f"teachers=[{{name: a, model: {tmp_path}/own}}, {{name: b, model: {tmp_path}/hf}}]"
    (found,), notes = trainings_of(read_subject("distill", [settings[0], "teacher=null", pair]))
    assert found.teacher == TEACHER
    assert notes == ["distill: of its 2 teachers the largest alone is planned; the dry run counts all"]
    (alone,), _ = trainings_of(read_subject("correct", [f"model={tmp_path}/own"]))
    assert (alone.student, alone.teacher) == (STUDENT, None)


def test_a_plan_starts_without_the_heavy_stack():
    """No torch, and in the time that the imports of a configuration take."""
    code = (
        "import sys; from rich.console import Console; from nemo_minitron.cli.plan import show_plan\n"
        "show_plan('mistral-nemo-minitron-8b', [], Console(), plot=None, save=None, rows=3)\n"
        "heavy = {'torch', 'megatron', 'nemo', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "8,414,105,600" in done.stdout


def test_the_command(tmp_path):
    """With its picture, in less than three seconds of a processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "nemo_minitron", "plan", "llama-31-minitron-4b-width",
         "--save", "p.yaml", "--plot", "p.png"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.png", "p.yaml"]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    bad = subprocess.run(
        [sys.executable, "-m", "nemo_minitron", "plan", "nothing"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert bad.returncode == 2
    assert "shipped recipes" in bad.stderr
