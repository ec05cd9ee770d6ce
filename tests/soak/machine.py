"""A state machine over one pipeline: run, kill, change settings, damage files, and always end as a fresh run would.

What it holds: a run that ends well leaves what its settings say, bit for bit (nothing false); work that was done, is
intact and has unchanged settings is not done again (nothing lost).
"""

from __future__ import annotations

import copy
import shutil
import signal
from pathlib import Path
from typing import ClassVar

from hypothesis import HealthCheck, Phase, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from soak.bench import Bench, Fault, check_refusal
from soak.checks import differences, signature
from soak.program import Order
from soak.workload import CHEAP, Stages, write_pipeline

__all__ = ["explore"]

#: Stages by name: the settings that their output depends on. Each takes the output of an earlier one, or the source.
_DEPENDS = {"teacher": (), "tokens": ("blocks",), "random": ("ffn",), "export": ("ffn",)}
_BELOW = {"teacher": ("tokens", "random", "export"), "tokens": (), "random": ("export",), "export": ()}
_VALUES = {"blocks": (8, 4), "ffn": (48, 40)}

Key = tuple[str, ...]


def _stages(values: dict[str, int]) -> Stages:
    stages = copy.deepcopy([stage for stage in CHEAP if stage["name"] in _DEPENDS])
    for stage in stages:
        if stage["name"] == "tokens":
            stage["blocks"] = values["blocks"]
        if stage["name"] == "random":
            stage["target"]["ffn_hidden_size"] = values["ffn"]
    return stages


