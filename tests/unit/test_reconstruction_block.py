"""Gradient steps on a layer alone: gradients against float64, what is kept, and what stays as least squares left it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.families import family_model
from support.pruning import DictWeights, one_process, random_checkpoint, tokens
from support.shapes import SHAPE

from nemo_minitron.axes import KeptUnits
from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.config import BlockConfig
from nemo_minitron.data.blocks import Blocks
from nemo_minitron.pruning import prune_weights
from nemo_minitron.reconstruction import BlockTraining, reconstruct
from nemo_minitron.reconstruction.parts import Layer
from nemo_minitron.streamed import Pass, States, StreamedModel

NEURONS = dataclasses.replace(KeptUnits.everything(SHAPE), ffn=(tuple(range(20)),) * 3)


@pytest.fixture(scope="module")
def groups():
    with one_process() as given:
        yield given


def refit(teacher, kept, groups, blocks, block=None):
    """The reports, and the tensors that are replaced."""
    changed: dict[str, torch.Tensor] = {}
    reports = reconstruct(
        StreamedModel(teacher, groups),
        StreamedModel(prune_weights(teacher, kept), groups),
        kept,
        blocks,
        sink=lambda number, tensors, report: changed.update(tensors),
        block=block,
    )
    return reports, changed


def a_layer(checkpoint, groups, blocks, dtype):
    """A training of the first layer, towards states that are near to those it gives."""
    run = Pass(StreamedModel(checkpoint, groups, dtype=dtype), Blocks.of(blocks))
    run.embed()
    layer = Layer(run, run.model.layer(0))
    after = States(*run.states.tensor.shape, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    after.tensor.copy_(run.states.tensor + torch.randn(after.tensor.shape, generator=generator))
    return BlockTraining(layer, after, BlockConfig(), seed=0, dtype=dtype)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2", "mixtral"])
def test_gradients_equal_those_in_float64(groups, tmp_path, family):
    checkpoint = open_checkpoint(family_model(family, tmp_path / "m"))
    blocks, samples = tokens(10, 13), [0, 3, 7]
    found = a_layer(checkpoint, groups, blocks, torch.float32)._gradients(samples)
    exact = a_layer(checkpoint, groups, blocks, torch.float64)
    parameters = exact.layer.parameters
    with torch.enable_grad():
        errors = []
        for sample in samples:
            ours = exact.layer.whole(exact.run.batch(sample, sample + 1))
            theirs = exact.after.tensor[sample : sample + 1].transpose(0, 1)
            errors.append(((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean())
        expected = torch.autograd.grad(torch.stack(errors).mean(), list(parameters.values()), allow_unused=True)
    assert {"self_attention.linear_qkv.weight", "mlp.linear_fc2.weight"} & found.keys()
    assert found.keys() == parameters.keys()
    for name, gradient in zip(parameters, expected, strict=True):
        wanted = torch.zeros_like(parameters[name]) if gradient is None else gradient
        scale = float(wanted.abs().max()) or 1.0
        torch.testing.assert_close(found[name] / scale, wanted.double() / scale, rtol=1e-3, atol=2e-5)


def test_layers_come_closer_than_by_least_squares(groups):
    teacher, blocks = random_checkpoint(SHAPE), tokens(80, 13)
    kept = dataclasses.replace(NEURONS, hidden=tuple(range(20)))
    plain, _ = refit(teacher, kept, groups, blocks)
    trained, changed = refit(teacher, kept, groups, blocks, BlockConfig(steps=24, learning_rate=1e-3))
    reports = [report.block for report in trained if report.block is not None]
    assert len(reports) == SHAPE.num_layers
    assert all(report.after <= report.before and report.steps in (0, 6, 12, 18, 24) for report in reports)
    assert reports[0].after < reports[0].before
    assert trained[-2].error < plain[-2].error
    # all matrices and norm scales of the layer have moved
    names = {name.removeprefix("decoder.layers.0.") for name in changed if name.startswith("decoder.layers.0.")}
    assert names >= {
        "self_attention.linear_qkv.weight", "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_proj.weight", "mlp.linear_fc1.weight", "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc2.weight",
    }  # fmt: skip


def test_dropped_layers_are_taken_up_by_the_layer_before(groups):
    teacher = random_checkpoint(SHAPE)
    kept = dataclasses.replace(
        KeptUnits.everything(SHAPE),
        layers=(0, 2),
        ffn=NEURONS.ffn[:2],
        heads=NEURONS.heads[:2],
        groups=NEURONS.groups[:2],
    )
    reports, _ = refit(teacher, kept, groups, tokens(40, 13), BlockConfig(steps=16, learning_rate=5e-3))
    assert [report.teacher for report in reports] == [0, 2, None]
    assert reports[0].block.after < reports[0].block.before


@pytest.mark.parametrize(
    ("kept", "learning_rate"),
    [(KeptUnits.everything(SHAPE), 1e-3), (NEURONS, 1e3)],
    ids=["nothing to gain", "diverges"],
)
def test_steps_that_do_not_help_are_taken_back(groups, kept, learning_rate):
    teacher, blocks = random_checkpoint(SHAPE), tokens(20, 13)
    _, expected = refit(teacher, kept, groups, blocks)
    reports, changed = refit(teacher, kept, groups, blocks, BlockConfig(steps=4, learning_rate=learning_rate))
    for report in reports[:-1]:
        assert report.block.steps == 0
        assert report.block.after == report.block.before
    assert changed.keys() == expected.keys()
    assert all(torch.equal(changed[name], tensor) for name, tensor in expected.items())


def test_gradients_that_are_not_finite_end_the_steps(groups, monkeypatch):
    gradients = BlockTraining._gradients

    def broken(self, samples):
        found = gradients(self, samples)
        found["mlp.linear_fc2.weight"][0, 0] = float("inf")
        return found

    teacher, blocks = random_checkpoint(SHAPE), tokens(20, 13)
    _, expected = refit(teacher, NEURONS, groups, blocks)
    monkeypatch.setattr(BlockTraining, "_gradients", broken)
    reports, changed = refit(teacher, NEURONS, groups, blocks, BlockConfig(steps=4))
    assert [report.block.steps for report in reports[:-1]] == [0, 0, 0]
    assert all(torch.equal(changed[name], tensor) for name, tensor in expected.items())


def test_samples_that_are_held_out_take_no_part_and_all_others_do(groups):
    training = a_layer(random_checkpoint(SHAPE), groups, tokens(20, 13), torch.float32)
    training.config = BlockConfig(steps=8, samples=4)
    steps = list(training._batches())
    assert [len(step) for step in steps] == [4] * 8
    once = sorted(number for step in steps[:4] for number in step)
    assert once == [number for number in range(20) if number % 5 != 4]
    assert steps == list(training._batches())


def test_a_bfloat16_model_is_judged_as_it_is_stored(groups):
    teacher = random_checkpoint(
        SHAPE, architecture=dataclasses.replace(random_checkpoint(SHAPE).architecture, dtype="bfloat16")
    )
    stored = {name: teacher.weights.tensor(name).bfloat16() for name in teacher.weights.names()}
    teacher = dataclasses.replace(teacher, weights=DictWeights(stored))
    reports, changed = refit(teacher, NEURONS, groups, tokens(20, 13), BlockConfig(steps=8, learning_rate=5e-3))
    assert {tensor.dtype for tensor in changed.values()} == {torch.bfloat16}
    assert all(report.block.after <= report.block.before for report in reports[:-1])
