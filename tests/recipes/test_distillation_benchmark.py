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
