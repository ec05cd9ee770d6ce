"""ModelOpt's own minitron pruning side by side, on the same tiny model and tokens, on CPU.

``modelopt.torch.prune`` (0.37) in mode "mcore_minitron" converts the model to dynamic modules, runs the calibration
loop and slices the model. Two things it needs are brought here: a dynamic form of ``torch.nn.RMSNorm`` (it knows
Transformer Engine's alone), and divisors of 1, since it prunes in steps of 64 otherwise. Its dropping of layers is not
run: it gathers 0-dimensional tensors, which gloo refuses; the layers' scores come before that.

Neurons, hidden channels and layers agree. Heads differ by definition, query groups by what looks like a mistake of
theirs: see the tests.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from support.pruning import SHAPE, live, logits, one_process, random_checkpoint, tokens

from nemo_minitron.importance import score_model
from nemo_minitron.pruning import choose_units

TARGET = SHAPE.replace(hidden_size=14, ffn_hidden_size=22, num_query_groups=2, num_attention_heads=2)
MICRO_BATCH = 3
BLOCKS = tokens(2 * MICRO_BATCH, 13)
Q, G, D = SHAPE.heads_per_group, SHAPE.num_query_groups, SHAPE.head_dim


def modelopt_prune(chunk: Any) -> tuple[Any, dict[str, Any]]:
    """The chunk, pruned to ``TARGET`` by ModelOpt, and what it found: ``activations_per_rank``, ``layer_scores``."""
    import modelopt.torch.prune as mtp
    from modelopt.torch.nas.modules import _DynamicLayerNorm
    from modelopt.torch.nas.registry import DMRegistry
    from modelopt.torch.nas.traced_hp import TracedHp

    if torch.nn.RMSNorm not in DMRegistry:

        @DMRegistry.register({torch.nn.RMSNorm: "torch.nn.RMSNorm"})
        class DynamicRMSNorm(_DynamicLayerNorm):
            def _setup(self) -> None:  # that of LayerNorm, without the bias
                (size,) = self.normalized_shape
                self._register_hparam("num_features", TracedHp(list(range(1, size + 1))))
                self._register_dynamic_attribute("weight", self._cut_to_active_features)
                self._register_dynamic_attribute("normalized_shape", lambda mod, value: (mod.num_features,))

    def calibrate(model: Any) -> None:
        for batch in BLOCKS[:, :-1].split(MICRO_BATCH):
            model(batch, torch.arange(batch.shape[1]).expand_as(batch), None)

    divisors = dict.fromkeys(("hidden_size", "ffn_hidden_size", "num_heads_per_group", "num_query_groups"), 1)
    sizes = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    config = {"megatron.core.models.gpt.GPTModel": {f"{name}_divisor": one for name, one in divisors.items()}}
    return mtp.prune(
        chunk,
        mode=[("mcore_minitron", config)],
        constraints={"export_config": {name: getattr(TARGET, name) for name in sizes}},
        dummy_input=None,
        config={"forward_loop": calibrate},
    )


class Found(NamedTuple):
    """Both sides' results on one model."""

    scores: Any
    kept: Any
    pruned: Any
    activations: dict[str, Any]  # ModelOpt's sums of squares, by module
    layer_scores: dict[int, float]
    contexts: list[torch.Tensor]  # input of linear_proj, [s, b, A * D] in float64, of all samples at once


@pytest.fixture(scope="module")
def found() -> Found:
    with one_process() as groups:
        chunks = live(random_checkpoint(), groups)
        scores = score_model(chunks, BLOCKS, groups, shape=SHAPE, micro_batch_size=MICRO_BATCH)
        contexts: list[torch.Tensor] = []
        for layer in chunks[0].decoder.layers:
            layer.self_attention.linear_proj.register_forward_pre_hook(lambda _, a: contexts.append(a[0].double()))
        logits(chunks, BLOCKS[:, :-1])
        (chunk,) = live(random_checkpoint(), groups)
        pruned, state = modelopt_prune(chunk)
    kept = choose_units(scores, SHAPE, TARGET)
    return Found(scores, kept, pruned, state["activations_per_rank"][0], state["layer_scores"], contexts)


