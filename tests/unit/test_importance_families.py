"""Scoring by every estimator in every family of the axes table: none of them is asked for by name."""

from __future__ import annotations

import pytest
import torch
from support.families import CLASSES, family_model
from support.pruning import live, logits, one_process, tokens

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.importance import magnitude_scores, score_model
from nemo_minitron.importance.taylor import sample_losses

NAMES = ("ffn", "heads", "groups", "hidden", "layers")
BLOCKS = tokens(3, 13)


@pytest.fixture(scope="module")
def groups():
    with one_process() as found:
        yield found


@pytest.mark.parametrize("family", sorted(CLASSES))
def test_every_family_scores(groups, tmp_path, family):
    checkpoint = open_checkpoint(family_model(family, tmp_path / "m"))
    shape = checkpoint.shape
    chunks = live(checkpoint, groups, dtype=torch.float64)
    chunk = chunks[0].double()  # torch's norms are float32 whatever the model is, and LayerNorm refuses the mixture
    activation, taylor, reconstruction = (
        score_model(chunks, BLOCKS, groups, shape=shape, micro_batch_size=2, estimator=estimator)
        for estimator in ("activation", "taylor", "reconstruction")
    )
    magnitude = magnitude_scores(checkpoint)
    for scores in (activation, taylor, reconstruction, magnitude):
        for name in (*NAMES, *(["experts"] if shape.num_moe_experts else [])):
            assert (getattr(scores, name) >= 0).all()
            assert getattr(scores, name).unique().numel() > 1, (scores.estimator, name)

    # The activations that transformers' own float64 model feeds its heads' projection.
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", torch_dtype=torch.float64).eval()
    contexts = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: contexts.append(args[0]))
    with torch.no_grad():
        model(BLOCKS[:, :-1])
    heads = torch.stack(contexts).unflatten(-1, (shape.num_attention_heads, shape.head_dim)).norm(dim=-1)
    expected = heads.mean(2).square().sum(1).sqrt()  # [L, b, s, A] -> [L, A]
    torch.testing.assert_close(activation.heads, expected, rtol=1e-5, atol=1e-7)

    # Taylor: the slope of the loss along one channel of a norm, by finite differences, sample by sample.
    def losses(layer, norm, channel, scale):
        def change(module, args, output):
            output = output.clone()
            output[..., channel] *= scale
            return output

        handle = getattr(chunk.decoder.layers[layer], norm).register_forward_hook(change)
        found = sample_losses(logits(chunks, BLOCKS[:, :-1]), BLOCKS[:, 1:], shape.vocab_size, groups)
        handle.remove()
        return found

    # A router's softmax is in float32, whatever the model is: small steps would drown.
    total, step = 0.0, 1e-3 if shape.num_moe_experts else 1e-5
    for layer in range(shape.num_layers):
        for norm in ("input_layernorm", "pre_mlp_layernorm"):
            slopes = (losses(layer, norm, 7, 1 + step) - losses(layer, norm, 7, 1 - step)) / (2 * step)
            total += float(slopes.square().sum().sqrt())
    assert total == pytest.approx(float(taylor.hidden[7]), rel=1e-3 if shape.num_moe_experts else 1e-5)
