"""What every test gets."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from nemo_minitron.jobs.warm import COLD_VARIABLE, warm_pool

# Two threads a process on the few cores of a test machine are slower than one; set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# How long an example takes says something about the machine, and nothing about what is tested. Where CI is set,
# hypothesis has a profile that says so already, and draws the same examples each time.
settings.register_profile("any-machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top of the repository."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _warm() -> Iterator[None]:
    """Processes are forked from parents that live for the session; none is started before it is needed."""
    with warm_pool():
        yield


@pytest.fixture(autouse=True)
def _loggers() -> None:
    """Our loggers as they are in a fresh process: libraries that set up logging anew disable those of others."""
    logging.disable(logging.NOTSET)
    logging.getLogger("nemo_minitron")  # or else a placeholder, and the level is the root's
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.partition(".")[0] == "nemo_minitron":
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.INFO if name == "nemo_minitron" else logging.NOTSET)
            logger._cache.clear()  # type: ignore[attr-defined]


#: Tests of how processes start, each as a user starts it; and of fake stages, for which the parents' imports are waste.
_COLD = ("test_cli", "test_launch_outputs", "test_slurm", "test_status", "test_wheel")


@pytest.fixture(autouse=True)
def _cold(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.path.stem in _COLD:
        monkeypatch.setenv(COLD_VARIABLE, "1")


#: Where the long tests are, longest first: two workers then end at about the same time.
_LONG_FIRST = ("recipes", "smoke", "parity", "distributed", "unit", "gpu")
#: Files that are not run beside each other: each starts daemons of Slurm.
_SLURM = ("test_slurm", "test_slurm_nodes")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _choose_tier(config, items)
    if hasattr(config, "workerinput"):
        _share_out(items)


def _choose_tier(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the GPU tier out unless it is asked for with ``-m gpu``; asked for without a GPU, refuse to start."""
    tier = [item for item in items if item.get_closest_marker("gpu")]
    if not tier:
        return
    if "gpu" in re.findall(r"\w+", config.getoption("markexpr")):
        from support.tier import device_name

        device_name()
        return
    items[:] = [item for item in items if item not in tier]
    config.hook.pytest_deselected(items=tier)


def _share_out(items: list[pytest.Item]) -> None:
    """For several workers (``-n``): a file's tests stay in one of them, with its fixtures; long files begin."""

    def group(item: pytest.Item) -> str:
        return "slurm" if item.path.stem in _SLURM else f"{item.path.parent.name}/{item.path.stem}"

    items.sort(key=lambda item: (_LONG_FIRST.index(item.path.parent.name), group(item) != "slurm", group(item)))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
