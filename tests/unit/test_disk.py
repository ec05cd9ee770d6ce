"""A full disk is named, whatever a library made of it."""

from __future__ import annotations

import errno
import os
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_minitron.errors import DiskError, MinitronError
from nemo_minitron.jobs.results import RankResult, StageCrashError, failure, save_result, verdict
from nemo_minitron.runtime import disk
from nemo_minitron.runtime.disk import disk_fault

FULL = Path("/dev/full")  # Linux: every write fails as on a full disk


def torch_by_path(count: int) -> None:
    torch.save(torch.zeros(count), FULL)


def torch_by_file(count: int) -> None:
    with FULL.open("wb") as file:
        torch.save(torch.zeros(count), file)


def text(count: int) -> None:
    with FULL.open("w") as file:
        file.write("x" * count)


@pytest.mark.parametrize("write", [torch_by_path, torch_by_file, text])
@pytest.mark.parametrize("count", [10, 1 << 20])
def test_what_libraries_make_of_a_full_disk(tmp_path, write, count):
    with pytest.raises((OSError, RuntimeError)) as caught:
        write(count)
    result = failure(0, caught.value, tmp_path)
    assert (result.status, result.error) == ("refused", "DiskError")
    assert "\n" not in result.message
    assert "MiB are free on /" in result.message
    assert "free some space, or choose an output on another disk" in result.message


def test_what_safetensors_says(tmp_path):
    with pytest.raises(Exception, match="No such file|No space") as caught:
        save_file({"a": torch.zeros(4)}, tmp_path / "missing" / "a.safetensors")
    assert disk_fault(caught.value, tmp_path) is None  # a missing directory is no fault of the disk
    assert disk_fault(RuntimeError("I/O error: No space left on device (os error 28)"), tmp_path) is not None


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EROFS, "choose an output on a disk that can be written"),
        (errno.EDQUOT, "the quota is used up"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.EACCES, "change its permissions"),
    ],
)
def test_other_faults_deep_in_a_chain(tmp_path, number, remedy):
    def fail() -> None:
        try:
            try:
                raise OSError(number, os.strerror(number), str(tmp_path / "out"))
            except OSError as error:
                raise ValueError("could not write") from error
        except ValueError:
            raise ExceptionGroup("ranks", [KeyError("a"), RuntimeError("b")])  # noqa: B904 (the context is the point)

    with pytest.raises(ExceptionGroup) as caught:
        fail()
    fault = disk_fault(caught.value, tmp_path)
    assert fault is not None and str(fault).startswith(f"{tmp_path / 'out'}: {os.strerror(number)}")
    assert remedy in str(fault)


def test_a_real_name_that_is_too_long(tmp_path):
    with pytest.raises(OSError, match="too long") as caught:
        (tmp_path / ("x" * 300)).touch()
    assert "choose a shorter name" in failure(0, caught.value, tmp_path).message


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2"), ConnectionResetError(errno.ECONNRESET, "reset"), KeyError(1)]
)
def test_other_errors_stay_crashes(tmp_path, error):
    assert failure(0, error, tmp_path).status == "crashed"


def test_a_rank_without_a_result_on_a_full_disk(tmp_path, monkeypatch):
    save_result(tmp_path, RankResult(0, "crashed", message="Connection reset by peer"))
    with pytest.raises(StageCrashError):
        verdict(tmp_path, 2, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(10 << 20, 10 << 20, 100))
    with pytest.raises(DiskError, match=r"the disk is full \(0 of 10 MiB are free on /"):
        verdict(tmp_path, 2, 1)


def test_a_refusal_that_no_result_says_is_read_from_the_log(tmp_path):
    """Where a quota is used up the disk itself has room, and the rank could write no result."""
    log = tmp_path / "rank-0.log"
    log.write_text("step 1\n12:00:00 ERROR nemo_minitron: /data/x: Disk quota exceeded; remove something\n")
    with pytest.raises(MinitronError, match=r"^/data/x: Disk quota exceeded; remove something \(rank 0 of 1 could"):
        verdict(tmp_path, 1, 2)
    with pytest.raises(StageCrashError, match="exit code 1"):
        verdict(tmp_path, 1, 1)
    log.write_text("12:00:00 ERROR nemo_mi")  # nor the log
    with pytest.raises(MinitronError, match=rf"^{tmp_path}: takes no more files or bytes; look at the quota"):
        verdict(tmp_path, 1, 2)
