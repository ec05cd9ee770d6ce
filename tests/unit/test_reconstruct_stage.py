"""``minitron reconstruct`` on a tiny model: what it writes, going on after a kill, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.pruning import one_process
from support.text import write_jsonl

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.config import DataConfig, ParallelLayout, PruneConfig, ReconstructConfig, SourceConfig, TargetConfig
from nemo_minitron.errors import CheckpointError
from nemo_minitron.pruning import load_kept
from nemo_minitron.stages import prune, reconstruct
from nemo_minitron.stages.shared import streaming
from nemo_minitron.streamed import StreamedModel, Trail


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("reconstruct")
    tiny_checkpoint(home / "teacher")
    words = torch.randint(0, 125, (120, 30), generator=torch.Generator().manual_seed(0)).tolist()
    write_jsonl(home / "text.jsonl", [" ".join(f"w{number}" for number in row) for row in words])
    target = TargetConfig(ffn_hidden_size=60)
    prune.run(PruneConfig(model=str(home / "teacher"), output=str(home / "pruned"), method="random", target=target))
    with one_process():
        reconstruct.run(config(home, home / "reconstructed"))
    return home


def config(home, output, **changes):
    data = DataConfig(
        sources=[SourceConfig(name="text", path=str(home / "text.jsonl"))],
        sequence_length=16,
        calibration_fraction=0.6,
        cache_dir=str(home / "cache"),
    )
    settings = {
        "model": str(home / "pruned"),
        "teacher": str(home / "teacher"),
        "output": str(output),
        "data": data,
        "samples": 60,
        "micro_batch_size": 4,
    }
    return ReconstructConfig(**{**settings, **changes})


def tensors(path):
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.weights.tensor(name) for name in checkpoint.weights.names()}


def test_what_it_writes(home):
    content = json.loads((home / "reconstructed/reconstruction.json").read_text())
    assert [layer["teacher"] for layer in content["layers"]] == [0, 1, 2, None]
    names = [matrix["name"] for matrix in content["layers"][0]["matrices"]]
    assert "mlp.linear_fc2.weight" in names
    assert load_kept(home / "reconstructed/kept.json") == load_kept(home / "pruned/kept.json")
    lineage = open_checkpoint(home / "reconstructed").lineage
    assert (lineage["made_by"], lineage["parents"]["model"]["lineage"]["made_by"]) == ("reconstruct", "prune")
    assert not list(home.glob(".reconstructed*"))


def test_it_comes_closer_to_the_teacher(home):
    blocks = torch.randint(6, 131, (8, 17), generator=torch.Generator().manual_seed(9))

    def logits(path):
        from support.pruning import live
        from support.pruning import logits as logits_of

        with one_process() as groups:
            return logits_of(live(open_checkpoint(path), groups), blocks[:, :-1])[..., :131].log_softmax(-1)

    teacher, pruned, refitted = (logits(home / name) for name in ("teacher", "pruned", "reconstructed"))
    divergence = [(teacher.exp() * (teacher - other)).sum(-1).mean() for other in (pruned, refitted)]
    assert divergence[1] < 0.9 * divergence[0]


def test_a_killed_run_goes_on_at_its_layer(home, tmp_path, monkeypatch):
    monkeypatch.setattr(
        streaming, "trail", lambda config, groups, subject: Trail(streaming.scratch(config), subject, groups, every=0)
    )
    monkeypatch.setattr(reconstruct, "trail", streaming.trail)

    class Stopped(Exception):
        pass

    layer, loaded = StreamedModel.layer, []

    def watched(self, index):
        loaded.append((self.shape.ffn_hidden_size, index))
        if stop and loaded[-1] == (60, 2):
            raise Stopped
        return layer(self, index)

    monkeypatch.setattr(StreamedModel, "layer", watched)
    with one_process():
        stop = True
        with pytest.raises(Stopped):
            reconstruct.run(config(home, tmp_path / "again"))
        loaded.clear()
        stop = False
        reconstruct.run(config(home, tmp_path / "again"))
    assert loaded == [(76, 2), (60, 2)]
    expected = tensors(home / "reconstructed")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(tmp_path / "again").items())
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_a_model_that_was_not_cut_from_the_teacher(home, tmp_path):
    tiny_checkpoint(tmp_path / "other", seed=5)
    with one_process(), pytest.raises(CheckpointError, match="is not what pruning leaves of .*other"):
        reconstruct.run(config(home, tmp_path / "out", teacher=str(tmp_path / "other")))


def test_kept_units_of_another_model(home, tmp_path):
    tiny_checkpoint(tmp_path / "wide", intermediate_size=50)
    with one_process(), pytest.raises(CheckpointError, match="was not cut from .*wide"):
        reconstruct.run(config(home, tmp_path / "out", teacher=str(tmp_path / "wide")))


def test_a_model_without_kept_units(home, tmp_path):
    shutil.copytree(home / "pruned", tmp_path / "pruned")
    (tmp_path / "pruned/kept.json").unlink()
    with one_process(), pytest.raises(CheckpointError, match="kept"):
        reconstruct.run(config(home, tmp_path / "out", model=str(tmp_path / "pruned")))


def test_plan(home, tmp_path):
    plan = reconstruct.plan(config(home, tmp_path / "out"))
    assert not plan.faults
    assert plan.costs["calibration"] == "960 tokens in 60 samples"
    assert plan.makes[str(tmp_path / "out")] is not None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"samples": 4}, "samples=4: every 5th sample is held out"),
        ({"parallel": ParallelLayout(tensor=2)}, "parallel.tensor=2: a layer at a time"),
        ({"states_memory": "lots"}, "states_memory=lots"),
        ({"format": "onnx"}, "format=onnx"),
    ],
)
def test_refused_settings(changes, named):
    (fault,) = ReconstructConfig(**{"model": "m", "teacher": "t", "output": "o", **changes}).faults()
    assert fault.startswith(named)
