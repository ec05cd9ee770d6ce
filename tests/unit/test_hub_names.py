"""Models by their name on the Hub: from the local cache, or with the command that downloads them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from support.checkpoints import tiny_checkpoint

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.config import ImportConfig, load, load_pipeline
from nemo_minitron.config.hub import cached_model, download_hint, hub_cache, hub_name
from nemo_minitron.errors import CheckpointError
from nemo_minitron.jobs.plans import PlannedPath, StagePlan
from nemo_minitron.report.base import base_of
from nemo_minitron.stages import import_

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub leaves it: files are links to blobs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HUGGINGFACE_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "hub" / "models--org--Tiny-1.0"
    snapshot = folder / "snapshots" / COMMIT
    blobs = tiny_checkpoint(folder / "blobs")
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_the_library_agrees_on_the_place(snapshot: Path) -> None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache("org/Tiny-1.0", "config.json", cache_dir=hub_cache())
    assert found == str(snapshot / "config.json")
    assert cached_model("org/Tiny-1.0") == snapshot
    assert hub_name(snapshot) == "org/Tiny-1.0"
    assert hub_name(snapshot.parent) is None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HOME": "/d"}, "/d/.cache/huggingface/hub"),
        ({"HOME": "/d", "HF_HOME": "~/e"}, "/d/e/hub"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hub_cache() == Path(expected)


def test_checkpoints_are_opened_by_name(snapshot: Path) -> None:
    opened = open_checkpoint("org/Tiny-1.0")
    assert opened.path == snapshot
    assert opened.weights.tensor("decoder.final_layernorm.weight").shape == (48,)
    base = base_of({"made_by": "import", "source": str(snapshot)}, "x", hub_name=None, license_name=None)
    assert (base.name, base.hub_name) == ("Tiny-1.0", "org/Tiny-1.0")


def test_configurations_name_the_snapshot(snapshot: Path, tmp_path: Path) -> None:
    content = {
        "output": "out",
        "defaults": {"data": {"sources": [{"name": "text", "path": "org/Tiny-1.0"}]}},
        "stages": [
            {"stage": "import", "source": "org/Tiny-1.0"},
            {"stage": "distill", "student": "out/import", "teacher": "org/Tiny-1.0"},
            {"stage": "evaluate", "models": {"a": "org/Tiny-1.0", "b": "org/other"}},
        ],
    }
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(content))
    _, (taken, distilled, evaluation) = load_pipeline("pipeline.yaml")
    assert taken.source == str(snapshot)  # type: ignore[attr-defined]
    assert (distilled.student, distilled.teacher) == ("out/import", str(snapshot))  # type: ignore[attr-defined]
    assert distilled.data.sources[0].path == "org/Tiny-1.0"  # type: ignore[attr-defined]  # text
    assert evaluation.models == {"a": str(snapshot), "b": "org/other"}  # type: ignore[attr-defined]
    (tmp_path / "org" / "Tiny-1.0").mkdir(parents=True)
    (tmp_path / "import.yaml").write_text("source: org/Tiny-1.0\noutput: org/Tiny-1.0\n")
    config = load("import", "import.yaml")
    assert config.source == "org/Tiny-1.0"  # type: ignore[attr-defined]  # what is here goes before
    shutil.rmtree(tmp_path / "org")
    assert load("import", "import.yaml").output == "org/Tiny-1.0"  # no checkpoint that is read


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "refs/main names another"])
def test_what_is_not_whole_is_to_be_downloaded(snapshot: Path, missing: str) -> None:
    if missing.startswith("refs"):
        (snapshot.parent.parent / "refs" / "main").write_text("f" * 40)
    else:
        (snapshot / missing).unlink()
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint("org/Tiny-1.0")
    assert "org/Tiny-1.0 does not exist" in str(refused.value)
    assert str(refused.value).endswith("huggingface-cli download org/Tiny-1.0")
    assert "\n" not in str(refused.value)


def test_a_name_that_is_not_cached_is_refused_with_the_command(snapshot: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="huggingface-cli download org/absent"):
        import_.run(ImportConfig(source="org/absent", output=str(tmp_path / "out")))
    (fault,) = StagePlan("import", reads=[PlannedPath("org/absent", "model")]).missing_reads(set())
    assert fault.endswith("huggingface-cli download org/absent")
    assert [download_hint(path) for path in ("/org/name", "name", "a/b/c", "../name", "org/")] == [""] * 5
    (tmp_path / "org").mkdir()
    assert download_hint("org/absent") == ""  # a path, mistyped
