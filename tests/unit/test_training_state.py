"""Training checkpoints are looked at before NeMo loads them: nothing of them runs, and the one before is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from support.checkpoints import tiny_checkpoint

from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.checkpoints.formats.torch_dist.writer import write_torch_dist
from nemo_minitron.checkpoints.training_state import check_state, clear_previous, keep_previous, use_previous
from nemo_minitron.errors import CheckpointError


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint as NeMo lays it out."""
    source = open_checkpoint(tiny_checkpoint(tmp_path / "hf"))
    directory = tmp_path / "checkpoints" / "step=9-last" / "weights"
    directory.parent.mkdir(parents=True)
    common = {"settings": OmegaConf.create({"a": [1]}), "step": 9}
    write_torch_dist(source, directory, prefix="module.", dtype="float32", vocab_rows=256, common={})
    torch.save(common, directory / "common.pt")
    return directory.parent


def check(checkpoint: Path) -> None:
    check_state(checkpoint, begin_again="begin again")


def test_a_whole_one_passes(saved):
    check(saved)


def test_nothing_of_it_runs(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"hook": Hostile()}, saved / "weights" / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt names posix\.system, .* might run code; begin again"):
        check(saved)
    assert not Path("ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x04."])
def test_what_is_no_archive(saved, content):
    (saved / "weights" / "common.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"common\.pt (is damaged|cannot be read)"):
        check(saved)


@pytest.mark.parametrize("name", ["common.pt", ".metadata"])
def test_what_is_gone(saved, name):
    (saved / "weights" / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}.*(No such file|is missing)"):
        check(saved)


def test_each_rank_reads_its_share(saved, monkeypatch):
    """Together they read everything: a damaged chunk is seen by one of them."""
    chunk = max((saved / "weights").glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(chunk.read_bytes())
    at = content.index(b"archive/data/0") + 200
    content[at] ^= 1
    chunk.write_bytes(content)
    monkeypatch.setenv("WORLD_SIZE", "3")
    seen = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        try:
            check(saved)
        except CheckpointError:
            seen.append(rank)
    assert len(seen) == 1


def test_the_one_before(saved):
    folder = saved.parent
    keep_previous(saved)
    (folder / "step=19-last").mkdir()
    use_previous(folder)  # not needed
    assert [path.name for path in folder.iterdir()] == ["step=19-last"]
    with pytest.raises(CheckpointError, match=r"remove .*step=19-last to go on from step=9-last, the "):
        check(folder / "step=19-last")
    (folder / "step=19-last").rmdir()
    use_previous(folder)
    use_previous(folder)  # of another rank
    assert [path.name for path in folder.iterdir()] == ["step=9-last"]
    check(folder / "step=9-last")
    (folder / "step=29-last").mkdir()
    keep_previous(folder / "step=9-last")
    keep_previous(folder / "step=29-last")
    assert [path.name for path in (folder.parent / "previous").iterdir()] == ["step=29-last"]
    clear_previous(folder)
    clear_previous(folder)
    assert not (folder.parent / "previous").exists()
