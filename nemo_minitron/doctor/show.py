"""The tables of ``minitron doctor``."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nemo_minitron.config import DoctorConfig
from nemo_minitron.doctor.checks import CHECKS
from nemo_minitron.doctor.diagnosis import Diagnosis, diagnose
from nemo_minitron.doctor.facts import Facts, gather
from nemo_minitron.errors import ConfigError
from nemo_minitron.runtime.files import replace_file

if TYPE_CHECKING:
    from nemo_minitron.doctor.prove import Proof

__all__ = ["as_json", "look", "show_diagnosis", "show_proof"]

_STATES = {"works": "[green]works[/]", "limited": "[yellow]with limits[/]", "no": "[red]does not work[/]"}
_STATUS = {"passed": "[green]passed[/]", "failed": "[red]FAILED[/]", "not run": "[yellow]not run[/]"}


def look(console: Console, json_file: Path | None = None) -> bool:
    """Run ``minitron doctor`` without ``--run``.

    Args:
        console: for the tables.
        json_file: file for the same as JSON; None writes none.

    Returns:
        Whether all core stages work here.
    """
    facts = gather()
    diagnosis = diagnose(facts)
    show_diagnosis(facts, diagnosis, console)
    if json_file is not None:
        try:
            replace_file(json_file, json.dumps(as_json(facts, diagnosis), indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"--json {json_file}: cannot be written ({error.strerror})") from None
    return diagnosis.sound


def show_diagnosis(facts: Facts, diagnosis: Diagnosis, console: Console) -> None:
    """Print three tables: the facts, what works, and what to do about the problems."""
    here = Table(title="What is here", title_justify="left", show_header=False)
    here.add_column(style="dim", no_wrap=True)
    here.add_column(overflow="fold")
    for name, value in _facts_rows(facts):
        here.add_row(name, escape(value))
    console.print(here)
    works = Table(title="What works with it", title_justify="left")
    for heading in ("", "stages", "state", "why"):
        works.add_column(heading, overflow="fold")
    for ability in diagnosis.abilities:
        works.add_row(ability.name, ability.stages, _STATES[ability.state], escape(ability.reason))
    console.print(works)
    if not diagnosis.problems:
        console.print("No problems found. `minitron doctor --run` proves it.", markup=False, highlight=False)
        return
    remedies = Table(title="What to do about the rest", title_justify="left")
    for heading in ("problem", "remedy"):
        remedies.add_column(heading, overflow="fold")
    for problem in diagnosis.problems:
        remedies.add_row(escape(problem.what), escape(problem.remedy))
    console.print(remedies)


def as_json(facts: Facts, diagnosis: Diagnosis) -> dict[str, Any]:
    """Facts and diagnosis as JSON values."""
    return {
        "version": 1,
        "sound": diagnosis.sound,
        "facts": dataclasses.asdict(facts),
        "abilities": [dataclasses.asdict(ability) for ability in diagnosis.abilities],
        "problems": [dataclasses.asdict(problem) for problem in diagnosis.problems],
    }


def show_proof(proof: Proof, config: DoctorConfig, console: Console) -> None:
    """Print every quantity of every check, and the bandwidths."""
    parallel = config.parallel
    sizes = {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "data": parallel.data,
        "virtual_pipeline": parallel.virtual_pipeline,
        "sequence_parallel": parallel.sequence_parallel,
    }
    layout = ", ".join(f"{name} {value}" for name, value in sizes.items() if value not in (None, False))
    table = Table(
        title=f"{proof.device or 'no device'}, {layout}, against one process on the CPU", title_justify="left"
    )
    for heading, justify in (
        ("check", "left"),
        ("precision", "left"),
        ("quantity", "left"),
        ("difference", "right"),
        ("allowed", "right"),
        ("time", "right"),
        ("", "left"),
    ):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    before = None
    for row in proof.rows:
        first = (row.check, row.precision) != before
        before = (row.check, row.precision)
        table.add_row(
            CHECKS[row.check].title if first else "",
            row.precision if first else "",
            row.quantity,
            "" if row.difference is None else f"{row.difference:.1e}",
            "" if row.tolerance is None else f"{row.tolerance:.0e}",
            f"{row.seconds:.1f} s" if first and row.seconds is not None else "",
            _STATUS[row.status] + (f": {escape(row.reason)}" if row.reason else ""),
        )
    console.print(table)
    if proof.bandwidth:
        speeds = Table(title="All-reduce", title_justify="left")
        for heading in ("group", "ranks", "size", "precision", "time", "bus bandwidth"):
            speeds.add_column(heading, justify="left" if heading == "group" else "right")
        for entry in proof.bandwidth:
            speeds.add_row(
                entry["group"],
                str(entry["ranks"]),
                _bytes(entry["bytes"]),
                entry["precision"],
                f"{1e3 * entry['seconds']:.2f} ms",
                f"{entry['bus_gb_per_s']:.2f} GB/s",
            )
        console.print(speeds)
    elif "allreduce" in config.chosen and parallel.world_size == 1:
        console.print("all-reduce: one process has nothing to add up", markup=False, highlight=False)
    console.print(f"{_summary(proof)} in {proof.seconds:.0f} s", markup=False, highlight=False)


def _summary(proof: Proof) -> str:
    counts = Counter(row.status for row in proof.rows)
    return ", ".join(f"{counts[status]} {status}" for status in _STATUS if counts[status])


def _facts_rows(facts: Facts) -> list[tuple[str, str]]:
    def version(name: str) -> str:
        return facts.versions.get(name) or "not installed"

    if facts.torch_cuda is not None:
        build = f"built for CUDA {facts.torch_cuda}"
    else:
        build = f"built for ROCm {facts.torch_hip}" if facts.torch_hip is not None else "built for the CPU"
    torch = version("torch") + ("" if facts.versions.get("torch") is None else f", {build}")
    names = Counter((gpu.name, gpu.memory_bytes, gpu.driver, gpu.compute) for gpu in facts.gpus)
    gpus = [
        f"{count} x {name}, {_bytes(memory)}, driver {driver}, compute capability {compute or 'unknown'}"
        for (name, memory, driver, compute), count in names.items()
    ]
    shm = "none" if facts.shm_total is None else f"{_bytes(facts.shm_total)}, {_bytes(facts.shm_free or 0)} free"
    limits = (
        f"open files {_limit(facts.open_files)}, locked memory {_limit(facts.locked_memory, bytes_=True)}, "
        f"stack {_limit(facts.stack, bytes_=True)}"
    )
    bf16 = f", bfloat16 by {facts.bf16}" if facts.bf16 else ", no instructions for bfloat16"
    return [
        ("minitron", version("minitron")),
        ("Python", f"{facts.python}, {facts.executable}"),
        ("system", facts.system + (", in a container" if facts.container else "")),
        ("torch", torch),
        ("GPUs", "; ".join(gpus) or (f"none ({facts.gpu_trouble})" if facts.gpu_trouble else "none")),
        ("NCCL", facts.nccl or "not installed"),
        ("NeMo", f"{version('nemo')}, Megatron-core {version('megatron')}, NeMo-Aligner {version('aligner')}"),
        ("kernels", f"Transformer Engine {version('transformer_engine')}, Apex {version('apex')}"),
        (
            "besides",
            f"transformers {version('transformers')}, Lightning {version('lightning')}, "
            f"nemo_run {version('nemo_run')}, modelopt {version('modelopt')}, lm-eval {version('lm_eval')}",
        ),
        ("Slurm", (facts.slurm or "not installed") + (f" ({facts.slurm_trouble})" if facts.slurm_trouble else "")),
        ("processor", f"{facts.cores} {'core' if facts.cores == 1 else 'cores'} of {facts.processor}{bf16}"),
        ("memory", f"{_bytes(facts.memory_total)}, {_bytes(facts.memory_free)} free"),
        ("disk", f"{_bytes(facts.disk_free)} free here, {_bytes(facts.temporary_free)} for temporary files"),
        ("shared memory", shm),
        ("locale", f"{facts.locale}, text is read as {facts.encoding}"),
        ("host name", f"{facts.host}, " + (f"resolves to {facts.address}" if facts.address else "does not resolve")),
        ("limits", limits),
        ("variables", ", ".join(f"{name}={value}" for name, value in facts.environment.items()) or "none that matter"),
    ]


def _limit(value: int, *, bytes_: bool = False) -> str:
    if value < 0:
        return "unlimited"
    return _bytes(value) if bytes_ else str(value)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if count == int(count) else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
