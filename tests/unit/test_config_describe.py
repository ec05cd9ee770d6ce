"""What ``--help``, ``minitron config``, the completion and docs/settings.md say of the settings."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from nemo_minitron.cli.app import app
from nemo_minitron.config import STAGES, load, load_doctor, load_pipeline, load_slurm
from nemo_minitron.config.complete import complete_config, complete_override
from nemo_minitron.config.describe import (
    CLUSTER,
    CONFIGURATIONS,
    direct_settings,
    documented,
    faults_of_defaults,
    settings_of,
)
from nemo_minitron.config.reference import page
from nemo_minitron.config.template import template
from nemo_minitron.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

#: What makes each template a configuration, besides a word in the place of each ``???``.
SOURCE = ["data.sources[0].path=a.txt"]
FILLED: dict[str, list[str]] = {
    "import": ["source=hf"],
    "score": SOURCE,
    "depth": SOURCE,
    "tokens": SOURCE,
    "prune": ["target.num_layers=2", "scores=scores"],
    "iterate": ["target.num_layers=2", *SOURCE],
    "reconstruct": SOURCE,
    "search": ["space.num_layers.min=2", "budget.share=0.5", *SOURCE],
    "correct": SOURCE,
    "cache": SOURCE,
    "generate": ["prompts.path=a.txt"],
    "distill": ["teacher=given", *SOURCE],
    "sft": ["data.path=a.jsonl"],
    "dpo": ["data.path=a.jsonl"],
    "reward": ["data.path=a.jsonl"],
    "label": ["data.path=a.jsonl"],
    "steerlm": ["data.path=a.jsonl"],
    "steerlm2": ["data.path=a.jsonl"],
    "reinforce": ["data.path=a.jsonl", "rule=short"],
    "export": [],
    "evaluate": ["models={a: model}", *SOURCE],
    "benchmark": ["models={a: model}"],
    "report": [],
    "doctor": [],
    "pipeline": ["stages=[{stage: report}]"],
    "slurm": [],
}


def load_any(name: str, path: Path, words: list[str]) -> object:
    if name == "pipeline":
        return load_pipeline(path, words)[0]
    if name == "slurm":
        return load_slurm(path, words)
    return load_doctor([str(path), *words]) if name == "doctor" else load(name, path, words)


def classes() -> Iterator[type]:
    """Every dataclass that a file or a command line is read into, and those of its own that they derive from."""
    seen: set[type] = set()
    for cls in (*CONFIGURATIONS.values(), CLUSTER):
        for part in (cls, *(setting.part for setting in settings_of(cls) if setting.part is not None)):
            seen.update(base for base in part.__mro__ if dataclasses.is_dataclass(base))
    return iter(sorted(seen, key=lambda one: one.__name__))


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_every_setting_is_described_and_every_description_is_of_a_setting(cls):
    names = [field.name for field in dataclasses.fields(cls)]
    described = {name for base in cls.__mro__ for name in documented(base)}
    assert [name for name in names if name not in described] == []
    assert [name for name in documented(cls) if name not in names] == []
    assert all(len(setting.text) > 8 for setting in direct_settings(cls))


def test_descriptions_are_read_from_docstrings():
    class Example:
        """Something.

        Attributes:
            a, b: two of them,
                over two lines: with a colon.
            c: one.

        Raises:
            d: is no attribute.
        """

    both = "two of them, over two lines: with a colon."
    assert documented(Example) == {"a": both, "b": both, "c": "one."}


def test_settings_of_a_stage():
    settings = {setting.name: setting for setting in settings_of(STAGES["distill"])}
    source, lr, student = settings["data.sources[].path"], settings["lr"], settings["student"]
    assert (source.type, source.default, source.must) == ("text or null", None, False)
    assert (lr.type, lr.default, lr.must, lr.needed) == ("number", 1e-4, False, None)
    assert (student.must, student.shown) == (True, "required")
    assert settings["loss.kind"].shown == "forward_kl"
    assert settings["data"].is_group
    # A default of the derived class, under the words of the base.
    dpo = {setting.name: setting for setting in settings_of(STAGES["dpo"])}
    assert (dpo["lr"].default, "peak" in dpo["lr"].text) == (1e-6, True)


# ----------------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_template_is_refused_by_name_and_loads_once_filled_in(tmp_path, name):
    text = template(name)
    path = tmp_path / "template.yaml"
    path.write_text(text)
    needed = faults_of_defaults(CONFIGURATIONS[name])
    if needed:
        with pytest.raises(ConfigError) as error:
            load_any(name, path, [])
        for setting in needed:
            # Of a list that must not be empty, the template has an entry: what that lacks is named.
            assert any(re.search(rf"\b{re.escape(setting)}(\[0\]\.name)?: ", fault) for fault in error.value.faults)
            assert f"#   {setting}: " in text
    path.write_text(text.replace(" ???", " given"))
    config = load_any(name, path, FILLED[name])
    values = yaml.safe_load(text)
    assert list(values) == [setting.name for setting in direct_settings(CONFIGURATIONS[name])]
    # All that was not filled in is what the dataclass has.
    words = {word.split("=")[0].split(".")[0] for word in FILLED[name]}
    for setting in direct_settings(CONFIGURATIONS[name]):
        if not setting.must and setting.name not in words and "${" not in str(setting.default):
            assert getattr(config, setting.name) == setting.default, setting.name


def test_entries_that_a_template_only_shows_are_yaml_too(tmp_path):
    text = template("score").replace(" ???", " given").replace("\nalso: []\n", "\nalso:\n")
    head, also = text.split("\nalso:\n")
    path = tmp_path / "score.yaml"
    path.write_text(f"{head}\nalso:\n" + "\n".join(line.removeprefix("# ") for line in also.splitlines()))
    config = load("score", path, [*SOURCE, "also[0].batch=max"])
    assert [one.batch for one in config.also] == ["max"]


def test_config_command():
    runner = CliRunner()
    done = runner.invoke(app, ["config", "prune"])
    assert (done.exit_code, done.stdout) == (0, template("prune"))
    done = runner.invoke(app, ["config", "distil"])
    assert done.exit_code == 2
    assert "did you mean distill?" in done.stderr


# ---------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", [*STAGES, "run", "plan"])
def test_help_shows_every_setting(command):
    done = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80", "TERM": "dumb"})
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    cls = {"run": CONFIGURATIONS["pipeline"], "plan": CLUSTER}.get(command) or STAGES[command]
    group, shown = "", set()
    for line in done.stdout.splitlines():
        if match := re.match(r"╭─ ([\w.\[\]]+)", line):
            group = "" if match[1] == "Settings" else f"{match[1]}."
        elif match := re.match(r"│  ([\w.\[\]]+)", line):
            shown.add(f"{group}{match[1]}")
    settings = settings_of(cls, prefix="cluster." if command == "plan" else "")
    groups = {setting.name for setting in settings if setting.part is not None}
    named = {setting.name for setting in settings_of(cls, prefix="cluster." if command == "plan" else "")}
    assert named - groups <= shown


def cpu_seconds(arguments: list[str], **environment: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Time of a ``minitron`` of its own on the CPU, which other work on the machine does not change, and its result."""
    start = "import sys; sys.argv[0] = 'minitron'; from nemo_minitron.cli import main; main()"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", start, *arguments], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


