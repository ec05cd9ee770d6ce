"""Leaving layers out of a live model: equal to deleting them, restored afterwards, resumed where it stood."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support.pruning import SHAPE, live, logits, one_process, random_checkpoint, tokens

from nemo_minitron.axes import KeptUnits
from nemo_minitron.errors import CheckpointError, ConfigError, DataError, NonFiniteError, ShapeError
from nemo_minitron.importance import DepthScores, Measurement, layer_importance, left_out
from nemo_minitron.importance.candidates import blocks, diverge, greedy_round, layers_run, rounds, singles
from nemo_minitron.importance.depth_scores import FILE_NAME, depth_journal
from nemo_minitron.runtime.forward import block_losses
from nemo_minitron.runtime.journal import Journal

BLOCKS = tokens(5, 9)


@pytest.fixture(scope="module")
def model():
    """Groups of one, a checkpoint, and the model."""
    checkpoint = random_checkpoint()
    with one_process() as groups:
        yield groups, checkpoint, live(checkpoint, groups)


def measure(model, **options):
    groups, _, chunks = model
    return layer_importance(chunks, BLOCKS, groups, shape=SHAPE, micro_batch_size=2, **options)


def without(checkpoint, layers):
    """The checkpoint without some layers, as offline pruning writes it."""
    import dataclasses

    from nemo_minitron.pruning import prune_weights

    everything = KeptUnits.everything(checkpoint.shape)
    kept = [layer for layer in everything.layers if layer not in layers]
    per_layer = {name: tuple(getattr(everything, name)[layer] for layer in kept) for name in ("ffn", "groups", "heads")}
    return prune_weights(checkpoint, dataclasses.replace(everything, layers=tuple(kept), **per_layer))


def test_the_loss_is_that_of_the_model_with_the_layers_deleted(model):
    groups, checkpoint, chunks = model
    before = {name: tensor.clone() for name, tensor in chunks[0].state_dict().items() if tensor is not None}
    ids = tokens(2, 8)
    whole = logits(chunks, ids)
    found = measure(model, block_lengths=[2, 3], greedy=3)
    # single: 4, blocks: 3 + 2, greedy: the rest of 4 + 3 + 2, and the whole model
    assert len(found.measured) == 1 + 4 + 3 + 2 + sum(
        len(layers) > 1 and layers not in [*blocks(4, 2), *blocks(4, 3)] for layers in found.measured
    )
    for layers, one in found.measured.items():
        pruned = without(checkpoint, layers) if layers else checkpoint
        losses = block_losses(live(pruned, groups), groups, BLOCKS, 2, vocab_size=SHAPE.vocab_size)
        assert one.loss == pytest.approx(float(losses.mean()), rel=1e-6), layers
    assert torch.equal(logits(chunks, ids), whole)
    after = chunks[0].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_reused_prefixes_change_no_bit_and_run_fewer_layers(model):
    chunks = model[2]
    ran = []
    handles = [layer.register_forward_hook(lambda *_: ran.append(1)) for layer in chunks[0].decoder.layers]
    try:
        plain = measure(model, block_lengths=[2], greedy=2, reuse_prefix=False)
        all_layers, ran[:] = len(ran), []
        assert measure(model, block_lengths=[2], greedy=2).measured == plain.measured
        some = len(ran)
        ran[:] = []
        measure(model, block_lengths=[2])
    finally:
        for handle in handles:
            handle.remove()
    assert some < all_layers
    known = [one for part in rounds(4, single=True, block_lengths=[2]) for one in part]
    assert len(ran) == 3 * layers_run(4, known)  # three micro-batches


def test_an_error_within_puts_the_layers_back(model):
    chunks = model[2]
    layers = list(chunks[0].decoder.layers)
    with pytest.raises(KeyError), left_out(chunks, [1, 2], keep=2):
        assert list(chunks[0].decoder.layers) != layers
        raise KeyError
    assert list(chunks[0].decoder.layers) == layers
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_layers_that_cannot_be_left_out(model):
    chunks = model[2]
    for layers, message in (([4], "has layers 0..3"), ([-1], "layer -1"), (range(4), "leave at least one")):
        with pytest.raises(ShapeError, match=message), left_out(chunks, layers):
            pass
    with left_out(chunks, [1], keep=3) as prefix:
        pass
    assert prefix.serves([1, 3]) and not prefix.serves([0, 3])
    with (
        pytest.raises(ShapeError, match=r"without layers \[1\] do not serve a pass"),
        left_out(chunks, [2], start=prefix),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"single": False}, ConfigError, "nothing is to be measured"),
        ({"block_lengths": [2, 4]}, ShapeError, "a block of 4 cannot be left out of 4 layers; give 1 to 3"),
        ({"greedy": 4}, ShapeError, "at most 3"),
        ({"greedy": 1, "greedy_by": "task"}, ConfigError, "there is no task"),
        ({"greedy": 1, "greedy_by": "luck"}, ConfigError, "must be loss or task"),
    ],
)
def test_what_cannot_be_measured(model, options, error, message):
    with pytest.raises(error, match=message):
        measure(model, **options)


def test_no_data(model):
    groups, _, chunks = model
    with pytest.raises(DataError, match="calibration data is empty"):
        layer_importance(chunks, BLOCKS[:0], groups, shape=SHAPE)


def test_a_loss_that_is_not_finite_names_the_layers(model, tmp_path):
    groups = model[0]

    def spoil(tensors):
        tensors["decoder.layers.2.mlp.linear_fc2.weight"][0] = float("inf")

    chunks = live(random_checkpoint(change=spoil), groups)
    with pytest.raises(NonFiniteError, match="the loss of the whole model is NaN or infinite"):
        layer_importance(chunks, BLOCKS, groups, shape=SHAPE)
    # Without the layer the loss is fine; without another it is not.
    journal = depth_journal(tmp_path / "journal", {})
    journal.read()
    for layers in ((), (0,)):
        journal.append([(layers, Measurement(1.0))])
    with pytest.raises(NonFiniteError, match="without layer 1 is NaN"):
        layer_importance(chunks, BLOCKS, groups, shape=SHAPE, journal=journal)


class Killed(BaseException):
    """Comes from outside."""


@pytest.mark.parametrize("after", [0, 3, 6, 8])
def test_a_killed_run_goes_on_where_it_stood(model, tmp_path, after):
    """The same file, whether the kill fell between two candidates or in the middle of writing a line."""
    options = {"block_lengths": [2], "greedy": 3, "fingerprint": "f"}
    whole = measure(model, **options)
    path, calls = tmp_path / "journal", []

    def kill(count, status=""):
        calls.append(count)
        if len(calls) > after:
            raise Killed

    with pytest.raises(Killed):
        measure(model, journal=depth_journal(path, {"of": 1}), progress=kill, **options)
    with path.open("a") as stream:
        stream.write('{"layers": [0, 1], "lo')
    told = []
    journal = depth_journal(path, {"of": 1})
    found = measure(model, journal=journal, progress=lambda count, status="": told.append(count), **options)
    assert journal.resumed == after + 2
    assert sum(told) == len(found.measured) - 1 == Journal.entries(path) - 1
    for name, scores in (("one", whole), ("two", found)):
        (tmp_path / name).mkdir()
        scores.save(tmp_path / name)
    assert (tmp_path / "one" / FILE_NAME).read_bytes() == (tmp_path / "two" / FILE_NAME).read_bytes()


def test_a_journal_of_something_else_is_begun_anew(tmp_path):
    journal = depth_journal(tmp_path / "j", {"of": 1})
    assert journal.read() == []
    journal.append([((1,), Measurement(2.0, 0.5))])
    assert depth_journal(tmp_path / "j", {"of": 1}).read() == [((1,), Measurement(2.0, 0.5))]
    assert depth_journal(tmp_path / "j", {"of": 2}).read() == []
    assert depth_journal(tmp_path / "j", {"of": 1}).read() == []
    (tmp_path / "j").write_bytes(b"\x00garbage")
    assert depth_journal(tmp_path / "j", {"of": 1}).read() == []
    assert Journal.entries(tmp_path / "none") == 0


def scores(**changes):
    measured = {(): Measurement(2.0), (0,): Measurement(2.5), (1, 2): Measurement(math.pi)}
    return DepthScores(**{"measured": measured, "shape": SHAPE, "samples": 5, "tokens": 40, **changes})


def test_the_file_reads_as_it_was_written(tmp_path):
    task = {(): Measurement(2.0, 0.5), (3,): Measurement(2.25, 0.25)}
    for one in (scores(), scores(measured=task, task="t", questions=4, fingerprint="f")):
        one.save(tmp_path)
        assert DepthScores.load(tmp_path) == one
    assert one.costs("task") == {(3,): (0.25, 0.25)}
    assert scores().costs("loss") == {(0,): (0.5,), (1, 2): (math.pi - 2.0,)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format_version=9), "has format version 9"),
        (lambda content: content.pop("baseline"), "is not readable"),
        (lambda content: content["candidates"][0].update(layers=[7]), "are no layers"),
        (lambda content: content["candidates"][0].update(loss=float("nan")), "is not finite"),
        (lambda content: content["candidates"][0].update(accuracy=0.5), "the task was not measured, or none is"),
        (lambda content: content["shape"].update(num_layers=0), "num_layers=0"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    scores().save(tmp_path)
    content = json.loads((tmp_path / FILE_NAME).read_text())
    change(content)
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        DepthScores.load(tmp_path)
    (tmp_path / FILE_NAME).write_text("{")
    with pytest.raises(CheckpointError, match="is not readable"):
        DepthScores.load(tmp_path)
    with pytest.raises(CheckpointError, match="run `minitron depth`"):
        DepthScores.load(tmp_path / "none")


def test_scores_of_another_model(tmp_path):
    with pytest.raises(ConfigError, match="no task was measured"):
        scores().costs("task")
    with pytest.raises(ConfigError, match="must be loss or task"):
        scores().costs("luck")
    with pytest.raises(ShapeError, match="the whole model was not measured"):
        scores(measured={(0,): Measurement(1.0)})
    with pytest.raises(ShapeError, match="num_layers: 4 in there, 3 in the model"):
        scores().check(SHAPE.replace(num_layers=3), None, where="there")
    with pytest.raises(CheckpointError, match="other weights"):
        scores(fingerprint="a").check(SHAPE, "b", where="there")
    scores(fingerprint="a").check(SHAPE, "a", where="there")


def test_candidates():
    assert singles(3) == [(0,), (1,), (2,)]
    assert blocks(4, 3) == [(0, 1, 2), (1, 2, 3)]
    assert greedy_round(4, (2,)) == [(0, 2), (1, 2), (2, 3)]
    assert list(rounds(3, single=True, block_lengths=[2, 1, 2])) == [[()], singles(3), blocks(3, 2)]
    assert list(rounds(2, single=False, block_lengths=[1])) == [[()], blocks(2, 1)]
    assert diverge((1, 2), (1, 3)) == 2
    assert diverge((1,), (1,)) is None
    # The whole model runs all; each single layer from its own place: k .. L-1 without k, one more to get there.
    assert layers_run(4, [(), *singles(4)]) == 4 + 3 + (1 + 2) + (1 + 1) + (1 + 0)
