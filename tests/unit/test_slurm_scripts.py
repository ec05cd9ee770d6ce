"""What stages ask Slurm for, and what is refused, or warned of, before anything is submitted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.checkpoints import tiny_checkpoint

from nemo_minitron.cli.plan import write_pipeline
from nemo_minitron.cli.time_limits import time_warnings
from nemo_minitron.config import SlurmConfig, load, load_pipeline, load_slurm
from nemo_minitron.config.paths import absolute, paths_of
from nemo_minitron.config.slurm import CpuConfig, seconds_of
from nemo_minitron.errors import ConfigError, PreemptedError
from nemo_minitron.jobs.results import failure, save_result
from nemo_minitron.jobs.slurm_checks import input_faults, mount_faults
from nemo_minitron.jobs.slurm_submit import _SRUN, jobs_of
from nemo_minitron.planning import load_recipe, recipe_names

PIPELINE = """
output: runs/tiny
defaults:
  data: {sources: [{name: text, path: text.jsonl}], sequence_length: 16}
stages:
  - {stage: import, name: teacher, source: hf}
  - {stage: score, name: scores, model: "${output}/teacher", parallel: {tensor: 2}}
  - {stage: score, name: magnitudes, model: "${output}/teacher", estimator: magnitude}
  - {stage: prune, name: pruned, model: "${output}/teacher", scores: "${output}/scores", target: {ffn_hidden_size: 48}}
  - {stage: search, name: searched, model: "${output}/teacher", scores: "${output}/scores", budget: {share: 0.5},
     space: {ffn_hidden_size: {min: 8}}, parallel: {tensor: 4}}
  - {stage: distill, name: distilled, student: "${output}/pruned", teacher: "${output}/teacher",
     parallel: {tensor: 8, data: 2}}
  - {stage: export, model: "${output}/distilled/model"}
  - {stage: report}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    return tmp_path


def stages(*overrides: str) -> list[Any]:
    return [absolute(config) for config in load_pipeline("pipeline.yaml", overrides)[1]]


def requests(slurm: SlurmConfig, *overrides: str) -> dict[str, tuple[Any, ...]]:
    found = {config.name: slurm.request(config) for config in stages(*overrides)}
    return {name: (r.partition, r.nodes, r.tasks, r.gpus, r.exclusive) for name, r in found.items()}


# ------------------------------------------------------------------------------------------------------------ requests


def test_a_stage_without_work_for_a_gpu_leaves_the_node_to_others(here: Path) -> None:
    found = requests(load_slurm("dgx"))
    shared = ("batch", 1, 1, 1, False)
    assert found == {
        "teacher": shared, "scores": ("batch", 1, 2, 8, True), "magnitudes": shared, "pruned": shared,
        "searched": shared, "distilled": ("batch", 2, 8, 8, True), "export": shared, "report": shared,
    }  # fmt: skip
    found = requests(load_slurm("dgx", ["exclusive=false"]))
    assert found["scores"] == ("batch", 1, 2, 2, False)
    assert found["searched"] == shared


def test_a_cpu_partition_takes_such_stages(here: Path) -> None:
    cpu = "cpu={partition: cpu, mem: 64G, cpus_per_task: 16, time: '00:30:00', qos: low, extra: {comment: c}}"
    slurm = load_slurm("dgx", [cpu, "mem=1000G", "constraint=h100", "extra={reservation: gpus}"])
    found = requests(slurm)
    assert {name for name, request in found.items() if request == ("cpu", 1, 1, None, False)} == {
        "teacher", "magnitudes", "pruned", "searched", "export", "report",
    }  # fmt: skip
    teacher, scores = (slurm.request(config) for config in stages()[:2])
    assert (teacher.account, teacher.mem, teacher.cpus_per_task, teacher.time) == ("my_account", "64G", 16, "00:30:00")
    assert (teacher.qos, teacher.constraint, teacher.extra) == ("low", None, {"comment": "c"})
    assert (scores.mem, scores.constraint, scores.time) == ("1000G", "h100", "04:00:00")
    assert scores.extra == {"reservation": "gpus"}
    insists = requests(slurm, "stages.teacher.runtime={device: cuda}", "stages.scores.runtime={device: cpu}")
    assert insists["teacher"] == ("batch", 1, 1, 8, True), "the device that is insisted on"
    assert insists["scores"] == ("cpu", 1, 2, None, False)
    with pytest.raises(ConfigError, match="cpu.partition: must be given where anything of a CPU partition is"):
        load_slurm("dgx", ["cpu={mem: 64G}"])
    with pytest.raises(ConfigError, match=r"cpu.time=soon: must be \[D-\]HH:MM:SS"):
        load_slurm("dgx", ["cpu={partition: cpu, time: soon}"])


