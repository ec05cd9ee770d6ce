"""Scores after reconstruction of a live model: the sums, the families' layers, what is refused."""

from __future__ import annotations

import functools

import pytest
import torch
from support.pruning import SHAPE, live, one_process, random_checkpoint, tokens

from nemo_minitron.config import AggregationConfig, IterateConfig, ScoreConfig, TargetConfig, TaylorConfig
from nemo_minitron.data.blocks import Blocks
from nemo_minitron.errors import ConfigError, NonFiniteError
from nemo_minitron.importance import Scores, reconstruction, score_criteria, score_model
from nemo_minitron.importance.elimination import eliminate

BLOCKS = tokens(7, 13)


@pytest.fixture(scope="module")
def groups():
    with one_process() as given:
        yield given


def seen_by(chunk) -> list[dict[str, torch.Tensor]]:
    """Of each layer, ``[tokens, k]``: what the matrices that write to the stream read."""
    seen: list[dict[str, torch.Tensor]] = []

    def keep(index: int, name: str):
        return lambda module, args, output: seen[index].update({name: args[0].detach().flatten(0, 1)})

    for index, layer in enumerate(chunk.decoder.layers):
        seen.append({})
        attention, mlp = layer.self_attention, layer.mlp
        attention.linear_proj.register_forward_hook(keep(index, "attention"))
        mlp.linear_fc2.register_forward_hook(keep(index, "ffn"))
    return seen


