"""``minitron init``: look at a model, a text and a machine, and write the pipeline that suits them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nemo_minitron.config.parts import parse_bytes
from nemo_minitron.doctor.facts import gather
from nemo_minitron.errors import ConfigError
from nemo_minitron.jobs.plans import human_bytes, human_count
from nemo_minitron.proposal import Plan, Proposal, Request, parse_cluster, propose, this_machine
from nemo_minitron.runtime.files import replace_file
from nemo_minitron.shape import SIZES

__all__ = ["Options", "write_proposal"]

_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Options:
    """The words of the command line, as they were given."""

    save: Path
    share: float | None = None
    params: str | None = None
    memory: str | None = None
    text: tuple[str, ...] = ()
    text_key: str = "text"
    chat: str | None = None
    pairs: str | None = None
    cluster: str | None = None
    search: bool = False
    minutes: float | None = None
    steps: int | None = None
    output: str | None = None
    cache_dir: str = ".cache/minitron"
    overwrite: bool = False


def write_proposal(model: str, options: Options, console: Console) -> Proposal:
    """Write the pipeline, and print what was chosen and what to do next.

    Raises:
        MinitronError: as :func:`~nemo_minitron.proposal.propose`; for options that make no sense, an existing file.
    """
    save = options.save
    if save.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--save {save}: must end in .yaml")
    if save.exists() and not options.overwrite:
        raise ConfigError(f"--save {save}: is there already; choose another name, or give --overwrite")
    for name in ("minutes", "steps"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name} {value:g}: must be above 0")
    if options.minutes is not None and options.steps is not None:
        raise ConfigError("--minutes and --steps: give one of both")
    machine = this_machine(gather()) if options.cluster is None else parse_cluster(options.cluster)
    request = Request(
        name=save.stem,
        output=options.output or f"runs/{save.stem}",
        minutes=options.minutes,
        steps=options.steps,
        search=options.search,
        cache_dir=options.cache_dir,
    )
    proposal = propose(
        model,
        machine,
        request,
        share=options.share,
        parameters=None if options.params is None else parse_count(options.params),
        memory=None if options.memory is None else _bytes(options.memory),
        text=options.text,
        text_key=options.text_key,
        chat=options.chat,
        pairs=options.pairs,
    )
    save.parent.mkdir(parents=True, exist_ok=True)
    replace_file(save, proposal.text)
    _show(proposal, options, console)
    return proposal


def parse_count(text: str) -> float:
    """``"4.5B"`` -> 4.5e9; also K, M, and a plain number.

    Raises:
        ConfigError: if it is no number of parameters.
    """
    match = re.fullmatch(r"(\d+(?:[._]\d+)*)\s*([kmbgt]?)", text.strip().lower().replace(",", ""))
    if match is None:
        raise ConfigError(f"--params {text}: is no number of parameters; give one such as 4.5B or 90M")
    return float(match[1].replace("_", "")) * _COUNTS[match[2]]


def _bytes(text: str) -> float:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--memory {text}: {error}") from None


def _show(proposal: Proposal, options: Options, console: Console) -> None:
    plan = proposal.plan
    table = Table(title=f"{plan.subject.name}: the proposed pipeline", title_justify="left", title_style="bold",
                  show_header=False, min_width=72)  # fmt: skip
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(plan, options):
        table.add_row(name, value)
    table.add_row("stages", " → ".join(str(stage.STAGE) for stage in proposal.stages))
    console.print(table)
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)
    console.print(f"pipeline: {options.save}", soft_wrap=True, highlight=False)
    slurm = " --slurm dgx" if options.cluster is not None else ""
    console.print(f"next: minitron run {options.save}{slurm}", soft_wrap=True, highlight=False)


def _rows(plan: Plan, options: Options) -> list[tuple[str, str]]:
    own, student = plan.teacher.shape, plan.student.shape
    cut = [f"{name} {getattr(own, name)} → {getattr(student, name)}" for name in SIZES
           if getattr(own, name) != getattr(student, name)]  # fmt: skip
    share = plan.student.parameters / plan.teacher.parameters
    text = f"{human_count(plan.text.tokens)} tokens" + ("" if plan.text.exact else ", estimated")
    made, placed = plan.amount, plan.placed
    layout = placed.layout
    rows = [
        ("model", f"{human_count(plan.teacher.parameters)} parameters, {plan.teacher.architecture.family}, "
                  f"{plan.subject.format}"),
        ("budget", plan.budget.option),
        ("student", f"{human_count(plan.student.parameters)} parameters ({100 * share:.1f} %)"),
        ("shape", "by a search around: " * options.search + ", ".join(cut)),
        ("text", text + ("" if plan.text.own else ", of Python packages")),
        ("machine", plan.machine.title),
        ("layout", f"TP {layout.tensor} x PP {layout.pipeline} x DP {layout.data}, micro-batch "
                   f"{placed.micro_batch_size}, about {human_bytes(placed.memory)} a rank"),
        ("distillation", f"{human_count(made.tokens)} tokens: {made.steps:,} steps of {made.batch:,} x "
                         f"{made.sequence_length:,}, about {_time(made.steps * placed.seconds)}"),
    ]  # fmt: skip
    if (refit := plan.refit) is not None:
        rows.insert(-1, ("reconstruction", f"{human_count(refit.tokens)} tokens of calibration text, about "
                                           f"{_time(refit.seconds)}"))  # fmt: skip
    for kind, aligned in (("fine-tuning", plan.sft), ("preferences", plan.dpo)):
        if aligned is not None:
            rows.append((kind, f"{aligned.answers.samples:,} samples: {aligned.steps:,} steps of {aligned.batch}, "
                               f"template {aligned.answers.template}"))  # fmt: skip
    return rows


def _time(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.0f} seconds"
