"""What ``minitron doctor --run`` runs, on the tier's device: the tier is that and more."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest
from support.tier import environment, tail

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("nemo_minitron.doctor") is None, reason="this version has no `minitron doctor`"
    ),
]


@pytest.fixture(scope="module")
def rows(device: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of ``doctor.json``."""
    folder = tmp_path_factory.mktemp("doctor")
    command = [sys.executable, "-m", "nemo_minitron", "doctor", "--run", f"runtime.device={device}"]
    variables = environment(device) | {"MINITRON_COLD": "1"}
    del variables["MINITRON_LAYER_SPEC"]  # as a user has it
    with (folder / "doctor.log").open("wb") as log:
        code = subprocess.run(
            [*command, f"output={folder / 'doctor'}"],
            env=variables, cwd=folder, stdout=log, stderr=log, timeout=850, check=False,
        ).returncode  # fmt: skip
    assert code in (0, 1), tail(folder / "doctor.log", 60)
    found: list[dict[str, Any]] = json.loads((folder / "doctor/doctor.json").read_text())["rows"]
    return found


@pytest.mark.parametrize("check", ["allreduce", "forward", "kl", "score", "prune", "convert", "distill", "sft"])
def test_a_check_of_the_doctor(rows: list[dict[str, Any]], check: str) -> None:
    mine = [row for row in rows if row["check"] == check]
    assert mine, f"the doctor ran no check {check}"
    assert not [row for row in mine if row["status"] == "failed"]
    if all(row["status"] == "not run" for row in mine):
        pytest.skip(mine[0]["reason"])
