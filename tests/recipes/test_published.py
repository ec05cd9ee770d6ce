"""The published recipes: exact sizes, hyper-parameters, and each at its real layout on the meta device."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from support.meta import meta_chunks, rank_of_world

from nemo_minitron.cli.dry_run import show_plans
from nemo_minitron.cli.plan import read_subject, trainings_of
from nemo_minitron.config import ClusterConfig, DistillConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.planning import ForwardFlops, layout_cost, load_recipe, pipeline_stage_parameters, recipe_names

#: Of each distillation: exact parameters of student and teacher, those that the papers and model cards print, in
#: thousands of millions, and the FLOPs of a step that arXiv 2407.14679 (section 4.1) gives for plain training.
PUBLISHED = {
    # card: 4.51B; arXiv 2408.11796, table 1: 4.5B, of which 3.7B are no embeddings
    ("llama-31-minitron-4b-width", "distilled"): (4_512_746_496, 8_030_261_248, 4.51, 3.7, None),
    ("llama-31-minitron-4b-depth", "distilled"): (4_540_469_248, 8_030_261_248, 4.5, 3.5, None),
    # the same table: 8.4B and 7.3B
    ("mistral-nemo-minitron-8b", "distilled"): (8_414_105_600, 12_247_782_400, 8.4, 7.3, None),
    # arXiv 2407.14679, table 10: 8.27B and 4.19B of 15.6B; tables 2 and 3: 6.2B and 2.6B
    ("minitron-8b-4b", "minitron-8b"): (8_271_699_968, 15_628_775_424, 8.27, 6.2, 2.5e17),
    ("minitron-8b-4b", "minitron-4b"): (4_190_509_056, 15_628_775_424, 4.19, 2.6, 1.2e17),
    ("smollm2-demo", "distilled"): (93_372_480, 134_515_008, 0.093, None, None),
}
#: tokens in thousands of millions, global batch, length, peak and least learning rate, warm-up
SCHEDULES = {
    "llama-31-minitron-4b-width": (94, 1152, 8192, 1e-4, 1e-5, 40),
    "llama-31-minitron-4b-depth": (94, 1152, 8192, 1e-4, 1e-5, 40),
    "mistral-nemo-minitron-8b": (380, 768, 8192, 1e-4, 4.5e-7, 60),
    "minitron-8b-4b": (94, 1152, 4096, 2e-4, 4.5e-7, 40),
}


def trainings(name: str):
    return {one.name: one for one in trainings_of(read_subject(name, []))[0]}


def test_every_recipe_is_here():
    assert {name for name, _ in PUBLISHED} == set(recipe_names())


@pytest.mark.parametrize(("name", "stage"), PUBLISHED)
def test_sizes(name, stage):
    student, teacher, printed, without_embeddings, flops = PUBLISHED[name, stage]
    training = trainings(name)[stage]
    assert training.teacher is not None
    assert (training.student.parameters, training.teacher.parameters) == (student, teacher)
    digits = 3 if printed < 1 else 1 if printed * 10 % 1 == 0 else 2
    assert round(student / 1e9, digits) == printed
    parts = training.student.parts()
    if without_embeddings is not None:
        # the papers count the output layer among the embeddings in 2407.14679 alone
        rest = student - parts["embedding"] - parts["output layer"]
        assert without_embeddings in (round(rest / 1e9, 1), round((student - parts["embedding"]) / 1e9, 1))
    if flops is not None:
        plain = 3 * ForwardFlops.of(training.student, training.sequence_length).total * training.tokens_per_step
        assert plain == pytest.approx(flops, rel=0.12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    tokens, batch, length, lr, min_lr, warmup = SCHEDULES[name]
    for stage in load_recipe(name).stages:
        assert stage.faults() == []
        if isinstance(stage, DistillConfig):
            assert stage.tokens == pytest.approx(tokens * 1e9, rel=1e-4)
            assert (stage.global_batch_size, stage.data.sequence_length) == (batch, length)
            assert (stage.lr, stage.min_lr, stage.warmup_steps) == (lr, min_lr, warmup)
            assert (stage.loss.kind, stage.loss.temperature, stage.loss.label_weight) == ("forward_kl", 1.0, 0.0)
            assert stage.intermediate.weights() == {}


def test_the_4b_is_cut_from_the_8b_and_taught_by_the_15b():
    stages = {stage.name: stage for stage in load_recipe("minitron-8b-4b").stages}
    assert stages["pruned-4b"].model == f"{stages['minitron-8b'].output}/model"
    assert stages["minitron-4b"].teacher == stages["minitron-8b"].teacher == stages["teacher"].output


@pytest.mark.parametrize("name", recipe_names())
def test_dry_run(name, tmp_path, monkeypatch):
    """Nothing but the teacher and the text is missing."""
    monkeypatch.chdir(tmp_path)
    out, faults = io.StringIO(), []
    try:
        show_plans(load_recipe(name).stages, Console(file=out, width=120), name)
    except ConfigError as error:
        faults = error.faults
    assert [fault for fault in faults if "does not exist" not in fault and "data/*.jsonl" not in fault] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", recipe_names())
def test_nemo_run(name):
    """The partials build what the recipe's stages say, and can be changed."""
    import fiddle as fdl
    from nemo_minitron.recipes.published import partials

    recipe = load_recipe(name)
    stages = {stage.name: stage for stage in recipe.stages if isinstance(stage, DistillConfig)}
    found = partials(recipe)
    assert found.keys() == stages.keys()
    for key, stage in stages.items():
        partial = found[key]
        partial.schedule.lr = 1.0
        built = {part: fdl.build(getattr(partial, part)) for part in ("schedule", "data", "parallel", "loss")}
        assert built["schedule"].lr == 1.0
        assert (built["schedule"].steps, partial.seed) == (stage.steps, stage.runtime.seed)
        assert (built["data"], built["parallel"], built["loss"]) == (stage.data, stage.parallel, stage.loss)
        assert (partial.student, partial.teacher, partial.output) == (stage.student, stage.teacher, stage.output)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["logits=chunks", "quantize=int4", "group_size=64"], ("quantize", "group_size")),
        (["on_policy.share=0.5", "on_policy.prompts.texts=[Why]", "on_policy.sampling.greedy=true"], ("on_policy",)),
        (
            [
                "teacher=null",
                "teachers=[{name: a, model: a, weight: 2}, {name: b, model: b, placement: own_layout, "
                "parallel: {tensor: 8, data: 32}}]",
            ],
            ("teachers",),
        ),
        (["teacher_placement=own_ranks", "teacher_parallel.tensor=8"], ("teacher_placement", "teacher_parallel")),
        (["teacher=null", "teacher_cache=logits"], ("teacher_cache",)),
    ],
)
def test_nemo_run_with_further_settings(overrides, parts):
    """The partials have what the recipe's distillation is changed to."""
    import dataclasses

    import fiddle as fdl
    from nemo_minitron.recipes.published import partials

    recipe = load_recipe("llama-31-minitron-4b-width")
    stages = read_subject(recipe.name, [f"stages.distilled.{override}" for override in overrides]).stages
    stage = next(one for one in stages if one.name == "distilled")
    built = fdl.build(partials(dataclasses.replace(recipe, stages=stages))["distilled"]).keywords
    assert [built[part] for part in parts] == [getattr(stage, part) for part in parts]
    default = DistillConfig()
    assert all(getattr(stage, part) != getattr(default, part) for part in parts)
    assert (built["schedule"].logits, built["teacher"]) == (stage.logits, stage.teacher)


