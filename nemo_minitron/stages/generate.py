"""``minitron generate``: a model's answers to prompts, in the form that training reads."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.checkpoints.model_record import peek_architecture, peek_shape
from nemo_minitron.config import GenerateConfig
from nemo_minitron.jobs.atomic import stage_output
from nemo_minitron.jobs.plans import PlannedPath, StagePlan, human_bytes
from nemo_minitron.runtime.journal import PLAIN, Journal
from nemo_minitron.runtime.progress import progress_bar
from nemo_minitron.shape import uniform_faults
from nemo_minitron.stages.shared.checkpoints import model_costs
from nemo_minitron.stages.shared.measuring import live_model, start_groups
from nemo_minitron.stages.shared.memory import cache_of_rank
from nemo_minitron.stages.shared.prompts import plan_prompts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from nemo_minitron.checkpoints import Checkpoint
    from nemo_minitron.data.chat.conversations import Chat

__all__ = ["FILE_NAME", "plan", "run"]

FILE_NAME = "answers.jsonl"
logger = logging.getLogger(__name__)


def plan(config: GenerateConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    plan = StagePlan(
        "generate",
        reads=[PlannedPath(config.model, "model")],
        writes=[PlannedPath(str(Path(config.output) / FILE_NAME), "answers")],
        costs=model_costs(config.model, config.runtime.dtype),
    )
    plan_prompts(plan, config.prompts, "prompts")
    if done := Journal.entries(Journal.beside(config.output)):
        plan.notes.append(
            f"{done:,} answers of an earlier run are there; they are taken up if the settings are the same"
        )
    shape, architecture = peek_shape(config.model), peek_architecture(config.model)
    if shape is None or architecture is None:
        return plan
    if faults := uniform_faults(shape, "generation"):
        plan.faults += faults
        return plan
    layout = config.parallel
    plan.faults += shape.layout_faults(tensor=layout.tensor, pipeline=layout.pipeline_stages)
    context = architecture.max_position_embeddings
    if config.max_length is not None and config.max_length > context:
        plan.faults.append(f"max_length={config.max_length}: the model's context holds {context} tokens")
    length = min(config.max_length or context, context)
    cache = cache_of_rank(config, config.model, batch_size=config.batch_size, length=length)
    plan.costs["key-value cache of a rank"] = f"at most {human_bytes(cache)}"
    return plan


def run(config: GenerateConfig) -> dict[str, Any]:
    """Answer every prompt; rank 0 adds each answer to a journal beside the output, then writes ``answers.jsonl``.

    A line is ``{"messages": [..., the answer], "prompt_index": 0, "sample": 0, "finish": "stop" | "length", "tokens":
    37, "logprob": -21.4}``, with ``attributes`` if they were requested, in the order of the prompts. ``logprob`` is
    the sum over the answer's tokens under the model itself. Answers without any text have no line.

    Returns:
        ``prompts, answers, resumed, empty, stopped`` (by an end token), ``tokens`` (of all answers), ``mean_tokens,
        mean_words, tokens_per_second`` (of this run; None if all answers existed already), ``seconds``.

    Raises:
        MinitronError: for a model or prompts that cannot be used.
    """
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.data import load_tokenizer
    from nemo_minitron.generation import generate_tokens
    from nemo_minitron.generation.prompts import encode_prompts, prompt_title, read_prompts

    started = time.monotonic()
    groups = start_groups(config)
    checkpoint = open_checkpoint(config.model)
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    context = checkpoint.architecture.max_position_embeddings
    max_length = min(config.max_length or context, context)
    chats = read_prompts(config.prompts, system=config.system)
    encoded, ends = encode_prompts(
        chats,
        tokenizer,
        config.template,
        title=prompt_title(config.prompts),
        max_length=max_length,
        attributes=config.attributes,
        skip=config.prompts.skip,
    )
    chats, prompts = [chat for chat, _ in encoded], [ids for _, ids in encoded]
    ends = (*ends, *checkpoint.architecture.end_tokens)
    chunks = live_model(config, checkpoint, groups)

    total = len(prompts) * config.samples
    journal = Journal(Journal.beside(config.output), _subject(config, checkpoint, prompts, ends, max_length), PLAIN)
    answers = {entry["request"]: entry for entry in journal.read()} if groups.is_main else {}
    pending = _pending(total, answers, next(chunks[0].parameters()).device)
    pending.sort(key=lambda request: (len(prompts[request // config.samples]), request))
    resumed, produced, clock = total - len(pending), 0, time.monotonic()
    step = config.batch_size * config.parallel.data
    with progress_bar("answers", total, completed=resumed, shown=groups.is_main) as advance:
        for start in range(0, len(pending), step):
            requests = pending[start : start + step]
            generated = generate_tokens(
                chunks,
                groups,
                [prompts[request // config.samples] for request in requests],
                sampling=config.sampling,
                seed=config.runtime.seed,
                ends=ends,
                vocab_size=checkpoint.shape.vocab_size,
                max_length=max_length,
                requests=requests,
                batch_size=config.batch_size,
            )
            produced += sum(len(answer.tokens) for answer in generated)
            advance(len(generated), f"{produced / (time.monotonic() - clock):.0f} tokens/s")
            if groups.is_main:
                lines = [
                    {
                        "request": request,
                        "tokens": answer.tokens,
                        "finish": answer.finish,
                        "logprob": round(sum(answer.logprobs), 6),
                    }
                    for request, answer in zip(requests, generated, strict=True)
                ]
                journal.append(lines)
                answers.update((line["request"], line) for line in lines)
    seconds = time.monotonic() - clock
    if not groups.is_main:
        return {}
    records = [_record(config, chats, tokenizer, answers[request]) for request in range(total)]
    written = [record for record in records if record is not None]
    with stage_output(config.output, config.overwrite) as output:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in written)
        (output / FILE_NAME).write_text(text, encoding="utf-8")
    journal.close()
    if empty := total - len(written):
        logger.warning("%d of %d answers have no text and no line in %s", empty, total, FILE_NAME)
    tokens = sum(len(entry["tokens"]) for entry in answers.values())
    words = sum(len(record["messages"][-1]["content"].split()) for record in written)
    return {
        "prompts": len(prompts),
        "answers": total,
        "resumed": resumed,
        "empty": empty,
        "stopped": sum(entry["finish"] == "stop" for entry in answers.values()),
        "tokens": tokens,
        "mean_tokens": round(tokens / total, 2),
        "mean_words": round(words / total, 2),
        "tokens_per_second": round(produced / seconds, 2) if produced else None,
        "seconds": round(time.monotonic() - started, 3),
    }


def _subject(
    config: GenerateConfig, checkpoint: Checkpoint, prompts: list[list[int]], ends: Sequence[int], max_length: int
) -> dict[str, Any]:
    """Everything that an answer depends on, without layout and batch; a journal with other values is not used."""
    from nemo_minitron.checkpoints.fingerprint import model_fingerprint

    return {
        "model": model_fingerprint(checkpoint),
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:32],
        "samples": config.samples,
        "sampling": vars(config.sampling),
        "seed": config.runtime.seed,
        "ends": sorted(set(ends)),
        "max_length": max_length,
        "dtype": config.runtime.dtype,
    }


def _pending(total: int, answers: dict[int, Any], device: torch.device) -> list[int]:
    """The requests without an answer, according to rank 0, on every rank."""
    import torch
    import torch.distributed as dist

    done = torch.zeros(total, dtype=torch.uint8, device=device)
    done[[request for request in answers if request < total]] = 1
    dist.broadcast(done, src=0)
    return (done == 0).nonzero().flatten().tolist()


def _record(
    config: GenerateConfig, chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, answer: dict[str, Any]
) -> dict[str, Any] | None:
    """A line of the output, or None for an answer without text."""
    index, sample = divmod(answer["request"], config.samples)
    text = tokenizer.decode(answer["tokens"], skip_special_tokens=True).strip()
    if not text:
        return None
    return {
        **chats[index].answered(text, config.attributes).record(),
        "prompt_index": index,
        "sample": sample,
        "finish": answer["finish"],
        "tokens": len(answer["tokens"]),
        "logprob": answer["logprob"],
    }
