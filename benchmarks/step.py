"""Speed of a distillation step, of evaluation, scoring and generation against plain transformers code.

    python benchmarks/step.py [--quick] [--precision 32 ...] [--logits whole ...] [--only NAME ...] [--threads N]

The teacher has the sizes of SmolLM2-135M, the student 28 of its layers with 832 neurons; weights are random. Our step
is that of ``distill``: NeMo's trainer, Megatron's model and distributed optimizer. The plain one is a loop:
transformers' models, ``log_softmax`` of both logits, the KL by ``kl_div``, clipping and ``torch.optim.AdamW``, under
autocast in bf16. Each side is a process of its own below this one, and they take turns step by step, so what else runs
on the machine slows both; the first two steps warm up. Seconds are the processor's (user and system, all threads), the
median over the steps: with one thread those of an idle machine.

``evaluation`` is the loss of blocks, ``generation`` greedy with a key/value cache, ``scoring`` all criteria of the
activations beside transformers' forward pass alone. After its last turn each side of a step runs once more under
torch's profiler; the table says where its time goes. The last line is JSON: ``step_speed_ratio`` by precision, and the
same of the others: tokens a second of ours over plain ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "teacher": {"num_hidden_layers": 30, "intermediate_size": 1536},
    "student": {"num_hidden_layers": 28, "intermediate_size": 832},
}
QUICK = {"num_hidden_layers": 4}
ROWS, LENGTH, NEW_TOKENS, RATE = 2, 256, 32, 3e-4
FORWARD = ("evaluation", "scoring", "generation")
#: A kind of work, and what the names of its operators hold.
WORK = {
    "matrix products": ("mm", "linear", "attention", "convolution"),
    "copies and casts": ("copy_", "clone", "contiguous", "cat", "fill_", "zero_"),
    "optimizer": ("adam", "foreach", "addcdiv", "lerp", "sqrt"),
    "softmax and exponentials": ("softmax", "exp", "log", "kl_div", "amax", "sum"),
}


def models(folder: Path, *, quick: bool) -> None:
    """Both models with one tokenizer, as transformers saves them."""
    import torch
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{index}": index for index in range(3, 49152)}
    raw = Tokenizer(kinds.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for seed, (name, sizes) in enumerate(SIZES.items()):
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=576, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
            rope_theta=1e5, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, **{**sizes, **(QUICK if quick
            else {})},
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def blocks(count: int) -> Any:
    """``[n, s + 1]`` random tokens."""
    import torch

    return torch.randint(3, 49152, (count, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def work_of(averages: Any) -> dict[str, float]:
    """Seconds by kind of work, from a profile."""
    found = dict.fromkeys([*WORK, "others"], 0.0)
    for entry in averages:
        name = entry.key.lower()
        kind = next((kind for kind, parts in WORK.items() if any(part in name for part in parts)), "others")
        found[kind] += entry.self_cpu_time_total / 1e6
    return found


class Turns:
    """This side's turns: waits until it is asked for a step, and says what the step took."""

    def __init__(self) -> None:
        # What libraries print goes elsewhere.
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._started: float | None = None
        self._profile: Any = None

    def next(self) -> bool:
        """Report the step that has ended, if any, and wait; False when there is no further one."""
        if self._started is not None:
            answer: dict[str, Any] = {"seconds": time.process_time() - self._started}
            if self._profile is not None:
                self._profile.stop()
                answer["work"] = work_of(self._profile.key_averages())
                self._profile = None
            self._answers.write(json.dumps(answer) + "\n")
        else:
            self._answers.write("ready\n")
        self._answers.flush()
        order = sys.stdin.readline().strip()
        if order not in ("step", "profile"):
            return False
        if order == "profile":
            from torch.profiler import profile

            self._profile = profile()
            self._profile.start()
        self._started = time.process_time()
        return True


