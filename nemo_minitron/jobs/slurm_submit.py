"""``minitron run PIPELINE --slurm FILE``: the pipeline as a nemo_run experiment on a Slurm cluster.

Each stage that is not done is one job: nemo_run writes its script and submits it; ``srun`` starts its ranks
(:mod:`nemo_minitron.jobs.slurm_rank`). A job starts when the jobs whose outputs it reads have ended well, so that
independent stages run side by side. A stage that leads others is several jobs, in the same way
(:mod:`nemo_minitron.jobs.stage_jobs`).

Nothing of this stays behind to lead the jobs. The same command goes on with a run: what is done is not submitted, and
jobs that are still in the queue are kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nemo_minitron.config import PipelineConfig, SlurmConfig, StageConfig, StageJob
from nemo_minitron.config.paths import absolute
from nemo_minitron.errors import ConfigError, MinitronError
from nemo_minitron.jobs.dry_run import depends_on, pipeline_space_faults
from nemo_minitron.jobs.manifest import check_manifest, write_jobs, write_manifest
from nemo_minitron.jobs.output import Output
from nemo_minitron.jobs.slurm_checks import input_faults, mount_faults
from nemo_minitron.jobs.slurm_queue import live_jobs
from nemo_minitron.jobs.stage_jobs import STAGE_FILE, finished_jobs, job_folder_of, job_name
from nemo_minitron.runtime.cpu.quiet import quiet
from nemo_minitron.runtime.environment import ORDERED_KERNELS, ordered_kernels

if TYPE_CHECKING:
    import nemo_run as run

__all__ = ["Job", "TimeWarnings", "jobs_of", "submit"]

TimeWarnings = Callable[[Sequence[StageConfig], Sequence[StageConfig], SlurmConfig], list[str]]

#: Stands in for srun in a script. Without Pyxis, the two container options that nemo_run always passes
#: are left out. What a stage refuses, it would refuse again: such a job is not queued again. One that a signal stopped
#: (the time limit's, a preemption's) has saved its state and is.
_SRUN = """srun() {{
    local kept=() code
    while (($#)); do
        case "$1" in
            {dropped}) shift 2 ;;
            *) kept+=("$1"); shift ;;
        esac
    done
    command srun "${{kept[@]}}"
    code=$?
    if grep -hs '"status": "refused"' {folder}/rank-*.json | grep -qv '"error": "PreemptedError"'; then
        TORCHX_MAX_RETRIES=0
    fi
    return $code
}}"""
_PYXIS = "--container-mounts | --container-workdir"


@dataclasses.dataclass(frozen=True)
class Job:
    """A stage to be submitted, or a part of it.

    Attributes:
        config: of the stage.
        overwrite: replace an output of other settings.
        after: names of the jobs that it waits for and that are submitted too.
        part: which of the stage's jobs it is.
    """

    config: StageConfig
    overwrite: bool
    after: tuple[str, ...]
    part: StageJob

    @property
    def name(self) -> str:
        """Its name in the run: that of the stage for the stage's last job."""
        return job_name(self.config.name, self.part.name)

    @property
    def folder(self) -> Path:
        """The folder of its configuration, logs and results."""
        return job_folder_of(self.config, self.part.name)

    @property
    def settings_file(self) -> str:
        """The file of the stage's configuration in it."""
        return STAGE_FILE if self.part.name else "config.yaml"