def test_scores_of_neurons_channels_and_layers_agree(found: Found) -> None:
    for layer in range(SHAPE.num_layers):
        theirs = found.activations[f"decoder.layers.{layer}.mlp"].sqrt()
        torch.testing.assert_close(theirs.double(), found.scores.ffn[layer], rtol=1e-5, atol=1e-7)
        # Theirs add up over the micro-batches.
        batches = len(BLOCKS) // MICRO_BATCH
        assert found.layer_scores[layer + 1] / batches == pytest.approx(float(found.scores.layers[layer]), rel=1e-5)
    theirs = torch.stack([squares.sqrt() for squares in found.activations[""].values()]).sum(0)
    torch.testing.assert_close(theirs.double(), found.scores.hidden, rtol=1e-5, atol=1e-6)


def kept_columns(pruned: torch.Tensor, whole: torch.Tensor) -> list[int]:
    """Which entries of a row of distinct numbers are left."""
    return sorted(int((whole == value).nonzero()) for value in pruned)


def test_the_same_neurons_and_channels_stay(found: Found) -> None:
    weight = random_checkpoint().weights.tensor
    hidden = kept_columns(found.pruned.decoder.final_layernorm.weight, weight("decoder.final_layernorm.weight"))
    assert hidden == list(found.kept.hidden)
    first = int((weight("decoder.final_layernorm.weight") == found.pruned.decoder.final_layernorm.weight[0]).nonzero())
    for layer, block in enumerate(found.pruned.decoder.layers):
        whole = weight(f"decoder.layers.{layer}.mlp.linear_fc2.weight")[first]
        assert kept_columns(block.mlp.linear_fc2.weight[0], whole) == list(found.kept.ffn[layer])


def modelopt_heads(squares: torch.Tensor) -> torch.Tensor:
    """``[A * D]`` sums over samples of squared means -> ``[A]``."""
    return squares.sqrt().view(Q * G, D).norm(dim=1)


def test_heads_differ_by_definition(found: Found) -> None:
    """ModelOpt aggregates each channel of a head by itself, then takes the norm over the channels; the paper (and we)
    take the norm over the channels, token by token, and aggregate that. Its formula, from the same activations."""
    for layer, context in enumerate(found.contexts):
        squares = context.abs().mean(0).square().sum(0)
        theirs = found.activations[f"decoder.layers.{layer}.self_attention"]
        torch.testing.assert_close(theirs.double(), squares, rtol=1e-5, atol=1e-7)
        ours = context.view(*context.shape[:2], Q * G, D).norm(dim=-1).mean(0).square().sum(0).sqrt()
        torch.testing.assert_close(found.scores.heads[layer], ours, rtol=1e-5, atol=1e-7)
        # One is never above the other (Minkowski's inequality), and they rank heads much alike.
        assert (modelopt_heads(squares) <= ours * (1 + 1e-6)).all()
        assert torch.corrcoef(torch.stack([modelopt_heads(squares), ours]))[0, 1] > 0.9


def test_query_groups_differ_by_the_order_of_heads(found: Found) -> None:
    """ModelOpt sums a group's importance over heads ``g, g + G, g + 2G, ...``; but the heads of group ``g`` stand
    together, ``gq .. gq + q - 1`` (as its own slicing of the same matrix has it). With one head a group, or one group,
    the two are the same."""
    weight = random_checkpoint().weights.tensor
    first = int((weight("decoder.final_layernorm.weight") == found.pruned.decoder.final_layernorm.weight[0]).nonzero())
    mixed = 0
    for layer, block in enumerate(found.pruned.decoder.layers):
        heads = modelopt_heads(found.activations[f"decoder.layers.{layer}.self_attention"])
        strided, together = heads.view(Q, G).norm(dim=0), heads.view(G, Q).norm(dim=1)
        whole = weight(f"decoder.layers.{layer}.self_attention.linear_proj.weight")[first]
        columns = kept_columns(block.self_attention.linear_proj.weight[0], whole)
        stay = {column // (Q * D) for column in columns}
        assert stay == set(strided.topk(TARGET.num_query_groups).indices.tolist())
        mixed += stay != set(together.topk(TARGET.num_query_groups).indices.tolist())
        # Within the groups it keeps, its heads are its best.
        for group in stay:
            head = group * Q + int(heads.view(G, Q)[group].argmax())
            assert [column for column in columns if column // (Q * D) == group] == list(range(head * D, head * D + D))
    assert mixed, "on this model the two orders choose alike: take another seed"
