"""Every command that the README and the guides show exists, and its configuration loads with the settings shown."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from nemo_minitron.cli.app import app
from nemo_minitron.cli.plan import read_cluster, read_subject, trainings_of
from nemo_minitron.config import STAGES, load, load_doctor, load_pipeline, load_slurm
from nemo_minitron.config.template import template

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[tuple[str, str]]:
    """``(page, command)`` of each line of a shell block that starts with ``minitron`` or ``make``."""
    found = []
    for page in PAGES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S):
            for line in block.splitlines() if language in ("", "bash") else ():
                line = line.removeprefix("$ ").split("  #")[0].strip()
                if line.startswith(("minitron ", "make ")):
                    found.append((page.name, line))
    return found


def saved() -> set[str]:
    """Files that a command of the pages writes."""
    words = [shlex.split(line) for _, line in commands()]
    return {line[line.index("--save") + 1] for line in words if "--save" in line}


def test_the_pages_show_the_main_commands() -> None:
    shown = {line for _, line in commands()}
    assert {"make demo", "make test", "make env"} <= shown


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: str(value)[:60])
def test_command(page: str, line: str) -> None:
    program, *words = shlex.split(line)
    if program == "make":
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    stage, *rest = words
    if stage in ("--help", "--version", "--install-completion", "status", "verify"):
        return
    if rest == ["--help"]:
        assert stage in [*STAGES, "run", "plan"]
        return
    if stage == "config":
        assert template(*rest)
        return
    if stage == "doctor":
        words = [word for word in rest if not word.startswith("--")]
        if "--slurm" in rest:
            load_slurm(rest[rest.index("--slurm") + 1])
            words.remove(rest[rest.index("--slurm") + 1])
        load_doctor(words)
        return
    if stage == "init":  # the words are options that it has; see test_init_command for what it does
        get_command(app).commands["init"].make_context("init", rest)
        return
    if stage == "run" and rest[0] in saved():
        return
    if stage == "plan":
        settings = [word for word in rest if "=" in word]
        assert read_cluster(settings).faults() == []
        assert trainings_of(read_subject(rest[0], settings))[0]
        return
    if "--slurm" in rest:
        at = rest.index("--slurm")
        load_slurm(rest[at + 1])
        del rest[at : at + 2]
    if stage == "report" and not rest[0].endswith(".yaml"):  # directories: see test_report_compare
        return
    settings = [word for word in rest if not word.startswith("--")]
    if stage == "run":
        load_pipeline(settings[0], settings[1:])
    else:
        assert stage in STAGES
        load(stage, settings[0], settings[1:])


def test_help_shows_every_stage() -> None:
    done = subprocess.run([sys.executable, "-m", "nemo_minitron", "--help"], capture_output=True, text=True, check=True)
    for stage in [*STAGES, "init", "run", "plan"]:
        assert stage in done.stdout
