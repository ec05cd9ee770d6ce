"""Every block that README and guides show is run as it is written, or stands on a short list with the reason why not.

Shell lines are run in a folder that has what they read (``support.command_world``): what only looks is run as it is,
a stage by its dry run. Python runs page by page in one process (``support.page_world``), with tiny models. Parts of
configurations and records are read by the readers that they are for.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command_world import make_world
from support.extending import install_example
from support.pages import ROOT, Block, pages, read_blocks
from typer.testing import CliRunner

from nemo_minitron.cli.app import app
from nemo_minitron.config import STAGES, load, load_pipeline, load_slurm

BLOCKS = [block for page in pages() for block in read_blocks(page)]
#: A block of one of these languages is nothing to run.
SHOWN = {
    "text": "what a command prints, the files of an output, a formula",
    "mermaid": "a drawing; the browser tests of the site show it",
}
#: Commands that are not run, by how they begin.
NOT_RUN = {
    "docker ": "Docker is not here; tests/unit/test_docker.py reads the files",
    "minitron --install-completion": "it writes into the shell's own files",
    "pip install --no-deps --target build/": "it downloads a release that a benchmark reads",
    "python benchmarks/": "it takes between minutes and an hour; its options are looked up",
    ".ci/run": "it runs all tests",
    "python3.12 tests/gpu/": "for a machine with a GPU",
    "sh tests/gpu/": "for a machine with a GPU",
    "vllm serve ": "it serves until it is stopped; tests/parity/test_vllm.py loads a folder with vLLM",
    "trtllm-serve ": "it needs a GPU",
    "llama-server ": "llama.cpp's programs are not here; benchmarks/serving.py runs its library where that is",
    "llama-cli ": "llama.cpp's programs are not here",
    "curl ": "it asks a server",
    "MINITRON_VLLM_PYTHON=": "it needs an environment with vLLM",
    "CMAKE_ARGS=": "it builds llama.cpp, which takes minutes",
    "minitron chat ": "it waits for input; tests/unit/test_chat.py talks, and its options are looked up",
}
#: Commands whose dry run ends with this refusal, and with no other.
REFUSED = {
    "--slurm": (
        r"is not seen in the container \(container_mounts: /lustre:/lustre\)",
        "the shipped mounts are a site's",
    ),
    "teacher_cache=": (r"logit cache: runs/example/logits does not exist", "the cache of this model takes an hour"),
}
#: The guide whose blocks are the files of packages: ``tests/unit/test_extending_*.py`` install and use them.
EXTENDING = "docs/extending.md"
PACKAGES = ("A logit loss", "An importance estimator", "A checkpoint format")


def shell_lines() -> list[tuple[str, str]]:
    """``(page, command)`` of all shell blocks, each command once."""
    found: dict[str, str] = {}
    for block in BLOCKS:
        if block.language in ("bash", "sh"):
            for line in block.commands:
                found.setdefault(line, block.name)
    return [(name, line) for line, name in found.items()]


def is_minitron(line: str) -> bool:
    return line.startswith("minitron ") and not line.startswith(tuple(NOT_RUN))


def of_packages(page: str) -> bool:
    return page.startswith(f"{EXTENDING}:")


HERE = [(page, line) for page, line in shell_lines() if is_minitron(line) and not of_packages(page)]
#: Files that a command of the pages writes, with that command.
SAVED = {line.split(" --save ")[1].split()[0]: line for _, line in reversed(HERE) if " --save " in line}
PYTHON = [block for block in BLOCKS if block.language == "python" and not block.code.startswith("# ")]
FILES = [block for block in BLOCKS if block.language == "python" and block.code.startswith("# ")]


def of_language(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def named(block: Any) -> str:
    return block.name if isinstance(block, Block) else str(block)[:70]


def test_every_block_is_run_or_on_the_list() -> None:
    others = (
        set(BLOCKS) - set(PYTHON) - set(FILES) - set(of_language("bash", "sh", "yaml", "json", "toml", "diff", *SHOWN))
    )
    assert not others, f"no test runs {sorted(block.name for block in others)}; give the block a language"
    outside = [block.name for block in FILES + of_language("toml", "diff") if block.page != EXTENDING]
    assert outside == [block.name for block in FILES if block.page == "docs/model-families.md"]
    assert not [block.name for block in of_language("text") if re.match(r"minitron \w+ |python |make ", block.code)]
    unknown = [
        (page, line) for page, line in shell_lines() if not line.startswith(("minitron ", "make ", "pytest ", *NOT_RUN))
    ]
    assert not unknown, unknown


def test_the_pages_show_the_main_commands() -> None:
    shown = {line for _, line in shell_lines()}
    assert {"make demo", "make test", "make env"} <= shown


# --- commands


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read."""
    folder = tmp_path_factory.mktemp("reader")
    make_world(folder, ROOT / "configs")
    # a run of its own in runs/demo, for what looks at one
    settings = {
        "name": "demo",
        "output": "runs/demo",
        "stages": [
            {
                "stage": "tokens",
                "name": "tokens",
                "model": "runs/demo/teacher",
                "data": {"sequence_length": 16, "sources": [{"name": "mine", "path": "corpus/*.jsonl"}]},
            }
        ],
    }
    (folder / "tokens.yaml").write_text(yaml.safe_dump(settings))
    done = invoke(folder, "run", "tokens.yaml")
    assert done.exit_code == 0, done.output
    shutil.copytree(folder / "runs/demo/tokens", folder / "runs/demo/distilled", dirs_exist_ok=True)
    return folder


