"""The output of a stage: its state, the settings and inputs that made it, and the archive of earlier outputs.

An output that other settings or inputs made is archived beside the present one as ``<name>@<first twelve digits of its
identity>``. It is restored, without computing it again, when settings and inputs are changed back. This is what a
pipeline does; a stage that is started by itself refuses to resume an output of other settings
(:meth:`Output.resume_faults`).
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.config import StageConfig
from nemo_minitron.errors import ConfigError, DiskError, MinitronError, PreemptedError
from nemo_minitron.jobs import slurm_environment
from nemo_minitron.jobs.atomic import MARKER, check_output
from nemo_minitron.jobs.contents import SMALL, damaged, missing
from nemo_minitron.jobs.differences import differences
from nemo_minitron.jobs.lease import check_held, holder_of, leased
from nemo_minitron.jobs.precision import automatic, settle, taken, values_here, with_values
from nemo_minitron.jobs.records import (
    hashed_settings,
    identity_of,
    read_record,
    record_path,
    recorded,
    write_record,
)
from nemo_minitron.parsing import parse_json
from nemo_minitron.runtime.atomic import clear_leftovers
from nemo_minitron.runtime.files import is_earlier, replace_file

__all__ = ["Output", "archived_outputs", "claim_output", "settings_text"]

_DIGITS = 12
_STARTED = "begun.json"


class Output:
    """The output of one stage under its settings and inputs.

    The identity is computed once, at the first access, since inputs may be many files. Make a new object after an input
    may have changed.

    Args:
        config: of the stage.

    Attributes:
        config: of the stage.
        path: path of the output.
    """

    def __init__(self, config: StageConfig) -> None:
        self.config = config
        self.path = Path(config.output)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The settings and inputs that the result depends on; see :func:`~nemo_minitron.jobs.records.identity_of`."""
        return identity_of(self.config)

    @property
    def hash(self) -> str:
        """The identity as a hexadecimal hash."""
        return str(self.identity["hash"])

    @property
    def resumable(self) -> bool:
        """Whether the stage can resume an unfinished output."""
        return bool(getattr(self.config, "resume", False))

    @property
    def folder(self) -> Path:
        """The folder for settings, logs and results of its processes: ``logs/<output's name>`` beside the output."""
        path = self.path.absolute()
        return path.parent / "logs" / path.name

    def replaced_by(self, *, overwrite: bool) -> Output:
        """The same output, with ``overwrite`` set or not; no result depends on it."""
        other = Output(dataclasses.replace(self.config, overwrite=overwrite))
        if "identity" in self.__dict__:
            other.__dict__["identity"] = self.identity
        return other

    @property
    def _lease(self) -> Path:
        """The file of the lease: beside the logs."""
        return self.folder.with_name(f"{self.path.name}.lease")

    # How far it is

    def record(self) -> dict[str, Any] | None:
        """The record of the output; None if there is no complete one."""
        return read_record(self.path)

    def started_identity(self) -> dict[str, Any] | None:
        """The identity of the run that was started last; None if unknown."""
        try:
            started = parse_json((self.folder / _STARTED).read_text())
        except (OSError, ValueError):
            return None
        known = isinstance(started, dict) and {"stage", "hash", "settings", "parents"} <= started.keys()
        return started if known else None

    def state(self) -> tuple[str, list[str]]:
        """How far the stage is.

        Returns:
            "done"; "changed" (made with other settings or inputs), with the differences; "damaged" (files are gone or
            of another size), with the files; "unfinished" (an output without a record, or of a stage that is always
            made anew); "begun" (unfinished, and started with other settings, so that it cannot be resumed), with the
            differences; or "new".
        """
        record = self.record()
        if self.config.REPEATS:
            return ("unfinished" if self.path.exists() else "new"), []
        if not self.path.exists():
            return ("new", []) if record is None else ("changed", ["the output is gone"])
        if record is not None:
            changes = self._changes_since(record)
            if changes:
                return "changed", list(changes.values())
            faults = missing(self.path, record.get("files", {}))
            return ("damaged", faults) if faults else ("done", [])
        changes = self._changes_since(self.started_identity()) if self.resumable else {}
        return ("begun", list(changes.values())) if changes else ("unfinished", [])

    def is_stale(self) -> bool:
        """Whether the output was made with these settings, but from an input that was made again since and differs.

        So it is where an input was lost or damaged. There is nothing to archive: the same command made it.
        """
        made = self.record() or self.started_identity()
        return made is not None and self.path.exists() and made["hash"] == self.hash and bool(self._changes_since(made))

    def resume_faults(self) -> list[str]:
        """Why a training may not resume the output: it was started with other settings.

        It would go on from checkpoints that other settings made, or find nothing left to train, and the record would
        state the wrong settings for the model. Settings that change the numbers of a step by rounding at most may
        differ (``RESUMABLE_CHANGES``).
        """
        if self.config.RESUMABLE_CHANGES is None or self.config.overwrite or not self.path.exists():
            return []
        record = self.record()
        faults = [
            f"{self.path} was {'begun' if record is None else 'made'} with other settings: {change}"
            for key, change in self._changes_since(record or self.started_identity()).items()
            if not any(
                fnmatchcase(key, free) or fnmatchcase(key, f"{free}.*") for free in self.config.RESUMABLE_CHANGES
            )
        ]
        if faults:
            faults[-1] += "; choose another output, or make this one anew with --overwrite (overwrite=true)"
        return faults

    def check_resumable(self) -> None:
        """Refuse to resume an output of other settings.

        Raises:
            ConfigError: with the :meth:`resume_faults`, if any.
        """
        if faults := self.resume_faults():
            raise ConfigError(faults)

    def check_inputs(self) -> None:
        """Refuse inputs that are not what their record says: files that are gone, cut off, or, where they are small,
        changed.

        Raises:
            ConfigError: with each of them.
        """
        faults = []
        for setting, path in self.config.inputs().items():
            place = Path(path).absolute()
            if (owned := recorded(place)) is None:
                continue
            owner, record = owned
            files = {
                name: entry for name, entry in record.get("files", {}).items() if (owner / name).is_relative_to(place)
            }
            remedy = f"make {owner} again, or restore the file"
            faults += [f"{setting}: {fault}; {remedy}" for fault in damaged(owner, files, limit=SMALL)]
        if faults:
            raise ConfigError(faults)

    def is_requeued_job(self) -> bool:
        """Whether Slurm queued this job again and the output is unfinished, so that it is to be resumed.

        If the job was to overwrite an old output, its first attempt has done so.
        """
        return slurm_environment.requeued() and self.resumable and self.state()[0] == "unfinished"

    def _changes_since(self, before: dict[str, Any] | None) -> dict[str, str]:
        return differences(self.identity, before, hashed_settings(type(self.config)()))

    # The archive beside it

    def is_archived(self) -> bool:
        """Whether the archive has an output of the same settings and inputs."""
        place = _archive(self.path, self.hash)
        return _holds(place, self.hash) and not self._changes_since(read_record(place))

    def archive(self) -> Path | None:
        """Move the output into the archive. One rank calls it, before the stage starts.

        Returns:
            Its path in the archive; None if there is no output, or its identity is not known.

        Raises:
            ConfigError: if something else is at that path.
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
        """Restore an output of the same settings and inputs from the archive, and archive the present output.

        A present output of unknown identity is renamed to ``.<name>.replaced``.

        Returns:
            Whether the archive had such an output.

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
        """Restore an unfinished output of the same settings from the archive, to resume it."""
        place = _archive(self.path, self.hash)
        if self.resumable and place.exists() and not self.path.exists():
            place.rename(self.path)

    # A run of the stage

    def done_record(self) -> dict[str, Any] | None:
        """The record of an output that is done, which needs no lease: it may lie where nothing can be written.

        What a process left that was killed before it gave its lease back is cleared away, where that can be.
        """
        if self.state()[0] != "done":
            return None
        held = holder_of(self._lease)
        if held is not None and not held[1]:
            with suppress(ConfigError), self.leased():  # nothing can be written, or another process is faster
                pass
        return self.record()

    @contextmanager
    def leased(self) -> Iterator[None]:
        """Keep other processes, on any host, from writing the output while the block runs. One rank of a stage does.

        What a killed process left beside the output is cleared away, and an old output that it had moved aside comes
        back.

        Raises:
            ConfigError: if another process writes it.
        """
        with leased(self._lease, f"output: {self.path}", f"minitron {self.config.STAGE}"):
            clear_leftovers(self.path.absolute(), alone=True)
            yield

    def prepare(self, *, overwrite: bool = False) -> Output | None:
        """Prepare a run of the stage. One rank calls it, right before the stage starts.

        An output of other settings or inputs is archived, or replaced under ``overwrite``; an archived output of the
        same settings and inputs is restored. A stage that runs child stages keeps its directory, since each child's
        output is prepared by itself.

        Args:
            overwrite: replace an output of other settings or inputs, instead of archiving it.

        Returns:
            The output to make; None if it is done.
        """
        state, _ = self.state()
        if state != "done" and self.is_stale():
            return self.replaced_by(overwrite=True)
        if state == "done" or self.restore():
            return None
        changed = state in ("changed", "begun")
        if changed and not (overwrite or self.config.overwrite):
            if not (self.config.RUNS_CHILD_STAGES and self.resumable):
                self.archive()
                self.restore_unfinished()
            return self
        if state == "damaged" and self.resumable:
            record_path(self.path).unlink()  # it says that the output is complete
        if changed or (state in ("unfinished", "damaged") and not self.resumable):
            return self.replaced_by(overwrite=True)
        return self

    def write_settings(self, folder: Path | None = None, name: str = "config.yaml") -> None:
        """Write the ``config.yaml`` that the processes of the stage read, into ``folder`` or :attr:`folder`."""
        folder = folder or self.folder
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / name, settings_text(self.config))

    def begin(self) -> None:
        """Write the identity beside the logs at the start; the record is only written at the end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / _STARTED, json.dumps(self.identity, default=str) + "\n")

    def settled(self) -> StageConfig:
        """The configuration that the stage runs with: what it leaves to the suite is chosen. Every rank calls it, after
        :meth:`begin`; see :func:`~nemo_minitron.jobs.precision.settle`.
        """
        started = self.started_identity()
        identity = "" if started is None else str(started["hash"])
        return settle(self.config, self.folder, identity=identity, resumes=self.resumable and self.path.exists())

    def settled_here(self) -> StageConfig:
        """:meth:`settled`, called by a single process that leads others."""
        started = self.started_identity()
        identity = "" if started is None else str(started["hash"])
        if not any(True for _ in automatic(self.config)):
            return self.config
        resumes = self.resumable and self.path.exists()
        return with_values(self.config, values_here(self.config, self.folder, identity=identity, resumes=resumes))

    def as_settled(self) -> StageConfig:
        """The configuration that an earlier run of these settings went by; as it is, where that is not known."""
        kept = taken(self.config, self.folder, self.hash)
        return self.config if kept is None else with_values(self.config, kept["taken"])

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Implements ``overwrite`` for stages that can resume, around their ``run``, which never sees the old output.

        The old output is moved to ``.<name>.replaced``, and removed when the block ends well. If the stage refuses its
        settings or inputs, the old output is restored; on a full disk too, unless the stage has saved a state. A stage
        that fails otherwise, or is killed, can be resumed; the old output stays beside it until then. Stages that
        cannot resume replace their output by :func:`~nemo_minitron.jobs.atomic.stage_output`.

        Raises:
            ConfigError: if the old output was not written by this suite.
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
        except MinitronError as error:
            keeps = isinstance(error, DiskError) and any(path.glob("**/checkpoints/*-last"))
            if moved and not keeps:
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
        peak_gpu_bytes: Sequence[int] | None = None,
        started: str | None = None,
        work: dict[str, float] | None = None,
    ) -> dict[str, Any]:
        """Write the record, which marks the output complete; see :func:`~nemo_minitron.jobs.records.write_record`.

        Raises:
            MinitronError: if another process has taken the output over.
        """
        check_held(self._lease)
        return write_record(
            self.config,
            self.identity,
            metrics,
            seconds,
            peak_rss_bytes=peak_rss_bytes,
            peak_gpu_bytes=peak_gpu_bytes,
            started=started,
            work=work,
            precision=taken(self.config, self.folder, self.hash),
        )


def settings_text(config: StageConfig) -> str:
    """A configuration as YAML."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def claim_output(config: StageConfig) -> Path:
    """Create the output directory of a stage that can resume, and mark it as written by this suite. One rank calls it.

    ``overwrite`` has no effect here: :meth:`Output.replacing` has moved the old output away.

    Raises:
        ConfigError: for a directory that this suite did not write, or any existing directory if ``resume`` is off.
    """
    output = Path(config.output)
    if not ((output / MARKER).exists() and Output(config).resumable):
        check_output(output, overwrite=False)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()
    return output