def light(done: subprocess.CompletedProcess[str]) -> bool:
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    heavy = {"torch", "numpy", "megatron", "nemo", "nemo_run", "transformers", "lightning"}
    return "nemo_minitron.cli" in imported and not heavy & imported


@pytest.mark.parametrize("arguments", [["distill", "--help"], ["config", "distill"]], ids=" ".join)
def test_help_and_templates_import_nothing_heavy_and_are_quick(arguments):
    seconds, done = cpu_seconds(arguments)
    assert done.returncode == 0
    assert "teacher_placement" in done.stdout
    assert light(done)
    assert seconds < 1.0


# ---------------------------------------------------------------------------------------------------------- completion


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("minitron di", {"distill"}),
        ("minitron config pi", {"pipeline"}),
        ("minitron distill dist", {"distill"}),
        ("minitron distill configs/dist", {"configs/distill.yaml"}),
        ("minitron distill distill intermediate.re", {"intermediate.relation_heads="}),
        ("minitron distill distill steps=3 ste", set()),
        ("minitron run demo out", {"output="}),
        ("minitron run demo --slurm dg", {"dgx"}),
        (
            "minitron run demo stages.distilled.steps=4 stages.distilled.loss.k",
            {"stages.distilled.loss.kind=", "stages.distilled.loss.k="},
        ),
        ("minitron plan distill cluster.mf", {"cluster.mfu="}),
        ("minitron doctor minu", {"minutes="}),
    ],
)
def test_completion(words, offered):
    environment = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_MINITRON_COMPLETE": "complete_bash"}
    seconds, done = cpu_seconds([], **environment)
    assert set(done.stdout.split()) == offered
    assert light(done)
    assert seconds < 1.0


def test_what_the_completion_offers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "mine.txt").write_text("")
    (tmp_path / "more").mkdir()
    assert complete_config("m") == ["mine.yaml", "more/"]
    assert complete_config("none/such/") == []
    assert {"demo", "mine.yaml"} <= set(complete_config(""))
    offered = dict(complete_override("score", "", ["samples=3"]))
    assert "model=" in offered
    assert not {"samples=", "data=", "data.sources[].path="} & offered.keys()
    assert offered["model="] == "checkpoint to score."
    # A file that is no pipeline, and none at all, offer nothing of their stages.
    for text in ("[1]", "stages: 3", "stages: [1, {stage: such}, {name: a}, {stage: [a]}]", "a: [", "\0"):
        (tmp_path / "mine.yaml").write_text(text)
        assert complete_override("run", "stages.", (), "mine.yaml") == []
    assert complete_override("run", "stages.", (), "none.yaml") == []
    (tmp_path / "mine.yaml").write_text("stages: [{stage: report}, {stage: score, name: a}]")
    assert [key for key, _ in complete_override("run", "stages.a.sam", (), "mine.yaml")] == ["stages.a.samples="]


def test_the_completion_can_be_installed():
    done = subprocess.run(
        [sys.executable, "-m", "nemo_minitron", "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "--show-completion" in done.stdout


# ----------------------------------------------------------------------------------------------------------- reference


def test_the_page_of_settings_is_what_the_code_says():
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert text == page(), "make it again: python -m nemo_minitron.config.reference > docs/settings.md"
    for cls in (*CONFIGURATIONS.values(), CLUSTER):
        for setting in settings_of(cls):
            assert re.search(rf"^\| `(cluster\.)?{re.escape(setting.last)}`", text, re.M), setting.name
