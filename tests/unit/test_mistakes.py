"""What a new user gets wrong: each mistake ends with exit code 2 and a few lines with its value, place and remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from nemo_minitron.cli.app import app
from nemo_minitron.config import STAGES, ClusterConfig, PipelineConfig, load
from nemo_minitron.config.aliases import ALIASES, NOTES
from nemo_minitron.config.describe import settings_of
from nemo_minitron.config.spelling import instead_of
from nemo_minitron.errors import ConfigError

DATA: dict[str, Any] = {"sources": [{"name": "a", "path": "a.txt"}]}
FILES: dict[str, Any] = {
    "score.yaml": {"model": "m", "output": "o", "data": DATA},
    "prune.yaml": {"model": "m", "output": "o", "method": "random", "target": {"num_layers": 2}},
    "distill.yaml": {"student": "s", "teacher": "t", "output": "o", "data": DATA},
    "sft.yaml": {"model": "m", "output": "o", "data": {"path": "c.jsonl"}},
    "search.yaml": {
        "model": "m", "scores": "s", "output": "o", "data": DATA, "space": {"num_layers": {"min": 1}},
        "budget": {"share": 0.5},
    },
    "export.yaml": {"model": "m", "output": "o"},
    "evaluate.yaml": {"models": {"a": "m"}, "output": "o", "data": DATA},
    "run.yaml": {
        "output": "r", "defaults": {"data": DATA},
        "stages": [{"stage": "score", "model": "m"}, {"stage": "prune", "model": "m", "scores": "${output}/score",
                   "target": {"num_layers": 2}}],
    },
    "slurm.yaml": {"partition": "p", "account": "a"},
}  # fmt: skip

#: The words of a command, and what its message must say: the value and its place, and the remedy.
MISTAKES: list[tuple[str, list[str]]] = [
    # something else in the place of the configuration
    ("score my/model", ["my/model: no such file", "minitron score score model=my/model"]),
    ("distill my/model", ["minitron distill distill student=my/model"]),
    ("import meta-llama/Llama-3.1-8B", ["minitron import import source=meta-llama/Llama-3.1-8B"]),
    ("import weights.gguf", ["weights.gguf: is no YAML file", "minitron import import source=weights.gguf"]),
    ("evaluate my/model", ["minitron evaluate evaluate models.NAME=my/model"]),
    ("score folder", ["folder: is a directory", "minitron score score model=folder"]),
    ("score model=m", ["model=m: is a setting", "minitron score score model=m"]),
    ("run output=x", ["output=x: is a setting", "minitron run FILE output=x"]),
    ("score scor", ["scor: no such file", "did you mean score?"]),
    ("score scores.yaml", ["scores.yaml: no such file", "did you mean score?"]),
    ("run dem", ["dem: no such file", "did you mean demo?"]),
    ("run nothing.yaml", ["nothing.yaml: no such file", "shipped configurations: demo, "]),
    ("report nodir", ["nodir: no such directory", "the output of `minitron run`"]),
    ("report folder nodir", ["nodir: no such directory, to compare with"]),
    ("report nothing.yaml", ["nothing.yaml: no such file"]),
    ("status nodir", ["nodir"]),
    ("plan nothing", ["nothing: is neither a recipe nor a file", "shipped recipes: llama"]),
    ("plan smolm2-demo", ["did you mean smollm2-demo?"]),
    ("plan smollm2-demo gpus=4", ["gpus=4", "did you mean cluster.gpus=4?"]),
    ("plan smollm2-demo cluster.gpuz=4", ["gpuz", "did you mean gpu?"]),
    ("config scor", ["scor: is no stage", "did you mean score?"]),
    # files of another kind
    ("prune run.yaml", ["run.yaml: is a pipeline", "minitron run run.yaml"]),
    ("distill demo", ["demo: is a pipeline", "minitron run demo"]),
    ("run prune.yaml", ["prune.yaml: is a configuration of prune", "minitron prune prune.yaml"]),
    ("run score", ["score: is a configuration of score", "minitron score score"]),
    ("prune distill.yaml", ["distill.yaml: is a configuration of distill", "minitron distill distill.yaml"]),
    ("run slurm.yaml", ["slurm.yaml: has the settings of a Slurm cluster", "minitron run PIPELINE --slurm slurm.yaml"]),
    ("run run.yaml --slurm run.yaml", ["run.yaml: is a pipeline", "minitron run run.yaml"]),
    ("run run.yaml --slurm dgxx", ["dgxx: no such file", "bare, dgx"]),
    # names of the field
    ("prune prune.yaml hidden_dim=64", ["hidden_dim", "did you mean target.hidden_size?"]),
    ("prune prune.yaml target.n_layers=2", ["target.n_layers", "did you mean target.num_layers?"]),
    ("prune prune.yaml num_hidden_layers=2", ["num_hidden_layers", "did you mean target.num_layers?"]),
    ("prune prune.yaml intermediate_size=2", ["intermediate_size", "did you mean target.ffn_hidden_size?"]),
    ("prune prune.yaml num_key_value_heads=2", ["did you mean target.num_query_groups?"]),
    ("prune prune.yaml tensor_parallel=2", ["tensor_parallel", "did you mean student_layout.tensor?"]),
    ("prune prune.yaml sparsity=0.5", ["sparsity", "did you mean target?", "budget.share"]),
    ("search search.yaml n_layers=2", ["n_layers", "did you mean space.num_layers?"]),
    ("distill distill.yaml tp=2", ["tp", "did you mean parallel.tensor?"]),
    ("distill distill.yaml pipeline_model_parallel_size=2", ["did you mean parallel.pipeline?"]),
    ("distill distill.yaml parallel.tp=2", ["parallel.tp", "did you mean parallel.tensor?"]),
    ("distill distill.yaml num_gpus=8", ["num_gpus", "did you mean parallel?", "processes are started"]),
    ("distill distill.yaml learning_rate=1e-4", ["learning_rate", "did you mean lr?"]),
    ("distill distill.yaml batch_size=8", ["batch_size", "did you mean global_batch_size?"]),
    ("distill distill.yaml per_device_train_batch_size=8", ["did you mean micro_batch_size?"]),
    ("distill distill.yaml max_steps=8", ["max_steps", "did you mean steps?"]),
    ("distill distill.yaml epochs=3", ["epochs", "did you mean steps?", "counts optimizer steps"]),
    ("sft sft.yaml num_train_epochs=3", ["num_train_epochs", "did you mean epochs?"]),
    ("distill distill.yaml seq_length=8", ["seq_length", "did you mean data.sequence_length?"]),
    ("sft sft.yaml max_seq_length=8", ["max_seq_length", "did you mean data.max_length?"]),
    ("distill distill.yaml bf16=true", ["bf16", "did you mean precision?", "bf16-mixed"]),
    ("distill distill.yaml temperature=2", ["temperature", "did you mean loss.temperature?"]),
    ("distill distill.yaml device=cpu", ["device", "did you mean runtime.device?"]),
    ("distill distill.yaml model=m", ["model", "did you mean student?"]),
    ("distill distill.yaml output_dir=o", ["output_dir", "did you mean output?"]),
    ("score score.yaml batch_size=8", ["batch_size", "did you mean micro_batch_size?"]),
    ("score score.yaml num_samples=8", ["num_samples", "did you mean samples?"]),
    ("score score.yaml target.num_layers=8", ["target", "it is a setting of prune, iterate"]),
    ("prune prune.yaml lr=1e-3", ["lr", "it is a setting of correct, distill, sft, dpo"]),
    ("export export.yaml format=hf", ["format", "did you mean formats?"]),
    ("evaluate evaluate.yaml model=m", ["model", "did you mean models?"]),
    ("run run.yaml runtime.seed=3", ["runtime", "below defaults"]),
    ("run run.yaml steps=3", ["steps", "below defaults"]),
    ("run run.yaml defaults.lr=3", ["defaults.lr", "it is one of correct, distill"]),
    ("run run.yaml stages.prune.hidden_size=3", ["stage prune: hidden_size", "did you mean target.hidden_size?"]),
    ("run run.yaml stages.prun.method=random", ["no stage is called prun", "did you mean prune?"]),
    # values
    ("score score.yaml samples=many", ["samples=many", "must be a whole number"]),
    ("score score.yaml samples=0", ["samples=0", "must be above 0"]),
    ("score score.yaml runtime.device=gpu", ["runtime.device=gpu", "must be one of auto, cpu, cuda"]),
    ("distill distill.yaml precision=bf16", ["precision=bf16", "bf16-mixed"]),
    ("distill distill.yaml loss.kind=kl", ["loss.kind=kl", "must be one of forward_kl"]),
    ("distill distill.yaml warmup_steps=400", ["warmup_steps=400", "steps=300", "leave it out"]),
    ("distill distill.yaml teacher=null", ["teacher: none is given", "teacher_cache"]),
    ("distill distill.yaml global_batch_size=3 parallel.data=2", ["global_batch_size=3", "= 2"]),
    ("search search.yaml method=acitvation", ["method=acitvation", "must be one of"]),
    ("search search.yaml depth.criterion=loss", ["depth_scores", "`minitron depth`"]),
    ("prune prune.yaml target=3", ["target=3", "must be a mapping"]),
    ("prune prune.yaml method=activation target.hidden_size=8", ["scores", "`minitron score`"]),
    ("score score.yaml nonsense", ["'nonsense'", "must have the form key=value"]),
    ("score score.yaml --samples", ["--samples"]),
    # before anything runs
    ("score score.yaml model=org/name --dry-run", ["org/name", "huggingface-cli download org/name"]),
    ("tokens tokens model=org/name --dry-run", ["org/name", "downloads nothing", "huggingface-cli download org/name"]),
    ("score score.yaml data.sources[0].path=org/text --dry-run", ["org/text", "dataset: org/text"]),
    ("prune prune.yaml format=hf output=o.nemo --dry-run", ["output=o.nemo", "does not end in .nemo"]),
    ("prune prune.yaml target=r/search --dry-run", ["r/search/search.json does not exist"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    for name, content in FILES.items():
        (folder / name).write_text(yaml.safe_dump(content))
    (folder / "folder").mkdir()
    (folder / "m").mkdir()
    (folder / "a.txt").write_text("text")
    (folder / "weights.gguf").write_bytes(b"GGUF\xff")
    return folder


@pytest.mark.parametrize(("words", "parts"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_named_once_with_its_remedy(
    words: str, parts: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HOME", str(folder / "hub"))
    monkeypatch.setenv("COLUMNS", "200")
    before = sorted(folder.rglob("*"))
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    message = done.stderr
    for part in parts:
        assert part in message, message
    lines = message.strip().splitlines()
    assert len(lines) <= 9, message  # a frame of typer's own has most
    assert max(len(line) for line in lines) < 700
    assert "Traceback" not in message
    faults = [line.strip().removeprefix("- ") for line in lines]
    assert len(faults) == len(set(faults))
    shown = " ".join(done.stdout.split())
    assert not [fault for fault in faults if fault.rpartition(": ")[2] in shown]  # the tables of a dry run
    if lines[0].startswith("minitron:"):
        assert len(lines) <= 5, message
        assert "shipped configurations: cache" not in message
    assert sorted(folder.rglob("*")) == before


def test_there_are_as_many_as_it_takes() -> None:
    assert len(MISTAKES) >= 40


def bad_values(stage: str) -> Iterator[str]:
    """A value that is wrong, for each setting of a stage that takes no text of any kind."""
    for setting in settings_of(STAGES[stage]):
        if setting.part is None and "[]" not in setting.name:
            if "number" in setting.type and not setting.type.startswith("list"):
                yield f"{setting.name}=-3"
            elif setting.type.startswith("true"):
                yield f"{setting.name}=maybe"
            elif setting.last in ("method", "format", "precision", "kind", "criterion", "form", "loss", "dtype"):
                yield f"{setting.name}=nonsense"


@pytest.mark.slow
@pytest.mark.parametrize("stage", sorted(STAGES.keys() - {"doctor"}))
def test_no_value_is_refused_twice(stage: str) -> None:
    """A wrong value has one line, whatever looks at it: its group, the stage, or a stage that the stage starts."""
    for bad in bad_values(stage):
        faults: list[str] = []
        try:
            load(stage, stage, [bad])
        except ConfigError as error:
            faults = error.faults
        own = [
            fault for fault in faults if bad in fault.partition(": must")[0].partition(": is")[0].partition(": lab")[0]
        ]
        assert len(own) <= 1, (bad, faults)
        assert all(fault.startswith("override: ") for fault in own), (bad, faults)


def test_every_name_of_the_field_leads_to_a_setting() -> None:
    """No alias is of a setting that exists nowhere, and none hides a setting's own name in its stage."""
    settings = [{setting.name for setting in settings_of(cls)} for cls in STAGES.values()]
    for ends in ALIASES.values():
        for end in ends:
            assert any(name == end or name.endswith(f".{end}") for names in settings for name in names), end
    for name, end in NOTES:
        names, ends = next((names, ends) for names, ends in ALIASES.items() if name in names)
        assert end in ends, (name, names)
    every = [name for names in ALIASES for name in names]
    assert len(every) == len(set(every)), sorted({name for name in every if every.count(name) > 1})


def test_hints_of_nothing_near() -> None:
    assert instead_of(ClusterConfig, ["qqq"]).startswith("; settings: gpu, ")
    assert instead_of(STAGES["distill"], ["qqq"]) == "; `minitron config distill` prints all settings"
    assert instead_of(STAGES["distill"], ["hiddenSize"]) == "; it is a setting of prune, iterate as target.hidden_size"
    assert instead_of(STAGES["distill"], ["Learning-Rate"]) == "; did you mean lr?"
    assert instead_of(PipelineConfig, ["qqq"]) == "; settings: name, output, vars, defaults, stages"
