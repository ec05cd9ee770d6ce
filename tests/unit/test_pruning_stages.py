"""The stages import, score, prune and export on a tiny model, called as the worker calls them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from support.checkpoints import hf_logits, tiny_checkpoint, tokens
from support.pruning import one_process
from support.text import write_jsonl

from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.config import (
    AggregationConfig,
    DataConfig,
    ExportConfig,
    ImportConfig,
    PruneConfig,
    ScoreConfig,
    SourceConfig,
    TargetConfig,
)
from nemo_minitron.errors import CheckpointError, ConfigError, DataError, ShapeError
from nemo_minitron.pruning import load_kept
from nemo_minitron.pruning.kept import kept_path
from nemo_minitron.stages import export, import_, prune, score
from nemo_minitron.stages.shared.checkpoints import format_faults


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, text for it, and its scores."""
    home = tmp_path_factory.mktemp("stages")
    tiny_checkpoint(home / "model")
    words = torch.randint(0, 125, (60, 30), generator=torch.Generator().manual_seed(0)).tolist()
    write_jsonl(home / "text.jsonl", [" ".join(f"w{number}" for number in row) for row in words])
    with one_process():
        score.run(score_config(home, home / "scores"))
    return home


def score_config(home, output, **changes):
    data = DataConfig(
        sources=[SourceConfig(name="text", path=str(home / "text.jsonl"))],
        sequence_length=16,
        calibration_fraction=0.3,
        cache_dir=str(home / "cache"),
    )
    settings = {"model": str(home / "model"), "output": str(output), "data": data, "samples": 8, "micro_batch_size": 3}
    return ScoreConfig(**{**settings, **changes})


def prune_config(home, output, **changes):
    settings = {
        "model": str(home / "model"),
        "scores": str(home / "scores"),
        "output": str(output),
        "format": "hf",
        "target": TargetConfig(ffn_hidden_size=40, num_query_groups=1, num_layers=2),
    }
    return PruneConfig(**{**settings, **changes})


def test_score_writes_what_the_record_says(home):
    files = {path.name for path in (home / "scores").iterdir()}
    assert {"scores.json", "scores.safetensors"} <= files
    meta = json.loads((home / "scores" / "scores.json").read_text())
    assert (meta["samples"], meta["tokens"], meta["sequence"], meta["batch"]) == (8, 128, "mean", "l2")


def test_other_estimators_and_criteria_prune_too(home, tmp_path):
    """A pass with several criteria leaves a score directory for each; weights need neither text nor a live model."""
    also = [AggregationConfig("l2", "max"), AggregationConfig("variance", "mean")]
    with one_process():
        many = score.run(score_config(home, tmp_path / "many", also=also))
        taylor = score.run(score_config(home, tmp_path / "taylor", estimator="taylor"))
    assert many["criteria"] == ["mean-l2", "l2-max", "variance-mean"]
    assert (taylor["estimator"], taylor["criteria"]) == ("taylor", ["sum-l2"])
    config = score_config(home, tmp_path / "magnitude", estimator="magnitude", data=DataConfig())
    assert score.plan(config).reads[0].path == str(home / "model")
    assert len(score.plan(config).reads) == 1
    assert score.run(config)["estimator"] == "magnitude"
    kept = {}
    for name in ("many", "many/criteria/l2-max", "many/criteria/variance-mean", "taylor", "magnitude"):
        output = tmp_path / "pruned" / name.replace("/", "-")
        method = name if name in ("taylor", "magnitude") else "activation"
        prune.run(prune_config(home, output, scores=str(tmp_path / name), method=method))
        kept[name] = load_kept(output / "kept.json")[0]
    assert len({units.ffn for units in kept.values()}) == 5
    expected = prune.run(prune_config(home, tmp_path / "expected"))
    assert load_kept(tmp_path / "expected" / "kept.json")[0] == kept["many"]
    assert expected["shape"]["ffn_hidden_size"] == 40