def jobs_of(stages: Sequence[StageConfig], slurm: SlurmConfig, *, overwrite: bool) -> list[Job]:
    """The jobs of the stages that are not done, each with the jobs that it waits for.

    Raises:
        ConfigError: for layouts that do not fill nodes, and time limits of unknown stages; and where a stage has the
            name of another's job.
    """
    if faults := slurm.stage_faults(stages):
        raise ConfigError(faults)
    jobs: list[Job] = []
    for config in stages:
        whole = [job for job in jobs if not job.part.name]
        after = tuple(job.name for job in whole if depends_on(config, job.config))
        # What an earlier job makes anew, this one has to make anew too.
        if after or Output(config).state()[0] != "done":
            jobs += _jobs_of_stage(config, after, overwrite=overwrite or config.overwrite)
    names = [job.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        remedy = "another stage has a job of that name; choose another name"
        raise ConfigError([f"stage {name}: {remedy}" for name in twice])
    return jobs


def _jobs_of_stage(config: StageConfig, after: tuple[str, ...], *, overwrite: bool) -> list[Job]:
    """The jobs of one stage that are to run.

    Args:
        config: of the stage.
        after: names of the jobs that the stage waits for.
        overwrite: replace an output of other settings.
    """
    parts = config.jobs()
    done = set() if after else finished_jobs(config)
    todo = [part for part in parts if part.name not in done or not part.name]
    begun = any(part.begins for part in parts)
    jobs = []
    for part in todo:
        within = tuple(job_name(config.name, other.name) for other in todo if other.name in part.after)
        own = config
        if begun and not part.begins:  # the output is what the first job has begun
            resumes: dict[str, Any] = {"resume": True} if hasattr(config, "resume") else {}
            own = dataclasses.replace(config, overwrite=False, **resumes)
        jobs.append(Job(own, overwrite and own is config, within or after, part))
    return jobs


def submit(
    pipeline: PipelineConfig,
    stages: Sequence[StageConfig],
    slurm: SlurmConfig,
    *,
    overwrite: bool,
    dry_run: bool,
    console: Console,
    time_warnings: TimeWarnings | None = None,
) -> dict[str, str]:
    """Submit the stages that are not done, or print the scripts.

    Jobs run in directories of their own, on nodes or in containers: every path of the settings is made absolute.

    Args:
        pipeline, stages: from :func:`~nemo_minitron.config.load_pipeline`.
        slurm: where the jobs run.
        overwrite: replace outputs that were made with other settings, instead of archiving them.
        dry_run: print the scripts and leave nothing behind.
        console: to print on.
        time_warnings: called with all stages, those to be submitted, and ``slurm``; says which time limits are too
            short (:func:`nemo_minitron.cli.time_limits.time_warnings`).

    Returns:
        The number of each submitted job, by the name of the stage, with that of the part for one that is a part;
        under ``dry_run`` its script.

    Raises:
        ConfigError: see :func:`jobs_of`; for inputs that are missing, paths that the container does not show, and
            outputs that cannot fit on the disk (under ``dry_run`` after the scripts are printed); and for a job in the
            queue that was submitted with other settings.
        MinitronError: if Slurm refuses a job.
    """
    pipeline = dataclasses.replace(pipeline, output=str(Path(pipeline.output).absolute()))
    stages, slurm = [absolute(config) for config in stages], absolute(slurm)
    check_manifest(Path(pipeline.output))
    jobs = jobs_of(stages, slurm, overwrite=overwrite)
    live = {} if slurm.host is not None else live_jobs(Path(pipeline.output), jobs)
    if live:
        said = ", ".join(f"{name} (job {number})" for name, number in live.items())
        console.print(f"still in the queue, and kept: {said}", markup=False, highlight=False, soft_wrap=True)
    jobs = [job for job in jobs if job.name not in live]
    if not jobs:
        console.print("every stage is done: there is nothing to submit" if not live else "there is nothing to submit")
        return {}
    home = Path(slurm.job_dir or Path(pipeline.output) / "jobs")
    names = {job.config.name for job in jobs}
    todo = [config for config in stages if config.name in names]
    faults = [*mount_faults(todo, slurm), *input_faults(stages, todo)]
    if slurm.host is None:  # the file systems of another host are not seen from here
        faults += pipeline_space_faults(stages)
    if faults and not dry_run:
        raise ConfigError(faults)
    for warning in time_warnings(stages, todo, slurm) if time_warnings is not None else []:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if dry_run:
        import tempfile

        with tempfile.TemporaryDirectory() as aside:
            scripts = _scripts(pipeline.name, jobs, slurm, home, Path(aside), live)
        for job in jobs:
            console.rule(job.name)
            console.print(scripts[job.name], markup=False, highlight=False, soft_wrap=True)
        if faults:
            raise ConfigError(faults)
        return scripts
    Path(pipeline.output).mkdir(parents=True, exist_ok=True)
    write_manifest(Path(pipeline.output), pipeline, list(stages))
    for job in jobs:
        _write(job)
    submitted = _submit(pipeline.name, jobs, slurm, home, live)
    write_jobs(Path(pipeline.output), submitted)
    for job in jobs:
        waits = f", after {', '.join(job.after)}" if job.after else ""
        console.print(f"{job.name}: job {submitted[job.name]}{waits}", markup=False, highlight=False)
    console.print(f"minitron status {pipeline.output} tells how far they are", markup=False, highlight=False)
    return submitted


def _write(job: Job) -> None:
    """Write the files that the ranks read."""
    Output(job.config).write_settings(job.folder, job.settings_file)
    content = {"stage": job.config.STAGE, "overwrite": job.overwrite}
    if job.part.name:
        content["job"] = job.part.name
    (job.folder / "job.json").write_text(json.dumps(content) + "\n")


def _executor(job: Job, slurm: SlurmConfig, home: Path) -> run.SlurmExecutor:
    """nemo_run's description of one job."""
    import nemo_run as run

    request = slurm.request(job.config, job.part)
    # Without a directory of its own, the jobs' is that of nemo_run's records, which lie in ``home``.
    tunnel: run.LocalTunnel | run.SSHTunnel = run.LocalTunnel(job_dir="")
    if slurm.host is not None:
        tunnel = run.SSHTunnel(host=slurm.host, user=str(slurm.user), job_dir=str(home), identity=slurm.identity)
    dropped = _PYXIS if slurm.container_image is None else "--none"
    setup = [*slurm.setup, _SRUN.format(dropped=dropped, folder=shlex.quote(str(job.folder)))]
    env = {**slurm.env, "OMP_NUM_THREADS": str(job.config.runtime.threads or request.cpus_per_task or 1)}
    env |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if request.gpus and ordered_kernels(job.config):
        env.setdefault(*ORDERED_KERNELS)
    extra = dict(request.extra)
    if job.after:  # Slurm's own default may keep those that can never start in the queue for ever
        extra = {"kill_on_invalid_dep": "yes"} | {name.replace("-", "_"): value for name, value in extra.items()}
    return run.SlurmExecutor(
        account=request.account,
        partition=request.partition,
        job_name_prefix="minitron-",
        time=request.time,
        nodes=request.nodes,
        ntasks_per_node=request.tasks,
        cpus_per_task=request.cpus_per_task,
        gpus_per_node=request.gpus,
        qos=request.qos,
        constraint=request.constraint,
        mem=request.mem,
        exclusive=True if request.exclusive else None,
        signal=slurm.signal,
        container_image=slurm.container_image,
        container_mounts=list(slurm.container_mounts),
        additional_parameters=extra or None,
        env_vars=env,
        setup_lines="\n".join(setup),
        retries=slurm.retries,
        tunnel=tunnel,
        packager=run.Packager(),
    )


@contextlib.contextmanager
def _experiment(name: str, home: Path) -> Iterator[run.Experiment]:
    """An experiment of nemo_run, whose records stay in the run, and which prints nothing."""
    quiet()  # nemo_run imports torch
    os.environ["NEMORUN_HOME"] = str(home / "nemo_run")  # read when nemo_run is imported
    import nemo_run as run
    from nemo_run.run.torchx_backend.schedulers import slurm as scheduler

    run.config.set_nemorun_home(str(home / "nemo_run"))
    # A file in the home of the time of its import, which may have been a directory that is gone.
    scheduler.SLURM_JOB_DIRS = str(home / "nemo_run" / ".slurm_jobs")
    said, title = io.StringIO(), re.sub(r"[^\w.-]", "-", name) or "pipeline"
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        run.Experiment(title, log_level="ERROR") as experiment,
    ):
        yield experiment


