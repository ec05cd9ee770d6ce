"""Every shipped configuration is loaded and dry-run, and its header tells the command that runs it."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from nemo_minitron.cli.dry_run import show_plans
from nemo_minitron.config import STAGES, load, load_pipeline, shipped_configs
from nemo_minitron.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def command(name: str) -> tuple[str, list[str]]:
    """The first command of a file's header, as ``(stage, words after the configuration)``."""
    header = re.search(r"^#   minitron (\S+) configs/(\S+)\.yaml(.*)$", (CONFIGS / f"{name}.yaml").read_text(), re.M)
    assert header is not None, f"{name}.yaml tells no command"
    assert header[2] == name
    return header[1], header[3].split()


def pipelines() -> set[str]:
    return {name for name in NAMES if command(name)[0] == "run"}


def read(name: str, overrides: list[str]):
    stage = command(name)[0]
    if stage == "run":
        return load_pipeline(CONFIGS / f"{name}.yaml", overrides)[1]
    return [load(stage, CONFIGS / f"{name}.yaml", overrides)]


def test_all_are_shipped_and_every_stage_has_one():
    assert shipped_configs() == NAMES
    assert {command(name)[0] for name in NAMES} == {*STAGES, "run"}


@pytest.mark.parametrize("name", NAMES)
def test_every_command_in_a_header_loads(name):
    commands = re.findall(r"^#   minitron (\S+) configs/(\S+)\.yaml(.*)$", (CONFIGS / f"{name}.yaml").read_text(), re.M)
    for _, file, words in commands:
        assert file == name
        read(name, [word for word in words.split() if not word.startswith("--")])


@pytest.mark.parametrize("name", NAMES)
def test_dry_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs, out, faults = read(name, []), io.StringIO(), []
    try:
        show_plans(configs, Console(file=out, width=150), name)
    except ConfigError as error:
        faults = error.faults
    # A single stage reads what the stages before it wrote, a pipeline perhaps what another one did; nothing else may
    # be wrong.
    made = [config.output for other in pipelines() - {name} for config in read(other, [])]
    faults = [fault for fault in faults if not fault.endswith("does not exist") or len(configs) > 1]
    assert [fault for fault in faults if not any(f" {output}{end}" in fault for output in made for end in "/ ")] == []
    for config in configs:
        assert (config.name or config.STAGE) in out.getvalue()
    assert list(tmp_path.iterdir()) == []