def test_nodes_without_gpus_are_as_they_were(here: Path) -> None:
    found = requests(load_slurm("bare", ["tasks_per_node=4"]), "stages.distilled.parallel={tensor: 4, data: 2}")
    assert found["teacher"] == (None, 1, 1, None, False)
    assert found["distilled"] == (None, 2, 4, None, False)
    slurm = load_slurm("bare", ["tasks_per_node=4", "cpus_per_task=2"])
    steered = [steerlm(tensor) for tensor in (1, 4)]
    assert [slurm.request(config).cpus_per_task for config in steered] == [2, 8], "with those that it starts"
    with pytest.raises(ConfigError, match="stage steered: it starts 4 processes by itself, all on the one node"):
        jobs_of(steered[1:], load_slurm("bare"), overwrite=False)


# ------------------------------------------------------------------------------------------- stages of several jobs


SEARCH = (
    "stages.searched.best=2", "stages.searched.reconstruct_samples=20", "stages.searched.parallel={tensor: 1, data: 4}"
)  # fmt: skip


def test_a_search_is_a_job_for_each_stage_of_each_candidate(here: Path) -> None:
    """Each with the resources that its stage states, on as many nodes as that takes, beside the other candidates."""
    slurm = load_slurm(
        "bare", ["cpu={partition: cpu}", "stage_time={distill: '02:00:00', searched.ranking: '03:00:00'}"]
    )
    config = stages(*SEARCH)[4]
    jobs = jobs_of([config], slurm, overwrite=False)
    graph = {job.name: job.after for job in jobs}
    assert graph == {
        "searched.ranking": (),
        **{
            f"searched.{number}.{name}": (f"searched.{before}",)
            for number in (1, 2)
            for name, before in (
                ("student", "ranking"), ("reconstructed", f"{number}.student"),
                ("distilled", f"{number}.reconstructed"), ("measured", f"{number}.distilled"),
            )
        },
        "searched": ("searched.1.measured", "searched.2.measured"),
    }  # fmt: skip
    found = {job.part.name: slurm.request(config, job.part) for job in jobs}
    assert {name: (r.partition, r.nodes, r.tasks, r.time) for name, r in found.items() if not name.startswith("2")} == {
        "ranking": (None, 2, 2, "03:00:00"), "1.student": ("cpu", 1, 1, "01:00:00"),
        "1.reconstructed": (None, 2, 2, "01:00:00"), "1.distilled": (None, 2, 2, "02:00:00"),
        "1.measured": (None, 2, 2, "01:00:00"), "": ("cpu", 1, 1, "01:00:00"),
    }  # fmt: skip
    assert {job.folder.relative_to(here).as_posix() for job in jobs[:2]} == {
        "runs/tiny/logs/searched/jobs/ranking", "runs/tiny/logs/searched/jobs/1.student",
    }  # fmt: skip
    assert [job.overwrite for job in jobs_of([config], slurm, overwrite=True)] == [True] + [False] * 9
    of_all = load_slurm("bare", ["stage_time={searched: '09:00:00', distill: '02:00:00'}"])
    assert {of_all.request(config, job.part).time for job in jobs} == {"09:00:00"}, "a name goes before a kind"

    timed = stages(*SEARCH, "stages.searched.parallel={}", "stages.searched.budget={latency_ms: 5}",
                   "stages.searched.best=0", "stages.searched.reconstruct_samples=0")[4]  # fmt: skip
    assert {job.name: job.after for job in jobs_of([timed], slurm, overwrite=False)} == {
        "searched.latency": (), "searched.ranking": ("searched.latency",), "searched": ("searched.ranking",),
    }  # fmt: skip


def test_an_iteration_is_a_job_for_each_round(here: Path) -> None:
    content = yaml.safe_load(PIPELINE)
    content["stages"][3] = {
        "stage": "iterate", "name": "pruned", "model": "${output}/teacher", "rounds": 3,
        "target": {"ffn_hidden_size": 48}, "parallel": {"tensor": 4},
    }  # fmt: skip
    Path("pipeline.yaml").write_text(yaml.safe_dump(content))
    found = jobs_of(stages()[:4], load_slurm("bare"), overwrite=False)
    assert {job.name: job.after for job in found[3:]} == {
        "pruned.round-1": ("teacher",), "pruned.round-2": ("pruned.round-1",), "pruned": ("pruned.round-2",),
    }  # fmt: skip
    assert {load_slurm("bare").request(job.config, job.part).nodes for job in found[3:]} == {2}
    single = stages("stages.pruned.rounds=1")[3]
    assert [job.name for job in jobs_of([single], load_slurm("bare"), overwrite=False)] == ["pruned"]


