"""What every test gets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_minitron.jobs.warm import COLD_VARIABLE, warm_pool

# Two threads a process on the few cores of a test machine are slower than one; set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top of the repository."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _warm() -> Iterator[None]:
    """Processes are forked from parents that live for the session; none is started before it is needed."""
    with warm_pool():
        yield


#: Tests of how processes start, each as a user starts it.
_COLD = ("test_cli", "test_launch_outputs", "test_slurm", "test_wheel")


@pytest.fixture(autouse=True)
def _cold(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.path.stem in _COLD:
        monkeypatch.setenv(COLD_VARIABLE, "1")
