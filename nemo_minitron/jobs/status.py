"""How far the stages of a run are, read from what they leave: records, leases, logs, metrics, and from Slurm.

Nothing is written, and any file may be missing, half-written or damaged.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.config import STAGES, StageConfig, load
from nemo_minitron.errors import ConfigError, MinitronError
from nemo_minitron.jobs.contents import missing
from nemo_minitron.jobs.failures import Failure, last_failure
from nemo_minitron.jobs.lease import Holder, holder_of
from nemo_minitron.jobs.manifest import MANIFEST, read_jobs, read_manifest
from nemo_minitron.jobs.output import Output, archived_outputs
from nemo_minitron.jobs.records import read_record, record_path
from nemo_minitron.jobs.slurm_status import JobState, job_states
from nemo_minitron.parsing import parse_json, parse_yaml

__all__ = ["RunStatus", "StageStatus", "status_of"]

#: Bytes of the end of a log, or of a metrics file, that are looked at.
_END = 1 << 16
#: Steps whose mean time says how long the others will take.
_RECENT = 20
#: States of Slurm jobs that ended otherwise than by a failure.
_ENDS = {"CANCELLED": "cancelled", "TIMEOUT": "timeout", "PREEMPTED": "stopped"}
_LOGGED = re.compile(r"(?::|\s)\s*(\d+)(?: of |/)(\d+)\b")
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class StageStatus:
    """How far one stage is.

    Attributes:
        name, stage, output: of the stage.
        state: "done"; "running"; "queued" (in Slurm); "failed"; "cancelled", "timeout" (by Slurm); "stopped" (by a
            signal, and it goes on when it is started again); "dead" (its process is gone without a word); "damaged"
            (files of a finished output are gone or cut off); "out of date" (made from other settings or inputs than the
            run has now); "unfinished"; "-".
        seconds: of a finished stage its time, of a running one the time since its start.
        finished: ISO time of the end of a finished stage.
        step, steps: of the work that a running stage does now, or had done when it ended.
        unit: what they count.
        left: seconds until ``steps``, as it goes now.
        process: who runs it, or ran it.
        host, pid: of that process.
        job: Slurm job.
        error: why it failed; of a damaged or outdated one, in what way.
        exit_code: of the failure, where it is known.
        log: the file to look at.
    """

    name: str
    stage: str
    output: str
    state: str = "-"
    seconds: float | None = None
    finished: str | None = None
    step: int | None = None
    steps: int | None = None
    unit: str = ""
    left: float | None = None
    process: str | None = None
    host: str | None = None
    pid: int | None = None
    job: str | None = None
    error: str | None = None
    exit_code: int | None = None
    log: str | None = None


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Attributes:
        name: of the run.
        stages: in order.
        earlier: outputs of other settings that are kept.
        remarks: damage that belongs to no stage.
    """

    name: str
    stages: list[StageStatus]
    earlier: list[Path] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def status_of(path: Path) -> RunStatus:
    """The state of a run, or of a stage's output.

    Raises:
        ConfigError: if there is neither at ``path``, or its ``pipeline.json`` cannot be read.
    """
    manifest = read_manifest(path) if path.is_dir() else None
    if manifest is None:
        return _of_output(path)
    jobs = read_jobs(path)
    states = job_states(jobs.values())
    configs = manifest.get("configs")
    run = holder_of(path / ".lease")
    stages, earlier = [], []
    for entry in manifest["stages"]:
        output = _placed(entry["output"], path)
        settings = configs.get(entry["name"]) if isinstance(configs, dict) else None
        job = jobs.get(entry["name"])
        stages.append(
            _stage(
                entry["name"],
                entry["stage"],
                output,
                settings,
                job,
                states.get(job or ""),
                shown=entry["output"],
                parts=_parts(entry["name"], jobs, states),
            )
        )
        earlier += archived_outputs(output)
    remarks = []
    if run is not None and not run[1] and not any(stage.state == "dead" for stage in stages):
        remarks.append(f"{run[0]}, is gone; the same command goes on")
    return RunStatus(manifest["name"], stages, earlier, remarks)


def _of_output(path: Path) -> RunStatus:
    """The state of a single stage by its output, or by what lies beside it."""
    place = path.absolute()
    logs = place.parent / "logs" / place.name
    record, begun = read_record(place), _json(logs / "begun.json")
    stage = (record or begun or {}).get("stage")
    held = holder_of(logs.with_name(f"{place.name}.lease"))
    if not isinstance(stage, str):
        submitted = (_json(logs / "job.json") or {}).get("stage")
        stage = submitted if isinstance(submitted, str) else None
    if stage is None and held is None and not record_path(place).exists() and last_failure(logs) is None:
        raise ConfigError(
            f"{path}: holds no pipeline ({MANIFEST} is missing) and no output of a stage; give the output of "
            "`minitron run`, or of a stage"
        )
    settings = None
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        settings = parse_yaml((logs / "config.yaml").read_text(encoding="utf-8"))
    named = settings.get("name") if isinstance(settings, dict) else None
    name = (record or {}).get("name") or named or place.name
    jobs = read_jobs(place.parent)
    job = jobs.get(str(name))
    own = {number: number for key, number in jobs.items() if key == name or key.startswith(f"{name}.")}
    states = job_states(own)
    status = _stage(str(name), stage or "?", place, settings, job, states.get(job or ""), shown=str(path),
                    parts=_parts(str(name), jobs, states))  # fmt: skip
    return RunStatus(str(name), [status], archived_outputs(place))


