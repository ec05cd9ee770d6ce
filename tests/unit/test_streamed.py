"""Streamed passes give what a live model gives, in every family and in both precisions."""

from __future__ import annotations

import pytest
import torch
from support.families import CLASSES, family_model, windowed_model
from support.pruning import SHAPE, live, one_process, random_checkpoint, tokens

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.config import ParallelLayout
from nemo_minitron.data.blocks import Blocks
from nemo_minitron.errors import CheckpointError, ConfigError, NonFiniteError
from nemo_minitron.importance import score_criteria
from nemo_minitron.importance.streamed import score_streamed
from nemo_minitron.runtime.forward import block_losses
from nemo_minitron.shape import LayerShape
from nemo_minitron.streamed import Pass, StreamedModel, Trail, streamed_faults

BLOCKS = tokens(5, 13)
CRITERIA = [("mean", "l2"), ("l2", "mean")]


@pytest.fixture(scope="module")
def groups():
    with one_process() as given:
        yield given


def losses(model, blocks, size=2):
    run = Pass(model, Blocks.of(blocks), size)
    run.embed()
    for layer in range(model.shape.num_layers):
        run.through(model.layer(layer))
    return run.losses()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", [*sorted(CLASSES), "windowed"])
def test_every_family(groups, tmp_path, family, dtype):
    path = windowed_model(tmp_path / "m") if family == "windowed" else family_model(family, tmp_path / "m")
    checkpoint = open_checkpoint(path)
    shape = checkpoint.shape
    model = StreamedModel(checkpoint, groups, dtype=dtype)
    streamed = score_streamed(model, BLOCKS, criteria=CRITERIA, micro_batch_size=2)
    means = losses(model, BLOCKS)
    chunks = live(checkpoint, groups, dtype=dtype)
    expected = score_criteria(chunks, BLOCKS, groups, criteria=CRITERIA, shape=shape, micro_batch_size=2)
    for ours, theirs in zip(streamed, expected, strict=True):
        for name in ("ffn", "heads", "groups", "hidden", "layers", *(["experts"] if shape.num_moe_experts else [])):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=1e-9)
    losses_after = {"criteria": [("none", "none")], "micro_batch_size": 2, "estimator": "reconstruction"}
    (ours,) = score_streamed(model, BLOCKS, **losses_after)
    (theirs,) = score_criteria(chunks, BLOCKS, groups, shape=shape, **losses_after)
    for name in ("ffn", "heads", "groups", "hidden", *(["experts"] if shape.num_moe_experts else [])):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        means, block_losses(chunks, groups, BLOCKS, 2, vocab_size=shape.vocab_size), rtol=1e-5, atol=1e-6
    )


class Stopped(Exception):
    pass


class StopsAt(StreamedModel):
    """A model whose pass is killed before a layer."""

    at = 2

    def layer(self, index):
        if index == self.at:
            raise Stopped
        return super().layer(index)


@pytest.mark.parametrize("estimator", ["activation", "reconstruction"])
def test_a_stopped_pass_goes_on_at_its_layer(groups, tmp_path, estimator):
    checkpoint = random_checkpoint()
    options = {"criteria": CRITERIA if estimator == "activation" else [("none", "none")], "estimator": estimator}
    expected = score_streamed(StreamedModel(checkpoint, groups), BLOCKS, **options)
    budget = 1000  # bytes: states go to a file
    trail = Trail(tmp_path / "pass", {"weights": 1}, groups, every=0)
    with pytest.raises(Stopped):
        score_streamed(StopsAt(checkpoint, groups), BLOCKS, budget=budget, trail=trail, **options)
    assert trail.spill.stat().st_size == 5 * 12 * SHAPE.hidden_size * 4

    loaded = []

    class Watched(StreamedModel):
        def layer(self, index):
            loaded.append(index)
            return super().layer(index)

    again = Trail(tmp_path / "pass", {"weights": 1}, groups, every=0)
    resumed = score_streamed(Watched(checkpoint, groups), BLOCKS, budget=budget, trail=again, **options)
    assert loaded == [2, 3]
    for ours, theirs in zip(resumed, expected, strict=True):
        assert torch.equal(ours.ffn, theirs.ffn)
        assert torch.equal(ours.groups, theirs.groups)
        assert torch.equal(ours.hidden, theirs.hidden)
        assert torch.equal(ours.layers, theirs.layers)
    again.close()
    assert not (tmp_path / "pass").exists()


def test_another_pass_begins_anew(groups, tmp_path):
    trail = Trail(tmp_path / "pass", {"weights": 1}, groups, every=0)
    with pytest.raises(Stopped):
        score_streamed(StopsAt(random_checkpoint(), groups), BLOCKS, criteria=CRITERIA, trail=trail)
    assert Trail(tmp_path / "pass", {"weights": 2}, groups).find() is None
    assert not list((tmp_path / "pass").rglob("*.safetensors"))


@pytest.mark.parametrize("damage", ["record", "states", "gone"])
def test_damaged_files_of_a_stopped_pass(groups, tmp_path, damage):
    trail = Trail(tmp_path / "pass", {}, groups, every=0)
    with pytest.raises(Stopped):
        score_streamed(StopsAt(random_checkpoint(), groups), BLOCKS, criteria=CRITERIA, trail=trail)
    record = trail.directory / "pass.json"
    if damage == "record":
        record.write_text(record.read_text()[:40])
    for file in trail.directory.glob("*-states.safetensors") if damage != "record" else ():
        file.unlink() if damage == "gone" else file.write_bytes(file.read_bytes()[:-9])
    again = Trail(tmp_path / "pass", {}, groups)
    if damage == "states":
        with pytest.raises(CheckpointError, match=r"cannot be read .* remove .*pass and start again"):
            score_streamed(StreamedModel(random_checkpoint(), groups), BLOCKS, criteria=CRITERIA, trail=again)
    else:
        assert again.find() is None


def test_documents_are_masked(groups):
    checkpoint = random_checkpoint()
    segments = torch.zeros(5, 13, dtype=torch.int32)
    segments[:, 6:] = 1
    blocks = Blocks(BLOCKS, torch.zeros(5, dtype=torch.int64), ("",), segments)
    means = losses(StreamedModel(checkpoint, groups), blocks)
    expected = block_losses(
        live(checkpoint, groups),
        groups,
        BLOCKS,
        2,
        vocab_size=SHAPE.vocab_size,
        counted=blocks.counted(),
        segments=segments,
    )
    torch.testing.assert_close(means, expected, rtol=1e-5, atol=1e-6)


def test_a_value_that_is_not_finite_is_named(groups):
    def break_layer(tensors):
        tensors["decoder.layers.2.mlp.linear_fc2.weight"][0, 0] = float("inf")

    model = StreamedModel(random_checkpoint(change=break_layer), groups)
    with pytest.raises(NonFiniteError, match=r"decoder\.layers\.2"):
        score_streamed(model, BLOCKS, criteria=CRITERIA)


def test_what_cannot_be_streamed():
    uneven = SHAPE.replace(layers=(LayerShape(8, 2), *[LayerShape(40, 4)] * 3))
    assert "memory=streamed" in streamed_faults(uneven, ParallelLayout())[0]
    (fault,) = streamed_faults(SHAPE, ParallelLayout(tensor=2, data=2))
    assert fault.startswith("parallel.tensor=2")


def test_estimators_with_gradients_are_refused(groups):
    with pytest.raises(ConfigError, match="estimator=taylor: its gradients need the whole model"):
        score_streamed(StreamedModel(random_checkpoint(), groups), BLOCKS, criteria=CRITERIA, estimator="taylor")
