"""Scoring a live Megatron model in one process, against an independent computation by transformers."""

from __future__ import annotations

import pytest
import torch
from support.checkpoints import tiny_hf_model
from support.pruning import SHAPE, live, one_process, random_checkpoint, tokens

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.errors import ConfigError, DataError, NonFiniteError, ShapeError
from nemo_minitron.importance import score_model


@pytest.fixture(scope="module")
def groups():
    with one_process() as found:
        yield found


def reference(path, blocks) -> dict[str, torch.Tensor]:
    """Scores by the formulas of arXiv 2407.14679, mean over sequence and L2 over batch, all samples at once, fp64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float64).eval()
    seen: dict[str, list[torch.Tensor]] = {"ffn": [], "attention": [], "norm": [], "in": [], "out": []}

    def keep(name, pick):
        return lambda module, args, output: seen[name].append(pick(args, output))

    config = model.config
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(keep("ffn", lambda a, o: a[0]))
        layer.self_attn.o_proj.register_forward_hook(keep("attention", lambda a, o: a[0]))
        layer.input_layernorm.register_forward_hook(keep("norm", lambda a, o: o))
        layer.post_attention_layernorm.register_forward_hook(keep("norm", lambda a, o: o))
        layer.register_forward_hook(keep("in", lambda a, o: a[0]))
        layer.register_forward_hook(keep("out", lambda a, o: o[0] if isinstance(o, tuple) else o))
    with torch.no_grad():
        model(blocks[:, :-1])

    def score(x):  # [b, s, u] -> [u]
        return x.abs().mean(1).square().sum(0).sqrt()

    b, s = blocks.shape[0], blocks.shape[1] - 1
    heads = [score(x.view(b, s, config.num_attention_heads, config.head_dim).norm(dim=-1)) for x in seen["attention"]]
    cosines = [
        torch.nn.functional.cosine_similarity(x, y, dim=-1).mean() for x, y in zip(seen["in"], seen["out"], strict=True)
    ]
    heads = torch.stack(heads)
    return {
        "ffn": torch.stack([score(x) for x in seen["ffn"]]),
        "heads": heads,
        "groups": heads.view(len(heads), config.num_key_value_heads, -1).norm(dim=-1),
        "hidden": sum(score(x) for x in seen["norm"]),
        "layers": 1 - torch.stack(cosines),
    }


@pytest.mark.parametrize("tied", [False, True])
def test_scores_equal_an_independent_computation(groups, tmp_path, tied):
    path = tiny_hf_model(tmp_path / "m", tied=tied)
    checkpoint = open_checkpoint(path)
    blocks = tokens(7, 13, vocab=checkpoint.shape.vocab_size)
    expected = reference(path, blocks)
    done = []
    scores = score_model(
        live(checkpoint, groups), blocks, groups, shape=checkpoint.shape, micro_batch_size=2, progress=done.append
    )
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(scores, name), value, rtol=2e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert (scores.samples, scores.tokens, sum(done)) == (7, 84, 7)


@pytest.mark.parametrize("sequence", ["mean", "l1", "l2", "variance", "max"])
@pytest.mark.parametrize("batch", ["mean", "l1", "l2", "variance", "max"])
def test_batching_changes_nothing(groups, sequence, batch):
    chunks = live(random_checkpoint(), groups)
    blocks = tokens(19, 9)
    one, other = (
        score_model(chunks, blocks, groups, shape=SHAPE, micro_batch_size=size, sequence=sequence, batch=batch)
        for size in (1, 4)
    )
    for name in ("ffn", "heads", "groups", "hidden", "layers"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-9)


def test_state_is_o_of_units(groups):
    from nemo_minitron.importance.aggregation import AGGREGATIONS
    from nemo_minitron.importance.hooks import Recorder
    from nemo_minitron.importance.score import _prepared, _run

    sizes = []
    for rows in (2, 20):
        chunks = live(random_checkpoint(), groups)
        recorder = Recorder(chunks, groups, sequence=AGGREGATIONS["mean"], batch=AGGREGATIONS["l2"])
        with torch.no_grad(), _prepared(chunks), recorder.attached():
            _run(recorder, tokens(rows, 9), 2, None)
        sizes.append(sum(x.numel() for x in recorder.statistics.values()))
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
    from nemo_minitron.importance.hooks import _fused_norm

    x = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
    linear = torch.nn.Linear(8, 3)
    linear.layer_norm_weight, linear.normalization, linear.eps = torch.nn.Parameter(torch.rand(8)), "RMSNorm", 1e-5
    norm = torch.nn.RMSNorm(8, eps=1e-5)
    norm.weight = linear.layer_norm_weight
    torch.testing.assert_close(_fused_norm(linear, x), norm(x))
    linear.zero_centered_gamma, linear.normalization = True, "LayerNorm"
    linear.layer_norm_bias = torch.nn.Parameter(torch.rand(8))
    expected = torch.nn.functional.layer_norm(x, (8,), linear.layer_norm_weight + 1, linear.layer_norm_bias, 1e-5)
    torch.testing.assert_close(_fused_norm(linear, x), expected)


def test_hooks_of_fused_norms_give_the_same_scores(groups):
    """Norms inside the linears (as Transformer Engine's) score as local norms do."""
    from megatron.core.transformer.identity_op import IdentityOp

    from nemo_minitron.importance.hooks import _fused_norm

    plain = score_model(live(random_checkpoint(), groups), tokens(3, 7), groups, shape=SHAPE)
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
            linear.forward = lambda x, inner=inner, linear=linear: inner(_fused_norm(linear, x))
    fused = score_model(chunks, tokens(3, 7), groups, shape=SHAPE)
    for name in ("ffn", "heads", "hidden", "layers"):
        torch.testing.assert_close(getattr(fused, name), getattr(plain, name), rtol=1e-6, atol=1e-9)


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


def test_a_layer_that_is_not_dense(groups):
    chunks = live(random_checkpoint(), groups)
    del chunks[0].decoder.layers[2].mlp.linear_fc2
    with pytest.raises(ShapeError, match=r"layers\.2: has no mlp\.linear_fc2"):
        score_model(chunks, tokens(2, 5), groups, shape=SHAPE)