def test_faults_of_stages_of_several_jobs(here: Path) -> None:
    slurm = load_slurm("bare", ["stage_time={searched.1.distil: '01:00:00'}"])
    with pytest.raises(ConfigError, match=r"stage_time.searched.1.distil: no stage is called so"):
        jobs_of(stages(), slurm, overwrite=False)
    uneven = stages("stages.searched.parallel={tensor: 3}")[4:5]
    with pytest.raises(ConfigError, match="stage searched: its 3 processes do not fill nodes of 2") as raised:
        jobs_of(uneven, load_slurm("bare"), overwrite=False)
    assert str(raised.value).count("searched") == 1
    twice = stages("stages.teacher.name=searched.ranking")
    with pytest.raises(ConfigError, match=r"stage searched.ranking: another stage has a job of that name"):
        jobs_of([twice[0], twice[4]], load_slurm("bare"), overwrite=False)


def steerlm(tensor: int) -> Any:
    """A stage that starts others on its own node."""
    settings = {"name": "steered", "output": "steered", "model": "m", "data": {"path": "a.jsonl"}}
    settings |= {"parallel": {"tensor": tensor}}
    Path("steerlm.yaml").write_text(yaml.safe_dump(settings))
    return absolute(load("steerlm", "steerlm.yaml"))


# --------------------------------------------------------------------------------------------------------- time limits


def test_a_time_limit_is_by_name_or_by_kind(here: Path) -> None:
    slurm = load_slurm("dgx", ["stage_time={distill: '1-00:00:00', scores: '00:10:00', score: '00:20:00'}"])
    times = {config.name: slurm.request(config).time for config in stages()}
    assert times["distilled"] == "1-00:00:00"
    assert times["scores"] == "00:10:00", "a name goes before a kind"
    assert times["magnitudes"] == "00:20:00"
    assert times["teacher"] == "04:00:00"
    only = stages()[:2]
    assert [job.config.name for job in jobs_of(only, load_slurm("dgx"), overwrite=False)] == ["teacher", "scores"]
    with pytest.raises(ConfigError, match="stage_time.disill: no stage is called so, nor a kind .*; did you mean"):
        jobs_of(only, load_slurm("bare", ["stage_time={disill: '00:10:00'}"]), overwrite=False)


