"""Scoring a live Megatron model in one process, against an independent computation by transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.checkpoints import tiny_hf_model
from support.pruning import SHAPE, live, logits, one_process, random_checkpoint, tokens

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.errors import ConfigError, DataError, NonFiniteError, ShapeError
from nemo_minitron.importance import score_criteria, score_model
from nemo_minitron.importance.score import collect


@pytest.fixture(scope="module")
def groups():
    with one_process() as found:
        yield found


def run_reference(path, blocks, backward=False) -> tuple[dict[str, torch.Tensor], Any]:
    """Activations of transformers' model in float64, ``[L, b, s, units]``; with their gradients if asked for.

    The loss is the sum over samples of each one's mean cross-entropy.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float64).eval()
    for name, norm in [(n, m) for n, m in model.named_modules() if type(m).__name__ == "LlamaRMSNorm"]:
        # transformers' own computes in float32, whatever the dtype of the model
        wide = torch.nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon, dtype=torch.float64)
        wide.weight = norm.weight
        model.set_submodule(name, wide)
    seen: dict[str, list[torch.Tensor]] = {"ffn": [], "attention": [], "norm": [], "in": [], "out": []}

    def keep(name, pick):
        def hook(module, args, output):
            seen[name].append(pick(args, output))
            if backward:
                seen[name][-1].retain_grad()

        return hook

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(keep("ffn", lambda a, o: a[0]))
        layer.self_attn.o_proj.register_forward_hook(keep("attention", lambda a, o: a[0]))
        layer.input_layernorm.register_forward_hook(keep("norm", lambda a, o: o))
        layer.post_attention_layernorm.register_forward_hook(keep("norm", lambda a, o: o))
        layer.register_forward_hook(keep("in", lambda a, o: a[0]))
        layer.register_forward_hook(keep("out", lambda a, o: o[0] if isinstance(o, tuple) else o))
    with torch.set_grad_enabled(backward):
        logits = model(blocks[:, :-1]).logits
        if backward:
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), blocks[:, 1:], reduction="none")
            losses.mean(1).sum().backward()
    found = {name: torch.stack([x.detach() for x in values]) for name, values in seen.items()}
    if backward:
        found |= {f"d{name}": torch.stack([x.grad for x in values]) for name, values in seen.items()}
    return found, model.config


def by_head(x, config):
    return x.view(*x.shape[:-1], config.num_attention_heads, config.head_dim)


# Along one dimension; the definitions of arXiv 2407.14679, section 2.2, and of the variance and maximum.
AGGREGATE = {
    "mean": lambda x, dim: x.abs().mean(dim),
    "l1": lambda x, dim: x.abs().sum(dim),
    "l2": lambda x, dim: x.square().sum(dim).sqrt(),
    "variance": lambda x, dim: x.var(dim, correction=0),
    "max": lambda x, dim: x.abs().amax(dim),
}


def expected_scores(seen, config, sequence, batch) -> dict[str, torch.Tensor]:
    """Scores from the activations of all samples at once."""

    def score(x):  # [L, b, s, u] -> [L, u]
        return AGGREGATE[batch](AGGREGATE[sequence](x, 2), 1)

    heads = score(by_head(seen["attention"], config).norm(dim=-1))
    cosines = torch.nn.functional.cosine_similarity(seen["in"], seen["out"], dim=-1)
    return {
        "ffn": score(seen["ffn"]),
        "heads": heads,
        "groups": heads.view(len(heads), config.num_key_value_heads, -1).norm(dim=-1),
        "hidden": score(seen["norm"]).sum(0),
        "layers": 1 - cosines.mean((1, 2)),
    }


def assert_scores(scores, expected, *, rtol, atol=1e-12):
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(scores, name), value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{scores.sequence} {n}: {m}"
        )


@pytest.mark.parametrize("tied", [False, True])
def test_scores_equal_an_independent_computation(groups, tmp_path, tied):
    path = tiny_hf_model(tmp_path / "m", tied=tied)
    checkpoint = open_checkpoint(path)
    blocks = tokens(7, 13, vocab=checkpoint.shape.vocab_size)
    expected = expected_scores(*run_reference(path, blocks), "mean", "l2")
    done = []
    scores = score_model(
        live(checkpoint, groups), blocks, groups, shape=checkpoint.shape, micro_batch_size=2, progress=done.append
    )
    assert_scores(scores, expected, rtol=2e-5, atol=1e-6)
    assert (scores.samples, scores.tokens, sum(done)) == (7, 84, 7)