def _script(job: Job, slurm: SlurmConfig) -> run.Script:
    import nemo_run as run

    return run.Script(
        path="nemo_minitron.jobs.slurm_rank", m=True, entrypoint=slurm.python, args=[str(job.folder.absolute())]
    )


def _scripts(
    name: str, jobs: Sequence[Job], slurm: SlurmConfig, home: Path, aside: Path, live: Mapping[str, str]
) -> dict[str, str]:
    """The sbatch script of each job; a job that it waits for is written as ``<its name>``, or by its number if it is in
    the queue.
    """
    scripts: dict[str, str] = {}
    with _experiment(name, aside) as experiment:
        for job in jobs:
            executor = _executor(job, slurm, home)
            executor.dependencies = [_handle(live.get(other, f"<{other}>")) for other in job.after]
            experiment.add(_script(job, slurm), executor=executor, name=job.name, tail_logs=False)
        experiment.dryrun(log=False, delete_exp_dir=False)
        for job, task in zip(jobs, experiment.jobs, strict=True):
            path = Path(experiment._exp_dir) / f"{task.executor.job_name}_sbatch.sh"
            scripts[job.name] = path.read_text().replace(str(aside / "nemo_run"), str(home / "nemo_run"))
    return scripts


def _handle(job: str) -> str:
    """A job as nemo_run names it."""
    return f"stage://of/{job}/0"


