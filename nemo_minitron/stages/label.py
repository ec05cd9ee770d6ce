"""``minitron label``: predict the attribute values of answers and write them into the conversations."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.config import LabelConfig
from nemo_minitron.jobs.output import claim_output
from nemo_minitron.jobs.plans import PlannedPath, StagePlan
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.files import replace_file
from nemo_minitron.stages.shared.chats import shorter, tokens_of
from nemo_minitron.stages.shared.measuring import start_groups
from nemo_minitron.stages.shared.steering import chat_inputs, plan_layout

if TYPE_CHECKING:
    from nemo_minitron.data.chat.conversations import Chat

__all__ = ["plan", "run"]

_JOURNAL = "scores.jsonl"


def plan(config: LabelConfig) -> StagePlan:
    """What :func:`run` would read, write and cost."""
    plan = StagePlan(
        "label",
        reads=[PlannedPath(config.reward, "attribute model")],
        writes=[PlannedPath(str(Path(config.output) / "labelled.jsonl"), "labelled conversations")],
    )
    chat_inputs(config.data, plan)
    plan_layout(str(Path(config.reward) / "model"), config.parallel, plan)
    return plan


def run(config: LabelConfig) -> dict[str, Any]:
    """Label. Every rank runs this; rank 0 writes.

    ``labelled.jsonl`` has the conversations in their order, in the ``messages`` form, with ``attributes`` (whole
    numbers on the model's scale) and ``predicted`` (the predictions themselves). Each batch of predictions is saved at
    once; the predictions of a killed run are used again.

    Returns:
        ``conversations``, ``kept`` (labelled by an earlier run), ``derived`` (the model's own labels were derived by
        rules) and ``attributes``: for each attribute the mean and the count of each value.

    Raises:
        MinitronError: for data or a model that cannot be used.
    """
    import torch

    from nemo_minitron.alignment.attribute_model import AttributeScorer, load_attribute_model, to_values
    from nemo_minitron.data.chat.labelled import open_chats
    from nemo_minitron.runtime.progress import progress_bar

    groups = start_groups(config)
    attribute_model = load_attribute_model(config.reward)
    scorer = AttributeScorer(attribute_model, groups)
    chats = open_chats(config.data.path, config.data.package, config.data.cache_dir, skip=config.data.skip)
    data = dataclasses.replace(config.data, template=attribute_model.template, labelled=False)
    encoded, _ = tokens_of(chats, scorer.checkpoint, data)
    pairs = [(chat, sample.ids) for chat, (sample,) in encoded]
    chosen = shorter(pairs, [len(ids) for _, ids in pairs], [chat.where for chat, _ in pairs], data)
    rows = [ids for _, ids in chosen]
    key = _key(attribute_model.weight, rows)
    if groups.is_main:
        claim_output(config)
        journal = Path(config.output) / _JOURNAL
        known = _saved(journal, key) if config.resume else []
        replace_file(journal, "".join(json.dumps(line) + "\n" for line in [{"key": key}, *known]))
    torch.distributed.barrier()
    known = _saved(Path(config.output) / _JOURNAL, key)
    torch.distributed.barrier()  # read by all before rank 0 goes on writing
    scores, kept = list(known), len(known)
    with progress_bar("labelling", len(rows), completed=kept, shown=groups.is_main) as advance:
        for start in range(kept, len(rows), config.batch):
            part = rows[start : start + config.batch]
            fresh = scorer.scores(part, micro_batch_size=config.micro_batch_size).tolist()
            scores += fresh
            if groups.is_main:
                _append(Path(config.output) / _JOURNAL, fresh)
            advance(len(part))
    if not groups.is_main:
        return {}
    values = to_values(torch.tensor(scores), scorer.schema)
    _write([chat for chat, _ in chosen], values, scores, scorer.schema.names, Path(config.output))
    (Path(config.output) / _JOURNAL).unlink()
    counts = {
        name: {
            "mean": sum(value[name] for value in values) / len(values),
            "counts": [sum(value[name] == level for value in values) for level in range(scorer.schema.highest + 1)],
        }
        for name in scorer.schema.names
    }
    return {
        "conversations": len(chosen),
        "left_out": len(pairs) - len(chosen),
        "kept": kept,
        "derived": attribute_model.derived,
        "attributes": counts,
    }


def _key(weight: Any, rows: list[list[int]]) -> str:
    """Hash of everything that predictions depend on: the head, which any training changes, and the conversations."""
    digest = hashlib.sha256(weight.numpy().tobytes())
    digest.update(json.dumps(rows).encode())
    return digest.hexdigest()


def _saved(journal: Path, key: str) -> list[list[float]]:
    """Predictions that an earlier run of the same work saved; a last line cut off by a kill is left out."""
    if not journal.is_file():
        return []
    lines = []
    for line in journal.read_bytes().splitlines():
        try:
            lines.append(parse_json(line))
        except ValueError:
            break
    return lines[1:] if lines and lines[0] == {"key": key} else []


def _append(journal: Path, scores: list[list[float]]) -> None:
    with journal.open("a") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in scores))
        stream.flush()
        os.fsync(stream.fileno())


def _write(
    chats: list[Chat], values: list[dict[str, int]], scores: list[list[float]], names: tuple[str, ...], output: Path
) -> None:
    lines = []
    for chat, value, row in zip(chats, values, scores, strict=True):
        assert chat.answer is not None
        predicted = {name: round(score, 4) for name, score in zip(names, row, strict=True)}
        lines.append(chat.answered(chat.answer, value).record() | {"predicted": predicted})
    replace_file(output / "labelled.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