def _parts(name: str, jobs: Mapping[str, str], states: Mapping[str, JobState]) -> dict[str, JobState | None]:
    """Of the jobs that are parts of a stage, by their names within it, what Slurm says."""
    start = f"{name}."
    return {key.removeprefix(start): states.get(job) for key, job in jobs.items() if key.startswith(start)}


def _stage(
    name: str,
    stage: str,
    output: Path,
    settings: Any,
    job: str | None,
    state: JobState | None,
    *,
    shown: str,
    parts: Mapping[str, JobState | None],
) -> StageStatus:
    """The state of one stage.

    Args:
        name, stage: of the stage.
        output: where it is.
        settings: its configuration, as the run has it; None where that is not known.
        job: its Slurm job.
        state: of that job; None where Slurm does not know it (any more).
        shown: the output as the user wrote it.
        parts: of :func:`_parts`.
    """
    logs = output.absolute().parent / "logs" / output.name
    base: dict[str, Any] = {"name": name, "stage": stage, "output": shown, "job": job}
    held = holder_of(logs.with_name(f"{output.name}.lease"))
    if held is not None and held[1]:
        return StageStatus(**base, state="running", **_who(held[0]), **_progress(output, logs, settings, held[0]))
    if state is not None and state.waits:
        return StageStatus(**base, **_waiting(state, parts))
    if state is not None and state.runs:
        return StageStatus(**base, state="running", process=_job_text(state), **_progress(output, logs, settings, None))
    record = read_record(output)
    if record is not None and output.exists():
        return _recorded(base, record, output, settings)
    if record is None and record_path(output).exists() and not _is_unfinished(output, logs, held):
        return StageStatus(**base, state="damaged", error=f"{record_path(output)} cannot be read")
    if (failed := _failed_part(logs, parts)) is not None:
        return StageStatus(**base, **failed)
    failure = last_failure(logs)
    log = str(_log(logs)) if _log(logs) is not None else None
    done = {key: value for key, value in _progress(output, logs, settings, None).items() if key != "left"}
    if state is not None and state.state != "COMPLETED":
        why = _job_text(state) if failure is None else f"{_job_text(state)}: {failure.message}"
        code = state.exit_code if failure is None else failure.exit_code
        word = _ENDS.get(state.state, "failed")
        return StageStatus(**base, state=word, error=why, exit_code=code, log=log, **done)
    if failure is not None:
        return StageStatus(**base, **done, **_failed(failure, log))
    if held is not None:
        return StageStatus(**base, state="dead", error=f"{held[0]}, is gone", log=log, **_who(held[0]), **done)
    if record is not None:
        return StageStatus(**base, state="damaged", error=f"{output} is gone")
    if output.exists():
        return StageStatus(**base, state="unfinished", log=log, **done)
    return StageStatus(**base)


def _waiting(state: JobState, parts: Mapping[str, JobState | None]) -> dict[str, Any]:
    """The state of a stage whose last job waits: running, if one of its other jobs does."""
    known = {name: part for name, part in parts.items() if part is not None}
    running = [f"{name}: {_job_text(part)}" for name, part in known.items() if part.runs]
    if running:
        return {"state": "running", "process": "; ".join(running)}
    first = next((f"{name}: {_job_text(part)}" for name, part in known.items() if part.waits), _job_text(state))
    return {"state": "queued", "process": first}


def _failed_part(logs: Path, parts: Mapping[str, JobState | None]) -> dict[str, Any] | None:
    """Why a stage ended without a result, where a job that is a part of it did: the first that failed."""
    for name, state in parts.items():
        if state is not None and (state.state in ("COMPLETED", "CANCELLED") or state.waits or state.runs):
            continue
        folder = logs / "jobs" / name
        failure = last_failure(folder)
        if failure is None and state is None:
            continue
        said = [text for text in (state and _job_text(state), failure and failure.message) if text]
        return {
            "state": "failed" if state is None else _ENDS.get(state.state, "failed"),
            "error": f"{name}: {': '.join(said)}",
            "exit_code": state.exit_code if failure is None and state is not None else failure and failure.exit_code,
            "log": str(_log(folder)) if _log(folder) is not None else None,
        }
    return None


