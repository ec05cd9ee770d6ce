"""Collect the wheels that the GPU tier needs beyond torch, for a machine without a network.

    python3.12 tests/gpu/carry.py [--size MiB] FOLDER

Run it where a package index can be reached, with the Python version of the machine that is to be tested (3.12 of
NVIDIA's containers, say). Versions are those of ``constraints.txt``; nothing is taken that torch brings itself. The
folder is emptied of other wheels first. Exits with 1 if it is larger than ``--size``, with 2 if it cannot be made.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT = 64  # MiB

#: By what needs them. No dependencies are followed: torch would come with them, gigabytes of it.
PACKAGES = {
    "Megatron-core": ["megatron-core", "einops", "numpy", "packaging", "setuptools"],
    "this suite": ["antlr4-python3-runtime", "omegaconf", "psutil", "pyyaml", "safetensors", "wrapt"],
    "the command line": [
        "annotated-doc", "annotated-types", "click", "markdown-it-py", "mdurl", "pydantic", "pydantic-core", "pygments",
        "rich", "shellingham", "typer", "typing-inspection",
    ],
    "checkpoints and tokenizers of Hugging Face": [
        "certifi", "charset-normalizer", "hf-xet", "huggingface-hub", "idna", "regex", "requests", "tokenizers",
        "tqdm", "transformers", "urllib3",
    ],
    "pytest": ["iniconfig", "pluggy", "pytest", "pytest-timeout"],
}  # fmt: skip


def requirements() -> list[str]:
    """``name==version`` of every package.

    Raises:
        SystemExit: if one has no version in ``constraints.txt``.
    """
    pins = {}
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
        name, equals, version = line.partition(";")[0].strip().partition("==")
        if equals:
            pins[name.lower().replace("_", "-")] = version.strip()
    names = [name for part in PACKAGES.values() for name in part]
    if missing := [name for name in names if name not in pins]:
        raise SystemExit(f"constraints.txt has no version of {', '.join(missing)}")
    return [f"{name}=={pins[name]}" for name in names]


def main() -> int:
    """Empty the folder, fill it, weigh it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the wheels go")
    parser.add_argument("--size", type=float, default=LIMIT, help="most that they may be, in MiB (%(default)s)")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.whl"):
        stale.unlink()
    # What has no wheel is built: Megatron-core compiles a small helper, antlr4's runtime is pure Python.
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*command, "--wheel-dir", str(folder), *requirements()]).returncode:
        print("pip could not collect the wheels: see above", file=sys.stderr)
        return 2
    wheels = sorted(folder.glob("*.whl"), key=lambda wheel: -wheel.stat().st_size)
    total = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:7.2f} MiB  {wheel.name}")
    print(f"{total:7.2f} MiB  in all, {len(wheels)} wheels for Python {sys.version_info[0]}.{sys.version_info[1]}")
    if total > arguments.size:
        print(f"{total:.2f} MiB are more than {arguments.size:g} MiB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