@pytest.mark.slow
def test_every_rank_on_the_meta_device_and_the_export():
    """Megatron's own models, at the real layout, rank by rank; and transformers' from the exported configuration."""
    import torch
    import transformers

    from nemo_minitron.checkpoints.formats.huggingface.config import to_hf
    from nemo_minitron.checkpoints.live import canonical_parameters
    from nemo_minitron.runtime import cpu

    cpu.prepare()
    try:
        for (name, stage), (parameters, *_) in PUBLISHED.items():
            training = trainings(name)[stage]
            layout = training.layout
            cost = layout_cost(training, training.layout, "none", ClusterConfig())
            assert cost.fits, name
            per_stage = layout.tensor * layout.data
            # each tensor-parallel rank of each stage, of the first replica; and the last rank of the world
            ranks = [stage * per_stage + tensor for stage in range(layout.pipeline) for tensor in range(layout.tensor)]
            for rank in {*ranks, layout.world_size - 1}:
                with rank_of_world(layout, rank) as groups:
                    models = [training.student] + ([training.teacher] if rank in (0, layout.world_size - 1) else [])
                    for model in models:
                        chunks = meta_chunks(model, groups)
                        found = {n: tuple(p.shape) for chunk in chunks for n, p in canonical_parameters(chunk)}
                        expected = pipeline_stage_parameters(model, tensor=layout.tensor, pipeline=layout.pipeline)
                        assert found == expected[groups.pp_rank], (name, rank)
                        assert {p.device.type for chunk in chunks for p in chunk.parameters()} == {"meta"}
                        if model is training.student:
                            held = sum(p.numel() for chunk in chunks for p in chunk.parameters())
                            assert cost.ranks[groups.pp_rank].weights == held * training.bytes, (name, rank)

            written = to_hf(training.student.shape, training.student.architecture, dtype="bfloat16")
            config = transformers.AutoConfig.for_model(**written)
            with torch.device("meta"):
                exported = transformers.AutoModelForCausalLM.from_config(config)
            assert type(exported).__name__ == written["architectures"][0]
            assert exported.num_parameters() == parameters, name
    finally:
        cpu.deactivate()