class _Machine(RuleBasedStateMachine):
    bench: ClassVar[Bench]
    expected: ClassVar[dict[Key, dict[str, str]]]
    counts: ClassVar[dict[str, int]]

    def __init__(self) -> None:
        super().__init__()
        self.values = {name: values[0] for name, values in _VALUES.items()}
        self.made: dict[Key, bytes] = {}  # records of outputs that are intact
        self.bench.clear()

    # What is known

    def key(self, stage: str) -> Key:
        """A stage with the settings that it depends on."""
        return (stage, *(f"{name}={self.values[name]}" for name in _DEPENDS[stage]))

    def forget(self, stage: str) -> None:
        """The stage's outputs, whatever their settings, need not be kept, nor those made from them."""
        for name in (stage, *_BELOW[stage]):
            self.made = {key: record for key, record in self.made.items() if key[0] != name}

    def write(self) -> None:
        """The pipeline of the present settings."""
        write_pipeline(self.bench.pipeline, self.bench.home / "inputs", self.bench.run, _stages(self.values))

    def check_done(self) -> None:
        """All is as a fresh run of these settings leaves it, and nothing was made in vain."""
        if wrong := self.wrong():
            raise Fault(f"done with {self.values}, but {'; '.join(wrong[:8])}")
        for stage in _DEPENDS:
            record, key = (self.bench.run / stage / "record.json").read_bytes(), self.key(stage)
            if self.made.setdefault(key, record) != record:
                raise Fault(f"{key} was made again, though nothing had happened to it")

    def wrong(self) -> list[str]:
        """Files that are not as a fresh run of these settings leaves them."""
        wrong = []
        for stage in _DEPENDS:
            now = signature(self.bench.run / stage)
            wrong += [f"{stage}: {text}" for text in differences(self.expected[self.key(stage)], now)]
        return wrong

    def count(self, what: str) -> None:
        """For the summary."""
        note(what)
        self.counts[what.partition(" ")[0]] = self.counts.get(what.partition(" ")[0], 0) + 1

    # What happens

    @initialize()
    def begin(self) -> None:
        """No run, and the first settings."""
        self.write()

    @rule(overwrite=st.sampled_from((False, False, False, True)))
    def run(self, overwrite: bool) -> None:
        """Run, obeying refusals, to a good end."""
        self.count(f"run overwrite={overwrite}")
        if overwrite:  # outputs of other settings are replaced, not kept
            self.made = {key: record for key, record in self.made.items() if key == self.key(key[0])}
        for _ in range(8):
            result = self.bench.start(words=("--overwrite",) if overwrite else ())
            check_refusal(result, allowed=(0, 2))
            if result.code == 0:
                if not self.wrong():
                    break
                result = self.bench.verify()
                if result.code == 0:
                    raise Fault(f"done with {self.values}, and verified, but {'; '.join(self.wrong()[:8])}")
            self.bench.obey(result)
        else:
            raise Fault(f"no end after 8 attempts; the last one said: {result.message}")
        self.bench.check_end(result)
        self.check_done()

    @rule(
        at=st.integers(1, 200),
        whom=st.sampled_from(("launcher", "self", "all")),
        number=st.sampled_from((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)),
        after=st.sampled_from((0.0, 0.0, 3.0, 100.0)),
    )
    def kill(self, at: int, whom: str, number: signal.Signals, after: float) -> None:
        """Run, and a signal comes."""
        self.count(f"kill {number.name} to {whom} at change {at} + {after} ms")
        result = self.bench.start(order=Order(at, whom, number, after))
        check_refusal(result, allowed=(0, 1, 2, 75, 130, -2, -9))
        if result.code == 0 and not self.wrong():
            self.check_done()

    @rule(name=st.sampled_from(sorted(_VALUES)))
    def change(self, name: str) -> None:
        """Another value of a setting, or the one before."""
        values = _VALUES[name]
        self.values[name] = values[(values.index(self.values[name]) + 1) % len(values)]
        self.count(f"change {name}={self.values[name]}")
        self.write()

    @precondition(lambda self: self.bench.run.exists())
    @rule(
        which=st.integers(0, 1 << 16),
        what=st.sampled_from(("flip", "flip", "cut", "remove")),
        place=st.integers(0, 1 << 30),
    )
    def damage(self, which: int, what: str, place: int) -> None:
        """Something happens to a file."""
        run = self.bench.run
        files = sorted(path for path in run.rglob("*") if path.is_file())
        if not files:
            return
        file = files[which % len(files)]
        stage = file.relative_to(run).parts[0].partition("@")[0].lstrip(".").partition(".")[0]
        self.count(f"damage {what} {file.relative_to(run)}")
        if stage in _DEPENDS:
            self.forget(stage)
        content = bytearray(file.read_bytes())
        if what == "remove" or not content:
            file.unlink()
            return
        if what == "flip":
            content[place // 8 % len(content)] ^= 1 << place % 8
        else:
            del content[place % len(content) :]
        file.write_bytes(content)

    @precondition(lambda self: self.bench.run.exists())
    @rule()
    def verify(self) -> None:
        """It names what is damaged, or says that nothing is."""
        self.count("verify")
        check_refusal(self.bench.verify(), allowed=(0, 2))

    @precondition(lambda self: self.bench.run.exists())
    @rule()
    def status(self) -> None:
        """It shows how far the run is."""
        self.count("status")
        check_refusal(self.bench.program.run("status", str(self.bench.run)), allowed=(0, 2))

    def teardown(self) -> None:
        """Whatever happened: it ends well."""
        if self.bench.run.exists():
            self.run(False)


def explore(home: Path, program: object, number: int, *, examples: int, steps: int, shrink: bool = False) -> str:
    """Let the machine go.

    Args:
        home: for all files.
        program: the command, a :class:`soak.program.Program`.
        number: seed.
        examples, steps: how many runs of how many rules at most.
        shrink: look for the shortest way to a fault.

    Returns:
        How often each rule was applied.

    Raises:
        Fault: with the steps to it in its notes.
    """
    first = {name: values[0] for name, values in _VALUES.items()}
    bench = Bench(home, program, _stages(first))  # type: ignore[arg-type]
    machine = type("Machine", (_Machine,), {"bench": bench, "counts": {}, "expected": {}})
    for place in (0, 1):  # no stage depends on two settings: two runs have every output
        values = {name: values[place] for name, values in _VALUES.items()}
        write_pipeline(bench.pipeline, home / "inputs", bench.run, _stages(values))
        if place:
            bench.start()
        else:
            bench.finished()
        for stage, names in _DEPENDS.items():
            key = (stage, *(f"{name}={values[name]}" for name in names))
            machine.expected[key] = signature(bench.run / stage)
        shutil.rmtree(bench.run)
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    run_state_machine_as_test(
        seed(number)(machine),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return ", ".join(f"{count} {what}" for what, count in sorted(machine.counts.items()))
