"""The small version of the evidence: the real model, four layers of it, distilled for two steps by its benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_quick_evidence(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/distillation.py", "--quick", "--output", str(tmp_path / "evidence")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"forward_kl", "lm_only"}
    for curve in found.values():
        (points,) = curve.values()
        assert [tokens for tokens, _ in points] == [128, 256]
        losses = [loss for _, loss in points]
        assert losses[1] < losses[0] - 0.1, "it learns"
    assert "| forward_kl |" in done.stdout


@pytest.mark.slow
def test_the_whole_evidence_ends_at_its_bound(tmp_path: Path) -> None:
    """The second run finds its minutes spent by the first, and stops at once."""
    output = tmp_path / "evidence"
    spent = []
    for _ in range(2):
        command = [sys.executable, "benchmarks/distillation.py", "--minutes", "0.05", "--output", str(output)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 75, done.stdout[-2000:] + done.stderr[-2000:]
        assert "stopped at 0.05 minutes in all" in done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == {}
        spent.append(float((output / "seconds_spent").read_text()))
    assert 3 <= spent[0] < spent[1]
