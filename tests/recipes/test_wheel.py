"""The built wheel, installed where there is no source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"nemo_minitron": "nemo_minitron", "configs": "nemo_minitron/configs", "recipes": "nemo_minitron/recipes"}


def sources(root: Path) -> set[str]:
    """What a wheel must hold, by its name there: every file of the packages that is not a product of some tool."""
    return {
        f"{inside}/{file.relative_to(root / folder).as_posix()}"
        for folder, inside in FOLDERS.items()
        for file in (root / folder).rglob("*")
        if file.is_file()
        and not any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(root).parts)
    }


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {Path(name).parent.as_posix().replace("/", ".") for name in sources(ROOT) if name.endswith("/__init__.py")}
    assert set(listed) == found
    assert len(listed) == len(found)


def run(words: list[str], where: Path) -> str:
    # Neither the source tree nor what the tests were started with may be found.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(words, cwd=where, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the sources."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return copy


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    """Built from the copy, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(tree)], folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_works_by_itself(tree, wheel, tmp_path):
    """Its requirements are those of the running environment."""

    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    tops = {name.split("/")[0] for name in names}
    (info,) = tops - {"nemo_minitron"}
    assert info.endswith(".dist-info")
    assert {name for name in names if not name.startswith(info)} == sources(tree)

    bare = tmp_path / "bare"
    venv.create(bare, with_pip=False, symlinks=True)
    python = bare / "bin" / "python"
    (site,) = (bare / "lib").glob("python*/site-packages")
    run([*PIP, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], tmp_path)
    # A path, not a site directory: what the other environment installs by .pth files (an editable nemo_minitron) stays
    # unknown.
    (site / "requirements.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    minitron = str(bare / "bin" / "minitron")
    where = tmp_path / "elsewhere"
    where.mkdir()
    found = run([str(python), "-c", "import nemo_minitron; print(nemo_minitron.__file__)"], where)
    assert Path(found.strip()).is_relative_to(bare)
    assert "plan" in run([minitron, "--help"], where)
    assert "4,512,746,496" in run([minitron, "plan", "llama-31-minitron-4b-width", "--save", "pipeline.yaml"], where)
    shown = run(
        [str(python), "-c", "from nemo_minitron.config import *; print(*shipped_configs(), *shipped_slurm())"], where
    )
    expected = [path.stem for folder in ("configs", "configs/slurm") for path in sorted((ROOT / folder).glob("*.yaml"))]
    assert sorted(shown.split()) == sorted(expected)
    listed = run([str(python), "-c", "from nemo_minitron.planning import recipe_names; print(*recipe_names())"], where)
    assert "smollm2-demo" in listed.split()


def light_distributions() -> list[metadata.Distribution]:
    """What the package requires without extras, and what that requires, as installed here."""
    seen: dict[str, metadata.Distribution] = {}
    todo = [
        Requirement(text) for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    while todo:
        name = todo.pop().name
        if name not in seen:
            seen[name] = metadata.distribution(name)
            wanted = [Requirement(text) for text in seen[name].requires or []]
            todo += [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    return list(seen.values())


@pytest.mark.slow
def test_without_the_stack_it_plans_and_says_what_is_missing(wheel, tmp_path):
    """An environment of the wheel and its mandatory requirements alone, linked from the running one."""
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=False, symlinks=True)
    (site,) = (bare / "lib").glob("python*/site-packages")
    for distribution in light_distributions():
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    run([*PIP, "--python", str(bare / "bin/python"), "install", "--no-deps", "--no-index", str(wheel)], tmp_path)

    def minitron(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        command = [str(bare / "bin/minitron"), *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    absent = run([str(bare / "bin/python"), "-c", "import importlib.util as u; print(u.find_spec('torch'))"], tmp_path)
    assert absent.strip() == "None"
    assert "plan" in minitron("--help").stdout
    assert "4,512,746,496" in minitron("plan", "llama-31-minitron-4b-width").stdout
    (tmp_path / "score.yaml").write_text(
        "model: model\noutput: scores\ndata: {sources: [{name: text, path: text.jsonl}]}\n"
    )
    wrong = minitron("score", "score.yaml", "modell=3")
    assert (wrong.returncode, "did you mean model?" in wrong.stderr) == (2, True)
    refused = minitron("score", "score.yaml")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("minitron: score needs torch>=")
    assert 'pip install "nemo-minitron[stack]"' in line
    assert not (tmp_path / "scores").exists()
    whole = minitron("run", "demo-align")
    assert whole.returncode == 2
    assert "alignment needs nemo-aligner>=0.7 (not installed): pip install --no-deps" in whole.stderr
    assert "Traceback" not in whole.stderr
    assert not (tmp_path / "runs").exists()