def test_scores_are_the_losses_of_the_matrices(groups):
    """All tokens at once, in float64."""
    checkpoint = random_checkpoint()
    chunks = live(checkpoint, groups, dtype=torch.float64)
    scores = score_model(chunks, BLOCKS, groups, shape=SHAPE, micro_batch_size=2, estimator="reconstruction")
    assert (scores.estimator, scores.sequence, scores.batch, scores.samples) == ("reconstruction", "none", "none", 7)

    (chunk,) = live(checkpoint, groups, dtype=torch.float64)
    seen = seen_by(chunk)
    ids = BLOCKS[:, :-1]
    with torch.no_grad():
        chunk.eval()(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
    q = SHAPE.num_attention_heads // SHAPE.num_query_groups
    for index, (layer, x) in enumerate(zip(chunk.decoder.layers, seen, strict=True)):
        outer = {
            name: module.weight.detach().T @ module.weight.detach()
            for name, module in (
                ("proj", layer.self_attention.linear_proj), ("fc2", layer.mlp.linear_fc2),
            )
        }  # fmt: skip
        gram = {name: inputs.T @ inputs for name, inputs in x.items()}
        for name, expected in (
            ("ffn", eliminate(gram["ffn"], outer["fc2"])),
            ("heads", eliminate(gram["attention"], outer["proj"], SHAPE.head_dim, per_group=q)),
            ("groups", eliminate(gram["attention"], outer["proj"], SHAPE.head_dim * q)),
        ):
            torch.testing.assert_close(getattr(scores, name)[index], expected, rtol=1e-9, atol=1e-12)
    papers = score_model(chunks, BLOCKS, groups, shape=SHAPE)
    torch.testing.assert_close(scores.hidden, papers.hidden, rtol=1e-12, atol=0)
    torch.testing.assert_close(scores.layers, papers.layers, rtol=1e-12, atol=0)


def test_a_neuron_that_others_make_up_for_costs_nothing(groups, monkeypatch):
    """In one layer a neuron is the difference of two others; activations rate all three above most."""

    def combine(tensors):
        weight = tensors["decoder.layers.2.mlp.linear_fc1.weight"]
        gate, up = weight[: SHAPE.ffn_hidden_size], weight[SHAPE.ffn_hidden_size :]
        gate[[4, 9]] = gate[17].clone()
        up[[4, 9]] *= 6
        up[17] = up[4] - up[9]

    chunks = live(random_checkpoint(change=combine), groups, dtype=torch.float64)
    blocks = tokens(24, 13)
    three = [4, 9, 17]
    by_activation = score_model(chunks, blocks, groups, shape=SHAPE).ffn[2]
    assert int(by_activation.argmax()) in three
    assert by_activation[three].min() > by_activation.median()
    # The ridge holds the others' weights, so that what is free costs a little.
    losses = score_model(chunks, blocks, groups, shape=SHAPE, estimator="reconstruction").ffn[2]
    assert float(losses[three].min()) < 0.05
    assert losses[three].min() < losses[three].max() / 20
    monkeypatch.setattr(reconstruction, "eliminate", functools.partial(eliminate, ridge=1e-9))
    exact = score_model(chunks, blocks, groups, shape=SHAPE, estimator="reconstruction").ffn[2]
    assert int(exact.argmin()) in three
    assert float(exact.min()) < 1e-6
    assert float(exact[three].sort().values[1]) > 1e-3


def test_batching_changes_nothing(groups):
    chunks = live(random_checkpoint(), groups, dtype=torch.float64)
    one, other = (
        score_model(chunks, BLOCKS, groups, shape=SHAPE, micro_batch_size=size, estimator="reconstruction")
        for size in (1, 4)
    )
    for name in ("ffn", "heads", "groups", "hidden", "layers"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-12)


def test_values_that_are_not_finite(groups):
    def spoil(tensors):
        tensors["decoder.layers.1.mlp.linear_fc1.weight"][0] = float("nan")

    chunks = live(random_checkpoint(change=spoil), groups)
    with pytest.raises(NonFiniteError, match=r"decoder\.layers\.1: an activation of mlp\.linear_fc2"):
        score_model(chunks, BLOCKS, groups, shape=SHAPE, estimator="reconstruction")


def test_there_is_nothing_to_aggregate(groups):
    with pytest.raises(ConfigError, match="aggregation.sequence=mean: estimator=reconstruction takes all tokens"):
        score_criteria([], BLOCKS, groups, criteria=[("mean", "none")], shape=SHAPE, estimator="reconstruction")
    with pytest.raises(ConfigError, match="aggregation.batch=max: estimator=reconstruction takes all tokens"):
        score_criteria([], BLOCKS, groups, criteria=[("none", "max")], shape=SHAPE, estimator="reconstruction")

    def faults(**settings) -> list[str]:
        return ScoreConfig(output="o", model="m", estimator="reconstruction", **settings).faults()

    assert faults() == faults(memory="streamed") == []
    assert ScoreConfig(output="o", model="m", estimator="reconstruction").criteria() == [("none", "none")]
    (fault,) = faults(aggregation=AggregationConfig(batch="max"))
    assert fault.startswith("aggregation.batch=max: estimator=reconstruction takes all tokens together")
    (fault,) = faults(also=[AggregationConfig()])
    assert fault == "also: estimator=reconstruction has nothing to aggregate; leave it out"
    iterated = IterateConfig(
        output="o", model="m", estimator="reconstruction", target=TargetConfig(num_layers=1),
        aggregation=AggregationConfig(sequence="max"),
    )  # fmt: skip
    (fault,) = iterated.faults()
    assert fault.startswith("aggregation.sequence=max: estimator=reconstruction takes all tokens together")


def test_a_loss_where_there_is_none(groups):
    for config in (ScoreConfig, IterateConfig):
        rest = {"target": TargetConfig(num_layers=1)} if config is IterateConfig else {}
        (fault,) = config(output="o", model="m", taylor=TaylorConfig("kl"), **rest).faults()
        assert fault == "taylor.loss=kl: estimator=activation goes by no loss; set estimator=taylor or leave it out"
        assert config(output="o", model="m", estimator="taylor", taylor=TaylorConfig("kl"), **rest).faults() == []
    assert TaylorConfig("reverse").faults() == ["loss=reverse: must be one of labels, kl"]
    with pytest.raises(ConfigError, match="taylor.loss='reverse': must be one of labels, kl"):
        score_model([], BLOCKS, groups, shape=SHAPE, estimator="taylor", loss="reverse")


# ------------------------------------------------------------------------------------------------ the divergence's form


def test_labels_are_drawn_from_the_true_vocabulary(groups):
    """By the cumulative distribution; the padding of the vocabulary takes no part."""
    from nemo_minitron.importance.taylor import label_draws, own_labels

    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(400, 5, 128, generator=generator)
    draws = label_draws(Blocks.of(tokens(400, 6)))  # of a block of six tokens five are labels
    assert torch.equal(draws, label_draws(Blocks.of(tokens(400, 6, seed=1))))
    labels = own_labels(z, draws, 67, groups)
    steps = z[..., :67].double().softmax(-1).cumsum(-1)
    assert torch.equal(labels, torch.searchsorted(steps, draws[..., None])[..., 0])
    same = own_labels(z[:1, :1].expand(400, 5, 128), draws, 67, groups)
    shares = torch.bincount(same.flatten(), minlength=67) / same.numel()
    assert (shares - z[0, 0, :67].softmax(-1)).abs().max() < 0.05
    assert float(own_labels(z, torch.full_like(draws, 1 - 1e-16), 67, groups).max()) <= 66


def test_squares_are_the_divergence_in_expectation(groups):
    """Over all labels of one position, by finite differences of KL: ``sum_y p(y) v_y^2 = 2 KL(p || p_h) / h^2``."""
    chunks = live(random_checkpoint(), groups, dtype=torch.float64)
    (chunk,) = chunks
    given = tokens(1, 2)[:, :1]
    options = {"shape": SHAPE, "estimator": "taylor", "micro_batch_size": SHAPE.vocab_size}

    def logprobs(scale: float) -> torch.Tensor:
        def change(module, args):
            x = args[0].clone()
            x[..., 17] *= scale
            return (x, *args[1:])

        handle = chunk.decoder.layers[1].mlp.linear_fc2.register_forward_pre_hook(change)
        with torch.no_grad():
            z = chunk.eval()(given, torch.zeros_like(given), None)[0, 0, : SHAPE.vocab_size]
        handle.remove()
        return z.log_softmax(-1)

    p, h = logprobs(1.0), 1e-4
    squares = torch.tensor(
        [
            float(score_model(chunks, torch.cat([given, torch.tensor([[label]])], 1), groups, **options).ffn[1, 17])
            for label in range(SHAPE.vocab_size)
        ],
        dtype=torch.float64,
    ).square()
    expected = sum(2 * (p.exp() * (p - logprobs(1 + sign * h))).sum() / h**2 for sign in (1, -1)) / 2
    assert float((p.exp() * squares).sum()) == pytest.approx(float(expected), rel=1e-4)


def test_scores_of_the_divergence_are_those_of_the_labels_drawn(groups, tmp_path):
    from nemo_minitron.importance.taylor import label_draws, own_labels

    chunks = live(random_checkpoint(), groups, dtype=torch.float64)
    ids = BLOCKS[:, :-1]
    with torch.no_grad():
        z = chunks[0].eval()(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
    drawn = own_labels(z, label_draws(Blocks.of(BLOCKS)), SHAPE.vocab_size, groups)
    by_hand = []
    for row, labels in zip(ids, drawn, strict=True):  # the labels are no inputs
        segment = _sample_scores(chunks, row, labels, groups)
        by_hand.append(segment)
    expected = torch.stack(by_hand).square().sum(0).sqrt()
    scores = score_model(
        chunks, BLOCKS, groups, shape=SHAPE, micro_batch_size=3, estimator="taylor", loss="kl", batch="l2"
    )
    torch.testing.assert_close(scores.ffn, expected, rtol=1e-9, atol=1e-12)
    assert scores.loss == "kl"
    scores.save(tmp_path / "scores")
    assert Scores.load(tmp_path / "scores").loss == "kl"
    assert score_model(chunks, BLOCKS, groups, shape=SHAPE).loss is None


def _sample_scores(chunks, row, labels, groups) -> torch.Tensor:
    """``[L, F]``: |sum over tokens of a * dL/da| by autograd, for labels that are not the next tokens."""
    from nemo_minitron.importance.taylor import differentiable

    inputs: list[torch.Tensor] = []
    handles = []
    for layer in chunks[0].decoder.layers:
        handles.append(layer.mlp.linear_fc2.register_forward_pre_hook(lambda module, args: inputs.append(args[0])))
    with differentiable(chunks):
        z = chunks[0](row[None], torch.arange(len(row))[None], None)[0, :, : SHAPE.vocab_size]
        loss = torch.nn.functional.cross_entropy(z, labels)
        gradients = torch.autograd.grad(loss, inputs)
    for handle in handles:
        handle.remove()
    return torch.stack([(a.detach() * g).sum((0, 1)).abs() for a, g in zip(inputs, gradients, strict=True)])
