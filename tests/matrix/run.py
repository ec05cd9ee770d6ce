"""The smoke tier beside each known pair of NeMo and Megatron-core: what ``make matrix`` runs.

For every pair of :data:`nemo_minitron.runtime.versions.PAIRS` an environment is built under ``build/matrix/NAME``, on
Python 3.12 and without a GPU, the way docker/ builds the image:

- the pinned pair by the pip lines of ``docker/cuda.Dockerfile``;
- a pair of one of NVIDIA's containers by an environment that stands for the image (the same NeMo and Megatron-core, no
  NeMo-Aligner), on which the pip lines of ``docker/nemo-25.07.Dockerfile`` then run. They must not replace anything
  that is installed.

Then ``pytest -m smoke`` runs in it, on the installed package. The table goes to standard output and, with what each
environment holds, to ``build/matrix/matrix.json`` and ``matrix.md``. An environment takes some 7 GB; it is removed when
its tests are done, unless ``--keep`` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nemo_minitron.runtime.versions import PAIRS, PINNED, Pair

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "matrix"
#: What the image's copy of the sources is called in the Dockerfiles.
COPY = "/opt/nemo-minitron"
SHOWN = ("nemo-toolkit", "megatron-core", "nemo-aligner", "torch", "transformers", "numpy")
#: What the tests need beside the package.
TOOLS = ["pytest", "pytest-timeout", "hypothesis"]
STAGES = ("teacher", "scores", "pruned", "distilled", "distilled_tp2", "sft", "dpo", "evaluation", "export", "report")


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """``(instruction, rest)`` of each instruction of a Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", dockerfile.read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def pip_lines(dockerfile: Path) -> list[str]:
    """The shell lines of a Dockerfile that install Python packages or use them, in order."""
    wanted = ("python -m pip", "minitron")
    return [rest for word, rest in instructions(dockerfile) if word == "RUN" and rest.startswith(wanted)]


def base_of(dockerfile: Path) -> str:
    """The image that a Dockerfile starts from, by the default of its argument."""
    (default,) = (rest for word, rest in instructions(dockerfile) if word == "ARG" and rest.startswith("IMAGE="))
    return default.removeprefix("IMAGE=")


def copied(dockerfile: Path) -> list[str]:
    """What a Dockerfile copies from the repository, by name."""
    return [name for word, rest in instructions(dockerfile) if word == "COPY" for name in rest.split()[:-1]]


def constraints(pair: Pair, lines: list[str]) -> list[str]:
    """constraints.txt for a pair: its own versions instead of those that are there."""
    overrides = pair.overrides()
    kept = [line for line in lines if canonicalize_name(line.split("==")[0]) not in overrides]
    return kept + [f"{name}=={version}" for name, version in overrides.items() if version is not None]


