"""``python -m nemo_minitron.jobs.slurm_rank FOLDER``: one process of a stage that a cluster's own launcher starts.

``srun`` starts a process for each rank, on any number of nodes, in containers or not. Slurm states its rank;
otherwise it is as under :func:`~nemo_minitron.jobs.local.run_stage`: the folder holds ``config.yaml``, the ranks leave
their logs and results in it, and rank 0 writes the record when all results are there. The folder must be visible on all
nodes. A job that runs again, because Slurm or the user queued it again, goes on where the stage stood.

The folder of a job that is a part of a stage holds ``stage.yaml`` instead: rank 0 asks the stage what the job runs
(:mod:`nemo_minitron.jobs.stage_jobs`), and writes ``config.yaml``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import sys
import time
from pathlib import Path

from nemo_minitron.config import StageConfig, StageJob, load
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs import slurm_environment
from nemo_minitron.jobs.dry_run import check_stage_space
from nemo_minitron.jobs.failures import forget_failure
from nemo_minitron.jobs.launch import FOLDER_VARIABLE, clear_folder
from nemo_minitron.jobs.local import record_job
from nemo_minitron.jobs.output import Output
from nemo_minitron.jobs.results import ATTEMPT_VARIABLE, begin_attempt, failure, read_results, save_result, verdict
from nemo_minitron.jobs.stage_jobs import STAGE_FILE, job_name, jobs_module

__all__ = ["main"]

#: The arguments of the worker of a job that is a part of a stage.
_RUN_FILE = "run.txt"

#: Seconds that rank 0 waits for the results of the others once it has its own.
PATIENCE = 120.0


def main(folder: Path) -> int:
    """Run one rank.

    Returns:
        0 done (or done before), 2 refused, 1 crashed, or what the worker returns.
    """
    from nemo_minitron.jobs.worker import main as work

    job = json.loads((folder / "job.json").read_text())
    stage, name = job["stage"], job.get("job", "")
    config = load(stage, folder / (STAGE_FILE if name else "config.yaml"))
    attempt = f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    os.environ[FOLDER_VARIABLE], os.environ[ATTEMPT_VARIABLE] = str(folder), attempt
    rank, world = slurm_environment.translate()
    own = next(own for own in config.jobs() if own.name == name)
    if world != own.processes:
        print(
            f"minitron: the layout of {job_name(config.name, name)} needs {own.processes} processes, "
            f"Slurm started {world}",
            file=sys.stderr,
        )
        return 2
    with contextlib.ExitStack() as held:
        running = None
        if rank == 0:
            begin_attempt(folder, attempt)
            if name:
                state, running = _prepare_job(config, own, folder, job["overwrite"], held)
                (folder / _RUN_FILE).write_text("" if running is None else running.words())
            else:
                running = _Running(Output(config))
                state = _prepare(running.output, folder, job["overwrite"], held)
            (folder / f"ready-{attempt}").write_text(state)
        else:
            state = _wait_for(folder / f"ready-{attempt}")
        if state != "run":
            said = sys.stderr if state.startswith("refused") else sys.stdout
            print(f"minitron: {job_name(config.name, name)}: {state}", file=said)
            return 2 if state.startswith("refused") else 0
        started, clock = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), time.monotonic()
        words = (folder / _RUN_FILE).read_text().split() if name else [stage]
        code = work(*words)  # a failure ends the process there
        if rank or running is None:
            return code
        code = _record(running, folder, world, started, clock)
        if name and not code:
            jobs_module(config).finish(running.config, name, folder)
        return code


@dataclasses.dataclass(frozen=True)
class _Running:
    """What a job runs, as rank 0 prepared it.

    Attributes:
        output: of the stage that the ranks run.
        part: module that they run in its place, which makes no output.
        settings: of the stage that the job is a part of; None for that of ``output``.
    """

    output: Output
    part: str | None = None
    settings: StageConfig | None = None

    @property
    def config(self) -> StageConfig:
        return self.settings or self.output.config

    def words(self) -> str:
        """The arguments of the worker."""
        return " ".join([self.output.config.STAGE, *([] if self.part is None else [self.part])])


def _prepare_job(
    config: StageConfig, job: StageJob, folder: Path, overwrite: bool, held: contextlib.ExitStack
) -> tuple[str, _Running | None]:
    """:func:`_prepare` for a job that is a part of a stage: a stage of its own, or work on the stage's output."""
    output = Output(config)
    if output.done_record() is not None:
        return "done before", None
    try:
        if job.begins:
            state = _prepare(output, folder, overwrite, held)
            if state != "run":
                return state, None
            output = output.replaced_by(overwrite=False)  # an old one has made room
        elif job.alone:
            held.enter_context(output.leased())
        settled = output.settled_here() if hasattr(config, "resume") else config
        prepared = jobs_module(config).prepare(settled, job.name, folder)
        if prepared is None:
            return "done before", None
        running = _Running(Output(prepared.config), prepared.part, settled)
        running.output.write_settings(folder)
        if prepared.part is None:
            return _prepare(running.output, folder, False, held), running
    except Exception as error:
        save_result(folder, failure(0, error))
        if not isinstance(error, MinitronError):
            raise
        held.__exit__(type(error), error, error.__traceback__)  # an old output comes back
        return f"refused: {error}", None
    clear_folder(folder)
    forget_failure(folder)
    return "run", running


def _prepare(output: Output, folder: Path, overwrite: bool, held: contextlib.ExitStack) -> str:
    """Called by rank 0 before the others start. Returns "run", "done before", or "refused: ..."."""
    if output.done_record() is not None:
        return "done before"
    try:
        held.enter_context(output.leased())
        if output.is_requeued_job():
            output, overwrite = output.replaced_by(overwrite=False), False
            output.write_settings(folder)
        todo = output.prepare(overwrite=overwrite)
        if todo is not None:
            todo.check_inputs()
            check_stage_space(todo)
            held.enter_context(todo.replacing())
            if not todo.resumable:  # one that resumes begins with nothing, and goes on if requeued
                todo.write_settings(folder)
    except MinitronError as error:
        save_result(folder, failure(0, error))
        return f"refused: {error}"
    if todo is None:
        return "done before"
    clear_folder(folder)
    forget_failure(folder)
    todo.begin()
    return "run"


def _wait_for(path: Path, patience: float = 600.0) -> str:
    """The content of a file that rank 0 writes."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.2)
    return f"refused: rank 0 did not write {path}; is the folder shared by all nodes?"


def _record(running: _Running, folder: Path, world: int, started: str, clock: float) -> int:
    """Called by rank 0 at the end: wait for the results of the other ranks and write the record of an output."""
    deadline = time.monotonic() + PATIENCE
    while len(read_results(folder)) < world and time.monotonic() < deadline:
        time.sleep(0.2)
    try:
        results = verdict(folder, world, 1)
    except Exception as error:
        print(f"minitron: {error}", file=sys.stderr)
        return 2 if isinstance(error, MinitronError) else 1
    if running.part is None:
        record_job(running.output, results, started=started, seconds=time.monotonic() - clock)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
