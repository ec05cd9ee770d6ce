"""``python -m nemo_minitron.jobs.slurm_rank FOLDER``: one process of a stage that a cluster's own launcher starts.

``srun`` starts a process for each rank, on any number of nodes, in containers or not. Slurm states its rank;
otherwise it is as under :func:`~nemo_minitron.jobs.local.run_stage`: the folder holds ``config.yaml``, the ranks leave
their logs and results in it, and rank 0 writes the record when all results are there. The folder must be visible on all
nodes. A job that runs again, because Slurm or the user queued it again, goes on where the stage stood.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import time
from pathlib import Path

from nemo_minitron.config import load
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs import slurm_environment
from nemo_minitron.jobs.dry_run import check_stage_space
from nemo_minitron.jobs.failures import forget_failure
from nemo_minitron.jobs.launch import FOLDER_VARIABLE, clear_folder
from nemo_minitron.jobs.local import record_job
from nemo_minitron.jobs.output import Output
from nemo_minitron.jobs.results import ATTEMPT_VARIABLE, begin_attempt, failure, read_results, save_result, verdict

__all__ = ["main"]

#: Seconds that rank 0 waits for the results of the others once it has its own.
PATIENCE = 120.0


def main(folder: Path) -> int:
    """Run one rank.

    Returns:
        0 done (or done before), 2 refused, 1 crashed, or what the worker returns.
    """
    from nemo_minitron.jobs.worker import main as work

    job = json.loads((folder / "job.json").read_text())
    config = load(job["stage"], folder / "config.yaml")
    attempt = f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    os.environ[FOLDER_VARIABLE], os.environ[ATTEMPT_VARIABLE] = str(folder), attempt
    rank, world = slurm_environment.translate()
    if world != config.processes:
        print(
            f"minitron: the layout of {config.name} needs {config.processes} processes, Slurm started {world}",
            file=sys.stderr,
        )
        return 2
    output = Output(config)
    with contextlib.ExitStack() as held:
        if rank == 0:
            begin_attempt(folder, attempt)
            state = _prepare(output, folder, job["overwrite"], held)
            (folder / f"ready-{attempt}").write_text(state)
        else:
            state = _wait_for(folder / f"ready-{attempt}")
        if state != "run":
            print(f"minitron: {config.name}: {state}", file=sys.stderr if state.startswith("refused") else sys.stdout)
            return 2 if state.startswith("refused") else 0
        started, clock = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), time.monotonic()
        code = work(job["stage"])  # a failure ends the process there
        return code if rank else _record(output, folder, world, started, clock)


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


def _record(output: Output, folder: Path, world: int, started: str, clock: float) -> int:
    """Called by rank 0 at the end: wait for the results of the other ranks and write the record."""
    deadline = time.monotonic() + PATIENCE
    while len(read_results(folder)) < world and time.monotonic() < deadline:
        time.sleep(0.2)
    try:
        results = verdict(folder, world, 1)
    except Exception as error:
        print(f"minitron: {error}", file=sys.stderr)
        return 2 if isinstance(error, MinitronError) else 1
    record_job(output, results, started=started, seconds=time.monotonic() - clock)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
