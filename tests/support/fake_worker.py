"""A worker whose stages are fakes: each writes, fails, hangs or dies as its ``name`` says. Used by the launching tests.

``python -m support.fake_worker STAGE`` stands in for ``python -m nemo_minitron.jobs.worker STAGE``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from nemo_minitron.config import StageConfig
from nemo_minitron.errors import PreemptedError, ShapeError
from nemo_minitron.jobs import worker
from nemo_minitron.jobs.atomic import stage_output
from nemo_minitron.jobs.plans import PlannedPath, StagePlan
from nemo_minitron.runtime.stopping import StopRequest


def run(config: StageConfig) -> dict[str, Any]:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    print(f"rank {rank} of {world}, threads {os.environ['OMP_NUM_THREADS']}", flush=True)
    what = config.name
    if what.startswith("refuse") and rank == world - 1:
        raise ShapeError("hidden_size=7: is odd; choose an even one")
    if what.startswith("crash") and rank == world - 1:
        raise RuntimeError("a fault of ours")
    if what.startswith("die") and rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what.startswith("stoppable"):
        with StopRequest() as request:
            (Path(config.output).parent / f"started-{rank}").touch()
            while request.received is None:
                time.sleep(0.05)
        raise PreemptedError(f"stopped by {request.received.name}")
    if what.startswith(("refuse", "crash", "die", "hang")):
        time.sleep(600)  # the peers wait for the one that is gone
    if rank == 0:
        with stage_output(config.output, config.overwrite) as aside:
            if what.startswith("slow"):
                (aside / "half").write_text("half")
                (Path(config.output).parent / "started").touch()
                time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
            (aside / "result.txt").write_text(str(config.runtime.seed) + os.environ.get("FAKE_CONTENT", ""))
    metrics = {"loss": 1.5, "world": world, "rank": rank}
    if "torch" in sys.modules:
        import torch

        from nemo_minitron.runtime import cpu

        metrics |= {"threads": torch.get_num_threads(), "draw": torch.rand(()).item(), "cpu": cpu.is_active()}
    return metrics


def plan(config: StageConfig) -> StagePlan:
    reads = [PlannedPath(path, name) for name, path in config.inputs().items()]
    return StagePlan(config.STAGE, reads=reads, writes=[PlannedPath(config.output, "output")], costs={"tokens": "12"})


def install() -> None:
    """Put the fakes where the stages' modules are looked up."""
    for stage in ("import_", "score", "prune", "distill", "export", "evaluate", "report"):
        module = ModuleType(f"nemo_minitron.stages.{stage}")
        module.run, module.plan = run, plan  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module


if __name__ == "__main__":
    install()
    if "REAL_SET_UP" not in os.environ:  # torch and Megatron take seconds to import
        worker.set_up = lambda config: None  # type: ignore[assignment]
    sys.exit(worker.main(sys.argv[1], launched=True))
