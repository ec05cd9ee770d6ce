"""Instructions that a program can check (IFEval: Zhou et al., arXiv:2311.07911), with the harness's own checks.

Prompts come from a package, and so do nltk's tables for splitting sentences: the harness would download both.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from nemo_minitron.data.packages import archive_members
from nemo_minitron.errors import DataError, MissingDependency
from nemo_minitron.evaluation.packs import Pack
from nemo_minitron.evaluation.packs.base import json_lines, task_config
from nemo_minitron.runtime.files import replace_file

__all__ = ["task"]

_FIELDS: dict[str, type] = {"key": int, "prompt": str, "instruction_id_list": list, "kwargs": list}


def task(pack: Pack, cache_dir: Path) -> dict[str, Any]:
    """All prompts; share of prompts and of instructions that are followed, strictly and loosely."""
    prompts, punkt = pack.packages
    checks, registry = _checks(punkt, cache_dir)
    ((name, content),) = archive_members(prompts, cache_dir)
    records = json_lines(content, f"{prompts}: {name}", _FIELDS)
    faults = [fault for record in records for fault in _faults(record, registry.INSTRUCTION_DICT)]
    if faults:
        raise DataError("\n".join([f"{prompts}: {len(faults)} faults:", *(f"  - {fault}" for fault in faults[:20])]))
    documents = [
        # Arguments as text: the fields of different instructions have nothing in common.
        {**{name: record[name] for name in _FIELDS}, "kwargs": json.dumps(record["kwargs"])}
        for record in records
    ]

    def score(doc: dict[str, Any], answers: list[str]) -> dict[str, Any]:
        return checks.process_results({**doc, "kwargs": json.loads(doc["kwargs"])}, answers)

    return task_config(
        pack.name,
        documents,
        doc_to_text=lambda doc: doc["prompt"],
        doc_to_target=lambda doc: "",
        process_results=score,
        metrics={
            "prompt_level_strict_acc": "mean",
            "inst_level_strict_acc": checks.agg_inst_level_acc,
            "prompt_level_loose_acc": "mean",
            "inst_level_loose_acc": checks.agg_inst_level_acc,
        },
        until=[],
        max_new_tokens=1280,
    )


def _checks(punkt: str, cache_dir: Path) -> tuple[Any, Any]:
    """The harness's modules; nltk's tables are put into nltk's path before the import, which would download them."""
    try:
        import immutabledict  # noqa: F401
        import langdetect
        import nltk
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"harness.tasks: ifeval_offline: {error.name}, which the harness checks answers with, is not installed; "
            "run `pip install 'lm-eval[ifeval]'`, or leave the task out"
        ) from error
    langdetect.DetectorFactory.seed = 0  # it samples, and the same answers shall give the same figures
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        folder = cache_dir / "nltk_data"
        for name, content in archive_members(punkt, cache_dir):
            target = folder / "tokenizers" / "punkt_tab" / "english" / PurePosixPath(name).name
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_file(target, content)
        nltk.data.path.append(str(folder.resolve()))
    from lm_eval.tasks.ifeval import instructions_registry, utils

    return utils, instructions_registry


def _faults(record: dict[str, Any], known: dict[str, Any]) -> list[str]:
    names, arguments = record["instruction_id_list"], record["kwargs"]
    faults = [f"prompt {record['key']}: instruction {name!r} has no check" for name in names if name not in known]
    if not names or len(names) != len(arguments) or not all(isinstance(argument, dict) for argument in arguments):
        faults.append(f"prompt {record['key']}: {len(names)} instructions, arguments for {len(arguments)}")
    return faults
