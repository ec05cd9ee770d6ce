"""Outputs appear whole or not at all: kill -9, full disk, failures half-way, leftovers."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import tiny_checkpoint

from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.errors import CheckpointError, MinitronError
from nemo_minitron.runtime.atomic import clear_leftovers, staging, write_aside
from nemo_minitron.runtime.files import take_umask


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in files if file.is_file()}


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    return tiny_checkpoint(tmp_path / "a", seed=1), tiny_checkpoint(tmp_path / "b", seed=2)


def test_an_existing_output_is_kept_unless_told_otherwise(sources: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = map(open_checkpoint, sources)
    write_checkpoint(first, tmp_path / "out", "hf")
    before = content(tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists; choose another path"):
        write_checkpoint(second, tmp_path / "out", "hf")
    assert content(tmp_path / "out") == before
    written = write_checkpoint(second, tmp_path / "out", "hf", overwrite=True)
    name = "decoder.final_layernorm.weight"
    assert torch.equal(written.weights.tensor(name), second.weights.tensor(name))
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_a_file_of_many_layers_holds_one_tensor_in_memory(sources: tuple[Path, Path], tmp_path: Path) -> None:
    source = open_checkpoint(sources[0])
    alive: list[weakref.ref[torch.Tensor]] = []
    most = []

    class Counted:
        def names(self) -> list[str]:
            return list(source.weights.names())

        def tensor(self, name: str) -> torch.Tensor:
            most.append(sum(reference() is not None for reference in alive))
            tensor = source.weights.tensor(name).clone()
            alive.append(weakref.ref(tensor))
            return tensor

    write_checkpoint(dataclasses.replace(source, weights=Counted()), tmp_path / "out", "hf")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert len(most) == len(source.weights.names())
    assert max(most) == 0  # each is gone before the next is read


def test_converting_in_place_reads_before_it_replaces(sources: tuple[Path, Path]) -> None:
    checkpoint = open_checkpoint(sources[0])
    name = "decoder.layers.2.mlp.linear_fc1.weight"
    before = checkpoint.weights.tensor(name).to(torch.bfloat16)
    written = write_checkpoint(checkpoint, sources[0], "hf", dtype="bfloat16", overwrite=True)
    assert torch.equal(written.weights.tensor(name), before)


@pytest.mark.parametrize("form", ["hf", "nemo"])
def test_a_full_disk_leaves_the_old_output(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    out = tmp_path / "out.nemo"
    write_checkpoint(open_checkpoint(sources[0]), out, form)
    before = content(out)
    calls = []

    def full(*_: object, **__: object) -> None:
        calls.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = "nemo_minitron.checkpoints.formats.huggingface.shards.ShardWriter.write"
    monkeypatch.setattr(writer if form == "hf" else "torch.save", full)
    with pytest.raises(CheckpointError, match=r"no space left while writing .*untouched"):
        write_checkpoint(open_checkpoint(sources[1]), out, form, overwrite=True)
    assert calls
    assert content(out) == before
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_a_damaged_source_leaves_the_old_output(sources: tuple[Path, Path], tmp_path: Path) -> None:
    write_checkpoint(open_checkpoint(sources[0]), tmp_path / "out", "hf")
    before = content(tmp_path / "out")
    second = open_checkpoint(sources[1])
    file = sources[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        write_checkpoint(second, tmp_path / "out", "hf", overwrite=True)
    assert content(tmp_path / "out") == before


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hf", "nemo"])
def test_kill_in_mid_save_leaves_the_old_output(sources: tuple[Path, Path], tmp_path: Path, form: str) -> None:
    out = tmp_path / "out.nemo"
    write_checkpoint(open_checkpoint(sources[0]), out, form)
    before = content(out)
    out_, source = str(out), str(sources[1])
    script = (
        "import sys, time\n"
        "from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint\n"
        "def stop(name, done, total):\n"
        "    if done == total // 2:\n"
        "        print('half', flush=True)\n"
        "        time.sleep(60)\n"
        f"write_checkpoint(open_checkpoint({source!r}), {out_!r}, {form!r}, overwrite=True, progress=stop)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == b"half"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert content(out) == before
    assert [entry for entry in tmp_path.iterdir() if entry.name.startswith(".out.nemo.")]  # what the dead process left
    written = write_checkpoint(open_checkpoint(sources[1]), out, form, overwrite=True)
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]
    assert written.shape == open_checkpoint(sources[1]).shape


def test_an_output_moved_aside_by_a_dead_process_comes_back(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    time.sleep(0.01)
    out = tmp_path / "out"
    with write_aside(out, overwrite=False) as partial:
        partial.write_text("old")
    host = staging(out).name.split(".files.")[1].rsplit(".", 1)[0]
    out.rename(tmp_path / f".out.replaced.{host}.{dead.pid}")
    with pytest.raises(CheckpointError, match=r"does not exist.*killed"):
        open_checkpoint(out)
    with pytest.raises(MinitronError, match="exists"), write_aside(out, overwrite=False):
        pass
    assert out.read_text() == "old"


def test_an_interrupt_cleans_up(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), write_aside(tmp_path / "out", overwrite=False) as partial:
        partial.mkdir()
        (partial / "file").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_is_alone_clears_what_any_process_and_release_left(tmp_path: Path) -> None:
    out, host = tmp_path / "out", staging(tmp_path / "out").name.split(".files.")[1].rsplit(".", 1)[0]
    alive = [f".out.partial.{host}.1", f".out.files.{host}.1", ".out.partial.elsewhere.7"]
    earlier = [".out.staged", ".out.partial-1a2b3c4d", ".out.partial-old-1a2b3c4d", ".out.partial.1"]
    others = [".other.partial.1", ".out.replaced", ".out2.staged"]
    for name in (*alive, *earlier, *others):
        (tmp_path / name).mkdir()
    clear_leftovers(out)
    assert {path.name for path in tmp_path.iterdir()} == {*alive, *earlier, *others}
    clear_leftovers(out, alone=True)
    assert {path.name for path in tmp_path.iterdir()} == {*others}


def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody reads it at all times; a directory cannot be replaced so, and comes back where the rename fails."""
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("old")
    folder.mkdir()
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        if target == folder:
            raise OSError(errno.EDQUOT, "Quota exceeded")
        assert file.read_text() == "old"
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    with write_aside(file, overwrite=True) as aside:
        aside.write_text("new")
    assert file.read_text() == "new"
    with pytest.raises(CheckpointError, match="no space"), write_aside(folder, overwrite=True, error=CheckpointError):
        staging(folder).mkdir()
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def test_a_file_that_safetensors_wrote_takes_the_mode_of_the_umask(tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    file.chmod(0o600)
    before = os.umask(0o027)
    try:
        take_umask(file)
        assert os.umask(0o027) == 0o027  # left as it was
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o640
