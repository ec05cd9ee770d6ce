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
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_the_wheel_works_by_itself(tmp_path):
    """Built from a copy of the sources, without a network; its requirements are those of the running environment."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(tree)], tmp_path)
    (wheel,) = tmp_path.glob("*.whl")

    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    tops = {name.split("/")[0] for name in names}
    (metadata,) = tops - {"nemo_minitron"}
    assert metadata.endswith(".dist-info")
    assert {name for name in names if not name.startswith(metadata)} == sources(tree)

    bare = tmp_path / "bare"
    venv.create(bare, with_pip=False, symlinks=True)
    python = bare / "bin" / "python"
    (site,) = (bare / "lib").glob("python*/site-packages")
    run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], tmp_path)
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
