"""The output of a stage: how far it is, what made it, and what is archived beside it.

An output that other settings or inputs made is archived beside the present one as ``<name>@<first twelve digits of its
identity>``. It comes back, without any work, when they are changed back. So in a pipeline; a stage that is started by
itself refuses to go on with what others made (:meth:`Output.resume_faults`).
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.config import StageConfig
from nemo_minitron.errors import ConfigError, MinitronError, PreemptedError
from nemo_minitron.jobs import slurm_environment
from nemo_minitron.jobs.atomic import MARKER, check_output
from nemo_minitron.jobs.differences import differences
from nemo_minitron.jobs.records import hashed_settings, identity_of, read_record, record_path, write_record
from nemo_minitron.runtime.files import is_earlier, replace_file

__all__ = ["Output", "archived_outputs", "claim_output"]

_DIGITS = 12
_STARTED = "begun.json"


class Output:
    """The output of one stage under its settings and inputs.

    The identity is worked out when it is first asked for, and once: inputs may be many files. Make another object where
    an input may have changed since.

    Args:
        config: of the stage.

    Attributes:
        config: of the stage.
        path: where the output lies.
    """

    def __init__(self, config: StageConfig) -> None:
        self.config = config
        self.path = Path(config.output)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the result depends on, see :func:`~nemo_minitron.jobs.records.identity_of`."""
        return identity_of(self.config)

    @property
    def hash(self) -> str:
        """The identity as a hexadecimal hash."""
        return str(self.identity["hash"])

    @property
    def resumable(self) -> bool:
        """Whether the stage goes on with what it left unfinished."""
        return bool(getattr(self.config, "resume", False))

    @property
    def folder(self) -> Path:
        """Where settings, logs and results of its processes lie: ``logs/<output's name>`` beside the output."""
        path = self.path.absolute()
        return path.parent / "logs" / path.name

    def replaced_by(self, *, overwrite: bool) -> Output:
        """The same output, with ``overwrite`` set or not; no result depends on it."""
        other = Output(dataclasses.replace(self.config, overwrite=overwrite))
        if "identity" in self.__dict__:
            other.__dict__["identity"] = self.identity
        return other

    # How far it is

    def record(self) -> dict[str, Any] | None:
        """The record of what lies there; None where there is none, or it is not whole."""
        return read_record(self.path)

    def started_identity(self) -> dict[str, Any] | None:
        """The identity of what was begun there last; None if unknown."""
        try:
            started = json.loads((self.folder / _STARTED).read_text())
        except (OSError, json.JSONDecodeError):
            return None
        known = isinstance(started, dict) and {"stage", "hash", "settings", "parents"} <= started.keys()
        return started if known else None

    def state(self) -> tuple[str, list[str]]:
        """How far the stage is.

        Returns:
            "done"; "changed" with what differs from the record; "unfinished" (an output without a record, or of a stage
            that is always made anew); "begun" (one that could be resumed, if it had not been begun with other settings,
            and which); or "new".
        """
        record = self.record()
        if self.config.REPEATS:
            return ("unfinished" if self.path.exists() else "new"), []
        if not self.path.exists():
            return ("new", []) if record is None else ("changed", ["the output is gone"])
        if record is not None:
            changes = self._changes_since(record)
            return ("changed", list(changes.values())) if changes else ("done", [])
        changes = self._changes_since(self.started_identity()) if self.resumable else {}
        return ("begun", list(changes.values())) if changes else ("unfinished", [])

    def resume_faults(self) -> list[str]:
        """Why a training may not go on with what lies there: it may only with what the same training began.

        Other settings would train on from the old checkpoints, or would find nothing left to train, and the record
        would say that they had made the model. Settings that change a step's numbers by rounding at most may differ
        (``RESUMABLE_CHANGES``).
        """
        if self.config.RESUMABLE_CHANGES is None or self.config.overwrite or not self.path.exists():
            return []
        record = self.record()
        faults = [
            f"{self.path} was {'begun' if record is None else 'made'} with other settings: {change}"
            for key, change in self._changes_since(record or self.started_identity()).items()
            if not any(key == free or key.startswith(f"{free}.") for free in self.config.RESUMABLE_CHANGES)
        ]
        if faults:
            faults[-1] += "; choose another output, or make this one anew with --overwrite (overwrite=true)"
        return faults

    def check_resumable(self) -> None:
        """Refuse to go on with what other settings made.

        Raises:
            ConfigError: with :meth:`resume_faults`.
        """
        if faults := self.resume_faults():
            raise ConfigError(faults)

    def is_requeued_job(self) -> bool:
        """Whether this is a job that Slurm queued again, and what lies there is what it began: to be resumed.

        Where the job was to overwrite, it has done so.
        """
        return slurm_environment.requeued() and self.resumable and self.state()[0] == "unfinished"

    def _changes_since(self, before: dict[str, Any] | None) -> dict[str, str]:
        return differences(self.identity, before, hashed_settings(type(self.config)()))

    # The archive beside it

    def is_archived(self) -> bool:
        """Whether an output of just these settings and inputs lies in the archive."""
        return _holds(_archive(self.path, self.hash), self.hash)

    def archive(self) -> Path | None:
        """Move what lies there into the archive, whoever made it. One rank calls it, before the stage starts.

        Returns:
            Where it lies now; None if there was none, or none whose identity is known.

        Raises:
            ConfigError: if something else lies there.
        """
        made = self.record() or self.started_identity()
        if made is None or not self.path.exists():
            return None
        place = _archive(self.path, made["hash"])
        if _holds(place, made["hash"]):  # the same thing, made twice
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        elif place.exists():
            raise ConfigError(
                f"{place} is in the way of an output that is to be kept there, and is not whole; remove it"
            )
        _move(self.path, place)
        return place

    def restore(self) -> bool:
        """Take an output of just these settings and inputs out of the archive; the present one goes there.

        One of unknown identity makes room as ``.<name>.replaced``, as where a stage is made anew.

        Returns:
            Whether there was one.

        Raises:
            ConfigError: as :meth:`archive`.
        """
        if not self.is_archived():
            return False
        if self.archive() is None and self.path.exists():
            aside = self.path.with_name(f".{self.path.name}.replaced")
            shutil.rmtree(aside, ignore_errors=True)
            self.path.rename(aside)
        _move(_archive(self.path, self.hash), self.path)
        return True

    def restore_unfinished(self) -> None:
        """Take what was begun with just these settings out of the archive, to be resumed."""
        place = _archive(self.path, self.hash)
        if self.resumable and place.exists() and not self.path.exists():
            place.rename(self.path)

    # A run of the stage

    def prepare(self, *, overwrite: bool = False) -> Output | None:
        """Make room for a run of the stage. One rank calls it, right before the stage starts.

        What other settings or inputs made is archived, or replaced under ``overwrite``; an archived output of just
        these comes back. A stage that runs others keeps what they made: they are asked one by one.

        Args:
            overwrite: replace what other settings or inputs made, instead of keeping it.

        Returns:
            What is to be run; None if it is done.
        """
        state, _ = self.state()
        if state == "done" or self.restore():
            return None
        changed = state in ("changed", "begun")
        if changed and not (overwrite or self.config.overwrite):
            if not (self.config.RUNS_CHILD_STAGES and self.resumable):
                self.archive()
                self.restore_unfinished()
            return self
        if changed or (state == "unfinished" and not self.resumable):
            return self.replaced_by(overwrite=True)
        return self

    def write_settings(self, folder: Path | None = None) -> None:
        """Write the ``config.yaml`` that the processes of the stage read, into ``folder`` or :attr:`folder`."""
        folder = folder or self.folder
        folder.mkdir(parents=True, exist_ok=True)
        settings = yaml.safe_dump(dataclasses.asdict(self.config), sort_keys=False, allow_unicode=True)
        replace_file(folder / "config.yaml", settings)

    def begin(self) -> None:
        """Note beside the logs what is about to be made; the record says so only at the end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / _STARTED, json.dumps(self.identity, default=str) + "\n")

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Around a run: ``overwrite`` for stages that can resume, whose ``run`` never sees the old output.

        What lies there is moved to ``.<name>.replaced``, and removed when the block ends well. What a stage refuses
        costs nothing: the old output comes back. A stage that fails otherwise, or is killed, can be resumed; the old
        output stays beside it until then. Stages that cannot resume replace their output by
        :func:`~nemo_minitron.jobs.atomic.stage_output`.

        Raises:
            ConfigError: if what lies there was not written by this suite.
        """
        path = self.path
        old = path.with_name(f".{path.name}.replaced")
        resumes = hasattr(self.config, "resume")  # also where it is off
        moved = resumes and self.config.overwrite and path.is_dir() and any(path.iterdir())
        if moved:
            if not any((path / part).exists() for part in ("checkpoints", "metrics.jsonl")):
                check_output(path, overwrite=True)
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        try:
            yield
        except PreemptedError:
            raise
        except MinitronError:
            if moved:
                shutil.rmtree(path, ignore_errors=True)
                old.rename(path)
            raise
        if resumes:
            shutil.rmtree(old, ignore_errors=True)

    def finish(
        self,
        metrics: dict[str, Any],
        seconds: float,
        *,
        peak_rss_bytes: int | None = None,
        started: str | None = None,
    ) -> dict[str, Any]:
        """Write the record, which declares the output whole; see :func:`~nemo_minitron.jobs.records.write_record`."""
        return write_record(
            self.config, self.identity, metrics, seconds, peak_rss_bytes=peak_rss_bytes, started=started
        )


