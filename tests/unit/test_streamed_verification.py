"""Conversions checked a layer at a time: the live verdicts, faults are caught, and a layer is all that is in memory."""

from __future__ import annotations

import dataclasses
import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import tiny_checkpoint, tokens
from support.families import CLASSES, family_model, windowed_model
from support.memory import StorageWatch
from support.pruning import one_process

from nemo_minitron.checkpoints import open_checkpoint, verify, write_checkpoint
from nemo_minitron.checkpoints.formats.huggingface.loader import hf_logits, hf_logits_streamed
from nemo_minitron.checkpoints.verification import compare
from nemo_minitron.config import ExportConfig, ImportConfig
from nemo_minitron.errors import CheckpointError
from nemo_minitron.stages import export, import_
from nemo_minitron.stages.shared import checkpoints
from nemo_minitron.streamed import loaders


@pytest.fixture(scope="module")
def groups():
    with one_process() as given:
        yield given


@pytest.fixture
def here(groups, monkeypatch):
    """The streamed loaders run in this process; the list is of those that ran."""
    ran = []

    def run(kind, args, environment, log, timeout, streamed):
        assert streamed
        ran.append(kind)
        log.touch()
        loaders.main(*args)
        return 0

    monkeypatch.setattr(compare, "_run", run)
    monkeypatch.setattr(loaders, "end_with_launcher", lambda clear: None)
    return ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", [*sorted(CLASSES), "windowed"])
def test_transformers_layers_compute_what_its_model_does(tmp_path, family, dtype):
    path = windowed_model(tmp_path / "m") if family == "windowed" else family_model(family, tmp_path / "m")
    with torch.no_grad():
        expected = hf_logits(path, tokens(), dtype)
        assert torch.equal(hf_logits_streamed(path, tokens(), dtype), expected)


def test_one_part_is_filled_at_a_time(tmp_path):
    path = tiny_checkpoint(tmp_path / "m", num_hidden_layers=5)
    with StorageWatch([]) as watch, torch.no_grad():
        hf_logits_streamed(path, tokens(rows=1, length=2), torch.float32)
    sizes = {name: tensor.nbytes for name, tensor in load_file(path / "model.safetensors").items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.1."))
    largest = max(layer, sizes["lm_head.weight"])
    assert watch.peak < 2 * largest < sum(sizes.values()) / 2


def test_a_tensor_that_is_missing_or_of_another_size(tmp_path):
    path = tiny_checkpoint(tmp_path / "m")
    stored = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**stored, name: stored[name][:-1].contiguous()}, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"), torch.no_grad():
        hf_logits_streamed(path, tokens(), torch.float32)
    del stored[name]
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing, such as model\.layers\.1\.mlp\.up_proj"), torch.no_grad():
        hf_logits_streamed(path, tokens(), torch.float32)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_direction(here, tmp_path, tied):
    source = open_checkpoint(tiny_checkpoint(tmp_path / "hf", tied=tied))
    steps = {"nemo2": tmp_path / "nemo2", "nemo": tmp_path / "model.nemo", "hf": tmp_path / "again"}
    for form, path in steps.items():
        target = write_checkpoint(source, path, form)
        result = verify(source, target, streamed=True)
        assert result.relative < 1e-4
        assert result.same_choice == 1.0
        assert result.loader == form
        source = target
    assert here == ["hf", "nemo2", "megatron", "nemo", "megatron", "hf"]


@pytest.mark.parametrize("form", ["hf", "nemo2"])
def test_a_fault_in_a_layer_is_caught(here, tmp_path, form):
    source = open_checkpoint(tiny_checkpoint(tmp_path / "hf"))

    class Faulty:
        def __getattr__(self, name):
            return getattr(source.weights, name)

        def tensor(self, name):
            tensor = source.weights.tensor(name)
            return tensor.flip(0) if name == "decoder.layers.1.mlp.linear_fc2.weight" else tensor

    target = write_checkpoint(dataclasses.replace(source, weights=Faulty()), tmp_path / "out", form)
    with pytest.raises(CheckpointError, match=r"out does not compute what .*hf does: logits differ by") as caught:
        verify(source, target, streamed=True)
    assert "do not use it, and report the conversion" in str(caught.value)


def test_a_narrower_type_rounds_the_source_first(here, tmp_path):
    source = open_checkpoint(tiny_checkpoint(tmp_path / "hf"))
    target = write_checkpoint(source, tmp_path / "narrow", "nemo2", dtype="bfloat16")
    result = verify(source, target, streamed=True)
    assert (result.dtype, result.relative < 1e-4) == ("bfloat16", True)


@pytest.mark.parametrize(("free", "expected"), [(10**5, True), (10**12, False)])
def test_auto_goes_by_the_free_memory(tmp_path, monkeypatch, free, expected):
    asked = []

    def seen(source, target, **options):
        asked.append(options.get("streamed", False))
        raise CheckpointError("enough")

    monkeypatch.setattr(checkpoints, "host_memory", lambda: (10**13, free))
    monkeypatch.setattr("nemo_minitron.checkpoints.verify", seen, raising=False)
    path = str(tiny_checkpoint(tmp_path / "hf"))
    for memory in ("auto", "live", "streamed"):
        for run in (
            lambda memory=memory: import_.run(
                ImportConfig(source=path, output=str(tmp_path / "in"), format="hf", memory=memory)
            ),
            lambda memory=memory: export.run(
                ExportConfig(model=path, output=str(tmp_path / "out"), formats=["hf"], memory=memory)
            ),
        ):
            with pytest.raises(CheckpointError, match="enough"):
                run()
    assert asked == [expected] * 2 + [False] * 2 + [True] * 2


def test_a_loader_that_fails_is_said(tmp_path, monkeypatch):
    source = open_checkpoint(tiny_checkpoint(tmp_path / "hf"))
    seen = []

    def run(command, **options):
        seen.append(command[2])
        options["stdout"].write(b"something\nMemoryError\n")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(compare, "reachable_pool", lambda: None)
    monkeypatch.setattr(compare.subprocess, "run", run)
    with pytest.raises(CheckpointError, match=r"could not be loaded by the hf loader \(exit code 1\): MemoryError"):
        verify(source, source, streamed=True)
    assert seen == ["nemo_minitron.streamed.loaders"]


def test_unknown_words_for_memory(tmp_path):
    for config in (
        ImportConfig(source="m", output="o", memory="all"),
        ExportConfig(model="m", output="o", memory="all"),
    ):
        assert config.faults() == ["memory=all: must be one of auto, live, streamed"]


@pytest.mark.slow
def test_the_stage_checks_in_processes_of_their_own(tmp_path):
    path = tiny_checkpoint(tmp_path / "hf")
    config = ImportConfig(source=str(path), output=str(tmp_path / "nemo2"), memory="streamed")
    live = ImportConfig(source=str(path), output=str(tmp_path / "other"), memory="live")
    found, expected = (import_.run(one)["verification"] for one in (config, live))
    assert found["loader"] == expected["loader"] == "nemo2"
    assert found["scale"] == pytest.approx(expected["scale"], rel=1e-5)
    assert found["relative"] < 1e-4
    assert json.dumps(found)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hf", "nemo2", "other"]