def our_steps(turns: Turns, folder: Path, precision: str, logits: str) -> None:
    """The training of ``distill``."""
    import lightning.pytorch as pl

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.distillation import recipe
    from nemo_minitron.runtime.groups import ParallelLayout

    class Stop(Exception):
        pass

    class InTurn(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            if not turns.next():
                raise Stop

        def on_train_batch_end(self, *_: Any) -> None:
            if not turns.next():
                raise Stop

    train = recipe.train

    def in_turn(*arguments: Any, callbacks: Sequence[pl.Callback] = (), **settings: Any) -> Any:
        return train(*arguments, callbacks=[*callbacks, InTurn()], **settings)

    recipe.train = in_turn  # type: ignore[assignment]
    data = blocks(64)
    schedule = recipe.Schedule(
        steps=1000, micro_batch_size=ROWS, global_batch_size=ROWS, lr=RATE, min_lr=RATE / 10, warmup_steps=1,
        validate_every=1000, validation_batches=1, save_every=1000, precision=precision, logits=logits,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        try:
            recipe.distill(
                *(open_checkpoint(folder / name) for name in ("student", "teacher")),
                data,
                data[:ROWS],
                layout=ParallelLayout(),
                schedule=schedule,
                directory=Path(out),
            )
        except Stop:
            os._exit(0)  # the directory is the parent's to remove


def plain_steps(turns: Turns, folder: Path, precision: str) -> None:
    """The loop that anybody writes."""
    import torch
    from transformers import AutoModelForCausalLM

    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("student", "teacher"))
    teacher.requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    data, step = blocks(64), 0
    while turns.next():
        batch = data[step * ROWS % 64 :][:ROWS, :-1]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32"):
            with torch.no_grad():
                wanted = teacher(batch).logits
            given = student(batch).logits
        loss = torch.nn.functional.kl_div(
            given.float().log_softmax(-1).flatten(0, 1), wanted.float().log_softmax(-1).flatten(0, 1),
            log_target=True, reduction="batchmean",
        )  # fmt: skip
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1


def our_forward(what: str, folder: Path, precision: str) -> Callable[[], Any]:
    """Evaluation, scoring or generation with Megatron's model."""
    import torch

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.checkpoints.live import load_into
    from nemo_minitron.runtime.groups import ParallelLayout, initialize
    from nemo_minitron.runtime.model import build_model

    groups = initialize(ParallelLayout())
    checkpoint = open_checkpoint(folder / "teacher")
    dtype = torch.float32 if precision == "32" else torch.bfloat16
    chunks = build_model(checkpoint.shape, checkpoint.architecture, groups, dtype=dtype)
    load_into(chunks, checkpoint, groups)
    vocabulary, data = checkpoint.shape.vocab_size, blocks(ROWS)
    if what == "evaluation":
        from nemo_minitron.runtime.forward import block_losses

        return lambda: block_losses(chunks, groups, data, ROWS, vocab_size=vocabulary)
    if what == "scoring":
        from nemo_minitron.importance import score_criteria

        return lambda: score_criteria(
            chunks, data, groups, criteria=[("mean", "l2")], shape=checkpoint.shape, micro_batch_size=ROWS
        )
    from nemo_minitron.generation import Sampling, generate_tokens

    sampling = Sampling(max_new_tokens=NEW_TOKENS, greedy=True)
    prompts = data[:, : LENGTH // 4].tolist()
    return lambda: generate_tokens(chunks, groups, prompts, sampling=sampling, ends=[], vocab_size=vocabulary)


def plain_forward(what: str, folder: Path, precision: str) -> Callable[[], Any]:
    """The same with transformers; beside scoring the forward pass that it needs."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if precision == "32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", torch_dtype=dtype).eval()
    data = blocks(ROWS)

    @torch.no_grad()
    def run() -> Any:
        if what == "generation":
            prompts = data[:, : LENGTH // 4]
            return model.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=NEW_TOKENS,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        if what == "scoring":
            return model.model(data[:, :-1])
        logits = model(data[:, :-1]).logits.float()
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), data[:, 1:], reduction="none").mean(1)

    return run


def side(whose: str, what: str, folder: Path, precision: str, logits: str, threads: int) -> None:
    """One process: ours or the plain one."""
    turns = Turns()
    import torch

    if whose == "ours":
        from nemo_minitron.runtime import cpu

        cpu.prepare("cpu")
    torch.set_num_threads(threads)
    if what == "step":
        if whose == "ours":
            our_steps(turns, folder, precision, logits)
        else:
            plain_steps(turns, folder, precision)
        return
    run = (our_forward if whose == "ours" else plain_forward)(what, folder, precision)
    while turns.next():
        run()


def compare(what: str, folder: Path, precision: str, logits: str, threads: int, steps: int) -> dict[str, Any]:
    """Both sides in turn: median seconds of each, their ratio, and where the time of a step goes."""
    processes = {
        whose: subprocess.Popen(
            [sys.executable, __file__, "--side", whose, what, str(folder), precision, logits, str(threads)],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for whose in ("ours", "plain")
    }

    def ask(whose: str, order: str) -> dict[str, Any]:
        process = processes[whose]
        assert process.stdin is not None
        assert process.stdout is not None
        if order != "ready":
            process.stdin.write(order + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"{what} ({precision}, {whose}): the process ended with code {process.wait()}")
        return {} if order == "ready" else dict(json.loads(line))

    for whose in processes:
        ask(whose, "ready")
    seconds: dict[str, list[float]] = {whose: [] for whose in processes}
    for turn in range(steps + 2):
        for whose in processes:
            taken = ask(whose, "step")["seconds"]
            if turn >= 2:
                seconds[whose].append(taken)
    found: dict[str, Any] = {whose: {"seconds": median(taken)} for whose, taken in seconds.items()}
    for whose, process in processes.items():
        if what == "step":
            found[whose]["work"] = ask(whose, "profile")["work"]
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    tokens = ROWS * (NEW_TOKENS if what == "generation" else LENGTH)
    for whose in processes:
        found[whose]["tokens_per_second"] = tokens / found[whose]["seconds"]
    return {
        "what": what,
        "precision": precision,
        "logits": logits,
        "speed_ratio": found["plain"]["seconds"] / found["ours"]["seconds"],
        **found,
    }


def show(case: dict[str, Any]) -> None:
    """A case's lines."""
    print(f"{case['what']} {case['precision']} logits={case['logits']}: speed ratio {case['speed_ratio']:.2f}")
    for whose in ("ours", "plain"):
        row = case[whose]
        work = ", ".join(f"{kind} {seconds:.2f}" for kind, seconds in row.get("work", {}).items())
        print(f"  {whose:6} {row['seconds']:7.3f} s  {row['tokens_per_second']:8.1f} tokens/s  {work}", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    """Run the cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a step and evaluation of four layers in fp32, under 50 s")
    parser.add_argument("--precision", nargs="+", choices=("32", "bf16-mixed"))
    parser.add_argument("--logits", nargs="+", choices=("whole", "chunks"))
    parser.add_argument("--only", nargs="+", choices=("step", *FORWARD))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="steps that count; 2 with --quick, else 6")
    arguments = parser.parse_args(words)
    quick = arguments.quick
    steps = arguments.steps or (2 if quick else 6)
    precisions = arguments.precision or (["32"] if quick else ["32", "bf16-mixed"])
    kinds = arguments.only or (["step", "evaluation"] if quick else ["step", *FORWARD])
    forms = arguments.logits or (["whole"] if quick else ["whole", "chunks"])
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        models(Path(folder), quick=quick)
        for precision in precisions:
            for what in kinds:
                for logits in forms if what == "step" else ["whole"]:
                    cases.append(compare(what, Path(folder), precision, logits, arguments.threads, steps))
                    show(cases[-1])
    ratios: dict[str, dict[str, float]] = {}
    for case in cases:
        key = case["precision"] + ("" if case["logits"] == "whole" else " in chunks")
        ratios.setdefault(f"{case['what']}_speed_ratio", {})[key] = case["speed_ratio"]
    print(json.dumps({**ratios, "threads": arguments.threads, "cases": cases}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        whose, what, folder, precision, logits, threads = sys.argv[2:]
        side(whose, what, Path(folder), precision, logits, int(threads))
    else:
        main()
