"""The undisturbed run, and the checks that a disturbed one ends as it did."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from soak.checks import differences, leftovers, signature
from soak.program import Order, Program, Result
from soak.workload import Stages, write_inputs, write_pipeline

__all__ = ["Bench", "Fault"]

#: What messages advise where a file is damaged: what is to be removed before the same command is given again.
_REMEDIES = (
    re.compile(r"(?P<path>/[^\s;,]+) is in the way"),
    re.compile(r"remove (?P<path>/[^\s;,]+)"),
    re.compile(r"make (?P<path>/[^\s;,]+) again"),
    re.compile(
        r"(?P<path>/[^\s;,:]+)(?:, tensor [^:]*)?:? (?:is damaged|is gone|cannot be read|has [\d,]+ bytes, not)"
    ),
)
_ATTEMPTS = 8


class Fault(Exception):
    """The suite lost something, said something false, or did not say why it ended."""


class Bench:
    """A pipeline, the directory that it runs in, and what an undisturbed run leaves there.

    Args:
        home: for all files.
        program: the command.
        stages: of the pipeline.

    Attributes:
        run: directory of the runs, one after the other.
        pipeline: its YAML.
        whole: copy of the undisturbed run.
        expected: signature of it.
        changes: number of changes that it made to its directory.
    """

    def __init__(self, home: Path, program: Program, stages: Stages) -> None:
        self.home, self.program = home, program
        self.run, self.whole = home / "run", home / "whole"
        write_inputs(home / "inputs")
        self.pipeline = write_pipeline(home / "pipeline.yaml", home / "inputs", self.run, stages)
        result = program.run("run", str(self.pipeline), folder=self.run)
        if result.code:
            raise Fault(f"the undisturbed run ended with {result.code}: {result.text}")
        self.changes = result.changes
        self.expected = signature(self.run)
        self.check_end(result)
        self.run.rename(self.whole)

    def clear(self) -> None:
        """Begin with no run."""
        shutil.rmtree(self.run, ignore_errors=True)

    def finished(self) -> None:
        """Begin with a finished run."""
        self.clear()
        shutil.copytree(self.whole, self.run, symlinks=True)

    def start(self, *, order: Order | None = None, words: Sequence[str] = ()) -> Result:
        """Run the pipeline once."""
        return self.program.run("run", str(self.pipeline), *words, folder=self.run, order=order)

    def verify(self) -> Result:
        """``minitron verify`` on the run."""
        return self.program.run("verify", str(self.run))

    def converge(self) -> int:
        """Run the pipeline, obeying each refusal, until it ends well; then all must be as in the undisturbed run.

        Returns:
            How often something had to be removed, as a message said.

        Raises:
            Fault: if it is not so.
        """
        for removed in range(_ATTEMPTS):
            result = self.start()
            check_refusal(result, allowed=(0, 2))
            if result.code == 0:
                changed = differences(self.expected, signature(self.run))
                if not changed:
                    self.check_end(result)
                    return removed
                result = self.verify()
                if result.code == 0:
                    raise Fault(f"done, and verified, but {'; '.join(changed[:8])}")
                check_refusal(result, allowed=(2,))
            self.obey(result)
        raise Fault(f"no end after {_ATTEMPTS} attempts; the last one said: {result.message}")

    def obey(self, result: Result) -> None:
        """Remove what a refusal says is to be removed."""
        for remedy in _REMEDIES:
            paths = [Path(match["path"]) for match in remedy.finditer(result.message)]
            paths = [path for path in paths if path.is_relative_to(self.run) and path != self.run]
            if not paths:
                continue
            for path in paths:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            return
        raise Fault(f"a refusal without a remedy: {result.message}")

    def check_end(self, result: Result) -> None:
        """Nothing but the outputs is left.

        Raises:
            Fault: with what is.
        """
        if left := leftovers(self.run):
            raise Fault(f"left behind: {', '.join(left)}")
        if result.left:
            raise Fault(f"processes outlived the command: {'; '.join(result.left)}")


def check_refusal(result: Result, *, allowed: tuple[int, ...]) -> None:
    """A command ended in one of the ways that are documented, in words and without a traceback.

    Raises:
        Fault: otherwise.
    """
    if result.code not in allowed:
        raise Fault(f"exit code {result.code}, not {' or '.join(map(str, allowed))}: {result.text[-3000:]}")
    if result.left:
        raise Fault(f"processes outlived the command: {'; '.join(result.left)}")
    if result.code in (2, 75) and ("Traceback" in result.text or not result.message):
        raise Fault(f"exit code {result.code}, but not in words: {result.text[-3000:]}")
