"""Trainings around attribute values on tiny models, and the ways in which they are stopped."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from support.chat import byte_tokenizer
from support.checkpoints import tiny_hf_model
from support.signals import stopped_and_resumed

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
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.config import AlignmentSchedule
    from nemo_minitron.data.chat.attributes import AttributeSchema
    from nemo_minitron.runtime.files import read_json_lines
    from nemo_minitron.runtime.groups import ParallelLayout, current

    schema, parallel = AttributeSchema("own", SCHEMA, 4), ParallelLayout(**layout)
    source, directory = open_checkpoint(model), Path(out) / "reward"
    data = Dying(samples(32, 1))
    if dies_after is not None:
        data.left = dies_after * BATCH
    schedule = AlignmentSchedule(
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


def tiny_chat_model(folder: Path, rows: int = 260) -> str:
    """A tiny tied Llama with a byte tokenizer."""
    tiny_hf_model(
        folder, tied=True, vocab_size=rows, num_hidden_layers=2, hidden_size=32, intermediate_size=64,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, eos_token_id=256, pad_token_id=None,
        bos_token_id=None, max_position_embeddings=128,
    )  # fmt: skip
    byte_tokenizer(folder, chat_template="{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    return str(folder)


def labelled_rows(count: int) -> list[dict[str, Any]]:
    """Conversations whose verbosity is their answer's length."""
    return [
        {"prompt": f"q{number}", "response": "a b c d e f g h"[: 1 + 2 * (number % 8)],
         "attributes": {"verbosity": number % 8 // 2}}
        for number in range(count)
    ]  # fmt: skip


def gradients(model: str, out: str) -> dict[str, Any]:
    """Loss and some gradients of one batch by NeMo-Aligner's model as it is set up for training."""
    from nemo_minitron.alignment.reward import AttributeRewardModel, _settings, _start_head, collate
    from nemo_minitron.alignment.session import open_session
    from nemo_minitron.alignment.supervised import Listed
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.config import AlignmentSchedule
    from nemo_minitron.runtime.groups import ParallelLayout

    batch = samples(4, 5)
    schedule = AlignmentSchedule(steps=2, micro_batch_size=4, global_batch_size=4, warmup_steps=1)
    session = open_session(
        AttributeRewardModel, open_checkpoint(model), layout=ParallelLayout(), schedule=schedule, kind="rm",
        directory=Path(out), samples=4, held_out=4, max_length=32, model=_settings(2, schedule), skip=("rm_head",),
    )  # fmt: skip
    _start_head(session, batch, 7)
    session.start(session.loader(Listed(batch), collate, training=True))
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
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.config import AlignmentSchedule
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
        Sampling(max_new_tokens=6), seed=3, ends=tuple(range(128)), vocab_size=260, prompts_per_step=8,
        samples_per_prompt=8, validation_prompts=64, kl_penalty=0.01, batch_size=64,
    )  # fmt: skip
    schedule = AlignmentSchedule(
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
    from nemo_minitron.alignment.steerlm2 import train_steerlm2
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.config import AlignmentSchedule
    from nemo_minitron.runtime.files import read_json_lines
    from nemo_minitron.runtime.groups import ParallelLayout

    schedule = AlignmentSchedule(
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
    (out / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled_rows(24)))
    data = ChatDataConfig(path=str(out / "chats.jsonl"), template="chatml", max_length=80, held_out_fraction=0.2)
    common = {
        "model": model, "steps": 2, "global_batch_size": 4, "warmup_steps": 1, "validate_every": 2, "save_every": 2,
        "verify": False,
    }  # fmt: skip
    found: dict[str, Any] = {}
    of_reward = RewardConfig(output=str(out / "reward"), data=data, **common)
    found["reward"] = reward.run(of_reward)
    of_steerlm2 = Steerlm2Config(
        output=str(out / "steerlm2"), base=tiny_chat_model(out / "base", rows=272), samples_per_prompt=2,
        attribute_model=of_reward.output, data=data,
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