def claim_output(config: StageConfig) -> Path:
    """The output directory of a stage that resumes, there and marked as ours. One rank calls it.

    ``overwrite`` is no matter of the stage: :meth:`Output.replacing` has emptied the place.

    Raises:
        ConfigError: for a directory that is not ours, or for any that is there where ``resume`` is off.
    """
    output = Path(config.output)
    if not ((output / MARKER).exists() and getattr(config, "resume", False)):
        check_output(output, overwrite=False)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()
    return output


def archived_outputs(output: str | Path) -> list[Path]:
    """What the archive holds of an output's earlier settings."""
    output = Path(output)
    stem, suffix = _name_parts(output)
    escaped = re.sub(r"([*?[])", r"[\1]", stem)
    return sorted(path for path in output.parent.glob(f"{escaped}@*{suffix}") if is_earlier(path))


def _holds(place: Path, identity: str) -> bool:
    """Whether a whole output of that identity lies there."""
    record = read_record(place)
    return record is not None and record["hash"] == identity and place.exists()


def _archive(output: Path, identity: str) -> Path:
    """Where the archive has an output of that identity."""
    stem, suffix = _name_parts(output)
    return output.with_name(f"{stem}@{identity[:_DIGITS]}{suffix}")


def _name_parts(output: Path) -> tuple[str, str]:
    """An output's name without its suffix, and the suffix: only a ``.nemo`` file has one."""
    suffix = ".nemo" if output.suffix == ".nemo" else ""
    return output.name.removesuffix(suffix), suffix


def _move(source: Path, target: Path) -> None:
    """Rename an output, and the record that lies beside a file. The record goes last: without it nothing is whole."""
    source.rename(target)
    if record_path(source).exists():
        record_path(source).rename(record_path(target))
