"""A loader that checks a conversion ends with the process that started it, and leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.checkpoints import tiny_checkpoint

from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint

CODE = """
import sys
from pathlib import Path
from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.checkpoints.verification.compare import verify
verify(open_checkpoint(Path(sys.argv[1])), open_checkpoint(Path(sys.argv[2])))
"""


@pytest.mark.slow
def test_a_killed_parent_takes_its_loader_along(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "hf"))
    write_checkpoint(source, tmp_path / "nemo2", "nemo2")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", CODE, str(tmp_path / "hf"), str(tmp_path / "nemo2")],
        env={**os.environ, "TMPDIR": str(scratch), "MINITRON_COLD": "1"},
    )
    deadline = time.monotonic() + 90
    loaders: list[psutil.Process] = []
    while not loaders and time.monotonic() < deadline:
        time.sleep(0.05)
        below = psutil.Process(parent.pid).children(recursive=True)
        loaders = [
            process for process in below if "nemo_minitron.checkpoints.verification.loaders" in process.cmdline()
        ]
    assert loaders, "no loader was started"
    while not _watches(loaders[0]) and loaders[0].is_running() and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(loaders, timeout=10)
    assert not alive
    assert [path.name for path in scratch.iterdir() if (path / "tokens.safetensors").exists()] == []


def _watches(process: psutil.Process) -> bool:
    """Whether it has come as far as to watch its launcher: it has a thread for that."""
    try:
        names = [Path(f"/proc/{process.pid}/task/{thread.id}/comm").read_text() for thread in process.threads()]
        return len(names) > 1
    except (OSError, psutil.Error):
        return False