def test_a_plan_counts_the_work_of_losses_after_reconstruction(home, tmp_path):
    model = open_checkpoint(home / "model")
    write_checkpoint(model, tmp_path / "model", "nemo2")  # whose record a plan reads
    flops = [
        score.plan(score_config(home, tmp_path / "scores", model=str(tmp_path / "model"), estimator=name)).flops
        for name in ("activation", "reconstruction")
    ]
    neurons, heads = model.shape.ffn_hidden_size, model.shape.num_attention_heads * model.shape.head_dim
    products = 2 * 8 * 16 * (neurons**2 + heads**2)  # 8 samples of 16 tokens
    work = model.shape.num_layers * (products + 3 * neurons**3 + 6 * heads**3)
    assert flops[1] - flops[0] == pytest.approx(2 * work, rel=1e-9)


def test_score_without_enough_text(home, tmp_path):
    with one_process(), pytest.raises(DataError, match="blocks of the calibration split were asked for"):
        score.run(score_config(home, tmp_path / "scores", samples=10_000))
    assert not (tmp_path / "scores").exists()


def test_prune_then_transformers_opens_it(home, tmp_path):
    metrics = prune.run(prune_config(home, tmp_path / "pruned"))
    assert metrics["shape"]["ffn_hidden_size"] == 40
    assert metrics["shape"]["num_attention_heads"] == 3
    assert metrics["parameters"] < metrics["parameters_before"]
    assert torch.isfinite(hf_logits(tmp_path / "pruned", tokens())).all()
    kept, shape = load_kept(tmp_path / "pruned" / "kept.json")
    assert shape == open_checkpoint(home / "model").shape
    pruned = open_checkpoint(tmp_path / "pruned")
    assert kept.target(shape) == pruned.shape
    assert pruned.lineage["scores"] == str(home / "scores")
    assert pruned.lineage["parents"]["model"]["path"] == str(home / "model")


def test_keeping_everything_changes_no_logit(home, tmp_path):
    prune.run(prune_config(home, tmp_path / "same", target=TargetConfig(ffn_hidden_size=76)))
    assert torch.equal(hf_logits(tmp_path / "same", tokens()), hf_logits(home / "model", tokens()))


def test_pruned_heads_are_merged_where_asked(home, tmp_path):
    target = TargetConfig(num_attention_heads=4)
    for name, merge in (("plain", False), ("merged", True)):
        prune.run(prune_config(home, tmp_path / name, target=target, merge_pruned_heads=merge))
    plain, merged = (open_checkpoint(tmp_path / name) for name in ("plain", "merged"))
    assert (plain.lineage["merge_pruned_heads"], merged.lineage["merge_pruned_heads"]) == (False, True)
    different = [
        name
        for name in plain.weights.names()
        if not torch.equal(plain.weights.tensor(name), merged.weights.tensor(name))
    ]
    assert different == [f"decoder.layers.{layer}.self_attention.linear_qkv.weight" for layer in range(3)]
    for change in ({"method": "random"}, {"scores": None}):
        faults = prune_config(home, tmp_path / "none", merge_pruned_heads=True, **change).faults()
        assert any("merge_pruned_heads: needs scores" in fault for fault in faults)


def test_random_is_of_the_same_shape_and_other_units(home, tmp_path):
    scored = prune.run(prune_config(home, tmp_path / "scored"))
    random = prune.run(prune_config(home, tmp_path / "random", method="random", scores=None))
    assert random["shape"] == scored["shape"]
    one, other = (load_kept(tmp_path / name / "kept.json")[0] for name in ("scored", "random"))
    assert one.ffn != other.ffn


def test_scores_of_other_weights_are_refused(home, tmp_path):
    tiny_checkpoint(tmp_path / "other", seed=7)
    with pytest.raises(CheckpointError, match="other weights"):
        prune.run(prune_config(home, tmp_path / "pruned", model=str(tmp_path / "other")))
    tiny_checkpoint(tmp_path / "wider", hidden_size=60)
    with pytest.raises(ShapeError, match="hidden_size: 48 in"):
        prune.run(prune_config(home, tmp_path / "pruned", model=str(tmp_path / "wider")))
    assert not (tmp_path / "pruned").exists()


def test_a_failed_prune_leaves_the_earlier_output(home, tmp_path, monkeypatch):
    prune.run(prune_config(home, tmp_path / "pruned"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "pruned").iterdir() if path.is_file()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nemo_minitron.pruning.save_kept", full, raising=False)
    with pytest.raises(CheckpointError, match="no space left"):
        prune.run(prune_config(home, tmp_path / "pruned", overwrite=True))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "pruned").iterdir() if path.is_file()}
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


