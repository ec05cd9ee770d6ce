"""Distillation on the student's own answers: against a plain torch loop on the same answers, in every layout."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_distributed
from support.training import make_models, measured

SEQUENCE, STEPS, BATCH, VOCABULARY, REFRESH, CLIP = 24, 6, 4, 131, 2, 1.02
ENDS = tuple(range(6, 30))  # a random model draws one of these now and then
KIND = "reverse_kl"


def data() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(6, VOCABULARY, (STEPS * BATCH, SEQUENCE + 1), generator=generator)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(6, VOCABULARY, (3 + n % 5,), generator=generator).tolist() for n in range(7)]


def settings(**changes: Any) -> Any:
    """Half of the sequences are answers; those of every second step are stale."""
    from nemo_minitron.config import OnPolicyConfig, Sampling
    from nemo_minitron.distillation.own_answers import OnPolicy

    drawn = {"max_new_tokens": changes.pop("max_new_tokens", 10), "greedy": changes.pop("greedy", False)}
    sampling = Sampling(**drawn, temperature=0.9, top_p=0.95)
    given, ends = changes.pop("prompts", prompts()), changes.pop("ends", ENDS)
    values = {"share": 0.5, "refresh": REFRESH, "max_age": 0, "stale": "reweight", "clip": CLIP, "batch_size": 3}
    return OnPolicy(OnPolicyConfig(sampling=sampling, **{**values, **changes}), given, ends, seed=5)


def train(
    models: str,
    out: str,
    *,
    layout: dict[str, Any] | None = None,
    on_policy: Any = None,
    blocks: Any = None,
    at: int | None = None,
    placed: dict[str, Any] | None = None,
    logits: str = "whole",
) -> str:
    """Distil; with ``at``, rank 0 gets SIGTERM after that step. Returns the error, or ""."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.config import LossConfig
    from nemo_minitron.distillation import on_policy as module
    from nemo_minitron.distillation.recipe import Schedule, distill
    from nemo_minitron.distillation.teachers.placement import TeacherPlacement
    from nemo_minitron.distillation.training import metrics
    from nemo_minitron.errors import MinitronError
    from nemo_minitron.runtime.groups import ParallelLayout, initialize

    unset_num_microbatches_calculator()
    student_layout = ParallelLayout(**(layout or {}))
    placement = TeacherPlacement(**(placed or {}))
    if placement.kind != "own_ranks":
        initialize(student_layout)
    generate, advance = module.generate_tokens, metrics.ProgressBar.on_train_batch_end

    def recorded(*arguments: Any, **keywords: Any) -> Any:
        answers = generate(*arguments, **keywords)
        if torch.distributed.get_rank() == 0:
            lines = [
                {"sample": sample, "prompt": prompt, "tokens": a.tokens, "logprobs": a.logprobs, "finish": a.finish}
                for sample, prompt, a in zip(keywords["requests"], arguments[2], answers, strict=True)
            ]
            Path(out).mkdir(parents=True, exist_ok=True)
            with Path(out, "answers.jsonl").open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        return answers

    def interrupted(self: Any, trainer: Any, *arguments: Any) -> None:
        advance(self, trainer, *arguments)
        if trainer.global_step == at and trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGTERM)

    module.generate_tokens = recorded  # type: ignore[assignment]
    metrics.ProgressBar.on_train_batch_end = interrupted  # type: ignore[method-assign]
    try:
        distill(
            open_checkpoint(Path(models) / "student"),
            open_checkpoint(Path(models) / "teacher"),
            data() if blocks is None else blocks,
            data()[:BATCH],
            layout=student_layout,
            schedule=Schedule(
                steps=STEPS, micro_batch_size=1, global_batch_size=BATCH, lr=3e-3, min_lr=1e-4, warmup_steps=2,
                validate_every=3, validation_batches=1, save_every=100, logits=logits,
            ),
            loss=LossConfig(KIND),
            directory=Path(out),
            placement=placement,
            on_policy=on_policy,
        )  # fmt: skip
    except MinitronError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        module.generate_tokens, metrics.ProgressBar.on_train_batch_end = generate, advance  # type: ignore[method-assign]
    return ""


