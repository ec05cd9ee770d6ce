"""The model card beside exported weights: written by ``export`` from what is known then, completed by ``report``.

A card ends in a comment with the hash of what is above it. ``report`` replaces a card whose hash is right; one that was
edited, or that an earlier release wrote, stays as it is. The card is no part of what an output's record has hashes of.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from nemo_minitron import axes
from nemo_minitron.checkpoints import Checkpoint
from nemo_minitron.checkpoints.formats import FORMATS, ExportNotes
from nemo_minitron.checkpoints.model_record import ModelRecord, read_model_record
from nemo_minitron.errors import DataError, MinitronError
from nemo_minitron.report.ancestry import made_at
from nemo_minitron.report.base import base_of
from nemo_minitron.report.card import card_content
from nemo_minitron.report.collect import collect
from nemo_minitron.report.history import changes_of, first_parameters, title_of
from nemo_minitron.report.run import Run, StageRun, stage_of
from nemo_minitron.report.template import rendered
from nemo_minitron.runtime.files import replace_file

__all__ = ["FILE_NAME", "complete_cards", "export_notes", "write_export_card", "write_run_card"]

FILE_NAME = "README.md"
_MARK = re.compile(r"\n<!-- minitron: ([0-9a-f]{64}) -->\n\Z")


def write_export_card(
    model: Checkpoint,
    file: Path,
    *,
    run_dir: Path | None = None,
    base_model: str | None = None,
    license_name: str | None = None,
    library: str = "transformers",
) -> None:
    """Write the model card that lies beside an exported model.

    Args:
        model: the model that is exported, at the path where its stage wrote it.
        file: the card.
        run_dir: directory of the stages' outputs, one of which made the model; None if it is not known. What cannot be
            read there is left out.
        base_model, license_name, library: see :func:`~nemo_minitron.report.card.card_content`.
    """
    try:
        run = None if run_dir is None else collect(run_dir)
    except DataError:
        run = None
    content = card_content(
        model.shape,
        model.family,
        model.lineage,
        model.path,
        run=run,
        made=None if run is None else made_at(run, model.path),
        base_model=base_model,
        license_name=license_name,
        library=library,
    )
    file.write_text(_marked(rendered("model-card.md.j2", content, markdown=True)), encoding="utf-8")


def export_notes(model: Checkpoint, *, base_model: str | None = None, license_name: str | None = None) -> ExportNotes:
    """What an exported file may say of a model: its title, as on its card, its base and that one's license.

    Args:
        model: the model that is exported.
        base_model, license_name: see :func:`~nemo_minitron.report.card.card_content`.
    """
    base = base_of(model.lineage, model.path, hub_name=base_model, license_name=license_name)
    after = axes.parameter_count(model.family, model.shape)
    before = first_parameters(model.lineage, model.family)
    return ExportNotes(
        title_of(base.name, changes_of(model.lineage), before, after),
        base.name or None,
        base.hub_name,
        base.license,
        base.license_name,
        base.license_link,
    )


def complete_cards(run: Run, *, title: str, base_model: str | None, license_name: str | None) -> None:
    """Write the cards of a run's exports again, with what was measured since.

    Args:
        run: a whole run; a card that stays as it is is named in its remarks.
        title, base_model, license_name: those of the export win, as far as it has any.
    """
    for stage in run.stages:
        for form in [form for form in FORMATS.values() if form.card] if stage.stage == "export" else []:
            file = stage.path / form.output_name / FILE_NAME
            if not file.is_file():
                continue
            where = file.relative_to(run.path)
            try:
                text = _card_of(stage, file.parent, run, title, base_model, license_name, form.card)
                if text is None:
                    continue
                if not _is_ours(file):
                    run.remarks.append(f"{where} was edited, or is of an earlier release; the whole card is not in it")
                    continue
                replace_file(file, _marked(text))
            except (OSError, MinitronError) as error:
                run.remarks.append(f"the model card {where} could not be completed ({error})")


def write_run_card(run: Run, file: Path, *, title: str, base_model: str | None, license_name: str | None) -> bool:
    """Write the card of the model that a run was for (:attr:`~nemo_minitron.report.run.Run.result`).

    Returns:
        Whether there is such a model, and its record can be read.
    """
    result = run.result
    if result is None or result.path is None:
        return False
    made = next(stage for stage in run.stages if stage.name == result.name)
    exports = [stage for stage in run.stages if stage.stage == "export" and _exported(stage, run) is made]
    given = exports[-1].config if exports else {}
    record = read_model_record(result.path)
    if record is None:
        return False
    text = _text(
        record,
        result.path,
        run,
        made,
        title,
        base_model or given.get("base_model"),
        license_name or given.get("license"),
    )
    file.write_text(text, encoding="utf-8")
    return True


def _exported(stage: StageRun, run: Run) -> StageRun | None:
    return stage_of(str(stage.config.get("model")), run)


def _card_of(
    stage: StageRun,
    path: Path,
    run: Run,
    title: str,
    base_model: str | None,
    license_name: str | None,
    library: str | None,
) -> str | None:
    """The card of one export; None where its record cannot be read."""
    record = read_model_record(path)
    if record is None:
        return None
    config = stage.config
    return _text(
        record,
        path,
        run,
        _exported(stage, run),
        title,
        config.get("base_model") or base_model,
        config.get("license") or license_name,
        library or "transformers",
    )


def _text(
    record: ModelRecord,
    path: Path,
    run: Run,
    made: StageRun | None,
    title: str,
    base_model: str | None,
    license_name: str | None,
    library: str = "transformers",
) -> str:
    content = card_content(
        record.shape,
        axes.family(record.architecture.family),
        record.lineage,
        path,
        run=run,
        made=made,
        title=title,
        base_model=base_model,
        license_name=license_name,
        library=library,
    )
    return rendered("model-card.md.j2", content, markdown=True)


def _marked(text: str) -> str:
    """The text with the comment that says that nobody has edited it."""
    body = text.rstrip("\n") + "\n"
    return f"{body}\n<!-- minitron: {hashlib.sha256(body.encode()).hexdigest()} -->\n"


def _is_ours(file: Path) -> bool:
    text = file.read_text(encoding="utf-8")
    mark = _MARK.search(text)
    return mark is not None and hashlib.sha256(text[: mark.start()].encode()).hexdigest() == mark[1]