def archived_outputs(output: str | Path) -> list[Path]:
    """The archived outputs, made with other settings, of an output."""
    output = Path(output)
    stem, suffix = _name_parts(output)
    escaped = re.sub(r"([*?[])", r"[\1]", stem)
    return sorted(path for path in output.parent.glob(f"{escaped}@*{suffix}") if is_earlier(path))


def _holds(place: Path, identity: str) -> bool:
    """Whether ``place`` is a complete output of that identity."""
    record = read_record(place)
    if record is None or record["hash"] != identity or not place.exists():
        return False
    return not missing(place, record.get("files", {}))


def _archive(output: Path, identity: str) -> Path:
    """The path in the archive for an output of that identity."""
    stem, suffix = _name_parts(output)
    return output.with_name(f"{stem}@{identity[:_DIGITS]}{suffix}")


def _name_parts(output: Path) -> tuple[str, str]:
    """An output's name without its suffix, and the suffix: only a ``.nemo`` file has one."""
    suffix = ".nemo" if output.suffix == ".nemo" else ""
    return output.name.removesuffix(suffix), suffix


def _move(source: Path, target: Path) -> None:
    """Rename an output and the record beside a file. The record goes last, since it marks an output as complete."""
    source.rename(target)
    if record_path(source).exists():
        record_path(source).rename(record_path(target))