def answers_of(directory: Path) -> dict[int, dict[str, Any]]:
    """The answers of a training by the number of their sequence."""
    lines = [json.loads(line) for line in (directory / "answers.jsonl").read_text().splitlines()]
    return {line["sample"]: line for line in lines}


def own_blocks(directory: Path) -> Any:
    """The answers of a training as blocks of data, of which only the answers are learned."""
    from nemo_minitron.data.blocks import Blocks

    tokens = torch.zeros(STEPS * BATCH, SEQUENCE + 1, dtype=torch.int64)
    mask = torch.zeros(STEPS * BATCH, SEQUENCE, dtype=torch.bool)
    for sample, line in answers_of(directory).items():
        text = [*line["prompt"], *line["tokens"]]
        tokens[sample, : len(text)] = torch.tensor(text)
        mask[sample, len(line["prompt"]) - 1 : len(text) - 1] = True
    return Blocks(tokens, torch.zeros(len(tokens), dtype=torch.int64), ("",), None, mask)


def one_process_case(models: str, out: str) -> dict[str, Any]:
    import logging

    train(models, f"{out}/plain")
    train(models, f"{out}/none", on_policy=settings(share=0.0))
    train(models, f"{out}/half", on_policy=settings())
    found: dict[str, Any] = {"stopped": train(models, f"{out}/resumed", on_policy=settings(), at=3)}
    train(models, f"{out}/all", on_policy=settings(share=1.0, refresh=1, max_age=None))
    train(models, f"{out}/all-chunks", on_policy=settings(share=1.0, refresh=1, max_age=None), logits="chunks")
    train(models, f"{out}/all-data", blocks=own_blocks(Path(out) / "all"))
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("nemo_minitron.distillation.on_policy").addHandler(handler)
    train(models, f"{out}/cut", on_policy=settings(ends=(), prompts=prompts()[:1], max_new_tokens=2))
    train(models, f"{out}/empty", on_policy=settings(ends=tuple(range(VOCABULARY))))
    found["messages"] = messages
    found["greedy"] = train(models, f"{out}/greedy", on_policy=settings(prompts=prompts()[:1], greedy=True))
    return found


def resumed_case(models: str, out: str) -> list[str]:
    """In a new process; then a student with damaged weights."""
    from safetensors.torch import load_file, save_file

    found = [train(models, f"{out}/resumed", on_policy=settings())]
    weights = load_file(Path(models, "student/model.safetensors"))
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, Path(models, "student/model.safetensors"), metadata={"format": "pt"})
    return [*found, train(models, f"{out}/damaged", on_policy=settings())]


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp": {"tensor": 2},
    "pp": {"pipeline": 2},
    "dp": {"data": 2},
    "sp": {"tensor": 2, "sequence_parallel": True},
    "vp": {"pipeline": 2, "virtual_pipeline": 2},
}


def layouts_case(models: str, out: str) -> None:
    from nemo_minitron.runtime.groups import ParallelLayout

    torch.distributed.init_process_group("gloo")
    for name, layout in LAYOUTS.items():
        assert not train(models, f"{out}/{name}", layout=layout, on_policy=settings())
    own = {"kind": "own_layout", "layout": ParallelLayout(pipeline=2)}
    assert not train(models, f"{out}/tp on pp", layout=LAYOUTS["tp"], on_policy=settings(), placed=own)