def invoke(folder: Path, *words: str) -> Any:
    """``minitron`` with these words, in this folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        return CliRunner().invoke(app, list(words), env={"COLUMNS": "150"})
    finally:
        os.chdir(before)


def dry(words: list[str]) -> list[str]:
    """The words of a command that computes, as a dry run; those of one that only looks, as they are."""
    if words[0] in (*STAGES, "run") and "--help" not in words and not (words[0] == "doctor" and "--run" not in words):
        return words if "--dry-run" in words else [*words, "--dry-run"]
    return words


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line"), HERE, ids=named)
def test_command(world: Path, page: str, line: str) -> None:
    words = shlex.split(line)[1:]
    if words == ["doctor"]:  # its exit code is the machine's
        assert "What is here" in invoke(world, *words).output
        return
    if words[0] == "run" and not (world / words[1]).exists() and words[1] in SAVED:
        saving = invoke(world, *shlex.split(SAVED[words[1]])[1:])
        assert saving.exit_code == 0, (saving.output, saving.exception)
    if "--save" in words:
        (world / words[words.index("--save") + 1]).unlink(missing_ok=True)
    done = invoke(world, *dry(words))
    output = done.output + done.stderr
    for mark, (message, _) in REFUSED.items():
        if mark in line:
            assert done.exit_code == 2, output
            refusal = output[output.rindex("minitron: ") :]
            assert re.search(message, refusal), output
            assert "faults:" not in refusal, output
            return
    assert done.exit_code == 0, (output, done.exception)


def test_lines_on_the_list_are_still_read() -> None:
    """Of what is not run: the files and targets that it names are there, and a program has the options."""
    for page, line in shell_lines():
        if line.startswith("make "):
            done = subprocess.run(["make", "-n", *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, (page, done.stderr)
        elif line.startswith("minitron chat "):
            known = CliRunner().invoke(app, ["chat", "--help"], env={"COLUMNS": "150"}).output
            assert all(word in known for word in shlex.split(line) if word.startswith("--")), (page, line)
        elif line.startswith(("python", "docker build", "sh ", ".ci/")):
            words = shlex.split(line)
            (file,) = [word for word in words if re.search(r"\.(py|sh|Dockerfile)$|^\.ci/", word)]
            assert (ROOT / file).is_file(), (page, line)
            if file.startswith("benchmarks/"):
                text = (ROOT / file).read_text()
                assert all(f'"{word}"' in text for word in words if word.startswith("--")), (page, line)


# --- Python


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of each Python block of the pages, by its name: nothing, or what it raised."""
    folder = tmp_path_factory.mktemp("python") / "reader"
    # NeMo's own training first: nothing has switched the CPU layer on before the page's code does
    order = sorted({block.page for block in PYTHON}, key=lambda page: (page != "docs/nemo-plugin.md", page))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "NEMORUN_HOME": str(folder.parent / "nemo_run"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "support.page_world", str(folder), *order],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert (folder / "results.json").is_file(), done.stdout[-2000:] + done.stderr[-4000:]
    results: dict[str, str] = json.loads((folder / "results.json").read_text())
    return results


