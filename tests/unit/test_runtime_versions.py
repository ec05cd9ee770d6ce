"""Versions of the stack: the known pairs, what is missing or too old, and what differs between them."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from nemo_minitron.config import (
    STAGES,
    ChatDataConfig,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    HarnessConfig,
    ImportConfig,
    PromptsConfig,
    ScoreConfig,
    SftConfig,
    SourceConfig,
)
from nemo_minitron.errors import MissingDependency, ShapeError
from nemo_minitron.jobs.needs import check_needs, needs_of
from nemo_minitron.runtime import requirements, versions
from nemo_minitron.runtime.cpu.patching import Patch, PatchSet

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str | None]]:
    """Versions by distribution that are told instead of what is installed; None: not installed."""
    pretended: dict[str, str | None] = {}
    true_version = importlib.metadata.version

    def version(name: str) -> str:
        if name in pretended and pretended[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return pretended.get(name) or true_version(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    versions.installed.cache_clear()
    yield pretended
    versions.installed.cache_clear()


def test_the_pinned_pair_is_what_constraints_say() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    assert {name: pins[name] for name in versions.PINNED.overrides()} == versions.PINNED.overrides()
    assert versions.PAIRS[0] is versions.PINNED


def test_every_pair_is_supported_and_the_oldest_is_where_support_begins() -> None:
    assert len({pair.name for pair in versions.PAIRS}) == len(versions.PAIRS)
    for pair in versions.PAIRS:
        for name, version in pair.overrides().items():
            if version is not None:
                assert SpecifierSet(versions.SUPPORTED.get(name, "")).contains(version), (pair.name, name)
    oldest = versions.PAIRS[-1]
    for name, version in (("nemo-toolkit", oldest.nemo), ("megatron-core", oldest.megatron)):
        major, minor = Version(version).release[:2]
        assert not SpecifierSet(versions.SUPPORTED[name]).contains(f"{major}.{minor - 1}.9"), name


@pytest.mark.parametrize(
    ("told", "expected"), [("2.7.0a0+79aa17489c.nv25.4", "2.7.0"), ("0.13.0rc2", "0.13.0"), ("not one", None)]
)
def test_builds_of_nvidia_count_as_the_release(pretend: dict[str, str | None], told: str, expected: str | None) -> None:
    pretend["torch"] = told
    assert str(versions.installed("torch")) == str(expected)


def test_what_is_too_old_is_named_with_a_remedy(pretend: dict[str, str | None]) -> None:
    pretend |= {"megatron-core": "0.10.0", "nemo-aligner": "0.5.0"}
    with pytest.raises(MissingDependency) as caught:
        requirements.require("torch", "megatron", "nemo_aligner", for_="alignment")
    first, second = str(caught.value).splitlines()
    assert first.startswith(
        'alignment needs megatron-core>=0.12 (0.10.0 is installed): pip install "nemo-minitron[stack]"'
    )
    assert second == "alignment needs nemo-aligner>=0.7 (0.5.0 is installed): pip install --no-deps nemo-aligner==0.7.0"


def test_nemo_without_its_first_models_is_too_new_for_alignment_alone(pretend: dict[str, str | None]) -> None:
    pretend["nemo-toolkit"] = "2.6.0"
    requirements.require("nemo", for_="distillation")
    with pytest.raises(MissingDependency, match=r"alignment needs nemo-toolkit>=2.3,<2.5 \(2.6.0 is installed\)"):
        requirements.require("nemo 1", for_="alignment")


def test_an_import_error_of_a_known_package_is_explained_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    error = ModuleNotFoundError("No module named 'gguf'", name="gguf")
    assert str(requirements.missing(error, for_="this stage")) == (
        'this stage needs gguf>=0.10 (not installed): pip install "nemo-minitron[gguf]"'
    )
    assert requirements.missing(ModuleNotFoundError("x", name="unknown_thing"), for_="this stage") is None
    assert requirements.missing(ImportError("x", name="gguf"), for_="this stage") is None
    # installed, and broken inside: its traceback is what helps
    assert requirements.missing(ModuleNotFoundError("x", name="torch.gone"), for_="this stage") is None


def test_stages_say_together_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    for config in STAGES.values():
        assert set(config.NEEDS) <= set(requirements.PARTS), config
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    stages = [STAGES[name]() for name in ("score", "prune", "evaluate")]
    with pytest.raises(MissingDependency) as caught:
        check_needs(stages)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("score and evaluate need megatron-core>=0.12 (not installed): pip install")


def test_settings_add_needs(tmp_path: Path) -> None:
    assert "lm_eval" in needs_of(EvaluateConfig(harness=HarnessConfig(tasks=["arc_easy"])))
    assert "gguf" in needs_of(ImportConfig(source="a/model.gguf"))
    assert "nemo" in needs_of(ExportConfig(formats=["nemo2"]))
    sources = [SourceConfig(path="a.parquet"), SourceConfig(dataset="b")]
    assert {"pyarrow", "datasets"} <= set(needs_of(ScoreConfig(data=DataConfig(sources=sources))))
    for data in (ChatDataConfig(path="a.jsonl.zst"), ChatDataConfig(path="a.jsonl", validation="b.arrow")):
        assert "pyarrow" in needs_of(SftConfig(data=data))
    assert not {"pyarrow", "datasets"} & set(needs_of(SftConfig(data=ChatDataConfig(path="a.jsonl"))))
    (tmp_path / "rows").mkdir()
    assert "datasets" in needs_of(GenerateConfig(prompts=PromptsConfig(path=str(tmp_path / "rows"))))


def test_a_patch_is_for_the_versions_it_says(pretend: dict[str, str | None]) -> None:
    import json.decoder as module

    def patch(requirement: str | None) -> Patch:
        return Patch("json.decoder", "absent", lambda original: 1, "test", optional=True, versions=requirement)

    pretend["megatron-core"] = "0.12.3"
    patches = PatchSet([patch("megatron-core>=0.13")])
    patches.activate()
    assert not hasattr(module, "absent")
    patches.deactivate()
    patches = PatchSet([patch("megatron-core<0.13")])
    patches.activate()
    assert module.absent == 1
    patches.deactivate()
    assert not hasattr(module, "absent")


def test_what_megatron_before_0_13_cannot_do_is_refused_by_name(pretend: dict[str, str | None]) -> None:
    stages = [["embedding", "decoder", "decoder"], ["decoder", "loss"]]
    pretend["megatron-core"] = "0.13.0"
    assert versions.layer_layout(stages) == {"pipeline_model_parallel_layout": stages}
    assert versions.virtual_pipeline_stage(1) == {"vp_stage": 1}
    versions.installed.cache_clear()
    pretend["megatron-core"] = "0.12.3"
    assert versions.layer_layout(None) == versions.virtual_pipeline_stage(None) == {}
    with pytest.raises(ShapeError, match=r"stages of 2, 1 layers need megatron-core 0.13, but 0.12.3 is here"):
        versions.layer_layout(stages)
    with pytest.raises(ShapeError, match=r"virtual_pipeline needs megatron-core 0.13"):
        versions.virtual_pipeline_stage(0)
