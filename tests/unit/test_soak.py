"""Kills, damaged files and full disks at random: nothing is lost and nothing is false. ``make soak`` does it for long.

The seed is drawn anew each time; a failure names it, and ``MINITRON_SOAK_SEED`` gives it to repeat the cases.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from soak.bench import Bench
from soak.driver import case, seed_of
from soak.machine import explore
from soak.program import Program, programs
from soak.workload import SHORT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

#: What the suite runs of each kind; that of the small disk takes root.
KINDS = ("kill", "flip", "flip-unfinished", "limited")


@pytest.fixture(scope="module")
def seed() -> str:
    return seed_of(None)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with programs(tmp_path_factory.mktemp("program"), "nemo") as opened:
        yield opened


def test_a_disturbed_run_ends_as_an_undisturbed_one(seed: str, program: Program, tmp_path: Path) -> None:
    bench = Bench(tmp_path, program, SHORT)
    faults = []
    for number, kind in enumerate(KINDS):
        _, said, well = case(bench, seed, number, [kind])
        print(f"{number} {kind}: {said}")
        if not well:
            faults.append(f"case {number}, {kind}: {said}")
    assert not faults, "\n".join([f"MINITRON_SOAK_SEED={seed}", *faults])


def test_a_state_machine_of_runs_kills_changes_and_damage(seed: str, program: Program, tmp_path: Path) -> None:
    print(f"MINITRON_SOAK_SEED={seed}")
    print(explore(tmp_path, program, zlib.crc32(seed.encode()), examples=3, steps=6))
