"""The teacher of a distillation, also where the student read its logits from a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.records import read_record
from nemo_minitron.parsing import parse_json
from nemo_minitron.report.run import Run, StageRun, stage_of

__all__ = ["teacher_of"]


def teacher_of(stage: StageRun, run: Run) -> str | None:
    """The path of a distillation's teacher, as it was recorded; None where nothing says it, or there was none.

    Of a cache, its record says which model filled it: in the run, or beside the cache. Without a record its manifest
    has the model's fingerprint, which is compared with that of the run's teachers.
    """
    loss = stage.config.get("loss")
    if isinstance(loss, dict) and loss.get("label_weight") == 1 and "teacher" not in stage.parents:
        return None
    if isinstance(teacher := stage.config.get("teacher"), str):
        return teacher
    cache = stage.config.get("teacher_cache")
    if not isinstance(cache, str):
        return None
    owner = stage_of(cache, run)
    places = [Path(cache), *([owner.path] if owner is not None else [])]
    records = [owner.record if owner is not None else None, *(read_record(place) for place in places)]
    for record in records:
        settings: Any = record.get("config") if isinstance(record, dict) else None
        if isinstance(settings, dict) and isinstance(settings.get("teacher"), str):
            return str(settings["teacher"])
    return _by_fingerprint(places, run)


def _by_fingerprint(places: list[Path], run: Run) -> str | None:
    for place in places:
        try:
            wanted = parse_json((place / "manifest.json").read_text(encoding="utf-8"))["teacher"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        for model in run.models:
            if model.path is not None and model.role in ("teacher", "other") and _is(model.path, wanted):
                stage = next(stage for stage in run.stages if stage.name == model.name)
                part = model.path.relative_to(stage.path)
                return str(Path(stage.config["output"]) / part)
    return None


def _is(path: Path, fingerprint: Any) -> bool:
    from nemo_minitron.checkpoints import open_checkpoint
    from nemo_minitron.checkpoints.fingerprint import model_fingerprint, same_fingerprint

    try:
        return same_fingerprint(model_fingerprint(open_checkpoint(path)), str(fingerprint))
    except MinitronError:
        return False
