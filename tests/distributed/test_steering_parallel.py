"""The attribute model, SteerLM 2 and REINFORCE in one process, tensor parallel, pipelined, and after a kill."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.chat import byte_tokenizer
from support.checkpoints import tiny_hf_model
from support.distributed import run_distributed

STEPS, SAVED, BATCH = 6, 3, 4
#: SteerLM 2 has fewer.
STEPS2, SAVED2 = 4, 2
SCHEMA = ("helpfulness", "verbosity")


class Killed(Exception):
    """What stops a training in the middle of a step."""


class Dying(list):  # type: ignore[type-arg]
    """Samples that end the process's training when so many were read."""

    left = 10**9

    def __getitem__(self, index: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Killed
        return super().__getitem__(index)


def samples(count: int, seed: int) -> list[Any]:
    """Random tokens of lengths that differ, with values, some of them missing."""
    from nemo_minitron.alignment.reward import NO_VALUE, ScoredSample

    draw = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        ids = torch.randint(3, 256, (int(torch.randint(4, 20, (1,), generator=draw)),), generator=draw).tolist()
        values = torch.randint(0, 5, (2,), generator=draw).float().tolist()
        found.append(ScoredSample(ids, [NO_VALUE, values[1]] if number % 3 == 0 else values))
    return found


def train(model: str, out: str, layout: dict[str, int], dies_after: int | None = None) -> dict[str, Any]:
    """Train the attribute model; metrics by step, its head, its predictions by NeMo-Aligner and by ours."""
    from nemo_minitron.alignment.attribute_model import AttributeModel, AttributeScorer
    from nemo_minitron.alignment.reward import read_head, train_reward
    from nemo_minitron.alignment.settings import Schedule
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.data.attributes import AttributeSchema
    from nemo_minitron.runtime.files import read_json_lines
    from nemo_minitron.runtime.groups import ParallelLayout, current

    schema, parallel = AttributeSchema("own", SCHEMA, 4), ParallelLayout(**layout)
    source, directory = open_checkpoint(model), Path(out) / "reward"
    data = Dying(samples(32, 1))
    if dies_after is not None:
        data.left = dies_after * BATCH
    schedule = Schedule(
        steps=STEPS, micro_batch_size=2, global_batch_size=BATCH, lr=1e-2, min_lr=1e-3, warmup_steps=1,
        validate_every=SAVED, save_every=SAVED,
    )  # fmt: skip
    try:
        last = train_reward(
            source, data, samples(8, 2), schema=schema, layout=parallel, schedule=schedule, directory=directory,
            max_length=32,
        )  # fmt: skip
    except Killed:
        return {"killed": True}
    lines = read_json_lines(directory / "metrics.jsonl")
    weight, bias = read_head(last)
    groups = current(parallel)
    trained = AttributeModel(Path(model), schema, "own", False, weight, bias)
    scores = AttributeScorer(trained, groups).scores([one.ids for one in samples(7, 3)], micro_batch_size=2)
    return {
        "loss": {line["step"]: line["loss"] for line in lines if "split" not in line},
        "validation": {line["step"]: line["loss"] for line in lines if "split" in line},
        "weight": weight,
        "bias": bias,
        "scores": scores,
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny tied Llama with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("steering") / "hf"
    tiny_hf_model(
        folder, tied=True, vocab_size=260, num_hidden_layers=2, hidden_size=32, intermediate_size=64,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, eos_token_id=256, pad_token_id=None,
        bos_token_id=None, max_position_embeddings=128,
    )  # fmt: skip
    byte_tokenizer(folder, chat_template="{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    return str(folder)


def gradients(model: str, out: str) -> dict[str, Any]:
    """Loss and some gradients of one batch by NeMo-Aligner's model as it is set up for training."""
    from nemo_minitron.alignment.reward import AttributeRewardModel, ScoredSamples, _settings, _start_head, collate
    from nemo_minitron.alignment.session import open_session
    from nemo_minitron.alignment.settings import Schedule
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.runtime.groups import ParallelLayout

    batch = samples(4, 5)
    schedule = Schedule(steps=2, micro_batch_size=4, global_batch_size=4, warmup_steps=1)
    session = open_session(
        AttributeRewardModel, open_checkpoint(model), layout=ParallelLayout(), schedule=schedule, kind="rm",
        directory=Path(out), samples=4, held_out=4, max_length=32, model=_settings(2, schedule), skip=("rm_head",),
    )  # fmt: skip
    _start_head(session, batch, 7)
    session.start(session.loader(ScoredSamples(batch), collate, training=True))
    aligner = session.model
    aligner.prepare_for_training_step()
    loss, _ = aligner.get_loss_and_metrics(collate(batch), forward_only=False)
    aligner.finish_training_step()
    (chunk,) = aligner.get_model_module_list()
    named = dict(chunk.named_parameters())
    wanted = ("rm_head.weight", "rm_head.bias", "embedding.word_embeddings.weight", "decoder.final_layernorm.weight")
    return {
        "loss": loss,
        "head": (named["rm_head.weight"].detach().clone(), named["rm_head.bias"].detach().clone()),
        "gradients": {name: named[name].main_grad.clone() for name in wanted},
    }


def reinforce(model: str, out: str, layout: dict[str, int], dies_after: int | None = None) -> dict[str, Any]:
    """REINFORCE by a rule: a point for an even first token, and a little for a short answer."""
    from nemo_minitron.alignment.reinforce import Prompt, Rollouts, train_reinforce
    from nemo_minitron.alignment.settings import Schedule
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.generation import Sampling
    from nemo_minitron.runtime.files import read_json_lines
    from nemo_minitron.runtime.groups import ParallelLayout

    seen: list[Any] = []

    def rewards(numbers: list[int], answers: list[Any]) -> list[float]:
        if dies_after is not None and len(seen) >= dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        values = [(one.tokens[0] % 2 == 0) + 0.1 / len(one.tokens) for one in answers]
        seen.append((numbers, [one.tokens for one in answers], [one.finish for one in answers], values))
        return values

    directory = Path(out) / "reinforce"
    prompts = [Prompt(number, list(range(130 + number, 133 + number + number % 5))) for number in range(64)]
    rollouts = Rollouts(
        Sampling(max_new_tokens=6, seed=3), ends=tuple(range(128)), vocab_size=260, prompts_per_step=8,
        samples_per_prompt=8, validation_prompts=64, kl_penalty=0.01, batch_size=64,
    )  # fmt: skip
    schedule = Schedule(
        steps=STEPS, micro_batch_size=64, global_batch_size=64, lr=5e-3, min_lr=1e-3, warmup_steps=1,
        validate_every=SAVED, save_every=SAVED,
    )  # fmt: skip
    train_reinforce(
        open_checkpoint(model), prompts, prompts, rewards, rollouts, layout=ParallelLayout(**layout),
        schedule=schedule, directory=directory, max_length=32,
    )  # fmt: skip
    lines = read_json_lines(directory / "metrics.jsonl")
    names = ("loss", "reward", "rewards_with_kl", "kl", "ended")
    return {
        "lines": {line["step"]: {name: line[name] for name in names} for line in lines if "split" not in line},
        "validation": {line["step"]: line["reward"] for line in lines if "split" in line},
        "first": seen[1:9],  # after the first validation, one call a sample of each prompt
        "prompts": [prompt.ids for prompt in prompts],
    }


def responses(count: int, seed: int) -> list[Any]:
    """Groups of three answers to random prompts."""
    from nemo_minitron.alignment.steerlm2 import Responses

    draw = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=draw))
        return list(torch.randint(3, 256, (length,), generator=draw).tolist())

    return [
        Responses(
            ids(3, 8),
            [ids(2, 9) for _ in range(3)],
            (-20 - 10 * torch.rand(3, generator=draw)).tolist(),
            (-20 - 10 * torch.rand(3, generator=draw)).tolist(),
        )
        for _ in range(count)
    ]


def steerlm2(model: str, out: str, layout: dict[str, int], dies_after: int | None = None) -> dict[str, Any]:
    """SteerLM 2 on given answers."""
    from nemo_minitron.alignment.settings import Schedule
    from nemo_minitron.alignment.steerlm2 import train_steerlm2
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.runtime.files import read_json_lines
    from nemo_minitron.runtime.groups import ParallelLayout

    schedule = Schedule(
        steps=STEPS2, global_batch_size=BATCH, lr=1e-3, min_lr=1e-4, warmup_steps=1, validate_every=SAVED2,
        save_every=SAVED2,
    )  # fmt: skip
    data = Dying(responses(8, 1))
    if dies_after is not None:
        data.left = dies_after * BATCH
    try:
        train_steerlm2(
            open_checkpoint(model), 8, 4, lambda chunks, groups: (data, responses(8, 1)[:4]),
            layout=ParallelLayout(**layout), schedule=schedule, directory=Path(out) / "steerlm2", max_length=32,
        )  # fmt: skip
    except Killed:
        return {"killed": True}
    lines = read_json_lines(Path(out) / "steerlm2" / "metrics.jsonl")
    return {
        part: {line["step"]: {name: line[name] for name in ("loss", "distance")} for line in lines
               if ("split" in line) is (part == "validation")}
        for part in ("train", "validation")
    }  # fmt: skip


def everything(model: str, out: str, layout: dict[str, int]) -> dict[str, Any]:
    """All trainings, in one process."""
    return {
        "reward": train(model, out, layout),
        "steerlm2": steerlm2(model, out, layout),
        "reinforce": reinforce(model, out, layout),
    }


def dying(model: str, out: str, layout: dict[str, int]) -> None:
    """Each of them to the step after the one that follows its first checkpoint; the last takes the process with it."""
    assert train(model, out, layout, SAVED + 1) == {"killed": True}
    assert steerlm2(model, out, layout, SAVED2 + 1) == {"killed": True}
    reinforce(model, out, layout, 1 + 8 * (SAVED + 1) + 1)


def alone(model: str, out: str) -> dict[str, Any]:
    """All trainings in one process, and the gradients of one batch."""
    return {
        "gradients": gradients(model, out + "/reference"),
        **everything(model, out, {}),
        "stages": stages(model, Path(out) / "stages"),
    }


def stages(model: str, out: Path) -> dict[str, Any]:
    """The stages one after the other, each on what the one before left; the metrics of each."""
    import dataclasses

    from nemo_minitron.config import (
        ChatDataConfig,
        LabelConfig,
        ReinforceConfig,
        RewardConfig,
        Steerlm2Config,
    )
    from nemo_minitron.stages import label, reinforce, reward, steerlm2

    out.mkdir(parents=True)
    rows = [
        {"prompt": f"q{number}", "response": "a b c d e f g h"[: 1 + 2 * (number % 8)],
         "attributes": {"verbosity": number % 8 // 2}}
        for number in range(24)
    ]  # fmt: skip
    (out / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ChatDataConfig(path=str(out / "chats.jsonl"), template="chatml", max_length=80, held_out_fraction=0.2)
    common = {
        "model": model, "steps": 2, "global_batch_size": 4, "warmup_steps": 1, "validate_every": 2, "save_every": 2,
        "verify": False,
    }  # fmt: skip
    found: dict[str, Any] = {}
    of_reward = RewardConfig(output=str(out / "reward"), data=data, **common)
    found["reward"] = reward.run(of_reward)
    of_steerlm2 = Steerlm2Config(
        output=str(out / "steerlm2"), base=model, attribute_model=of_reward.output, data=data, samples_per_prompt=2,
        max_new_tokens=6, **common,
    )  # fmt: skip
    found["steerlm2"] = steerlm2.run(of_steerlm2)
    of_reinforce = ReinforceConfig(
        output=str(out / "reinforce"), reward=of_reward.output, data=data, samples_per_prompt=2, prompts_per_step=2,
        validation_prompts=2, max_new_tokens=6, **common,
    )  # fmt: skip
    found["reinforce"] = reinforce.run(of_reinforce)
    found["stopped"] = {
        name: stopped_and_resumed(module, dataclasses.replace(config, output=f"{config.output}-stopped"))
        for name, module, config in (
            ("reward", reward, of_reward), ("steerlm2", steerlm2, of_steerlm2), ("reinforce", reinforce, of_reinforce),
        )
    }  # fmt: skip
    of_label = LabelConfig(output=str(out / "labels"), reward=of_reward.output, data=data, batch=5)
    found["label"] = label.run(of_label)
    labelled = (out / "labels" / "labelled.jsonl").read_text().splitlines()
    scores = [list(json.loads(line)["predicted"].values()) for line in labelled]
    found["again"] = label.run(dataclasses.replace(of_label, batch=7))
    found["predicted"] = scores
    return found


def stopped_and_resumed(stage: ModuleType, config: Any) -> str:
    """SIGUSR1 comes in the first step; then the same command again. Returns what the first one said."""
    from nemo_minitron.alignment.metrics import MetricsLog
    from nemo_minitron.errors import PreemptedError

    logged: Callable[..., None] = MetricsLog.log_metrics

    def signalled(self: MetricsLog, metrics: dict[str, Any], step: int, prefix: str = "") -> None:
        logged(self, metrics, step, prefix)
        if prefix == "train/":
            os.kill(os.getpid(), signal.SIGUSR1)

    MetricsLog.log_metrics = signalled  # type: ignore[method-assign]
    said = "nothing"
    try:
        stage.run(config)
    except PreemptedError as error:
        said = str(error)
    finally:
        MetricsLog.log_metrics = logged  # type: ignore[method-assign]
    stage.run(config)
    return said


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