def own_ranks_case(models: str, out: str) -> str:
    """The teacher's rank is gone while the student writes its answers for steps 4 and 5."""
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.distillation import on_policy as module
    from nemo_minitron.distillation.teachers import own_ranks
    from nemo_minitron.runtime.groups import ParallelLayout

    one, gone = ParallelLayout(), Path(out, "gone")
    if own_ranks.becomes_teacher(one, one):
        receive, headers = own_ranks.Bridge.receive, 0

        def counted(self: Any, tensor: torch.Tensor, *place: Any) -> torch.Tensor:
            nonlocal headers
            headers += tensor.shape == (4,)
            if headers > 5:  # four steps and a validation
                raise KeyboardInterrupt
            return receive(self, tensor, *place)

        own_ranks.Bridge.receive = counted  # type: ignore[method-assign]
        teacher = open_checkpoint(Path(models) / "teacher")
        try:
            own_ranks.serve_teacher(teacher, one, one, dtype=torch.float32, timeout_minutes=2)
        except KeyboardInterrupt:
            gone.touch()
        return ""
    generate = module.generate_tokens

    def waiting(*arguments: Any, **keywords: Any) -> Any:
        while keywords["requests"][0] >= 4 * BATCH and not gone.exists():
            time.sleep(0.1)
        time.sleep(2 * gone.exists())
        return generate(*arguments, **keywords)

    module.generate_tokens = waiting  # type: ignore[assignment]
    placed = {"kind": "own_ranks", "layout": one, "timeout_minutes": 2}
    return train(models, f"{out}/ranks", on_policy=settings(), placed=placed)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("one")
    (found,) = run_distributed(one_process_case, 1, out, timeout=280, models=str(models), out=str(out))
    return out, found


