"""The recipe of nemo_run: data that can be changed, shipped and run."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fiddle as fdl
import nemo_run as run
import pytest
from nemo_minitron.recipes.distillation import distillation_recipe
from rich.console import Console
from support.checkpoints import tiny_checkpoint

from nemo_minitron.cli.dry_run import show_plans
from nemo_minitron.config import DistillConfig, ParallelLayout, TeacherConfig
from nemo_minitron.errors import ConfigError


def tiny(folder: Path, **changes: object) -> run.Partial:
    settings: dict = {
        "num_nodes": 1, "devices": 2, "pipeline": 2, "sequence_length": 16, "steps": 4, "global_batch_size": 2,
        "precision": "32",
    }  # fmt: skip
    recipe = distillation_recipe(
        str(folder / "student"), str(folder / "teacher"), str(folder / "text.jsonl"), str(folder / "out"),
        **{**settings, **changes},
    )  # fmt: skip
    recipe.data.cache_dir = str(folder / "cache")
    recipe.data.held_out_fraction = 0.2
    recipe.schedule.validate_every = 2
    recipe.schedule.validation_batches = 1
    return recipe


def test_a_recipe_shares_its_processes_out():
    recipe = distillation_recipe("s", "t", "x.jsonl", "o", num_nodes=4, devices=8, tensor=4, pipeline=2)
    assert (recipe.parallel.tensor, recipe.parallel.pipeline, recipe.parallel.data) == (4, 2, 4)
    long = distillation_recipe("s", "t", "x.jsonl", "o", num_nodes=4, devices=8, tensor=4, context=4)
    assert (long.parallel.context, long.parallel.data) == (4, 2)
    with pytest.raises(ConfigError, match=r"num_nodes \* devices = 6: is not a multiple of tensor .* context = 4"):
        distillation_recipe("s", "t", "x.jsonl", "o", devices=6, tensor=4)


def test_a_recipe_is_shipped_as_text(tmp_path):
    """As nemo_run sends it to a cluster, and as a user reads it."""
    from nemo_run.core.serialization.yaml import YamlSerializer
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    recipe = tiny(tmp_path)
    recipe.loss.kind, recipe.loss.k = "top_k", 8
    recipe.schedule.lr = 3e-4
    shipped = ZlibJSONSerializer()
    back = shipped.deserialize(shipped.serialize(recipe))
    assert back == recipe
    assert fdl.build(back).keywords["loss"].k == 8
    text = YamlSerializer().serialize(recipe)
    assert "_target_: nemo_minitron.recipes.distillation.distill" in text
    assert "kind: top_k" in text


def test_every_fault_of_a_recipe_is_named(tmp_path, monkeypatch):
    from nemo_minitron.jobs import worker

    monkeypatch.setattr(worker, "set_up", lambda config: pytest.fail("it must not start"))
    recipe = tiny(tmp_path)
    recipe.schedule.min_lr, recipe.loss.temperature, recipe.data.sequence_length = 1.0, 0.0, "many"
    with pytest.raises(ConfigError) as error:
        fdl.build(recipe)()
    assert str(error.value).startswith("distill: ")
    assert "sequence_length" in str(error.value)
    recipe.data.sequence_length = 16
    with pytest.raises(ConfigError) as error:
        fdl.build(recipe)()
    assert sorted(error.value.faults) == ["loss.temperature=0.0: must be above 0", "min_lr=1.0: lies above lr=0.0001"]


def models_and_text(folder: Path) -> None:
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 16}
    tiny_checkpoint(folder / "teacher", num_hidden_layers=3, seed=1, **sizes)
    tiny_checkpoint(folder / "student", num_hidden_layers=2, seed=2, **sizes)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    texts = [" ".join(words[(i * j) % 10] for j in range(1, 30)) + f" {i}" for i in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def answers(recipe: run.Partial) -> None:
    recipe.on_policy.share, recipe.on_policy.template = 0.5, "none"
    recipe.on_policy.prompts.texts, recipe.on_policy.sampling.max_new_tokens = ["one two"], 4


def teachers(recipe: run.Partial) -> None:
    path, recipe.teacher = recipe.teacher, None
    recipe.teachers = [
        run.Config(TeacherConfig, name="large", model=path, weight=3.0),
        run.Config(TeacherConfig, name="small", model=recipe.student, placement="own_layout",
                   parallel=run.Config(ParallelLayout, tensor=2)),
    ]  # fmt: skip


def chunks(recipe: run.Partial) -> None:
    recipe.schedule.logits = "chunks"


def rounded(recipe: run.Partial) -> None:
    recipe.quantize, recipe.group_size = "int4", 8


SETTINGS: dict[Callable[[run.Partial], None], dict[str, object]] = {
    answers: {"on_policy.share": 0.5, "on_policy.prompts.texts": ["one two"], "on_policy.sampling.max_new_tokens": 4},
    teachers: {"teacher": None, "teachers.0.weight": 3.0, "teachers.1.parallel.tensor": 2},
    chunks: {"logits": "chunks"},
    rounded: {"quantize": "int4", "group_size": 8},
}


def value_of(config: object, path: str) -> object:
    for name in path.split("."):
        config = config[int(name)] if isinstance(config, list) else getattr(config, name)
    return config


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    models_and_text(folder)
    return folder


@pytest.mark.parametrize("change", SETTINGS, ids=lambda change: change.__name__)
def test_further_settings_reach_the_stage(change, models, monkeypatch):
    """Through the text that is shipped; and the stage's dry run has no fault."""
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    from nemo_minitron.jobs import in_place

    started: list[DistillConfig] = []
    monkeypatch.setattr(in_place, "run_in_place", lambda config: started.append(in_place.checked(config)))
    recipe = tiny(models)
    change(recipe)
    shipped = ZlibJSONSerializer()
    fdl.build(shipped.deserialize(shipped.serialize(recipe)))()
    (config,) = started
    assert {path: value_of(config, path) for path in SETTINGS[change]} == SETTINGS[change]
    out = io.StringIO()
    show_plans(started, Console(file=out, width=120), "recipe")
    assert "distill" in out.getvalue()


@pytest.mark.slow
def test_a_recipe_runs_under_a_local_executor(tmp_path):
    """Two processes, a pipeline stage each, and one of the teacher's; through nemo_run's own torchrun launcher."""
    models_and_text(tmp_path)
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    recipe = tiny(tmp_path)
    recipe.teacher_placement, recipe.teacher_parallel = "own_ranks", run.Config(ParallelLayout)
    (tmp_path / "recipe").write_text(ZlibJSONSerializer().serialize(recipe))
    code = (
        "import sys, nemo_run as run\n"
        "from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer\n"
        "recipe = ZlibJSONSerializer().deserialize(open('recipe').read())\n"
        "executor = run.LocalExecutor(ntasks_per_node=3, launcher='torchrun', env_vars={'OMP_NUM_THREADS': '1'})\n"
        "run.run(recipe, executor=executor, name='distillation')\n"
    )
    # nemo_run looks for torchrun there
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**os.environ, "NEMORUN_HOME": str(tmp_path / "nemo_run"), "PATH": path},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert (tmp_path / "out/record.json").is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "out/record.json").read_text())
    assert record["metrics"]["steps"] == 4
    assert {"last_kl", "last_validation_kl", "last_validation_lm_loss"} <= set(record["metrics"])
    from nemo_minitron.checkpoints import open_checkpoint

    assert open_checkpoint(tmp_path / "out/model").shape.num_layers == 2
    assert next((tmp_path / "out/best").iterdir()).name.startswith("step=")