def test_an_existing_output_needs_overwrite(home, tmp_path):
    prune.run(prune_config(home, tmp_path / "pruned"))
    with pytest.raises(CheckpointError, match="exists"):
        prune.run(prune_config(home, tmp_path / "pruned"))
    prune.run(prune_config(home, tmp_path / "pruned", overwrite=True))


def test_plans(home, tmp_path):
    prune.run(prune_config(home, tmp_path / "pruned"))  # what we write states its shape to the plans
    model = str(tmp_path / "pruned")
    found = prune.plan(prune_config(home, tmp_path / "again", model=model, target=TargetConfig(ffn_hidden_size=20)))
    assert not found.faults
    assert "->" in found.costs["parameters"]
    sizes = TargetConfig(num_layers=9, ffn_hidden_size=99)
    assert len(prune.plan(prune_config(home, tmp_path / "again", model=model, target=sizes)).faults) == 2
    config = score_config(home, tmp_path / "s", model=model)
    assert not score.plan(config).faults
    parallel = dataclasses.replace(config.parallel, tensor=2)
    faults = score.plan(dataclasses.replace(config, parallel=parallel)).faults
    assert any("num_attention_heads=3" in fault for fault in faults)
    assert import_.plan(ImportConfig(package="nothing", output=str(tmp_path / "x"))).faults
    planned = export.plan(ExportConfig(model=model, output=str(tmp_path / "e"), formats=["hf", "nemo"]))
    assert [item.path.rsplit("/", 1)[1] for item in planned.writes] == ["hf", "model.nemo"]


@pytest.mark.parametrize(("output", "form"), [("model", "nemo"), ("model.nemo", "hf"), ("model.nemo", "nemo2")])
def test_name_and_format_must_agree(home, tmp_path, output, form):
    assert format_faults(output, form)
    with pytest.raises(ConfigError, match="output="):
        prune.run(prune_config(home, tmp_path / output, format=form))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_import_and_export_verify(home, tmp_path):
    imported = import_.run(ImportConfig(source=str(home / "model"), output=str(tmp_path / "taken"), format="hf"))
    assert imported["verification"]["relative"] < 1e-4
    assert open_checkpoint(tmp_path / "taken").lineage["source"] == str(home / "model")
    found = export.run(ExportConfig(model=str(tmp_path / "taken"), output=str(tmp_path / "out"), formats=["hf"]))
    assert found["formats"]["hf"]["verification"]["relative"] < 1e-4
    assert torch.equal(hf_logits(tmp_path / "out" / "hf", tokens()), hf_logits(home / "model", tokens()))


def test_a_conversion_that_fails_its_check_never_stands_there(home, tmp_path, monkeypatch):
    def wrong(source, target, **options):
        raise CheckpointError("logits differ")

    monkeypatch.setattr("nemo_minitron.checkpoints.verify", wrong, raising=False)
    with pytest.raises(CheckpointError, match="logits differ"):
        import_.run(ImportConfig(source=str(home / "model"), output=str(tmp_path / "taken"), format="hf"))
    with pytest.raises(CheckpointError, match="logits differ"):
        export.run(ExportConfig(model=str(home / "model"), output=str(tmp_path / "out"), formats=["hf"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_prune_to_nemo_file_and_directory(home, tmp_path):
    """The pruned shape (3 heads, head_dim x heads != hidden) goes through both NeMo formats, kept units with it."""
    expected = prune.run(prune_config(home, tmp_path / "hf"))
    for name, form in (("nemo2", "nemo2"), ("model.nemo", "nemo")):
        prune.run(prune_config(home, tmp_path / name, format=form))
        pruned = open_checkpoint(tmp_path / name)
        assert pruned.shape.to_dict() == expected["shape"]
        same = open_checkpoint(tmp_path / "hf")
        for tensor in pruned.weights.names():
            assert torch.equal(pruned.weights.tensor(tensor), same.weights.tensor(tensor)), tensor
        assert load_kept(kept_path(tmp_path / name)) == load_kept(tmp_path / "hf" / "kept.json")
