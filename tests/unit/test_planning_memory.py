"""The memory model against what Megatron and torch allocate, for every family, and its monotony."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pruning import one_process
from support.shapes import mixed_shapes

from nemo_minitron import axes
from nemo_minitron.architecture import Architecture
from nemo_minitron.config import DataConfig, DistillConfig, ParallelLayout
from nemo_minitron.jobs.plans import human_bytes
from nemo_minitron.planning import Model, pipeline_stage_parameters
from nemo_minitron.planning.counts import layer_cost, outer_counts
from nemo_minitron.runtime.model import build_model
from nemo_minitron.search import MemoryCost, Sizes, Workload
from nemo_minitron.shape import ModelShape, padded_vocab
from nemo_minitron.stages import distill

SHAPE = ModelShape(3, 48, 80, 8, 4, 12, 250)
CONSTANTS = {
    "nemotron": {"rotary_percent": 0.5},
    "mixtral": {"moe_router_topk": 2},
    "qwen3_moe": {"moe_router_topk": 2, "moe_router_pre_softmax": True},
    "gemma3": {
        "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
        "sliding_window": 16,
        "rotary_base_local": 500.0,
    },
}
BATCH, LENGTH = 2, 40


def of_family(name: str) -> tuple[ModelShape, Architecture]:
    shape = SHAPE.replace(num_moe_experts=4) if axes.family(name).expert else SHAPE
    return shape, Architecture(family=name, max_position_embeddings=64, **CONSTANTS.get(name, {}))


def saved_bytes(model: torch.nn.Module) -> int:
    """Bytes that the forward pass and the loss keep for the backward pass, without parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 250, (BATCH, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(ids, torch.arange(LENGTH).expand(BATCH, LENGTH), None)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def test_against_what_is_allocated():
    """Weights and cache to the byte, activations within 10 %."""
    from megatron.core.inference.contexts import StaticInferenceContext

    with one_process() as groups:
        for name in axes.FAMILIES:
            shape, architecture = of_family(name)
            topk, rotary = architecture.moe_router_topk, architecture.rotary_percent
            (model,) = build_model(shape, architecture, groups, initialize=True)
            weights = sum(parameter.numel() * 4 for parameter in model.parameters())

            def cost(**how: object) -> MemoryCost:
                work = Workload(batch_size=BATCH, sequence_length=LENGTH, bytes=4, fused=False, **how)  # type: ignore[arg-type]
                return MemoryCost(axes.family(name), shape, work, topk=topk, rotary=rotary)  # noqa: B023

            inference = cost().fullest(Sizes.of(shape))
            context = StaticInferenceContext(BATCH, LENGTH)
            with torch.no_grad():
                model(torch.zeros(BATCH, LENGTH, dtype=torch.int64), None, None, inference_context=context)
            cached = sum(part.nbytes for pair in context.key_value_memory_dict.values() for part in pair)
            assert (inference.weights, inference.cache) == (weights, cached), name

            training = cost(training=True).fullest(Sizes.of(shape))
            assert (training.weights, training.gradients, training.optimizer) == (weights, weights, 2 * weights)
            assert training.activations == pytest.approx(saved_bytes(model), rel=0.1), name
            model.config.recompute_granularity, model.config.recompute_method = "full", "uniform"
            model.config.recompute_num_layers = 1
            outside = saved_bytes(model)  # without the one layer that the backward pass computes again
            again = cost(training=True, recompute="full")
            one = again._layer(Sizes.of(shape)) * BATCH * LENGTH * 4 - shape.hidden_size * BATCH * LENGTH * 4
            assert again.fullest(Sizes.of(shape)).activations - one == pytest.approx(outside, rel=0.1), name


def test_layouts():
    """Weights of all ranks are those of the model, and copies; more ranks need less each."""
    for name in axes.FAMILIES:
        shape, _ = of_family(name)
        shape = shape.replace(vocab_size=256, tied_embeddings=True)
        sizes, table = Sizes.of(shape), axes.family(name)
        whole = axes.parameter_count(table, shape) * 2
        assert MemoryCost(table, shape, Workload()).fullest(sizes).weights == whole
        stages = MemoryCost(table, shape, Workload(pipeline=2)).ranks(sizes)
        assert sum(rank.weights for rank in stages) == whole + 2 * 256 * 48  # the copy of the tied embedding
        virtual = MemoryCost(table, shape.replace(num_layers=4), Workload(pipeline=2, virtual_pipeline=2))
        assert virtual.ranks(sizes._replace(num_layers=4))[0].cache == 2 * 2 * 2 * 512 * 4 * 12
        split = MemoryCost(table, shape, Workload(tensor=2)).fullest(sizes)
        assert whole / 2 < split.weights < 0.6 * whole
        full, shared = (
            MemoryCost(table, shape, Workload(training=True, tensor=2, data=data, sequence_parallel=True), topk=2)
            for data in (1, 4)
        )
        assert shared.fullest(sizes).optimizer == full.fullest(sizes).optimizer / 4
        assert shared.fullest(sizes).activations == full.fullest(sizes).activations


@pytest.mark.parametrize("training", [False, True])
def test_never_falls_when_a_size_grows(training):
    shape, _ = of_family("mixtral")
    work = Workload(training=training, tensor=2, pipeline=2, recompute="full" if training else "none")
    cost = MemoryCost(axes.family("mixtral"), shape, work, topk=2)
    smallest = Sizes(16, 2, 2, 2, 2, 8)
    for name in Sizes._fields:
        costs = [cost(smallest._replace(**{name: getattr(smallest, name) + more})) for more in range(12)]
        assert costs == sorted(costs)
        assert costs[0] < costs[-1]


@pytest.mark.parametrize(("tensor", "moved"), [(1, 0), (2, 1)])
def test_logits_of_both_vocabularies_are_counted(tensor: int, moved: int):
    """A larger vocabulary of the teacher, and what moves to the student's partition."""
    shape, table = SHAPE.replace(vocab_size=140), axes.family("llama")
    work = Workload(training=True, batch_size=2, sequence_length=64, bytes=4, fused=False, tensor=tensor)
    activations = [
        MemoryCost(table, shape, work, teacher=(table, shape.replace(vocab_size=rows))).ranks(shape)[-1].activations
        for rows in (140, 250, 300)
    ]
    assert activations[0] == activations[1]  # both are padded to 256
    padded = padded_vocab(300, tensor=tensor) // tensor
    own = padded_vocab(140, tensor=tensor) // tensor
    assert activations[2] - activations[0] == (padded - own + moved * own) * 4 * 2 * 64


def test_a_teacher_and_recomputation_of_a_layout():
    """Each rank has its share of the teacher; only the last stage keeps what waits for the student."""
    shape, _ = of_family("llama")
    table, sizes = axes.family("llama"), Sizes.of(shape)
    teacher = shape.replace(num_layers=6, hidden_size=96, vocab_size=256)
    work = Workload(training=True, batch_size=2, sequence_length=40, pipeline=2, micro_batches=5)
    cost = MemoryCost(table, shape, work, teacher=(table, teacher))
    first, last = cost.ranks(sizes)
    held = 5 * 2 * 40 * 96 * 2
    assert first.teacher + last.teacher == axes.parameter_count(table, teacher) * 2 + held
    alone = MemoryCost(table, shape, work).ranks(sizes)
    assert [rank.teacher for rank in alone] == [0, 0]
    assert [rank.weights for rank in alone] == [first.weights, last.weights]

    def activations(**how: object) -> float:
        return MemoryCost(table, shape, Workload(training=True, **how)).fullest(sizes).activations  # type: ignore[arg-type]

    assert activations(recompute="full") < activations(recompute="selective") == activations()
    plain = [activations(recompute=recompute, fused=False) for recompute in ("none", "selective", "full")]
    assert plain == sorted(plain, reverse=True)
    assert plain[0] > plain[1]


@pytest.mark.parametrize("placement", ["shared", "own_layout", "own_ranks"])
def test_a_stage_plans_with_these_formulas(tmp_path, placement):
    """A distillation's row is the planner's figure, wherever the teacher is."""
    student, architecture = of_family("llama")
    teacher = student.replace(num_layers=6, hidden_size=96)
    for role, shape in (("student", student), ("teacher", teacher)):
        (tmp_path / role).mkdir()
        record = {"shape": shape.to_dict(), "architecture": dataclasses.asdict(architecture)}
        (tmp_path / role / "minitron.json").write_text(json.dumps(record))
    layout, own = ParallelLayout(data=2, tensor=2), ParallelLayout(data=4)
    config = DistillConfig(
        student=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"), output=str(tmp_path / "out"),
        parallel=layout, teacher_placement=placement, micro_batch_size=2, precision="bf16-mixed", recompute="full",
        data=DataConfig(sequence_length=64), teacher_parallel=ParallelLayout() if placement == "shared" else own,
    )  # fmt: skip
    work = Workload.on(layout, training=True, batch_size=2, sequence_length=64, recompute="full", micro_batches=2)
    family = axes.family("llama")
    shared = MemoryCost(family, student, work, teacher=(family, teacher))(student)
    alone, theirs = MemoryCost(family, student, work)(student), axes.parameter_count(family, teacher) * 2
    padding = 6 * 2 * 96 * 2  # of the vocabulary of 250 to 256, in the embedding and the output layer
    expected = {
        "shared": f"about {human_bytes(shared)}",
        "own_layout": f"about {human_bytes(alone + theirs + padding)}",
        "own_ranks": f"about {human_bytes(alone)}; of the teacher's own ranks {human_bytes(theirs + padding)}",
    }
    assert distill.plan(config).costs["memory of a rank"] == expected[placement]


@given(shape=mixed_shapes(), family=st.sampled_from(sorted(axes.FAMILIES)), tensor=st.sampled_from([1, 2]))
@settings(max_examples=150, deadline=None)
def test_costs_of_layers_are_exact(shape, family, tensor):
    """Of any sizes, of a rank as of the whole model."""
    table = axes.family(family)
    experts = 3 if table.expert else None
    shape = shape.replace(num_moe_experts=experts)
    if shape.layout_faults(tensor=tensor, pipeline=1):
        shape = SHAPE.replace(num_moe_experts=experts)
    layer = layer_cost(table, hidden_size=shape.hidden_size, head_dim=shape.head_dim, experts=experts, tensor=tensor)
    first, last = outer_counts(table, shape, hidden_size=shape.hidden_size, tensor=tensor)
    total = first + last + sum(layer.parameters(sizes) for sizes in shape.each())
    if tensor == 1:
        assert total == axes.parameter_count(table, shape)
    (rank,) = pipeline_stage_parameters(Model(shape, Architecture(family=family)), tensor=tensor)
    padding = padded_vocab(shape.vocab_size, tensor=tensor) - shape.vocab_size
    tables = 1 if shape.tied_embeddings else 2
    assert total == sum(math.prod(size) for size in rank.values()) - tables * padding * shape.hidden_size / tensor
