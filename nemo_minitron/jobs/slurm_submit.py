"""``minitron run PIPELINE --slurm FILE``: the pipeline as a nemo_run experiment on a Slurm cluster.

Each stage that is not done is one job: nemo_run writes its script and submits it; ``srun`` starts its ranks
(:mod:`nemo_minitron.jobs.slurm_rank`). A job starts when the jobs whose outputs it reads have ended well, so that
independent stages run side by side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from nemo_minitron.config import PipelineConfig, SlurmConfig, StageConfig
from nemo_minitron.config.paths import absolute
from nemo_minitron.errors import ConfigError, MinitronError
from nemo_minitron.jobs.dry_run import depends_on, pipeline_space_faults
from nemo_minitron.jobs.manifest import check_manifest, write_jobs, write_manifest
from nemo_minitron.jobs.output import Output
from nemo_minitron.jobs.slurm_checks import input_faults, mount_faults
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
    """A stage to be submitted.

    Attributes:
        config: of the stage.
        overwrite: replace an output of other settings.
        after: names of the stages whose outputs it reads and that are submitted too.
    """

    config: StageConfig
    overwrite: bool
    after: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The folder of its configuration, logs and results."""
        return Output(self.config).folder


def jobs_of(stages: Sequence[StageConfig], slurm: SlurmConfig, *, overwrite: bool) -> list[Job]:
    """The stages that are not done, each with the stages that it waits for.

    Raises:
        ConfigError: for layouts that do not fill nodes, and time limits of unknown stages.
    """
    if faults := slurm.stage_faults(stages):
        raise ConfigError(faults)
    jobs: list[Job] = []
    for config in stages:
        after = tuple(job.config.name for job in jobs if depends_on(config, job.config))
        # What an earlier job makes anew, this one has to make anew too.
        if after or Output(config).state()[0] != "done":
            jobs.append(Job(config, overwrite or config.overwrite, after))
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
        The Slurm job of each submitted stage, by name; under ``dry_run`` its script.

    Raises:
        ConfigError: see :func:`jobs_of`; for inputs that are missing, paths that the container does not show, and
            outputs that cannot fit on the disk (under ``dry_run`` after the scripts are printed).
        MinitronError: if Slurm refuses a job.
    """
    pipeline = dataclasses.replace(pipeline, output=str(Path(pipeline.output).absolute()))
    stages, slurm = [absolute(config) for config in stages], absolute(slurm)
    check_manifest(Path(pipeline.output))
    jobs = jobs_of(stages, slurm, overwrite=overwrite)
    if not jobs:
        console.print("every stage is done: there is nothing to submit")
        return {}
    home = Path(slurm.job_dir or Path(pipeline.output) / "jobs")
    todo = [job.config for job in jobs]
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
            scripts = _scripts(pipeline.name, jobs, slurm, home, Path(aside))
        for job in jobs:
            console.rule(job.config.name)
            console.print(scripts[job.config.name], markup=False, highlight=False, soft_wrap=True)
        if faults:
            raise ConfigError(faults)
        return scripts
    Path(pipeline.output).mkdir(parents=True, exist_ok=True)
    write_manifest(Path(pipeline.output), pipeline, list(stages))
    for job in jobs:
        _write(job)
    submitted = _submit(pipeline.name, jobs, slurm, home)
    write_jobs(Path(pipeline.output), submitted)
    for job in jobs:
        waits = f", after {', '.join(job.after)}" if job.after else ""
        console.print(f"{job.config.name}: job {submitted[job.config.name]}{waits}", markup=False, highlight=False)
    console.print(f"minitron status {pipeline.output} tells how far they are", markup=False, highlight=False)
    return submitted


def _write(job: Job) -> None:
    """Write the files that the ranks read."""
    Output(job.config).write_settings()
    (job.folder / "job.json").write_text(json.dumps({"stage": job.config.STAGE, "overwrite": job.overwrite}) + "\n")


def _executor(job: Job, slurm: SlurmConfig, home: Path) -> run.SlurmExecutor:
    """nemo_run's description of one job."""
    import nemo_run as run

    request = slurm.request(job.config)
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

    run.config.set_nemorun_home(str(home / "nemo_run"))
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


def _scripts(name: str, jobs: Sequence[Job], slurm: SlurmConfig, home: Path, aside: Path) -> dict[str, str]:
    """The sbatch script of each job; a job that it waits for is written as ``<name of the stage>``."""
    scripts: dict[str, str] = {}
    with _experiment(name, aside) as experiment:
        for job in jobs:
            executor = _executor(job, slurm, home)
            executor.dependencies = [f"stage://of/<{other}>/0" for other in job.after]
            experiment.add(_script(job, slurm), executor=executor, name=job.config.name, tail_logs=False)
        experiment.dryrun(log=False, delete_exp_dir=False)
        for job, task in zip(jobs, experiment.jobs, strict=True):
            path = Path(experiment._exp_dir) / f"{task.executor.job_name}_sbatch.sh"
            scripts[job.config.name] = path.read_text().replace(str(aside / "nemo_run"), str(home / "nemo_run"))
    return scripts


def _submit(name: str, jobs: Sequence[Job], slurm: SlurmConfig, home: Path) -> dict[str, str]:
    """Submit all jobs, each after the jobs that it waits for."""
    from invoke.exceptions import UnexpectedExit

    try:
        with _experiment(name, home) as experiment:
            ids: dict[str, str] = {}
            for job in jobs:
                ids[job.config.name] = experiment.add(
                    _script(job, slurm),
                    executor=_executor(job, slurm, home),
                    name=job.config.name,
                    tail_logs=False,
                    dependencies=[ids[other] for other in job.after] or None,
                )
            experiment.run(detach=True)
            handles = {job.config.name: task.handle for job, task in zip(jobs, experiment.jobs, strict=True)}
    except UnexpectedExit as error:
        raise MinitronError(f"Slurm refused a job: {error.result.stderr.strip() or error}") from error
    missing = [stage for stage, handle in handles.items() if not handle]
    if missing:
        raise MinitronError(f"nemo_run submitted no job for {', '.join(missing)}; its records are in {home}")
    return {stage: handle.rpartition("/")[2] for stage, handle in handles.items()}
