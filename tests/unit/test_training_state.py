"""Training checkpoints are looked at before NeMo loads them: nothing of them runs, and the one before is at hand."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from support.checkpoints import tiny_checkpoint

from nemo_minitron.checkpoints import Checkpoint, open_checkpoint
from nemo_minitron.checkpoints.formats.torch_dist.writer import write_torch_dist
from nemo_minitron.checkpoints.training_state import (
    check_state,
    clear_previous,
    keep_previous,
    seal_state,
    use_previous,
)
from nemo_minitron.errors import CheckpointError

#: As a training of NeMo 2 writes it, with objects that NeMo-Aligner's have.
COMMON: dict[str, object] = {
    "epoch": 0, "global_step": 9, "pytorch-lightning_version": "2.4.0", "state_dict": {}, "loops": {}, "callbacks": {},
    "optimizer_states": {}, "lr_schedulers": [], "optimizer": [], "settings": OmegaConf.create({"a": [1]}),
}  # fmt: skip


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint as NeMo lays it out."""
    source = open_checkpoint(tiny_checkpoint(tmp_path / "hf"))
    directory = tmp_path / "checkpoints" / "step=9-last" / "weights"
    directory.parent.mkdir(parents=True)
    write_torch_dist(source, directory, prefix="module.", dtype="float32", vocab_rows=256, common={})
    torch.save(COMMON, directory / "common.pt")
    return directory.parent


def check(checkpoint: Path, model: Checkpoint | None = None) -> None:
    check_state(checkpoint, begin_again="begin again", model=model)


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def as_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def without(*keys: str) -> Callable[[Path], None]:
    return lambda file: torch.save({key: value for key, value in COMMON.items() if key not in keys}, file)


def backend(**settings: object) -> Callable[[Path], None]:
    return lambda file: file.write_text(json.dumps({"sharded_backend": "torch_dist", **settings}))  # type: ignore[func-returns-value]


CHUNK = "__0_0_0.distcp"
#: What becomes of a file, and what is said of it: of each kind what reached NeMo, and ended there in a traceback.
KINDS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    f"{what} {name}": (name, change, reason)
    for name, reasons in {
        ".metadata": ("is missing", "was refused", "was refused", "was refused", "was refused"),
        "common.pt": ("No such file", "not a zip file", "not a zip file", "not a zip file", "Is a directory"),
        "metadata.json": ("No such file", "cannot be read", "cannot be read", "cannot be read", "Is a directory"),
        CHUNK: (
            "No such file",
            "not a zip file|the file ends early",
            "not a zip file",
            "not a zip file",
            "a directory",
        ),
    }.items()
    for what, change, reason in (
        ("gone", Path.unlink, reasons[0]),
        ("cut", lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]), reasons[1]),
        ("empty", lambda file: file.write_bytes(b""), reasons[2]),
        ("foreign", lambda file: file.write_bytes(b"\0hello {" * 50), reasons[3]),
        ("a directory", as_directory, reasons[4]),
    )
} | {
    "a number": ("metadata.json", lambda file: file.write_text("3"), "says 3, which no training of NeMo writes"),
    "nested": ("metadata.json", lambda file: file.write_text("[" * 10_000), "cannot be read"),
    "another backend": ("metadata.json", backend(sharded_backend="zarr"), 'says .*"zarr"'),
    "another version": ("metadata.json", backend(sharded_backend_version=7), "says .*7"),
    "a list": ("common.pt", lambda file: torch.save([1], file), "holds list, not the state of a training"),
    "no optimizer": ("common.pt", without("optimizer"), "has no optimizer: it is not the state of a training"),
    "no position": ("common.pt", without("loops", "lr_schedulers"), "has no loops, lr_schedulers"),
    "of a model alone": (
        "common.pt",
        without(*(key for key in COMMON if key != "state_dict")),
        "has no epoch, global_",
    ),
}


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_each_kind_of_damage_is_one_line(saved, kind, sealed):
    name, change, reason = KINDS[kind]
    if sealed:
        seal_state(saved)
    change(saved / "weights" / name)
    with pytest.raises(CheckpointError) as caught:
        check(saved)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"the training state in {saved} is damaged: {saved / 'weights' / name}")
    assert message.endswith("; begin again")
    assert re.search(reason, message), message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda last: last.rename(last.with_name("step=9-la")),
            "step=9-la is no checkpoint of a training; remove it, or",
        ),
        (lambda last: (last.parent / "other-last").mkdir(), "other-last is no checkpoint of a training"),
        (lambda last: shutil.rmtree(last / "weights"), r"\.metadata is missing: this is no finished .*; begin again"),
        (
            lambda last: (shutil.rmtree(last / "weights"), (last / "weights").symlink_to("gone")),
            "is missing: this is no",
        ),
        (
            lambda last: (shutil.rmtree(last), last.mkdir()),
            r"\.metadata is missing: this is no finished .*; begin again",
        ),
    ],
)
def test_folders(saved, change, reason):
    change(saved)
    (last,) = [path for path in saved.parent.iterdir() if path.name != "other-last"]
    with pytest.raises(CheckpointError, match=reason):
        check(last)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json"])
def test_a_flipped_bit_of_a_sealed_file_is_seen(saved, name):
    """Wherever it is: of 100 places each is refused, by one line."""
    seal_state(saved)
    check(saved)
    file, dice = saved / "weights" / name, random.Random(name)
    for _ in range(100):
        bit = dice.randrange(8 * file.stat().st_size)
        flip(file, bit)
        with pytest.raises(CheckpointError, match=re.escape(str(saved))) as caught:
            check(saved)
        assert "\n" not in str(caught.value), bit
        flip(file, bit)
    check(saved)
    (saved / "sha256.json").write_text("[")
    with pytest.raises(CheckpointError, match="sha256.json cannot be read"):
        check(saved)


def test_the_state_of_another_model(saved, tmp_path):
    check(saved, open_checkpoint(tiny_checkpoint(tmp_path / "same")))
    for name, sizes in {"wider": {"intermediate_size": 96}, "deeper": {"num_hidden_layers": 5}}.items():
        other = open_checkpoint(tiny_checkpoint(tmp_path / name, **sizes))
        with pytest.raises(
            CheckpointError, match="it is not of the model that is trained: .* where the model's sizes ask"
        ):
            check(saved, other)


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