ALL_PAIRS = [(sequence, batch) for sequence in AGGREGATE for batch in AGGREGATE]


def test_every_pair_of_aggregations_in_one_pass(groups, tmp_path):
    """All 25 against transformers in float64, where nothing is lost to rounding; micro-batches of three are uneven."""
    path = tiny_hf_model(tmp_path / "m")
    checkpoint = open_checkpoint(path)
    blocks = tokens(7, 13, vocab=checkpoint.shape.vocab_size)
    seen, config = run_reference(path, blocks)
    chunks = live(checkpoint, groups, dtype=torch.float64)
    passes = []
    handle = chunks[0].decoder.register_forward_hook(lambda *_: passes.append(1))
    scored = score_criteria(chunks, blocks, groups, criteria=ALL_PAIRS, shape=checkpoint.shape, micro_batch_size=3)
    handle.remove()
    assert len(passes) == 3
    for pair, scores in zip(ALL_PAIRS, scored, strict=True):
        assert (scores.sequence, scores.batch) == pair
        assert_scores(scores, expected_scores(seen, config, *pair), rtol=1e-8)


def test_many_criteria_are_what_one_at_a_time_gives(groups):
    chunks = live(random_checkpoint(), groups)
    pairs = [("mean", "l2"), ("variance", "max"), ("mean", "l2")]
    for scores, (sequence, batch) in zip(
        score_criteria(chunks, tokens(3, 9), groups, criteria=pairs, shape=SHAPE), pairs, strict=True
    ):
        alone = score_model(chunks, tokens(3, 9), groups, shape=SHAPE, sequence=sequence, batch=batch)
        for name in ("ffn", "heads", "groups", "hidden", "layers"):
            assert torch.equal(getattr(scores, name), getattr(alone, name))


# --------------------------------------------------------------------------------------------------------------- taylor


def expected_taylor(seen, config, batch) -> dict[str, torch.Tensor]:
    """``|sum over tokens of a * dL/da|`` of each sample, from autograd's own gradients."""

    def score(x):  # [L, b, s, u] -> [L, u]
        return AGGREGATE[batch](x.sum(2).abs(), 1)

    heads = score(by_head(seen["attention"] * seen["dattention"], config).sum(-1))
    return {
        "ffn": score(seen["ffn"] * seen["dffn"]),
        "heads": heads,
        "groups": heads.view(len(heads), config.num_key_value_heads, -1).norm(dim=-1),
        "hidden": score(seen["norm"] * seen["dnorm"]).sum(0),
        "layers": score(((seen["out"] - seen["in"]) * seen["dout"]).sum(-1, keepdim=True))[:, 0],
    }


@pytest.mark.parametrize("tied", [False, True])
def test_taylor_equals_autograd(groups, tmp_path, tied):
    path = tiny_hf_model(tmp_path / "m", tied=tied)
    checkpoint = open_checkpoint(path)
    blocks = tokens(7, 13, vocab=checkpoint.shape.vocab_size)
    seen, config = run_reference(path, blocks, backward=True)
    chunks = live(checkpoint, groups, dtype=torch.float64)
    pairs = [("sum", batch) for batch in AGGREGATE]
    scored = score_criteria(
        chunks, blocks, groups, criteria=pairs, shape=checkpoint.shape, micro_batch_size=3, estimator="taylor"
    )
    for scores in scored:
        assert scores.estimator == "taylor"
        assert_scores(scores, expected_taylor(seen, config, scores.batch), rtol=1e-8, atol=1e-10)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in chunks[0].parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in chunks[0].modules())


