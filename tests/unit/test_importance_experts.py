"""Scores of a mixture of experts, against each expert worked out by hand."""

from __future__ import annotations

import pytest
import torch
from support.mixture import MIXTURE, TOPK, live_mixture, random_mixture
from support.pruning import one_process, tokens

from nemo_minitron.errors import ShapeError
from nemo_minitron.importance import magnitude_scores, score_criteria, score_model

E, F, H = MIXTURE.num_moe_experts, MIXTURE.ffn_hidden_size, MIXTURE.hidden_size


@pytest.fixture(scope="module")
def groups():
    with one_process() as found:
        yield found


class PlainMixture(torch.nn.Module):
    """Mixtral's block written out: softmax over the two best experts' logits, every expert on every token."""

    def __init__(self, mlp, keep):
        super().__init__()
        self.mlp, self.keep = mlp, keep

    def forward(self, x):  # [s, b, H]
        best, index = (x @ self.mlp.router.weight.T).topk(TOPK, -1)
        weights = torch.zeros(*x.shape[:2], E, dtype=x.dtype).scatter(-1, index, best.softmax(-1))
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.mlp.experts.local_experts):
            gate, up = (x @ expert.linear_fc1.weight.T).chunk(2, -1)
            a = torch.nn.functional.silu(gate) * up * weights[..., number : number + 1]
            out = a @ expert.linear_fc2.weight.T
            self.keep(a, out)
            total = total + out
        return total, None


def reference(groups, blocks, estimator) -> tuple[torch.Tensor, torch.Tensor]:
    """``[b, L, E, F]`` and ``[b, L, E]`` values of each sample, all tokens at once."""
    (chunk,) = live_mixture(groups)
    chunk.eval()
    seen: list[torch.Tensor] = []

    def keep(*tensors):
        for tensor in tensors:
            if estimator == "taylor":
                tensor.retain_grad()
            seen.append(tensor)

    for layer in chunk.decoder.layers:
        layer.mlp = PlainMixture(layer.mlp, keep)
    ids = blocks[:, :-1]
    logits = chunk(ids, torch.arange(ids.shape[1]).expand_as(ids), None)[..., : MIXTURE.vocab_size]
    torch.nn.functional.cross_entropy(logits.transpose(1, 2), blocks[:, 1:], reduction="none").mean(1).sum().backward()
    ffn, experts = seen[::2], seen[1::2]
    if estimator == "taylor":
        by_ffn = [(a.detach() * a.grad).sum(0).abs() for a in ffn]
        by_expert = [(out.detach() * out.grad).sum((0, 2)).abs() for out in experts]
    else:
        by_ffn = [a.detach().abs().mean(0) for a in ffn]
        by_expert = [out.detach().norm(dim=-1).mean(0) for out in experts]
    rows, layers = len(blocks), MIXTURE.num_layers
    return torch.stack(by_ffn, 1).view(rows, layers, E, F), torch.stack(by_expert, 1).view(rows, layers, E)


@pytest.mark.parametrize("estimator", ["activation", "taylor"])
def test_experts_and_their_neurons(groups, estimator):
    blocks = tokens(5, 13)
    scores = score_model(live_mixture(groups), blocks, groups, shape=MIXTURE, micro_batch_size=2, estimator=estimator)
    ffn, experts = (values.square().sum(0).sqrt() for values in reference(groups, blocks, estimator))
    assert scores.ffn.shape == (MIXTURE.num_layers, E, F)
    # Megatron's router takes its softmax in float32.
    torch.testing.assert_close(scores.ffn, ffn, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(scores.experts, experts, rtol=1e-5, atol=1e-7)


def test_an_expert_that_no_token_reaches(groups):
    """Its scores are zero by every estimator and criterion, and no one else's are."""
    chunks = live_mixture(groups)
    router = chunks[0].decoder.layers[1].mlp.router
    gating = router.gating
    router.gating = lambda x: gating(x).index_fill(-1, torch.tensor([2]), float("-inf"))
    cases = (("activation", [("mean", "l2"), ("variance", "variance")]), ("taylor", [("sum", "max")]))
    for estimator, criteria in cases:
        options = {"shape": MIXTURE, "criteria": criteria, "estimator": estimator}
        for scores in score_criteria(chunks, tokens(3, 9), groups, **options):
            assert (scores.experts[1] > 0).tolist() == [True, True, False, True]
            assert (scores.ffn[1, 2] == 0).all()
            assert (scores.experts[0] > 0).all()


def test_magnitude_by_expert():
    """Each expert's matrices and its row of the router; each neuron's rows and column."""
    checkpoint = random_mixture()
    scores, tensors = magnitude_scores(checkpoint), checkpoint.weights.tensors

    up, down = (
        tensors[f"decoder.layers.1.mlp.experts.local_experts.2.{linear}.weight"].double()
        for linear in ("linear_fc1", "linear_fc2")
    )
    router = tensors["decoder.layers.1.mlp.router.weight"][2].double()
    neuron = torch.cat([up[3], up[F + 3], down[:, 3]])
    assert float(scores.ffn[1, 2, 3]) == pytest.approx(float(neuron.norm()), rel=1e-9)
    expert = torch.cat([up.flatten(), down.flatten(), router])
    assert float(scores.experts[1, 2]) == pytest.approx(float(expert.norm()), rel=1e-9)
    whole = torch.cat([x.double().flatten() for name, x in tensors.items() if name.startswith("decoder.layers.1.")])
    assert float(scores.layers[1]) == pytest.approx(float(whole.norm()), rel=1e-9)


def test_experts_in_one_grouped_matrix_are_refused(groups):
    chunks = live_mixture(groups)
    del chunks[0].decoder.layers[1].mlp.experts.local_experts
    with pytest.raises(ShapeError, match=r"layers\.1: has no mlp\.experts\.local_experts \(MoELayer\).*grouped_gemm"):
        score_model(chunks, tokens(2, 5), groups, shape=MIXTURE)


def test_losses_after_reconstruction_by_expert(groups):
    """From each expert's inputs over all tokens, zero where a token went to others; in float64."""
    from nemo_minitron.importance.elimination import eliminate

    blocks = tokens(5, 13)
    scores = score_model(
        live_mixture(groups), blocks, groups, shape=MIXTURE, micro_batch_size=2, estimator="reconstruction"
    )
    (chunk,) = live_mixture(groups)
    chunk.eval()
    seen: list[torch.Tensor] = []
    for layer in chunk.decoder.layers:
        layer.mlp = PlainMixture(layer.mlp, lambda *tensors: seen.extend(tensors))
    ids = blocks[:, :-1]
    with torch.no_grad():
        chunk(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
    for index, layer in enumerate(chunk.decoder.layers):
        for number, expert in enumerate(layer.mlp.mlp.experts.local_experts):
            a, out = seen[2 * (index * E + number) :][:2]
            weight = expert.linear_fc2.weight.detach()
            x = a.flatten(0, 1)
            # Megatron's router takes its softmax in float32.
            torch.testing.assert_close(
                scores.ffn[index, number], eliminate(x.T @ x, weight.T @ weight), rtol=1e-4, atol=1e-7
            )
            assert float(scores.experts[index, number]) == pytest.approx(float(out.square().sum()), rel=1e-5)