@pytest.fixture(scope="module")
def parallel(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parallel")
    run_distributed(layouts_case, 2, out, timeout=400, models=str(models), out=str(out))
    return out


def expected_step(
    student: Any, teacher: Any, step: int, answers: dict[int, dict[str, Any]]
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of a step, and what the metrics say of it, by transformers' models and plain torch."""
    from nemo_minitron.config import LossConfig
    from nemo_minitron.distillation.losses.table import LOGIT_LOSSES

    blocks, losses, masks, owns, weights, lengths, cut = data(), [], [], [], [], [], 0
    for sample in range(step * BATCH, (step + 1) * BATCH):
        tokens, mask, weight = blocks[sample], torch.ones(SEQUENCE), torch.ones(SEQUENCE)
        own = sample % 2 == 1
        if own:
            line = answers[sample]
            start, text = len(line["prompt"]), [*line["prompt"], *line["tokens"]]
            tokens = torch.tensor(text + [77] * (SEQUENCE + 1 - len(text)))  # what follows is not seen
            mask = torch.zeros(SEQUENCE)
            mask[start - 1 : len(text) - 1] = 1
            lengths.append(len(line["tokens"]))
            cut += line["finish"] == "length"
        logits = student(tokens[None, :-1]).logits[0]
        if own:
            now = logits.detach().log_softmax(-1)[range(start - 1, len(text) - 1), line["tokens"]]
            ratio = (now - torch.tensor(line["logprobs"])).exp()
            if step % REFRESH == 0:
                torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=2e-4, atol=0)  # of these weights
            else:
                before = torch.cat([torch.ones(1), ratio.cumprod(0)[:-1]])
                weight[start - 1 : len(text) - 1] = before.clamp(1 / CLIP, CLIP)
        with torch.no_grad():
            theirs = teacher(tokens[None, :-1]).logits[0]
        losses.append(LOGIT_LOSSES[KIND].expected(logits, theirs, LossConfig(KIND)))
        masks.append(mask)
        owns.append(torch.full((SEQUENCE,), float(own)))
        weights.append(weight)
    kl, mask, own, weight = (torch.stack(parts) for parts in (losses, masks, owns, weights))

    def mean(values: torch.Tensor, over: torch.Tensor) -> float:
        return float((values.detach() * over).sum() / over.sum())

    figures = {
        "kl": mean(kl, mask),
        "own_kl": mean(kl, mask * own),
        "data_kl": mean(kl, mask * (1 - own)),
        "own_weight": mean(weight, mask * own),
        "own_share": 0.5,
        "own_length": sum(lengths) / len(lengths),
        "own_cut": cut / len(lengths),
        "own_age": step % REFRESH,
    }
    return (kl * weight * mask).sum() / mask.sum(), figures


def assert_equals_plain_torch(models: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    student, teacher = (AutoModelForCausalLM.from_pretrained(models / which) for which in ("student", "teacher"))
    student.model.embed_tokens.padding_idx = None  # it would get no gradient, and an answer may hold it
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in student.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in student.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    answers = answers_of(directory)
    lines = [line for line in measured(directory) if "split" not in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert sorted(answers) == [sample for sample in range(STEPS * BATCH) if sample % 2]
    for step, line in enumerate(lines):
        loss, figures = expected_step(student, teacher, step, answers)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for parameters in optimizer.param_groups:
            parameters["lr"] = line["lr"]
        optimizer.step()
        assert {name: line[name] for name in figures} == pytest.approx(figures, rel=1e-4), (directory.name, step)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4), (directory.name, step)
    weighed = [line["own_weight"] for line in lines]
    assert weighed[::2] == [1.0] * 3
    assert all(weight != 1 for weight in weighed[1::2])


@pytest.mark.slow
def test_one_process_equals_a_plain_torch_loop(models: Path, one_process: tuple[Path, dict[str, Any]]) -> None:
    """Loss on answers and data, weights of stale answers, gradient norm: each round is of the weights of its time."""
    assert_equals_plain_torch(models, one_process[0] / "half")


@pytest.mark.slow
def test_no_share_and_the_whole(one_process: tuple[Path, dict[str, Any]]) -> None:
    """A share of 0 is a plain distillation; one of 1 is that on the answers as data. Both bit for bit."""
    out, _ = one_process
    assert measured(out / "none") == measured(out / "plain")
    own, plain = measured(out / "all"), measured(out / "all-data")
    assert [{k: v for k, v in line.items() if not k.startswith("own_")} for line in own] == plain
    assert all(line["own_kl"] == line["kl"] and "data_kl" not in line for line in own if "split" not in line)
    for line, expected in zip(measured(out / "all-chunks"), own, strict=True):
        assert line.pop("split", "") == expected.pop("split", "")
        assert line == pytest.approx(expected, rel=1e-5)
    lengths = {len(line["tokens"]) for line in answers_of(out / "all").values()}
    assert len(lengths) > 3


@pytest.mark.slow
def test_warnings_and_refusals(one_process: tuple[Path, dict[str, Any]]) -> None:
    _, found = one_process
    few, cut, empty = found["messages"]
    assert few.startswith("on_policy: 1 prompts are fewer than the 2 answers of a step: they are repeated")
    assert cut.startswith("on_policy: 100 % of the 4 answers of step 0 were cut off")
    assert empty.startswith("on_policy: 100 % of the 4 answers of step 0 are empty")
    assert found["greedy"].startswith(
        "ConfigError: on_policy: 1 prompts are fewer than the 2 answers of a step, and gree"
    )


@pytest.mark.slow
def test_a_resume_is_exact_and_damaged_weights_stop_it(
    models: Path, one_process: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Stopped between the two steps of a round, whose answers the checkpoint holds; bit for bit."""
    import shutil

    out, found = one_process
    assert found["stopped"].startswith("PreemptedError: stopped by a signal after step 3 of 6")
    shutil.copytree(models, tmp_path / "models")
    ((resumed, damaged),) = run_distributed(
        resumed_case, 1, tmp_path, timeout=200, models=str(tmp_path / "models"), out=str(out)
    )
    assert resumed == ""
    assert measured(out / "resumed") == measured(out / "half")
    assert answers_of(out / "resumed") == answers_of(out / "half")
    assert damaged.startswith("NonFiniteError: generation: the model gave logits that are NaN or infinite")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*LAYOUTS, "tp on pp"])
def test_layouts_equal_a_plain_torch_loop(name: str, models: Path, parallel: Path) -> None:
    """Generation with the live model, teacher and loss, under every layout, and with a teacher in its own."""
    assert_equals_plain_torch(models, parallel / name)


@pytest.mark.slow
def test_a_teacher_on_its_own_ranks_and_one_that_dies(
    models: Path, one_process: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The student ends with one clear line, and what was trained until then is that of the shared teacher."""
    error, _ = run_distributed(own_ranks_case, 2, tmp_path, timeout=250, models=str(models), out=str(tmp_path))
    assert "MinitronError: teacher_placement=own_ranks: a rank of the teacher does not answer" in error
    ours, theirs = (measured(directory)[:5] for directory in (tmp_path / "ranks", one_process[0] / "half"))
    for line, expected in zip(ours, theirs, strict=True):
        assert line.pop("split", "") == expected.pop("split", "")
        assert line == pytest.approx(expected, rel=1e-5)
