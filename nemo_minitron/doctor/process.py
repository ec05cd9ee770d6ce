"""``python -m nemo_minitron.doctor.process JOB``: one rank of one group of checks, or the reference of all.

JOB is a JSON file with a :class:`Job`. The outcome of each case is appended to its ``events`` file at once, one JSON
object per line, so that it is known how far a process came that died. An error ends the process, because the ranks
would be out of step; its leader starts another process with the remaining cases.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_minitron.runtime.device import Device

__all__ = ["Job", "main"]


@dataclass(frozen=True)
class Job:
    """The work of a process.

    Attributes:
        cases: checks and precisions, in order.
        folder: of the material.
        scratch: directory for files of the checks; one directory per case.
        values: directory for measured tensors: ``<check>-<precision>.rank-<rank>.safetensors``.
        events: file of this process's events.
        layout: the layout to be checked.
        device: "auto", "cpu" or "cuda".
        reference: compute the reference, in a layout of one.
        seed: of every generator.
        timeout_minutes: of a collective.
    """

    cases: list[tuple[str, str]]
    folder: str
    scratch: str
    values: str
    events: str
    layout: dict[str, Any]
    device: str = "auto"
    reference: bool = False
    seed: int = 1234
    timeout_minutes: float = 10.0

    def write(self, path: Path) -> None:
        """Write the JSON that :func:`main` reads."""
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read the JSON that :meth:`write` wrote."""
        content = json.loads(path.read_text())
        return cls(**{**content, "cases": [(check, precision) for check, precision in content["cases"]]})


def main(path: Path) -> int:
    """Run the cases.

    Returns:
        0 if all cases ran, 1 after the first that failed.
    """
    from nemo_minitron.jobs.launch import LAUNCHER_VARIABLE, end_with_launcher

    if LAUNCHER_VARIABLE in os.environ:
        end_with_launcher()
    job = Job.read(path)
    events = Path(job.events)
    for check, precision in job.cases:
        _note(events, check, precision, "started")
        try:
            if not _ready:
                _set_up(job)
                _note(events, check, precision, "started")  # its time begins only now
            seconds, details = _run(job, check, precision)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            _note(events, check, precision, "failed", message=_words(error))
            return 1
        _note(events, check, precision, "done", seconds=seconds, details=details)
    return 0


def _run(job: Job, check: str, precision: str) -> tuple[float, dict[str, Any]]:
    """Run one case; its values go to a file. Returns its seconds, without imports, and its details."""
    from nemo_minitron.doctor.checks import Context, measure, module_of, reference_of
    from nemo_minitron.doctor.material import Material
    from nemo_minitron.runtime.device import here
    from nemo_minitron.runtime.groups import ParallelLayout

    module_of(check)

    case, rank = f"{check}-{precision}", os.environ.get("RANK", "0")
    scratch = Path(job.scratch, case)
    scratch.mkdir(parents=True, exist_ok=True)
    proven = ParallelLayout(**job.layout)
    context = Context(
        Material(Path(job.folder), proven),
        ParallelLayout() if job.reference else proven,
        precision,
        scratch,
        timeout_minutes=job.timeout_minutes,
    )
    context.details["device"] = device_name(here())
    started = time.monotonic()
    measured = (reference_of if job.reference else measure)(check, context)
    seconds = time.monotonic() - started
    from safetensors.torch import save

    from nemo_minitron.runtime.files import replace_file

    values = Path(job.values)
    values.mkdir(parents=True, exist_ok=True)
    content = save({name: tensor.contiguous() for name, tensor in measured.items()})
    replace_file(values / f"{case}.rank-{rank}.safetensors", content)
    return seconds, context.details


def device_name(device: Device) -> str:
    """``"cpu"``, or the GPU's name and the layer implementation that runs on it."""
    if not device.is_cuda:
        return device.type
    import torch

    layers = "Transformer Engine's" if device.transformer_engine else "Megatron-core's"
    return f"{torch.cuda.get_device_name(device.torch)}, {layers} layers"


_ready: list[bool] = []


def _set_up(job: Job) -> None:
    """Set device, threads and seeds, once, before the stack is imported."""
    import random

    import numpy as np
    import torch

    from nemo_minitron.runtime import cpu, log
    from nemo_minitron.runtime.waits import limit_waits

    log.configure()
    limit_waits(job.timeout_minutes)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    cpu.prepare(job.device)
    random.seed(job.seed)
    np.random.seed(job.seed % 2**32)
    torch.manual_seed(job.seed)
    import megatron.core.models.gpt  # noqa: F401 - here, and not in the first check's time

    _ready.append(True)


def _note(events: Path, check: str, precision: str, what: str, **more: Any) -> None:
    line = {"check": check, "precision": precision, "event": what, "time": time.time(), **more}
    with events.open("a") as file:
        file.write(json.dumps(line, default=str) + "\n")


def _words(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # An ordinary exit would wait for groups whose other members do not come, and search the imports for cycles.
    os._exit(code)