def _submit(name: str, jobs: Sequence[Job], slurm: SlurmConfig, home: Path, live: Mapping[str, str]) -> dict[str, str]:
    """Submit all jobs, each after the jobs that it waits for.

    nemo_run knows dependencies on jobs of the same experiment. Where some jobs are in the queue already, each rank of
    the graph is an experiment of its own, and waits for jobs by their numbers.
    """
    if not live:
        return _submit_together(name, jobs, slurm, home, {})
    submitted: dict[str, str] = {}
    left = list(jobs)
    while left:
        waiting = {job.name for job in left}
        ready = [job for job in left if not waiting & set(job.after)]
        title = f"{name}-{len(jobs) - len(left)}"  # the time in an experiment's name has whole seconds
        submitted |= _submit_together(title, ready, slurm, home, {**live, **submitted})
        left = [job for job in left if job not in ready]
    return submitted


def _submit_together(
    name: str, jobs: Sequence[Job], slurm: SlurmConfig, home: Path, submitted: Mapping[str, str]
) -> dict[str, str]:
    """Submit jobs that wait for one another, or for jobs that are ``submitted``."""
    from invoke.exceptions import UnexpectedExit

    try:
        with _experiment(name, home) as experiment:
            ids: dict[str, str] = {}
            for job in jobs:
                executor = _executor(job, slurm, home)
                executor.dependencies = [_handle(submitted[other]) for other in job.after if other in submitted]
                ids[job.name] = experiment.add(
                    _script(job, slurm),
                    executor=executor,
                    name=job.name,
                    tail_logs=False,
                    dependencies=[ids[other] for other in job.after if other in ids] or None,
                )
            experiment.run(detach=True)
            handles = {job.name: task.handle for job, task in zip(jobs, experiment.jobs, strict=True)}
    except UnexpectedExit as error:
        raise MinitronError(f"Slurm refused a job: {error.result.stderr.strip() or error}") from error
    missing = [stage for stage, handle in handles.items() if not handle]
    if missing:
        raise MinitronError(f"nemo_run submitted no job for {', '.join(missing)}; its records are in {home}")
    return {stage: handle.rpartition("/")[2] for stage, handle in handles.items()}
