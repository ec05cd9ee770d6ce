"""Fingerprints cover every tensor from hashes that are taken at writing, and agree with those of earlier releases."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from support.checkpoints import tiny_checkpoint
from support.pruning import DictWeights

from nemo_minitron.checkpoints import Checkpoint, open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.fingerprint import model_fingerprint, same_fingerprint
from nemo_minitron.errors import CheckpointError
from nemo_minitron.importance import fingerprint
from nemo_minitron.importance.subject import check_subject

#: In a layer that is neither first nor last, and no vector.
MIDDLE = "decoder.layers.1.mlp.linear_fc2.weight"


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    """Of another program: without a model record."""
    return open_checkpoint(tiny_checkpoint(tmp_path / "hf", num_hidden_layers=3))


def changed(checkpoint: Checkpoint) -> Checkpoint:
    tensors = {name: checkpoint.weights.tensor(name).clone() for name in checkpoint.weights.names()}
    tensors[MIDDLE][0, 0] += 1
    return dataclasses.replace(checkpoint, weights=DictWeights(tensors))


@pytest.mark.parametrize("of", [model_fingerprint, fingerprint])
def test_every_tensor_counts_in_every_format(source, tmp_path, of):
    before = of(source)
    assert "-" not in before
    written = {form: write_checkpoint(source, tmp_path / f"as.{form}", form) for form in ("hf", "nemo")}
    other = write_checkpoint(changed(source), tmp_path / "other", "hf")
    one, same = of(written["hf"]), of(written["nemo"])
    assert one == same
    assert one.startswith(f"{before}-float32-")
    assert of(other).startswith(f"{before}-float32-")  # which did not tell them apart
    assert not same_fingerprint(one, of(other))
    # of an earlier release, or of another program
    assert same_fingerprint(before, one) and same_fingerprint(one, before)
    assert of(changed(written["hf"])) == before  # what wraps the weights has no hash of all


def test_records_of_earlier_releases(source, tmp_path):
    written = write_checkpoint(source, tmp_path / "out", "hf")
    record = tmp_path / "out" / "minitron.json"
    content = json.loads(record.read_text())
    assert content.pop("weights") == model_fingerprint(written).partition("-")[2]
    record.write_text(json.dumps(content))
    assert model_fingerprint(open_checkpoint(tmp_path / "out")) == model_fingerprint(source)


def test_a_cast_model_has_its_own_hash(source, tmp_path):
    half = write_checkpoint(source, tmp_path / "half", "hf", dtype="bfloat16")
    full = write_checkpoint(half, tmp_path / "full", "hf", dtype="float32")
    assert same_fingerprint(fingerprint(half), fingerprint(full))  # the same values
    assert not same_fingerprint(model_fingerprint(half), model_fingerprint(full))  # other logits


def test_scores_of_a_model_with_another_middle_are_refused(source, tmp_path):
    one = write_checkpoint(source, tmp_path / "one", "hf")
    two = write_checkpoint(changed(source), tmp_path / "two", "hf")
    shape = source.shape
    check_subject((shape, fingerprint(one)), (shape, fingerprint(one)), where="s", remedy="r")
    check_subject((shape, fingerprint(source)), (shape, fingerprint(one)), where="s", remedy="r")
    with pytest.raises(CheckpointError, match="s: made from other weights"):
        check_subject((shape, fingerprint(one)), (shape, fingerprint(two)), where="s", remedy="r")