def _recorded(base: dict[str, Any], record: dict[str, Any], output: Path, settings: Any) -> StageStatus:
    """The state of an output with a record."""
    seconds = record["seconds"] if isinstance(record["seconds"], int | float) else None
    known: dict[str, Any] = {"seconds": seconds, "finished": _end(record)}
    files = record.get("files", {})
    with contextlib.suppress(AttributeError, KeyError, TypeError):  # a record that somebody has edited
        if faults := missing(output, files):
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            return StageStatus(**base, **known, state="damaged", error=f"{faults[0]}{more}")
    if changes := _changes(base["stage"], output, settings):
        return StageStatus(**base, **known, state="out of date", error="; ".join(changes))
    return StageStatus(**base, **known, state="done")


def _changes(stage: str, output: Path, settings: Any) -> list[str]:
    """How the settings and inputs that the run has now differ from those that made an output; none if not known."""
    config = _config(stage, settings)
    if config is None or config.REPEATS:
        return []
    inputs = config.inputs().values()
    if not all(Path(path).exists() for path in inputs):  # gone, or the run was started in another directory
        return []
    config.output = str(output)
    try:
        state, reasons = Output(config).state()
    except (MinitronError, OSError, AttributeError, LookupError, TypeError, ValueError):  # damaged records of inputs
        return []
    return reasons if state == "changed" else []


def _config(stage: str, settings: Any) -> StageConfig | None:
    if stage not in STAGES or not isinstance(settings, dict):
        return None
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "config.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        try:
            return load(stage, path)
        except (MinitronError, yaml.YAMLError):
            return None  # of another release


def _progress(output: Path, logs: Path, settings: Any, holder: Holder | None) -> dict[str, Any]:
    """How far the work is, by the metrics of a training or else by the log of rank 0."""
    since = None
    if holder is not None:
        with contextlib.suppress(ValueError):
            since = max(0.0, time.time() - time.mktime(time.strptime(holder.since, "%Y-%m-%d %H:%M:%S")))
    shown: dict[str, Any] = {"seconds": since}
    steps = settings.get("steps") if isinstance(settings, dict) else None
    lines = [line for line in _last_objects(output / "metrics.jsonl") if isinstance(line.get("step"), int)]
    if lines:
        shown |= {"step": lines[-1]["step"], "steps": steps if isinstance(steps, int) else None, "unit": "steps"}
        trained = [line for line in lines if "split" not in line and isinstance(line.get("seconds"), int | float)]
        trained = trained[-_RECENT:]
        if len(trained) > 1 and isinstance(steps, int) and trained[-1]["seconds"] > trained[0]["seconds"]:
            each = (trained[-1]["seconds"] - trained[0]["seconds"]) / max(1, trained[-1]["step"] - trained[0]["step"])
            shown["left"] = max(0.0, (steps - lines[-1]["step"]) * each)
        return shown
    log = logs / "rank-0.log"
    found = _LOGGED.findall(_CONTROLS.sub("", _tail(log)))
    counts = [(int(done), int(total)) for done, total in found if 0 < int(total) >= int(done)]
    if counts:
        done, total = counts[-1]
        shown |= {"step": done, "steps": total}
        if since and done:
            shown["left"] = since * (total - done) / done
    return shown


def _last_objects(path: Path) -> list[dict[str, Any]]:
    """The whole JSON objects near the end of a file of one a line."""
    objects = []
    for line in _tail(path).splitlines():
        try:
            content = parse_json(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            objects.append(content)
    return objects


def _tail(path: Path) -> str:
    """The end of a file; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _END))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _who(holder: Holder) -> dict[str, Any]:
    return {"process": str(holder), "host": holder.host, "pid": holder.pid}


def _failed(failure: Failure, log: str | None) -> dict[str, Any]:
    stopped = failure.exit_code in (75, 130)
    return {
        "state": "stopped" if stopped else "failed",
        "error": failure.message,
        "exit_code": failure.exit_code,
        "log": log,
    }


def _job_text(state: JobState) -> str:
    where = f" on {state.nodes}" if state.nodes else ""
    why = f" ({state.reason})" if state.reason else ""
    return f"job {state.job} is {state.state}{where}{why}"


def _log(logs: Path) -> Path | None:
    """The log to look at: that of a rank that failed, of rank 0, or the launcher's."""
    for result in sorted(logs.glob("rank-*.json")):
        content = _json(result) or {}
        if content.get("status") in ("refused", "crashed") and (log := result.with_suffix(".log")).exists():
            return log
    return next((log for name in ("rank-0.log", "launcher.log") if (log := logs / name).exists()), None)


def _is_unfinished(output: Path, logs: Path, held: tuple[Holder, bool] | None) -> bool:
    return held is not None or last_failure(logs) is not None or not output.exists()


def _end(record: Mapping[str, Any]) -> str | None:
    try:
        started = datetime.datetime.fromisoformat(record["started"])
        return (started + datetime.timedelta(seconds=float(record["seconds"]))).isoformat(timespec="seconds")
    except (KeyError, TypeError, ValueError):
        return None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _placed(output: str, folder: Path) -> Path:
    """Where an output is: as the run wrote it, or in the run's directory where that was moved, or is seen from afar."""
    own, moved = Path(output), folder / Path(output).name
    logs = own.absolute().parent / "logs" / own.name
    return moved if moved.exists() and not own.exists() and not logs.exists() else own
