"""The Dockerfiles: well-formed and of the versions that the tables name. ``make matrix`` runs their pip lines."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest
from matrix import run as matrix
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nemo_minitron.runtime.versions import PAIRS, PINNED

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def test_both_are_there() -> None:
    assert [path.name for path in DOCKERFILES] == ["cuda.Dockerfile", "nemo-25.07.Dockerfile"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_well_formed(path: Path) -> None:
    found = matrix.instructions(path)
    assert {word for word, _ in found} <= {"ARG", "FROM", "COPY", "RUN", "ENV"}
    assert [word for word, _ in found][:2] == ["ARG", "FROM"]
    assert all(rest for _, rest in found)
    for word, rest in found:
        if word == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name in matrix.copied(path):
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignored, f"{name} is not sent to the builder"
    # Whatever pip needs of the sources to build the wheel has been copied before.
    assert {"pyproject.toml", "README.md", "LICENSE", "nemo_minitron", "configs", "recipes"} <= set(matrix.copied(path))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_versions_and_extras_are_those_of_the_project(path: Path) -> None:
    lines = matrix.pip_lines(path)
    assert lines[-1].startswith("minitron ")
    for line in lines:
        for word in line.split():
            text = word.strip('"')
            if text.startswith(matrix.COPY) and "[" in text:
                extras = text.partition("[")[2].rstrip("]").split(",")
                assert set(extras) <= set(PROJECT["optional-dependencies"]), text
            elif "==" in text:
                requirement = Requirement(text)
                assert requirement.specifier.contains(PINS[requirement.name]), text
        if " install " in line:
            assert "-c " in line or "--no-deps" in line, f"nothing holds what is installed already: {line}"


def test_the_container_is_one_of_the_table() -> None:
    path = ROOT / "docker/nemo-25.07.Dockerfile"
    assert matrix.base_of(path) in {f"nvcr.io/nvidia/nemo:{pair.container}" for pair in PAIRS if pair.container}
    assert any("--no-deps nemo-aligner==" in line for line in matrix.pip_lines(path))


def test_the_plain_image_has_a_supported_python_and_torchs_cuda() -> None:
    path = ROOT / "docker/cuda.Dockerfile"
    (line,) = (rest for word, rest in matrix.instructions(path) if word == "RUN" and "-m venv" in rest)
    python = line.split()[0].removeprefix("python")
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{python}.0")
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]
    assert "nvidia/cuda:13." in matrix.base_of(path)  # torch 2.13's wheels are of CUDA 13


def test_the_requirements_of_a_pair_are_its_own() -> None:
    old = PAIRS[-1]
    lines = matrix.constraints(old, (ROOT / "constraints.txt").read_text().splitlines())
    assert f"nemo-toolkit=={old.nemo}" in lines
    assert f"torch=={old.torch}" in lines
    assert len([line for line in lines if line.startswith(("nemo-toolkit==", "torch==", "megatron-core=="))]) == 3
    wanted = matrix.stack(old, leave_out=("nemo-aligner",))
    assert "nemo-toolkit" in wanted
    assert not any(text.startswith(("nemo-aligner", "nemo-minitron")) for text in wanted)
    assert sorted(matrix.constraints(PINNED, [f"{name}=={version}" for name, version in PINS.items()])) == sorted(
        f"{name}=={version}" for name, version in PINS.items()
    )
