"""Depth measured layer by layer gives what a live model gives; a stopped pass goes on; what breaks is named."""

from __future__ import annotations

import errno

import pytest
import torch
from support.families import CLASSES, family_model, windowed_model
from support.pruning import live, one_process, random_checkpoint, tokens

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.data.tasks import EncodedTask
from nemo_minitron.errors import ConfigError, NonFiniteError
from nemo_minitron.importance import layer_importance, layer_importance_streamed
from nemo_minitron.importance.depth_scores import depth_journal
from nemo_minitron.pruning.depth import choose_layers
from nemo_minitron.runtime.disk import disk_fault
from nemo_minitron.streamed import StreamedModel, Trail

BLOCKS = tokens(5, 13)
OPTIONS = {"block_lengths": [2], "greedy": 2, "micro_batch_size": 2}


@pytest.fixture(scope="module")
def groups():
    with one_process() as given:
        yield given


def task():
    """Two questions with choices of two lengths."""
    draw = torch.Generator().manual_seed(3)
    sizes = {4: 8, 3: 6}
    rows = [torch.randint(0, 32, (n, s + 1), generator=draw) for n, s in sizes.items()]
    counted = [torch.ones(n, s, dtype=torch.bool) for n, s in sizes.items()]
    for part in counted:
        part[:, :2] = False
    question, choice = torch.tensor([0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2, 3])
    return EncodedTask(
        tuple(rows), tuple(counted), question, choice, torch.arange(7).double() + 2, torch.tensor([1, 2])
    )


def same(streamed, expected, tolerance=1e-5):
    assert streamed.measured.keys() == expected.measured.keys()
    for layers, one in expected.measured.items():
        assert streamed.measured[layers].loss == pytest.approx(one.loss, rel=tolerance)
        assert streamed.measured[layers].accuracy == one.accuracy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", [*sorted(CLASSES), "windowed"])
def test_every_family(groups, tmp_path, family, dtype):
    path = windowed_model(tmp_path / "m") if family == "windowed" else family_model(family, tmp_path / "m")
    checkpoint = open_checkpoint(path)
    shape = checkpoint.shape
    options = {"block_lengths": [2] if shape.num_layers > 2 else [], "micro_batch_size": 2}
    streamed = layer_importance_streamed(StreamedModel(checkpoint, groups, dtype=dtype), BLOCKS, **options)
    expected = layer_importance(live(checkpoint, groups, dtype=dtype), BLOCKS, groups, shape=shape, **options)
    same(streamed, expected)
    one, other = (
        choose_layers(scores.costs("loss"), shape.num_layers, shape.num_layers - 1, "lowest")
        for scores in (streamed, expected)
    )
    assert one == other


def test_tasks_and_greedy_rounds_read_every_layer_once_a_round(groups):
    checkpoint = random_checkpoint()
    loaded = []

    class Watched(StreamedModel):
        def layer(self, index):
            loaded.append(index)
            return super().layer(index)

    options = {**OPTIONS, "greedy_by": "task", "task": task(), "task_name": "two"}
    seen = []
    streamed = layer_importance_streamed(
        Watched(checkpoint, groups), BLOCKS, progress=lambda count, status="": seen.append(count), **options
    )
    expected = layer_importance(live(checkpoint, groups), BLOCKS, groups, shape=checkpoint.shape, **options)
    same(streamed, expected)
    assert streamed.questions == expected.questions == 2
    # Singles and blocks in a pass; the first greedy round is of singles; some of the second's blocks are new.
    assert loaded == [*range(checkpoint.shape.num_layers)] * 2
    assert sum(seen) == 2 * (checkpoint.shape.num_layers + 1)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_stopped_pass_goes_on_at_its_layer(groups, tmp_path, at):
    checkpoint = random_checkpoint()
    expected = layer_importance_streamed(StreamedModel(checkpoint, groups), BLOCKS, **OPTIONS)
    loaded, files = [], []

    class Watched(StreamedModel):
        stops = True

        def layer(self, index):
            if self.stops and index == at and len(loaded) >= at:
                files.extend(path.name for path in (tmp_path / "pass").rglob("branch-*.bin"))
                raise Stopped
            loaded.append(index)
            return super().layer(index)

    def run(model):
        return layer_importance_streamed(
            model,
            BLOCKS,
            budget=1000,  # bytes: all branches but the first are in files
            journal=depth_journal(tmp_path / "journal", {}),
            trail=lambda candidates: Trail(tmp_path / "pass", {"candidates": candidates}, groups, every=0),
            **OPTIONS,
        )

    with pytest.raises(Stopped):
        run(Watched(checkpoint, groups))
    assert bool(files) == (at > 0)
    again = Watched(checkpoint, groups)
    again.stops = False
    loaded.clear()
    assert run(again) == expected
    assert loaded == [*range(at, 4), *range(4)]
    assert not (tmp_path / "pass").exists()


def test_a_full_disk_is_said_and_what_is_done_stays(groups, tmp_path, monkeypatch):
    checkpoint = random_checkpoint()

    def run(**options):
        return layer_importance_streamed(
            StreamedModel(checkpoint, groups),
            BLOCKS,
            trail=lambda candidates: Trail(tmp_path / "pass", {"candidates": candidates}, groups, every=0),
            **options,
            **OPTIONS,
        )

    reserved = []

    def full(descriptor, start, size):
        reserved.append(size)
        if len(reserved) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space") as caught:
        patched.setattr("os.posix_fallocate", full)
        run(budget=1000)
    message = str(disk_fault(caught.value, tmp_path))
    assert "branch-" in message
    assert "free some space" in message
    kept = list((tmp_path / "pass").rglob("*-states.safetensors"))
    assert kept  # the layers before it
    assert run() == layer_importance_streamed(StreamedModel(checkpoint, groups), BLOCKS, **OPTIONS)


def test_a_value_that_is_not_finite_names_its_layer(groups):
    def break_layer(tensors):
        tensors["decoder.layers.2.mlp.linear_fc2.weight"][0, 0] = float("inf")

    model = StreamedModel(random_checkpoint(change=break_layer), groups)
    with pytest.raises(NonFiniteError, match=r"decoder\.layers\.2: its output is NaN or infinite"):
        layer_importance_streamed(model, BLOCKS)


def test_what_cannot_be_measured(groups):
    with pytest.raises(ConfigError, match="nothing is to be measured"):
        layer_importance_streamed(StreamedModel(random_checkpoint(), groups), BLOCKS, single=False)