@pytest.mark.slow
@pytest.mark.parametrize("block", PYTHON, ids=named)
def test_python_runs_as_it_is_written(outcomes: dict[str, str], block: Block) -> None:
    assert outcomes[block.name] == "", outcomes[block.name]


def test_what_a_guide_quotes_of_a_file_stands_there() -> None:
    quoted = [block for block in FILES if block.page != EXTENDING]
    assert quoted
    for block in quoted:
        file = block.code.split("\n", 1)[0].removeprefix("# ")
        there = [ast.dump(node) for node in ast.parse((ROOT / file).read_text()).body]
        for node in ast.parse(block.code).body:
            assert ast.dump(node) in there, f"{block.name}: {ast.unparse(node)[:80]} is not in {file}"


# --- the guide with packages: tests/unit/test_extending_*.py use them


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.page == EXTENDING], ids=named)
def test_files_of_packages_are_read(block: Block) -> None:
    if block.language == "python":
        compile(block.code, block.name, "exec")
    elif block.language == "toml":
        assert tomllib.loads(block.code)["project"]["entry-points"]
    elif block.language == "yaml":
        assert yaml.safe_load(block.code)["stages"]
    elif block.language == "diff":
        assert block.code.startswith("--- a/")
    else:
        assert block.language == "sh"


WITH_PACKAGES = """
import json, sys
from typer.testing import CliRunner
from nemo_minitron.cli.app import app
for words in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (words, done.output, done.stderr)
print("all")
"""


@pytest.mark.slow
def test_commands_with_packages(world: Path, tmp_path: Path) -> None:
    for number, section in enumerate(PACKAGES):
        install_example(section, tmp_path / str(number))
    lines = [shlex.split(line)[1:] for page, line in shell_lines() if of_packages(page)]
    assert len(lines) > 4
    path = os.pathsep.join(str(tmp_path / str(number)) for number in range(len(PACKAGES)))
    done = subprocess.run(
        [sys.executable, "-c", WITH_PACKAGES, json.dumps([dry(words) for words in lines])],
        cwd=world, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "all", done.stderr[-3000:]


# --- settings and records


@pytest.mark.parametrize("block", [b for b in of_language("yaml") if b.page != EXTENDING], ids=named)
def test_settings_are_those_of_their_stage(block: Block, tmp_path: Path) -> None:
    part = yaml.safe_load(block.code)
    if block.settings_of == "slurm":
        shipped: dict[str, Any] = yaml.safe_load((ROOT / "configs/slurm/dgx.yaml").read_text())
        read: Callable[[Path], Any] = load_slurm
    elif block.settings_of == "pipeline":
        text = {"sources": [{"name": "mine", "path": "corpus/*.jsonl"}]}
        shipped = {"output": str(tmp_path), "defaults": {"data": text}}
        read = lambda path: load_pipeline(path)[0]  # noqa: E731
    else:
        assert block.settings_of in STAGES, f"{block.name}: say whose settings it has, in a comment before it"
        shipped = yaml.safe_load((ROOT / f"configs/{block.settings_of}.yaml").read_text())
        read = lambda path: load(str(block.settings_of), path)  # noqa: E731
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(shipped | part))
    config = read(tmp_path / "settings.yaml")
    assert all(hasattr(config, name) for name in part)


@pytest.mark.parametrize("block", of_language("json"), ids=named)
def test_records_are_read(block: Block, tmp_path: Path) -> None:
    from nemo_minitron.config import TaskConfig
    from nemo_minitron.data.chat.conversations import read_chats
    from nemo_minitron.data.chat.preferences import read_preferences
    from nemo_minitron.data.tasks import read_task

    file = tmp_path / "records.jsonl"
    file.write_text(block.code)
    readers: dict[str, Callable[[], Any]] = {
        "records: chats": lambda: read_chats(file),
        "records: preferences": lambda: read_preferences(file),
        "records: tasks": lambda: read_task(TaskConfig(path=str(file)), cache_dir=tmp_path, seed=0),
    }
    assert block.note in readers, f"{block.name}: say what the records are, in a comment before it"
    assert len(readers[block.note]()) == len(block.code.splitlines())


def test_help_shows_every_stage() -> None:
    done = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "150"})
    for stage in [*STAGES, "init", "run", "plan", "chat"]:
        assert stage in done.output
