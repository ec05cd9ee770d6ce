"""Only the known messages are dropped."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator

import pytest

from nemo_minitron.runtime.cpu import quiet


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    was_quiet = bool(quiet._filters)
    quiet.loud()
    yield
    quiet.loud()
    if was_quiet:
        quiet.quiet()


def warned(text: str, category: type[Warning], module: str) -> bool:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet.quiet()
        warnings.warn_explicit(text, category, "file.py", 1, module=module)
        quiet.loud()
    return bool(seen)


PYNVML = "The pynvml package is deprecated. Please install nvidia-ml-py instead."


@pytest.mark.parametrize(
    ("text", "category", "module", "heard"),
    [
        (PYNVML, FutureWarning, "torch.cuda", False),
        (PYNVML, FutureWarning, "somewhere.else", True),
        (PYNVML, UserWarning, "torch.cuda", True),
        ("Something else is deprecated", FutureWarning, "torch.cuda", True),
        ("Apex is not installed. Falling back to Torch Norm", UserWarning, "megatron.core.models.backends", False),
        ("Loss is not finite", UserWarning, "megatron.core.models.backends", True),
    ],
)
def test_python_warnings(text: str, category: type[Warning], module: str, heard: bool) -> None:
    assert warned(text, category, module) is heard


def heard_from(name: str, level: int, text: str) -> bool:
    seen: list[logging.LogRecord] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record)

    logger, ear = logging.getLogger(name), Ear()
    before = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(ear)
    try:
        logger.log(level, text)
    finally:
        logger.removeHandler(ear)
        logger.setLevel(before)
    return bool(seen)


FIELD = "The model: MegatronGPTModel() does not have field.name: mamba_num_heads in its cfg. Add this key"


@pytest.mark.parametrize(
    ("name", "level", "text", "heard"),
    [
        ("nemo_logger", logging.WARNING, FIELD, False),
        ("nemo_logger", logging.ERROR, FIELD, True),
        ("nemo_logger", logging.WARNING, "Restoring from a step that does not exist", True),
        ("nemo_logger", logging.INFO, "Padded vocab_size: 128", False),
        ("NeMo", logging.WARNING, "Cannot import zarr, support for zarr-based checkpoints is not available.", False),
        ("NeMo", logging.WARNING, "Cannot import something else", True),
        ("megatron.core.rerun_state_machine", logging.WARNING, "Need to rerun step", True),
        ("nemo_minitron", logging.WARNING, FIELD, True),
    ],
)
def test_log_records(name: str, level: int, text: str, heard: bool) -> None:
    assert heard_from(name, level, text)
    quiet.quiet()
    assert heard_from(name, level, text) is heard
    quiet.loud()
    assert heard_from(name, level, text)


def test_quiet_is_undone_and_idempotent() -> None:
    before = list(warnings.filters)
    for _ in range(2):
        quiet.quiet()
        quiet.quiet()
        assert len(warnings.filters) == len(before) + len(quiet.WARNINGS)
        quiet.loud()
        assert list(warnings.filters) == before
        assert not any(logging.getLogger(record.logger).filters for record in quiet.RECORDS)


def test_every_entry_is_a_pattern_with_a_reason() -> None:
    for entry in (*quiet.WARNINGS, *quiet.RECORDS):
        assert len(re.sub(r"\W", "", entry.message)) > 10, "too short to be sure of"
        assert entry.why
