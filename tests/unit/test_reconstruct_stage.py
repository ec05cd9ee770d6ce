"""``minitron reconstruct`` on a tiny model: what it writes, going on after a kill, and what it refuses."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from support.checkpoints import tiny_checkpoint
from support.distributed import run_distributed
from support.pruning import DictWeights, live, one_process, random_checkpoint
from support.text import write_jsonl

from nemo_minitron.axes import KeptUnits
from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.config import (
    BlockConfig,
    DataConfig,
    ParallelLayout,
    PruneConfig,
    ReconstructConfig,
    SourceConfig,
    TargetConfig,
)
from nemo_minitron.data import build_blocks
from nemo_minitron.errors import CheckpointError, DataError, NonFiniteError
from nemo_minitron.evaluation import held_out_loss
from nemo_minitron.pruning import load_kept, prune_weights
from nemo_minitron.reconstruction import RefittedLayers
from nemo_minitron.reconstruction import reconstruct as reconstruct_model
from nemo_minitron.stages import prune, reconstruct
from nemo_minitron.stages.shared import streaming
from nemo_minitron.streamed import StreamedModel, Trail


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("reconstruct")
    tiny_checkpoint(home / "teacher")
    words = torch.randint(0, 125, (140, 30), generator=torch.Generator().manual_seed(0)).tolist()
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
            reconstruct.run(config(home, tmp_path / "again", held_out_samples=0))
        loaded.clear()
        stop = False
        reconstruct.run(config(home, tmp_path / "again", held_out_samples=0))
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


def outside(home):
    words = torch.randint(60, 125, (120, 30), generator=torch.Generator().manual_seed(2)).tolist()
    write_jsonl(home / "other.jsonl", [" ".join(f"w{number}" for number in row) for row in words])
    return [SourceConfig(name="other", path=str(home / "other.jsonl"))]


def test_losses_before_and_after_by_source(home, tmp_path):
    content = json.loads((home / "reconstructed/reconstruction.json").read_text())
    assert list(content["losses"]) == ["text"]
    with one_process():
        metrics = reconstruct.run(config(home, tmp_path / "out", outside=outside(home), held_out_samples=6))
    content = json.loads((tmp_path / "out/reconstruction.json").read_text())
    assert content["losses"] == metrics["losses"]
    assert {name: (part["outside"], part["blocks"]) for name, part in content["losses"].items()} == {
        "text": (False, 6),
        "other": (True, 6),
    }
    with one_process() as groups:
        for name, path in (("teacher", "teacher"), ("pruned", "pruned"), ("reconstructed", "reconstructed")):
            checkpoint = open_checkpoint(home / path)
            blocks = build_blocks(config(home, "").data, checkpoint.tokenizer, "held_out", blocks=6)
            live_model = live(checkpoint, groups, dtype=torch.float32)
            expected = held_out_loss(live_model, groups, blocks, 2, vocab_size=checkpoint.shape.vocab_size)
            assert content["losses"]["text"][name] == pytest.approx(expected.overall.loss, abs=1e-5)


def test_nothing_is_measured_without_samples(home, tmp_path):
    with one_process():
        assert reconstruct.run(config(home, tmp_path / "out", held_out_samples=0))["losses"] == {}


def test_text_outside_has_a_name_of_its_own(home, tmp_path):
    (source,) = outside(home)
    with one_process(), pytest.raises(DataError, match="outside: 'text' is the name of a source of data too"):
        reconstruct.run(config(home, tmp_path / "out", outside=[dataclasses.replace(source, name="text")]))


def test_gradient_steps_follow_if_asked_for(home, tmp_path):
    with one_process():
        block = BlockConfig(steps=16, learning_rate=3e-4)
        metrics = reconstruct.run(config(home, tmp_path / "out", method="block", block=block))
    content = json.loads((tmp_path / "out/reconstruction.json").read_text())
    reports = [layer["block"] for layer in content["layers"]]
    assert reports[-1] is None
    assert metrics["trained"] == sum(report["steps"] > 0 for report in reports[:-1]) > 0
    assert open_checkpoint(tmp_path / "out").lineage["method"] == "block"
    assert (
        content["layers"][-2]["error"]
        < json.loads((home / "reconstructed/reconstruction.json").read_text())["layers"][-2]["error"]
    )


BLOCK = BlockConfig(steps=4, learning_rate=1e-3)


def killed(folder, layer):
    """Reconstruct, and be killed as a layer of the pruned model is asked for; None for no kill."""
    whole = StreamedModel.layer

    def watched(self, index):
        if (self.shape.ffn_hidden_size, index) == (60, layer):
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, index)

    StreamedModel.layer = watched
    reconstruct.trail = lambda config, groups, subject: Trail(streaming.scratch(config), subject, groups, every=0)
    home = Path(folder)
    reconstruct.run(config(home, home / "killed", method="block", block=BLOCK, states_memory="1KiB"))


@pytest.mark.slow
def test_a_process_that_is_killed_twice_ends_with_the_same_model(home, tmp_path):
    for layer in (1, 2):
        with pytest.raises(AssertionError, match="exit -9"):
            run_distributed(killed, 1, tmp_path, folder=str(home), layer=layer)
        assert (home / ".killed.pass").is_dir()
    run_distributed(killed, 1, tmp_path, folder=str(home), layer=None)
    with one_process():
        reconstruct.run(config(home, tmp_path / "whole", method="block", block=BLOCK))
    expected = tensors(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(home / "killed").items())
    assert not (home / ".killed.pass").exists()


def test_a_full_disk_as_states_are_spilled(home, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with one_process(), pytest.raises(OSError, match="No space left on device"):
        reconstruct.run(config(home, tmp_path / "out", states_memory="1KiB"))
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    with one_process():
        reconstruct.run(config(home, tmp_path / "out", states_memory="1KiB"))
    expected = tensors(home / "reconstructed")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(tmp_path / "out").items())


def test_a_disk_that_fills_up_as_a_layer_is_saved(home, tmp_path, monkeypatch):
    """The layers before are there when there is space again."""
    save, layer, loaded = RefittedLayers.save, StreamedModel.layer, []
    monkeypatch.setattr(
        reconstruct, "trail", lambda config, groups, subject: Trail(streaming.scratch(config), subject, groups, every=0)
    )

    def full(self, number, *args):
        if number == 1 and not loaded:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, number, *args)

    def watched(self, index):
        loaded.append(index)
        return layer(self, index)

    monkeypatch.setattr(RefittedLayers, "save", full)
    with one_process(), pytest.raises(OSError, match="No space left on device"):
        reconstruct.run(config(home, tmp_path / "out"))
    monkeypatch.setattr(StreamedModel, "layer", watched)
    loaded.append(-1)
    with one_process():
        reconstruct.run(config(home, tmp_path / "out", held_out_samples=0))
    assert loaded == [-1, 1, 1, 2, 2]
    expected = tensors(home / "reconstructed")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(tmp_path / "out").items())


@pytest.mark.parametrize(
    ("name", "whose", "module"),
    [
        ("mlp.linear_fc2.weight", "teacher", "mlp"),
        ("self_attention.linear_proj.weight", "teacher", "self_attention"),
    ],
)
def test_values_that_are_not_finite_are_named(name, whose, module):
    def broken(tensors):
        tensors[f"decoder.layers.1.{name}"][0, 0] = float("inf")

    teacher = random_checkpoint(change=broken)
    kept = dataclasses.replace(KeptUnits.everything(teacher.shape), ffn=(tuple(range(20)),) * teacher.shape.num_layers)
    with (
        one_process() as groups,
        pytest.raises(NonFiniteError, match=rf"decoder\.layers\.1 of the {whose}: {module} is"),
    ):
        refit(teacher, kept, groups)


def test_an_input_of_the_pruned_model_that_is_not_finite_is_named():
    teacher = random_checkpoint()
    kept = KeptUnits.everything(teacher.shape)
    pruned = prune_weights(teacher, kept)
    stored = {name: pruned.weights.tensor(name) for name in pruned.weights.names()}
    stored["decoder.layers.1.self_attention.linear_qkv.weight"] = stored[
        "decoder.layers.1.self_attention.linear_qkv.weight"
    ] * float("nan")
    broken = dataclasses.replace(pruned, weights=DictWeights(stored))
    with (
        one_process() as groups,
        pytest.raises(NonFiniteError, match=r"decoder\.layers\.1 of the pruned model: .*linear_proj"),
    ):
        refit(teacher, kept, groups, broken)


def refit(teacher, kept, groups, pruned=None):
    blocks = torch.randint(0, 60, (10, 13), generator=torch.Generator().manual_seed(1))
    student = StreamedModel(pruned or prune_weights(teacher, kept), groups)
    return reconstruct_model(StreamedModel(teacher, groups), student, kept, blocks, sink=lambda *_: None)


def test_too_few_tokens_for_the_columns_are_said(home, tmp_path, caplog):
    with one_process():
        reconstruct.run(config(home, tmp_path / "out", samples=5, held_out_samples=0))
    assert "fewer calibration tokens than columns of self_attention.linear_proj.weight" in caplog.text
    for layer in json.loads((tmp_path / "out/reconstruction.json").read_text())["layers"]:
        assert all(matrix["ridge"] is None or matrix["ridge"] >= 0.1 for matrix in layer["matrices"] if matrix["short"])


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
        ({"method": "magic"}, "method=magic: must be one of least_squares, block"),
        ({"held_out_samples": 0, "outside": [SourceConfig("a", path="a.txt")]}, "outside: nothing is measured"),
    ],
)
def test_refused_settings(changes, named):
    (fault,) = ReconstructConfig(**{"model": "m", "teacher": "t", "output": "o", **changes}).faults()
    assert fault.startswith(named)
