"""The checkpoint format of docs/extending.md, from a package outside: every place that asks the table of formats."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
import torch
from support.checkpoints import hf_logits, tiny_checkpoint, tokens
from support.extending import install_example

from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.formats import FORMATS
from nemo_minitron.config import ExportConfig, ImportConfig, PruneConfig
from nemo_minitron.errors import CheckpointError
from nemo_minitron.report.collect import StageRun
from nemo_minitron.stages import export, import_
from nemo_minitron.stages.shared.checkpoints import format_faults


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The package of the page: installed for new processes, registered in this one."""
    folder = tmp_path / "site-packages"
    install_example("A checkpoint format", folder)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.syspath_prepend(folder)
    entry = FORMATS.register(importlib.import_module("plain_format").PLAIN)
    yield entry
    FORMATS.unregister(entry.name)


def same_bits(one: Path, other: Path) -> None:
    first, second = open_checkpoint(one), open_checkpoint(other)
    assert (first.shape, first.architecture) == (second.shape, second.architecture)
    assert list(first.weights.names()) == list(second.weights.names())
    for name in first.weights.names():
        assert torch.equal(first.weights.tensor(name), second.weights.tensor(name)), name


def test_bits_survive_the_way_there_and_back(package, tmp_path):
    source = open_checkpoint(tiny_checkpoint(tmp_path / "model"))
    plain = write_checkpoint(source, tmp_path / "plain", "plain")
    assert (plain.format, plain.tokenizer) == ("plain", tmp_path / "plain")
    same_bits(tmp_path / "model", tmp_path / "plain")
    write_checkpoint(plain, tmp_path / "again", "hf")
    assert torch.equal(hf_logits(tmp_path / "again", tokens()), hf_logits(tmp_path / "model", tokens()))
    with pytest.raises(CheckpointError, match="plain exists"):
        write_checkpoint(source, tmp_path / "plain", "plain")


def test_messages_and_settings_name_it(package, tmp_path):
    source = open_checkpoint(tiny_checkpoint(tmp_path / "model"))
    with pytest.raises(CheckpointError, match="format 'onnx' is not known; use one of hf, nemo2, nemo, plain"):
        write_checkpoint(source, tmp_path / "out", "onnx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"a \.nemo file, a \.gguf file, or tensors\.safetensors \(plain\)"):
        open_checkpoint(tmp_path / "empty")
    here = {"output": str(tmp_path / "out")}
    assert ExportConfig(model="m", formats=["plain"], **here).faults() == []
    assert "gguf, plain" in ExportConfig(model="m", formats=["onnx"], **here).faults()[0]
    for fine in (ImportConfig(source="m", format="plain", **here), PruneConfig(model="m", format="plain", **here)):
        assert not [fault for fault in fine.faults() if "format" in fault]
    assert format_faults("out", "plain") == []
    assert "choose a name that does not end in .nemo" in format_faults("out.nemo", "plain")[0]


@pytest.mark.slow
def test_stages_export_import_and_verify_it(package, tmp_path):
    model = tiny_checkpoint(tmp_path / "model")
    exporting = ExportConfig(model=str(model), output=str(tmp_path / "out"), formats=["plain"])
    assert [path.path for path in export.plan(exporting).writes] == [str(tmp_path / "out" / "plain")]
    done = export.run(exporting)["formats"]["plain"]
    assert done["verification"]["relative"] < 1e-4  # read back by a process that finds the package installed
    (part,) = StageRun("export", "export", tmp_path / "out", 0, {}).parts()
    assert (part.name, part.kind) == ("plain", "Plain")
    import_.run(ImportConfig(source=done["path"], output=str(tmp_path / "back"), format="hf", verify=False))
    same_bits(model, tmp_path / "back")
