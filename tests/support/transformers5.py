"""A current transformers beside the stack's: in a folder of its own, which comes first on the path of a process."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "transformers-5"
#: The release, and what it needs in other versions than the stack has. torch and the others are the stack's.
PINS = (
    "transformers==5.24.0",
    "tokenizers==0.23.3",
    "huggingface-hub==2.4.0",
    "httpx2==2.16.2",
    "httpcore2==2.16.2",
    "h11==0.16.0",
    "truststore==0.10.5",
)


def transformers5() -> Path:
    """The folder, installed by pip when it is first asked for or the pins have changed.

    Where pip cannot install it the test is skipped; under continuous integration (``CI=true``) it fails.
    """
    marker = FOLDER / "pins.txt"
    FOLDER.parent.mkdir(exist_ok=True)
    with open(FOLDER.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if marker.is_file() and marker.read_text().split() == list(PINS):
            return FOLDER
        partial = FOLDER.with_suffix(".partial")
        for leftover in (partial, FOLDER):
            shutil.rmtree(leftover, ignore_errors=True)
        words = ["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *words, "--target", str(partial), *PINS],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = f"transformers 5 could not be installed: {done.stderr.strip()[-300:]}"
            if os.environ.get("CI") == "true":
                pytest.fail(reason)
            pytest.skip(reason)
        (partial / marker.name).write_text("\n".join(PINS))
        partial.rename(FOLDER)
    return FOLDER


def run_transformers5(folder: Path, script: str, *arguments: str | Path) -> None:
    """Run a script in a process whose transformers is that of ``folder``."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
