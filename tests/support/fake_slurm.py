"""A cluster of one process at a time: ``sbatch``, ``squeue`` and ``scancel`` keep a list, and a test runs its jobs.

For what a real Slurm takes too long for: a job is forked from a warm process instead of started by ``srun``.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nemo_minitron.jobs.warm import current_pool

_TOOLS = {
    "sbatch": """
number = 100 + len(list(home.glob("*.sh")))
shutil.copy(sys.argv[-1], home / f"{number}.sh")
(home / f"{number}.state").write_text("PENDING")
print(number)
""",
    "squeue": """
for path in sorted(home.glob("*.state")):
    print(f"{path.stem}|{path.read_text()}|None|")
""",
    "scancel": """
for number in sys.argv[1:]:
    (home / f"{number}.state").write_text("CANCELLED")
""",
    "sacct": "",
}
_HEAD = "#!{python}\nimport shutil, sys\nfrom pathlib import Path\nhome = Path({home!r})\n"


@dataclass
class FakeSlurm:
    """Its jobs, by number.

    Attributes:
        home: their scripts and states.
        started: names of the jobs that were run, in order.
    """

    home: Path
    started: list[str] = field(default_factory=list)

    @classmethod
    def installed(cls, home: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
        """With its commands at the front of ``PATH``."""
        tools = home / "tools"
        tools.mkdir(parents=True)
        for name, text in _TOOLS.items():
            (tools / name).write_text(_HEAD.format(python=sys.executable, home=str(home)) + text)
            (tools / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        return cls(home)

    def script(self, number: str) -> str:
        """What was submitted."""
        return (self.home / f"{number}.sh").read_text()

    def after(self, number: str) -> set[str]:
        """The jobs that it waits for."""
        found = re.search(r"^#SBATCH --dependency=afterok:(\S+)$", self.script(number), re.M)
        return set(found[1].split(":")) if found else set()

    def folder(self, number: str) -> Path:
        """Of the job's settings, logs and results."""
        found = re.search(r"nemo_minitron\.jobs\.slurm_rank (\S+)", self.script(number))
        assert found is not None
        return Path(found[1])

    def state(self, number: str, value: str | None = None) -> str:
        """Of a job, which is set if one is given."""
        path = self.home / f"{number}.state"
        if value is not None:
            path.write_text(value)
        return path.read_text()

    def run(self, number: str) -> int:
        """Run a job of one process, whose dependencies have ended well.

        Returns:
            Its exit code; jobs that wait for one that failed leave the queue.
        """
        assert {self.state(other) for other in self.after(number)} <= {"COMPLETED"}, number
        self.state(number, "RUNNING")
        self.started.append(number)
        pool = current_pool()
        assert pool is not None
        slurm = {
            "SLURM_JOB_ID": number, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0",
            "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_JOB_NODELIST": socket.gethostname(), "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
        }  # fmt: skip
        process = pool.start(
            "nemo", "nemo_minitron.jobs.slurm_rank", [str(self.folder(number))], environment={**os.environ, **slurm},
            cwd=Path.cwd(), output=self.home / f"{number}.log",
        )  # fmt: skip
        assert process is not None
        code = process.wait(300)
        self.state(number, "FAILED" if code else "COMPLETED")
        if code:
            self._leave_behind()
        return code

    def run_all(self) -> None:
        """Run all that wait, in order, until none can start."""
        while ready := [number for number in self.waiting() if self._can_start(number)]:
            assert self.run(ready[0]) == 0, (self.home / f"{ready[0]}.log").read_text()

    def waiting(self) -> list[str]:
        """The jobs in the queue."""
        return [path.stem for path in sorted(self.home.glob("*.state")) if path.read_text() == "PENDING"]

    def _can_start(self, number: str) -> bool:
        return {self.state(other) for other in self.after(number)} <= {"COMPLETED"}

    def _leave_behind(self) -> None:
        ended = {"FAILED", "CANCELLED"}
        while gone := [n for n in self.waiting() if ended & {self.state(other) for other in self.after(n)}]:
            for number in gone:
                self.state(number, "CANCELLED")