def test_taylor_predicts_what_a_neuron_is_worth(groups):
    """Finite differences: scaling one neuron's activation by ``1 - h`` changes the loss by ``h`` times its score."""
    from nemo_minitron.importance.taylor import sample_losses

    chunks = live(random_checkpoint(), groups, dtype=torch.float64)
    (chunk,) = chunks
    blocks = tokens(1, 9)
    scores = score_model(chunks, blocks, groups, shape=SHAPE, estimator="taylor")

    def loss(layer, neuron, scale):
        def change(module, args):
            x = args[0].clone()
            x[..., neuron] *= scale
            return (x, *args[1:])

        handle = chunk.decoder.layers[layer].mlp.linear_fc2.register_forward_pre_hook(change)
        logits_ = logits(chunks, blocks[:, :-1])
        handle.remove()
        return float(sample_losses(logits_, blocks[:, 1:], SHAPE.vocab_size, groups)[0])

    for layer, neuron in ((0, 3), (2, 17), (3, 39)):
        slope = (loss(layer, neuron, 1 + 1e-5) - loss(layer, neuron, 1 - 1e-5)) / 2e-5
        assert abs(slope) == pytest.approx(float(scores.ffn[layer, neuron]), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sample_losses_are_cross_entropy_of_the_true_vocabulary(groups, dtype):
    from nemo_minitron.importance.taylor import sample_losses

    generator = torch.Generator().manual_seed(0)
    z = (5 * torch.randn(2, 5, 128, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    labels = torch.randint(0, 67, (2, 5), generator=generator)
    losses = sample_losses(z, labels, 67, groups)
    losses.sum().backward()
    y = z.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(y[..., :67].transpose(1, 2), labels, reduction="none").mean(1)
    expected.sum().backward()
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-2, "atol": 1e-4}
    torch.testing.assert_close(losses.double(), expected, **tolerance)
    torch.testing.assert_close(z.grad.double(), y.grad, **tolerance)


# ------------------------------------------------------------------------------------------------------------ both ways


@pytest.mark.parametrize("estimator", ["activation", "taylor"])
@pytest.mark.parametrize("batch", ["mean", "l1", "l2", "variance", "max"])
def test_batching_changes_nothing(groups, estimator, batch):
    chunks = live(random_checkpoint(), groups, dtype=torch.float64)
    blocks = tokens(19, 9)
    one, other = (
        score_model(chunks, blocks, groups, shape=SHAPE, micro_batch_size=size, batch=batch, estimator=estimator)
        for size in (1, 4)
    )
    for name in ("ffn", "heads", "groups", "hidden", "layers"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", ["activation", "taylor"])
def test_state_is_o_of_units(groups, monkeypatch, estimator):
    """What the recorder holds after 2 and after 20 samples: the statistics of one criterion, one number a unit."""
    sizes = []

    def measure(recorder, *args, **kwargs):
        sizes.append(sum(x.numel() for found in recorder.statistics.values() for x in found.values()))
        return collect(recorder, *args, **kwargs)

    monkeypatch.setattr("nemo_minitron.importance.score.collect", measure)
    for rows in (2, 20):
        score_model(live(random_checkpoint(), groups), tokens(rows, 9), groups, shape=SHAPE, estimator=estimator)
    per_layer = 2 * SHAPE.hidden_size + SHAPE.num_attention_heads + SHAPE.ffn_hidden_size + 1
    assert sizes == [SHAPE.num_layers * per_layer] * 2


def test_the_model_is_left_as_it_was(groups):
    chunks = live(random_checkpoint(), groups)
    (chunk,) = chunks
    chunk.train()
    score_model(chunks, tokens(2, 5), groups, shape=SHAPE)
    assert chunk.training
    assert chunk.post_process
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in chunk.modules())


def test_the_output_layer_does_not_run(groups):
    chunks = live(random_checkpoint(), groups)
    ran = []
    chunks[0].output_layer.register_forward_hook(lambda *args: ran.append(1))
    score_model(chunks, tokens(2, 5), groups, shape=SHAPE)
    assert not ran


def test_fused_norm_is_read_like_an_unfused_one(groups):
    """Transformer Engine's layer-norm-linear: the norm's output is worked out from the linear's input."""
    from nemo_minitron.importance.hooks import fused_norm

    x = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
    linear = torch.nn.Linear(8, 3)
    linear.layer_norm_weight, linear.normalization, linear.eps = torch.nn.Parameter(torch.rand(8)), "RMSNorm", 1e-5
    norm = torch.nn.RMSNorm(8, eps=1e-5)
    norm.weight = linear.layer_norm_weight
    torch.testing.assert_close(fused_norm(linear, x), norm(x))
    linear.zero_centered_gamma, linear.normalization = True, "LayerNorm"
    linear.layer_norm_bias = torch.nn.Parameter(torch.rand(8))
    expected = torch.nn.functional.layer_norm(x, (8,), linear.layer_norm_weight + 1, linear.layer_norm_bias, 1e-5)
    torch.testing.assert_close(fused_norm(linear, x), expected)


@pytest.mark.parametrize("estimator", ["activation", "taylor"])
def test_hooks_of_fused_norms_give_the_same_scores(groups, estimator):
    """Norms inside the linears (as Transformer Engine's) score as local norms do."""
    from megatron.core.transformer.identity_op import IdentityOp

    from nemo_minitron.importance.hooks import fused_norm

    options = {"shape": SHAPE, "estimator": estimator}
    plain = score_model(live(random_checkpoint(), groups), tokens(3, 7), groups, **options)
    chunks = live(random_checkpoint(), groups)
    for layer in chunks[0].decoder.layers:
        for norm, linear in (
            ("input_layernorm", layer.self_attention.linear_qkv),
            ("pre_mlp_layernorm", layer.mlp.linear_fc1),
        ):
            module = getattr(layer, norm)
            linear.layer_norm_weight, linear.eps, linear.normalization = module.weight, module.eps, "RMSNorm"
            setattr(layer, norm, IdentityOp())
            inner = linear.forward
            linear.forward = lambda x, inner=inner, linear=linear: inner(fused_norm(linear, x))
    fused = score_model(chunks, tokens(3, 7), groups, **options)
    for name in ("ffn", "heads", "hidden", "layers"):
        torch.testing.assert_close(getattr(fused, name), getattr(plain, name), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("size", [(0, 9), (3, 1), (3,)])
def test_empty_calibration(groups, size):
    chunks = live(random_checkpoint(), groups)
    with pytest.raises(DataError, match="calibration data is empty"):
        score_model(chunks, torch.zeros(size, dtype=torch.int64), groups, shape=SHAPE)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", r"layers\.1: .*input_layernorm"),
        ("decoder.layers.2.self_attention.linear_qkv.weight", r"layers\.2: .*linear_proj"),
        ("decoder.layers.2.mlp.linear_fc1.layer_norm_weight", r"layers\.2: .*pre_mlp_layernorm"),
        ("decoder.layers.0.mlp.linear_fc1.weight", r"layers\.0: .*linear_fc2"),
        ("decoder.layers.3.mlp.linear_fc2.weight", r"layers\.3: .*whole layer"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_activation_names_layer_and_module(groups, tensor, message, value):
    def spoil(tensors):
        tensors[tensor].view(-1)[0] = value

    chunks = live(random_checkpoint(change=spoil), groups)
    with pytest.raises(NonFiniteError, match=message):
        score_model(chunks, tokens(2, 5), groups, shape=SHAPE)
    assert chunks[0].post_process
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in chunks[0].modules())


def test_unknown_aggregation(groups):
    with pytest.raises(ConfigError, match=r"aggregation\.sequence"):
        score_model(live(random_checkpoint(), groups), tokens(2, 5), groups, shape=SHAPE, sequence="median")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criteria": []}, "criteria: none is given"),
        ({"estimator": "fisher"}, "estimator='fisher': must be one of activation, taylor"),
        ({"estimator": "taylor", "criteria": [("mean", "l2")]}, "sequence=mean: estimator=taylor always takes the sum"),
        ({"criteria": [("mean", "median")]}, "aggregation.batch='median'"),
    ],
)
def test_criteria_that_do_not_exist(groups, options, message):
    options = {"criteria": [("mean", "l2")], **options}
    with pytest.raises(ConfigError, match=message):
        score_criteria(live(random_checkpoint(), groups), tokens(2, 5), groups, shape=SHAPE, **options)


def test_non_finite_gradient(groups):
    """Finite activations, a loss that is not: the first layer in forward order is named, all is left as it was."""

    def spoil(tensors):
        tensors["output_layer.weight"][3, 0] = float("nan")

    chunks = live(random_checkpoint(change=spoil), groups)
    with pytest.raises(NonFiniteError, match=r"layers\.0: an activation or gradient of input_layernorm"):
        score_model(chunks, tokens(2, 5), groups, shape=SHAPE, estimator="taylor")
    assert all(parameter.requires_grad for parameter in chunks[0].parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in chunks[0].modules())


def test_a_layer_that_is_not_dense(groups):
    chunks = live(random_checkpoint(), groups)
    del chunks[0].decoder.layers[2].mlp.linear_fc2
    with pytest.raises(ShapeError, match=r"layers\.2: has no mlp\.linear_fc2"):
        score_model(chunks, tokens(2, 5), groups, shape=SHAPE)