def stack(pair: Pair, *, leave_out: tuple[str, ...] = ()) -> list[str]:
    """The requirements of the extra ``stack``, without ranges for what the pair pins."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = []
    for text in extras["stack"]:
        name = canonicalize_name(Requirement(text).name)
        if name not in leave_out and name != "nemo-minitron":
            found.append(name if name in pair.overrides() else text)
    return found


class Environment:
    """A virtual environment and what is run in it, with a log beside it."""

    def __init__(self, home: Path, python: str) -> None:
        self.home, self.bin = home, home / "venv" / "bin"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        self.log = home / "log.txt"
        self.run([python, "-m", "venv", str(home / "venv")])

    def run(self, words: list[str], **environment: str) -> None:
        """Run a command; its output goes to the log.

        Raises:
            subprocess.CalledProcessError: if it fails.
        """
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        kept |= {"PATH": f"{self.bin}:{os.environ['PATH']}", **environment}
        with open(self.log, "a") as log:
            print("$", *words, file=log, flush=True)
            subprocess.run(words, cwd=ROOT, env=kept, stdout=log, stderr=subprocess.STDOUT, check=True)

    def pip(self, *words: str) -> None:
        """``pip install`` into it."""
        self.run([str(self.bin / "python"), "-m", "pip", "install", "--disable-pip-version-check", *words])

    def versions(self) -> dict[str, str]:
        """Version of every distribution in it."""
        words = [str(self.bin / "python"), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
        found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        return {canonicalize_name(each["name"]): each["version"] for each in found}


def build(pair: Pair, environment: Environment) -> dict[str, str]:
    """Fill an environment.

    Returns:
        What the pip lines of the Dockerfile replaced of the image's, "from -> to" by name: it should be empty.
    """
    home = environment.home
    sources = home / "sources"
    dockerfile = ROOT / "docker" / ("cuda.Dockerfile" if pair is PINNED else "nemo-25.07.Dockerfile")
    for name in copied(dockerfile):
        origin, target = ROOT / name, sources / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_dir():
            shutil.copytree(origin, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, target)
    pins = home / "constraints.txt"
    pins.write_text("\n".join(constraints(pair, (ROOT / "constraints.txt").read_text().splitlines())) + "\n")
    before: dict[str, str] = {}
    if pair is not PINNED:
        environment.pip("-c", str(pins), *stack(pair, leave_out=("nemo-aligner",)))
        before = environment.versions()
    for line in pip_lines(dockerfile):
        environment.run(["bash", "-euo", "pipefail", "-c", line.replace(COPY, str(sources))])
    after = environment.versions()
    environment.pip("-c", str(pins), *TOOLS)
    shutil.rmtree(sources)
    return {name: f"{old} -> {after.get(name)}" for name, old in before.items() if after.get(name) != old}


def smoke(environment: Environment) -> tuple[bool, list[str]]:
    """Run the smoke tier.

    Returns:
        Whether it passed, and the stages that did.
    """
    from nemo_minitron.jobs.records import read_record

    place = environment.home / "tests"
    # Not `python -m pytest`, which would put the source tree before what is installed.
    words = [str(environment.bin / "pytest"), "-m", "smoke", "-q", "-p", "no:cacheprovider", f"--basetemp={place}"]
    try:
        environment.run([*words, "-o", "tmp_path_retention_policy=all", "tests/smoke"], OMP_NUM_THREADS="1")
    except subprocess.CalledProcessError:
        runs = [path.parent for path in place.glob("*/run/pipeline.json")] or list(place.glob("*/run"))
        return False, [name for name in STAGES if runs and read_record(runs[0] / name) is not None]
    return True, list(STAGES)


def check(pair: Pair, python: str, *, keep: bool) -> dict[str, Any]:
    """Build an environment, test it, and say what came of it."""
    started, home = time.monotonic(), BUILD / pair.name
    row: dict[str, Any] = {"pair": pair.name, "container": pair.container, "passed": False, "stages": [], "held": {}}
    try:
        environment = Environment(home, python)
        row["replaced"] = build(pair, environment)
        row["seconds_to_build"] = round(time.monotonic() - started)
        versions = environment.versions()
        row["python"] = subprocess.run(
            [str(environment.bin / "python"), "-V"], check=True, capture_output=True, text=True
        ).stdout.split()[1]
        row["held"] = {name: versions.get(name) for name in SHOWN}
        row["all"] = versions
        tested = time.monotonic()
        row["passed"], row["stages"] = smoke(environment)
        row["passed"] = row["passed"] and not row["replaced"]
        row["seconds_to_test"] = round(time.monotonic() - tested)
    except subprocess.CalledProcessError as error:
        row["error"] = f"{' '.join(map(str, error.cmd))[:200]} failed: {home / 'log.txt'}"
    if not keep:
        shutil.rmtree(home / "venv", ignore_errors=True)
        shutil.rmtree(home / "tests", ignore_errors=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for docs/cluster.md."""
    lines = [
        "| container | NeMo | Megatron-core | NeMo-Aligner | torch | transformers | Python | smoke tier |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        held = row["held"]
        cells = [row["container"] or "none (constraints.txt)", *(held.get(name) for name in SHOWN[:-1])]
        missed = [name for name in STAGES if name not in row["stages"]]
        result = "passed" if row["passed"] else f"not passed: {', '.join(missed) or row.get('replaced')}"
        lines.append("| " + " | ".join(str(cell or "none") for cell in [*cells, row.get("python"), result]) + " |")
    return "\n".join(lines)


def main() -> int:
    """Check the pairs that are named, or all.

    Returns:
        0 if all passed.
    """
    names = [pair.name for pair in PAIRS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"pairs: {', '.join(names)}; all if none is named")
    parser.add_argument("--python", default="python3.12", help="interpreter of the environments, as in the containers")
    parser.add_argument("--keep", action="store_true", help="leave the environments where they are")
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; the pairs are {', '.join(names)}")
    rows = []
    for pair in PAIRS:
        if not options.names or pair.name in options.names:
            print(f"{pair.name}: NeMo {pair.nemo}, Megatron-core {pair.megatron} ...", flush=True)
            rows.append(check(pair, options.python, keep=options.keep))
            print(f"{pair.name}: {'passed' if rows[-1]['passed'] else rows[-1].get('error', 'failed')}", flush=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "matrix.json").write_text(json.dumps(rows, indent=2) + "\n")
    (BUILD / "matrix.md").write_text(table(rows) + "\n")
    print(table(rows))
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
