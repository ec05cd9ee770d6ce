"""Answers from passages, in a conversation (doc2dial of ChatRAG-Bench: Liu et al., ChatQA, arXiv:2401.10225)."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

from nemo_minitron.data.packages import archive_members
from nemo_minitron.errors import DataError
from nemo_minitron.evaluation.packs import Pack
from nemo_minitron.evaluation.packs.base import field_faults, json_value, task_config

__all__ = ["task", "token_overlap"]

_FIELDS: dict[str, type] = {
    "answers": list,
    "messages": list,
    "document": str,
    "ctxs": list,
    "ground_truth_ctx": int,
}
_SEED = 0  # of the order of the conversations, for a limit must not leave all but one subject out


def task(pack: Pack, cache_dir: Path) -> dict[str, Any]:
    """Conversations with the five passages that were retrieved for them, or with the one that holds the answer."""
    members = {Path(name).name: content for name, content in archive_members(pack.packages[0], cache_dir)}
    where = pack.packages[0]
    passages = json_value(members["documents.json"], f"{where}: documents.json")
    records = json_value(members["nvidia_dragon_multiturn_retrieved.jsonl"], f"{where}: conversations")
    if not isinstance(passages, dict) or not isinstance(records, list) or not records:
        raise DataError(f"{where}: not passages by document and a list of conversations")
    faults, documents = [], []
    for number, record in enumerate(records):
        if wrong := _faults(record, passages):
            faults += [f"conversation {number}: {fault}" for fault in wrong]
            continue
        chosen = record["ctxs"] if pack.option == "retrieved" else [record["ground_truth_ctx"]]
        shown = [passages[record["document"]][index] for index in chosen]
        documents.append({"prompt": _prompt(shown, record["messages"]), "answers": record["answers"]})
    if faults:
        raise DataError("\n".join([f"{where}: {len(faults)} faults:", *(f"  - {fault}" for fault in faults[:20])]))
    random.Random(_SEED).shuffle(documents)  # noqa: S311 - an order, no secret
    return task_config(
        pack.name,
        documents,
        doc_to_text=lambda doc: doc["prompt"],
        doc_to_target=lambda doc: doc["answers"][0],
        process_results=_score,
        metrics={"f1": "mean", "precision": "mean", "recall": "mean"},
        until=["\n\n", "\nUser:"],
        max_new_tokens=128,
    )


def token_overlap(answer: str, truth: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of the words of an answer, counted, without case, punctuation and articles."""
    given, wanted = _words(answer), _words(truth)
    same = (Counter(given) & Counter(wanted)).total()
    if not same:
        return 0.0, 0.0, 0.0
    precision, recall = same / len(given), same / len(wanted)
    return precision, recall, 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    plain = re.sub(r"[^\w\s]|_", " ", text.lower())
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _score(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Scores against the right answer with the largest overlap."""
    best = max((token_overlap(answers[0], truth) for truth in doc["answers"]), key=lambda overlap: overlap[2])
    return dict(zip(("precision", "recall", "f1"), best, strict=True))


def _prompt(passages: list[str], messages: list[dict[str, str]]) -> str:
    turns: list[str] = []
    speaker = ""
    for message in messages:
        if message["role"] == speaker:  # two messages of one speaker in a row are one turn
            turns[-1] += f" {message['content']}"
        else:
            turns.append(f"{message['role'].capitalize()}: {message['content']}")
        speaker = message["role"]
    return "\n\n".join(
        [
            "Answer the user's last question in full from the passages. Say so where they do not hold the answer.",
            *(passage.strip() for passage in passages),
            *turns,
            "Assistant:",
        ]
    )


def _faults(record: Any, passages: dict[str, Any]) -> list[str]:
    if faults := field_faults(record, _FIELDS):
        return faults
    if not record["answers"] or not all(isinstance(answer, str) and answer.strip() for answer in record["answers"]):
        faults.append("no answer")
    for message in record["messages"]:
        faults += field_faults(message, {"role": str, "content": str})
    if not faults and (not record["messages"] or record["messages"][-1]["role"] != "user"):
        faults.append("the last message is not the user's")
    listed = passages.get(record["document"])
    if not isinstance(listed, list):
        return [*faults, f"document {record['document']!r} is not there"]
    for number in [*record["ctxs"], record["ground_truth_ctx"]]:
        if not isinstance(number, int) or not 0 <= number < len(listed) or not isinstance(listed[number], str):
            faults.append(f"passage {number} of {record['document']!r} is not there")
    return faults
