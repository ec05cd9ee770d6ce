"""The attribute model, SteerLM 2 and REINFORCE in one process, tensor parallel, pipelined, and after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_distributed
from support.steering import STEPS, STEPS2, alone, dying, everything, responses, samples, tiny_chat_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_chat_model(tmp_path_factory.mktemp("steering") / "hf")


@pytest.fixture(scope="module")
def one(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process does."""
    folder = tmp_path_factory.mktemp("one")
    (found,) = run_distributed(alone, 1, folder, timeout=600, model=model, out=str(folder))
    return {**found, "folder": folder}


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_losses_are_those_of_plain_torch(model: str, one: dict[str, Any]) -> None:
    _check_regression(model, **one["gradients"])
    _check_reinforce(model, **one["reinforce"])
    _check_steerlm2(model, one["steerlm2"])


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_the_stages_follow_each_other(one: dict[str, Any]) -> None:
    _check_stages(one["stages"], one["folder"] / "stages")


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_tensor_parallel(model: str, one: dict[str, Any], tmp_path: Path) -> None:
    for other in run_distributed(
        everything, 2, tmp_path, timeout=600, model=model, out=str(tmp_path), layout={"tensor": 2}
    ):
        _check_same(one, other)


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_pipeline_killed_in_the_middle_and_resumed(model: str, one: dict[str, Any], tmp_path: Path) -> None:
    staged = {"model": model, "out": str(tmp_path), "layout": {"pipeline": 2}}
    with pytest.raises(AssertionError, match="exit -9"):
        run_distributed(dying, 2, tmp_path, timeout=600, **staged)
    for other in run_distributed(everything, 2, tmp_path, timeout=600, **staged):
        _check_same(one, other)