@pytest.mark.parametrize(("time", "seconds"), [("00:00:01", 1), ("04:30:00", 16200), ("1-02:00:00", 93600)])
def test_times(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


def test_a_limit_below_the_estimate_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, found = load_pipeline(write_pipeline("llama-31-minitron-4b-width", tmp_path / "recipe.yaml"))
    short = load_slurm("dgx", ["time='00:01:00'", "stage_time={}", "retries=0"])
    assert time_warnings(found, found, short) == [], "the sizes of a model that is not there are not known"
    # Llama-3.1-8B, as its config.json says.
    (tmp_path / "models/Llama-3.1-8B").mkdir(parents=True)
    (tmp_path / "models/Llama-3.1-8B/config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,'
        ' "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,'
        ' "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "hidden_act": "silu",'
        ' "tie_word_embeddings": false, "torch_dtype": "bfloat16", "bos_token_id": 128000, "eos_token_id": 128001}'
    )
    warnings = time_warnings(found, found, short)
    trainings = [config.name for config in found if config.STAGE in ("correct", "distill")]
    assert [re.match(r"stage (\w+): is estimated to take [\d.,]+ hours on h100, and 1 runs of 00:01:00", w)[1]  # type: ignore[index]
            for w in warnings] == trainings  # fmt: skip
    assert time_warnings(found, found[:1], short) == [], "of what is submitted"
    generous = load_slurm("dgx", ["time='90-00:00:00'", "stage_time={}", "retries=3"])
    assert time_warnings(found, found, generous) == []
    tight = load_slurm("dgx", ["time='01:00:00'", "stage_time={}", "retries=0"])
    many = load_slurm("dgx", ["time='01:00:00'", "stage_time={}", "retries=2000"])
    assert len(time_warnings(found, found, tight)) > len(time_warnings(found, found, many)), "every retry counts"
    assert time_warnings(found, found, load_slurm("bare")) == [], "nothing is known of CPUs"


# --------------------------------------------------------------------------------------------------- mounts and inputs


def test_what_the_container_does_not_show_is_named(here: Path) -> None:
    def faults(*mounts: str) -> list[str]:
        return mount_faults(stages(), load_slurm("dgx", [f"container_mounts=[{', '.join(mounts)}]"]))

    assert faults(f"{here}:{here}") == []
    assert faults(f"{here.parent}:{here.parent}:ro", "/a:/b") == []
    found = faults("/lustre:/lustre")
    assert [fault.partition("=")[0] for fault in found] == [
        "stage teacher: output", "stage teacher: source", "stage scores: data.sources[0].path",
        "stage scores: data.cache_dir",
    ]  # fmt: skip
    assert (
        f"{here}/hf is not seen in the container (container_mounts: /lustre:/lustre); add {here}/hf:{here}/hf"
        in (found[1])
    )
    other = faults(f"{here}:/workspace")
    assert f"{here}/hf is seen as /workspace/hf in the container" in other[1]
    # Logs and what is not whole yet lie beside an output.
    found = mount_faults(stages()[:1], load_slurm("dgx", [f"container_mounts=[{here}/runs/tiny/teacher:"
                         f"{here}/runs/tiny/teacher, {here}/hf:{here}/hf]"]))  # fmt: skip
    assert len(found) == 1
    assert f"add {here}/runs/tiny:{here}/runs/tiny" in found[0]
    assert mount_faults(stages(), load_slurm("bare")) == [], "no container"


def test_mounts_are_absolute() -> None:
    with pytest.raises(ConfigError, match="container_mounts: 'data:/data' must be host:container, both absolute"):
        load_slurm("dgx", ["container_mounts=['data:/data']"])
    with pytest.raises(ConfigError, match="python=venv/bin/python: is a path inside the container"):
        load_slurm("dgx", ["python=venv/bin/python"])


def test_a_stage_whose_text_an_earlier_one_writes_waits_for_it(here: Path) -> None:
    data = {"sources": [{"name": "a", "chat": "${output}/answers/a.jsonl"}]}
    content = {
        "output": "run",
        "stages": [
            {"stage": "generate", "name": "answers", "model": "m", "prompts": {"texts": ["a"]}},
            {"stage": "correct", "model": "m", "data": data},
        ],
    }
    Path("pipeline.yaml").write_text(yaml.safe_dump(content))
    found = jobs_of(stages(), load_slurm("bare"), overwrite=False)
    assert [job.after for job in found] == [(), ("answers",)]


def test_missing_inputs_are_refused(here: Path) -> None:
    found = input_faults(stages(), stages())
    assert any(re.fullmatch(rf"teacher: .*: {here}/hf does not exist", fault) for fault in found)
    assert any(f"{here}/text.jsonl does not exist" in fault for fault in found)
    assert not any("runs/tiny" in fault for fault in found), "what earlier stages write counts as there"
    assert input_faults(stages(), stages()[-1:]) == [], "of what is submitted"


# --------------------------------------------------------------------------------------------------- saved pipelines


@pytest.mark.parametrize("name", recipe_names())
def test_another_output_moves_all_of_a_saved_pipeline(name: str, tmp_path: Path) -> None:
    path = write_pipeline(name, tmp_path / "saved.yaml")
    before, stays = load_pipeline(path), f"runs/{name}"
    after = load_pipeline(path, ["output=/elsewhere"])
    assert before[1] == load_recipe(name).stages
    for one, other in zip(before[1], after[1], strict=True):
        moved = {key: path.replace(stays, "/elsewhere", 1) for key, path in paths_of(one).items()}
        assert paths_of(other) == moved
        assert other.output.startswith("/elsewhere/")


# ------------------------------------------------------------------------------------------------------- a fake sbatch


_SBATCH = """#!{python}
import os, shutil, sys
folder = {folder!r}
number = len(os.listdir(folder)) + 1
shutil.copy(sys.argv[-1], os.path.join(folder, f"{{number}}.sh"))
print(number)
"""


@pytest.mark.slow
def test_jobs_as_they_are_submitted(here: Path) -> None:
    """With relative paths everywhere: no job depends on the directory that the command was given in."""
    scripts, tools = here / "scripts", here / "tools"
    scripts.mkdir()
    tools.mkdir()
    (tools / "sbatch").write_text(_SBATCH.format(python=sys.executable, folder=str(scripts)))
    (tools / "sbatch").chmod(0o755)
    settings = yaml.safe_load((Path(__file__).parents[2] / "configs/slurm/dgx.yaml").read_text())
    settings |= {"container_mounts": [f"{here}:{here}"], "container_image": "images/nemo.sqsh"}
    settings["env"] = {"CUDA_DEVICE_MAX_CONNECTIONS": "4"}
    Path("own.yaml").write_text(yaml.safe_dump(settings))
    settings["env"] = {}
    Path("plain.yaml").write_text(yaml.safe_dump(settings))

    def run(slurm: str, *words: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "nemo_minitron", "run", "pipeline.yaml", "--slurm", slurm, *words],
            env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "COLUMNS": "1000"},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    code, told, error = run("own.yaml")
    assert (code, told) == (2, "")
    assert f"{here}/hf does not exist" in error
    assert not list(scripts.iterdir())
    assert not (here / "runs").exists()
    tiny_checkpoint(here / "hf", num_attention_heads=8, num_key_value_heads=8, intermediate_size=80)
    (here / "text.jsonl").write_text('{"text": "a"}\n')
    kept = yaml.safe_load(PIPELINE)
    kept["stages"] = [one for one in kept["stages"] if one["stage"] != "search"]
    Path("pipeline.yaml").write_text(yaml.safe_dump(kept))
    code, told, error = run("own.yaml")
    assert code == 0, error
    jobs = dict(re.findall(r"^(\w+): job (\d+)", told, re.M))
    assert list(jobs) == ["teacher", "scores", "magnitudes", "pruned", "distilled", "export", "report"]
    texts = {name: (scripts / f"{number}.sh").read_text() for name, number in jobs.items()}
    assert all(f"--container-image {here}/images/nemo.sqsh" in text for text in texts.values())
    assert "kill-on-invalid-dep" not in texts["teacher"]
    for name in ("scores", "pruned", "distilled"):
        assert "#SBATCH --kill-on-invalid-dep=yes" in texts[name]
        assert "#SBATCH --dependency=afterok:" in texts[name]
    assert "export CUDA_DEVICE_MAX_CONNECTIONS=4" in texts["distilled"], "the user's own"
    for name, text in texts.items():
        folder = re.search(r"nemo_minitron\.jobs\.slurm_rank (\S+)", text)
        assert folder is not None
        assert folder[1] == f"{here}/runs/tiny/logs/{name}"
        job = yaml.safe_load((Path(folder[1]) / "config.yaml").read_text())
        assert job["output"] == f"{here}/runs/tiny/{name}"
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    distilled = yaml.safe_load((here / "runs/tiny/logs/distilled/config.yaml").read_text())
    assert distilled["data"]["sources"][0]["path"] == f"{here}/text.jsonl"
    assert distilled["data"]["cache_dir"] == f"{here}/.cache/minitron"
    assert (distilled["student"], distilled["teacher"]) == (f"{here}/runs/tiny/pruned", f"{here}/runs/tiny/teacher")

    # A dry run shows the scripts, and then what it would refuse.
    code, told, error = run("plain.yaml", "--dry-run", "stages.teacher.source=gone")
    assert code == 2
    assert told.count("#!/bin/bash") == 7
    assert told.count("export CUDA_DEVICE_MAX_CONNECTIONS=1\n") == 2, "tensor parallelism: scores, distilled"
    assert f"{here}/gone does not exist" in error
    assert len(list(scripts.iterdir())) == 7


def test_settings_of_a_cpu_partition_are_typed() -> None:
    assert SlurmConfig(account="a").cpu == CpuConfig()


@pytest.mark.parametrize(
    ("error", "retries"),
    [(PreemptedError("stopped by a signal"), "3"), (ConfigError("no such layout"), "0"), (ValueError("a crash"), "3")],
    ids=["preempted", "refused", "crashed"],
)
def test_which_failed_jobs_are_queued_again(tmp_path: Path, error: Exception, retries: str) -> None:
    """What is refused would be refused again; a training that a signal stopped has saved its state and goes on."""
    save_result(tmp_path, failure(0, error))
    function = _SRUN.format(dropped="--none", folder=tmp_path)
    # `command srun` is that of the PATH.
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 75\n")
    (tmp_path / "srun").chmod(0o755)
    script = (
        f'export PATH="{tmp_path}:$PATH" TORCHX_MAX_RETRIES=3\n{function}\nsrun python; echo "$? $TORCHX_MAX_RETRIES"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.split() == ["75", retries], done.stderr
