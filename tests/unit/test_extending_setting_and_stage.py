"""A setting and a stage of a package outside this one: the code of docs/extending.md, run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from nemo_minitron.config import StageConfig, TokensConfig
from nemo_minitron.config.stages.base import STAGES, find_stage
from nemo_minitron.errors import ConfigError, MinitronError
from nemo_minitron.jobs.modules import reference_of, stage_module

ROOT = Path(__file__).resolve().parents[2]
TEXT = "a few words and a few more"  # seven, two of them of one letter


def blocks(section: str, language: str) -> list[str]:
    """The fenced blocks of a section of the guide."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (body,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    return re.findall(rf"^```{language}\n(.*?)^```\n", body, re.M | re.S)


def write(folder: Path, block: str) -> None:
    """Put a block where its first line says."""
    path = folder / block.partition("\n")[0].removeprefix("# ")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block, encoding="utf-8")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The guide's package as pip would install it, its text and its pipeline."""
    for language in ("python", "toml", "yaml"):
        for block in blocks("A stage", language):
            write(tmp_path, block)
    (change,) = blocks("A setting", "diff")
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=change, text=True, check=True)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    info = tmp_path / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"[{group}]\n{name} = {value}\n" for group, found in project["entry-points"].items()
             for name, value in found.items()]  # fmt: skip
    (info / "entry_points.txt").write_text("".join(lines))
    (tmp_path / "story.txt").write_text(TEXT)
    (tmp_path / "words.yaml").write_text("text: story.txt\noutput: words\n")
    return tmp_path


def python(*args: str, cwd: Path, code: int = 0) -> str:
    """What a fresh interpreter prints, in which the package is installed."""
    env = {**os.environ, "PYTHONPATH": str(cwd), "COLUMNS": "150"}
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def minitron(*args: str, cwd: Path, code: int = 0) -> str:
    return python("-m", "nemo_minitron", *args, cwd=cwd, code=code)


def test_the_command_line_knows_the_stage_and_its_setting(package: Path) -> None:
    assert re.search(r"words +Count the words of a text\.", minitron("--help", cwd=package))
    shown = minitron("words", "--help", cwd=package)
    assert re.search(r"shortest +1 +words of fewer letters are left out\. \(whole number\)", shown)
    assert "shortest: 1" in minitron("config", "words", cwd=package)
    planned = minitron("words", "words.yaml", "shortest=2", "--dry-run", cwd=package)
    assert "words.json" in planned
    assert not (package / "words").exists()
    refused = minitron("words", "words.yaml", "shortest=0", "--dry-run", cwd=package, code=2)
    assert "shortest=0: must be above 0" in refused
    assert "did you mean shortest?" in minitron("words", "words.yaml", "shortst=2", cwd=package, code=2)
    (package / "story.txt").unlink()
    assert "story.txt does not exist" in minitron("words", "words.yaml", "--dry-run", cwd=package, code=2)


@pytest.mark.slow
def test_the_stage_runs_in_a_process_of_its_own_and_is_recorded(package: Path) -> None:
    assert "words: done" in minitron("words", "words.yaml", "shortest=2", cwd=package)
    assert json.loads((package / "words/words.json").read_text()) == {"few": 2, "words": 1, "and": 1, "more": 1}
    record = json.loads((package / "words/record.json").read_text())
    assert (record["stage"], record["config"]["shortest"], record["metrics"]) == ("words", 2, {"words": 5})
    assert "already exists" in minitron("words", "words.yaml", cwd=package, code=2)
    minitron("words", "words.yaml", "--overwrite", cwd=package)
    assert json.loads((package / "words/record.json").read_text())["metrics"] == {"words": 7}


@pytest.mark.slow
def test_a_pipeline_and_its_report_take_the_stage(package: Path) -> None:
    minitron("run", "pipeline.yaml", cwd=package)
    record = package / "counted/words/record.json"
    made = record.stat().st_mtime_ns
    assert "words" in (package / "counted/report/report.md").read_text()
    minitron("run", "pipeline.yaml", cwd=package)
    assert record.stat().st_mtime_ns == made  # of the same settings: kept
    minitron("run", "pipeline.yaml", "stages.words.shortest=3", cwd=package)
    assert json.loads(record.read_text())["metrics"] == {"words": 5}


RANKS = '''
import os
from dataclasses import dataclass, field
from pathlib import Path
from nemo_minitron.config import ParallelLayout, StageConfig
from nemo_minitron.jobs.plans import StagePlan

@dataclass
class RanksConfig(StageConfig):
    """Say which ranks there are.

    Attributes:
        parallel: how many.
    """

    STAGE = "ranks"
    MODULE = "ranks"
    LEVEL = "torch"
    parallel: ParallelLayout = field(default_factory=ParallelLayout)

def plan(config):
    return StagePlan(config.STAGE)

def run(config):
    Path(config.output).mkdir(exist_ok=True)
    (Path(config.output) / f"rank-{os.environ.get('RANK', '0')}").touch()
    return {"world": config.parallel.world_size}
'''

RUN = """
import ranks
from nemo_minitron.config import ParallelLayout
from nemo_minitron.jobs.local import run_stage

for number in (1, 2):
    config = ranks.RanksConfig(output=f"out{number}", parallel=ParallelLayout(data=number))
    print("world", run_stage(config)["metrics"])
"""


@pytest.mark.slow
def test_a_class_without_entry_point_runs_from_its_import_on(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    (tmp_path / "script.py").write_text(RUN)
    said = python("script.py", cwd=tmp_path)
    assert "world {'world': 1}" in said
    assert "world {'world': 2}" in said
    assert sorted(path.name for path in (tmp_path / "out2").glob("rank-*")) == ["rank-0", "rank-1"]


def test_a_plugin_that_fails_is_named_and_the_others_go_on(package: Path) -> None:
    (package / "wordcount/config.py").write_text("import nothing_of_this_name\n")
    said = minitron("--help", cwd=package)
    assert "stage words of wordcount.config:WordsConfig is left out: ModuleNotFoundError" in said
    assert "distill" in said


def test_names_that_are_taken_are_refused() -> None:
    before = dict(STAGES)
    for name, holder in (("tokens", "nemo_minitron.config.stages.importance.TokensConfig"), ("run", "a word of")):
        with pytest.raises(ConfigError, match=rf"STAGE='{name}' is {holder}.* already; choose another name"):
            type("Other", (StageConfig,), {"STAGE": name})
    assert before == STAGES


def test_other_processes_find_the_class() -> None:
    assert reference_of(TokensConfig()) == "tokens"
    assert find_stage("nemo_minitron.config:tokens") is TokensConfig
    with pytest.raises(ConfigError, match=r"nothing: is no stage; stages: import"):
        find_stage("nothing")
    with pytest.raises(ConfigError, match=r"x: is a stage of not_there\.config, which cannot be imported here"):
        find_stage("not_there.config:x")
    with pytest.raises(MinitronError, match=r"gone: is not part of this installation \(nemo_minitron\.stages\.gone"):
        stage_module("gone")
    script = type("Script", (StageConfig,), {"__module__": "__main__"})
    with pytest.raises(MinitronError, match="defined in the script that runs"):
        reference_of(script())