def _check_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Every step of every training."""
    reward, reinforced = one["reward"], one["reinforce"]
    assert list(reward["loss"]) == list(reinforced["lines"]) == list(range(1, STEPS + 1))
    for name in ("loss", "validation"):
        assert other["reward"][name] == pytest.approx(reward[name], abs=1e-4)
    for name in ("weight", "bias", "scores"):
        torch.testing.assert_close(other["reward"][name], reward[name], atol=1e-4, rtol=1e-4)
    assert list(other["reinforce"]["lines"]) == list(reinforced["lines"])
    for step, line in other["reinforce"]["lines"].items():
        assert line == pytest.approx(reinforced["lines"][step], abs=1e-4), step
    for part, found in one["steerlm2"].items():
        for step, line in other["steerlm2"][part].items():
            assert line == pytest.approx(found[step], abs=1e-4), (part, step)
    assert other["reinforce"]["validation"] == pytest.approx(reinforced["validation"], abs=1e-4)


def _check_reinforce(
    model: str, lines: dict[int, dict[str, float]], validation: dict[int, float], first: list[Any], prompts: list[Any]
) -> None:
    """The first step's loss from transformers' log-probabilities; and the reward rises."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model).double().eval()
    by_prompt: dict[int, list[tuple[list[int], bool, float]]] = {}
    for numbers, answers, finishes, values in first:
        for number, answer, finish, value in zip(numbers, answers, finishes, values, strict=True):
            by_prompt.setdefault(number, []).append((answer, finish == "stop", value))
    assert [len(group) for group in by_prompt.values()] == [8] * 8
    terms = []
    for number, group in by_prompt.items():
        total, ended = sum(value for _, end, value in group if end), sum(end for _, end, _ in group)
        for answer, end, value in group:
            # NeMo-Aligner's leave-one-out baseline: answers that did not end count for nobody's.
            baseline = value if ended <= 1 else (total - value * end) / (ended - 1)
            ids = torch.tensor([[*prompts[number], *answer]])
            logprobs = policy(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            terms += list(-logprobs[len(prompts[number]) - 1 :] * (value - baseline))
    assert lines[1]["kl"] == pytest.approx(0, abs=1e-5)
    assert lines[1]["loss"] == pytest.approx(torch.stack(terms).mean().item(), abs=1e-4)
    assert lines[STEPS]["kl"] > 0.01
    assert validation[STEPS] > validation[0] + 0.05, "of the same prompts, by the same draws"


def _check_stages(found: dict[str, Any], out: Path) -> None:
    assert found["reward"]["attributes"].keys() == {"verbosity"}, "of the schema, what some answer has a value of"
    assert found["reward"]["samples"] + found["reward"]["held_out"] == 24
    assert found["steerlm2"]["steps"] == found["reinforce"]["steps"] == 2
    for stage, said in found["stopped"].items():
        assert said.startswith("stopped by a signal after step 1 of 2: its state is saved"), (stage, said)
        whole, resumed = (by_step(out / f"{stage}{which}" / "metrics.jsonl") for which in ("", "-stopped"))
        assert {key: resumed[key] for key in whole} == pytest.approx(whole, abs=1e-6), stage
        assert (out / f"{stage}-stopped" / "model" / "minitron.json").is_file()
    assert found["label"]["conversations"] == len(found["predicted"]) == 24
    assert found["label"] | {"kept": 0} == found["again"] | {"kept": 0}
    for name in ("reward/model", "steerlm2/model", "reinforce/model"):
        assert (out / name / "minitron.json").is_file()
    first = json.loads((out / "labels" / "labelled.jsonl").read_text().splitlines()[0])
    assert first["attributes"]["verbosity"] == min(4, max(0, round(first["predicted"]["verbosity"])))


def by_step(metrics: Path) -> dict[tuple[int, str], float]:
    """What each step and each validation told."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {
        (line["step"], f"{line.get('split', 'training')} {name}"): line[name]
        for line in lines
        for name in ("loss", "reward", "kl", "distance", "lr")
        if name in line
    }


def _check_steerlm2(model: str, found: dict[str, Any]) -> None:
    """The first validation's loss and distance by transformers: wanted weights, own weights, likelihoods."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model).double().eval()
    losses, distances = [], []
    for group in responses(8, 1)[:4]:
        likelihoods = []
        for answer in group.answers:
            ids = torch.tensor([[*group.prompt, *answer]])
            logprobs = policy(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            likelihoods.append(logprobs[len(group.prompt) - 1 :].sum())
        log_p, log_q = (torch.tensor(one, dtype=torch.float64) for one in (group.log_p, group.log_q))
        own = (torch.stack(likelihoods).detach() - log_q).softmax(0)
        wanted = (log_p - log_q).softmax(0)
        length = sum(map(len, group.answers)) / len(group.answers)
        losses.append(-((wanted - own) * torch.stack(likelihoods)).sum() / length)
        distances.append(((wanted + 1e-8) * ((wanted + 1e-8) / (own + 1e-8)).log()).sum())
    first = found["validation"][0]
    assert first["loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)
    assert first["distance"] == pytest.approx(torch.stack(distances).mean().item(), abs=1e-3)
    assert found["validation"][STEPS2]["distance"] < first["distance"]


def _check_regression(
    model: str, loss: float, head: tuple[torch.Tensor, torch.Tensor], gradients: dict[str, torch.Tensor]
) -> None:
    """The masked squared error of transformers' last hidden state through the same head, and its gradients."""
    from transformers import AutoModel

    decoder = AutoModel.from_pretrained(model).double().eval()
    weight, bias = (part.double().requires_grad_() for part in head)
    errors = []
    for one in samples(4, 5):
        state = decoder(torch.tensor([one.ids])).last_hidden_state[0, -1]
        wanted = torch.tensor(one.values, dtype=torch.float64)
        errors += [(value - label) ** 2 for value, label in zip(weight @ state + bias, wanted, strict=True)
                   if label != -100]  # fmt: skip
    expected = torch.stack(errors).mean()
    expected.backward()
    assert len(errors) == 6, "two of the eight values are missing"
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    reference = {
        "rm_head.weight": weight.grad,
        "rm_head.bias": bias.grad,
        "embedding.word_embeddings.weight": decoder.embed_tokens.weight.grad,
        "decoder.final_layernorm.weight": decoder.norm.weight.grad,
    }
    for name, wanted in reference.items():
        rows = gradients[name][: len(wanted)]  # the embedding may be padded
        torch.testing.assert_close(rows.double(), wanted, atol=1e-5, rtol=1e-4, msg=name)
