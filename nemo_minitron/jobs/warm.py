"""Fork processes from a parent that has already imported the stack, instead of starting them cold.

Importing Megatron takes seconds, NeMo three times as many; a fork takes a tenth of one. A :class:`WarmPool` keeps a
server (:mod:`nemo_minitron.jobs.warm_server`) for each :data:`level <LEVELS>`, each forked from the one below it, and
:meth:`WarmPool.start` forks a process from it that behaves as ``python -m module args`` would. Only on the CPU: CUDA
does not survive a fork. Whenever forking is not safe or does not work, ``start`` returns None, logs why, and the caller
starts the process cold; ``MINITRON_COLD=1`` makes it do so always.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.jobs.warm_client import WarmProcess, WarmServer, WarmUnavailable

__all__ = [
    "COLD_VARIABLE",
    "LEVELS",
    "Level",
    "WarmPool",
    "current_pool",
    "is_cold",
    "keep_pool",
    "reachable_pool",
    "warm_pool",
]

logger = logging.getLogger(__name__)

COLD_VARIABLE = "MINITRON_COLD"
"""Of the environment: with any value but "" and "0", every process starts cold."""
_FOLDER_VARIABLE = "MINITRON_WARM"
"""Of a forked process: the folder of the sockets of the servers that it may use too."""

_MODULE = "nemo_minitron.jobs.warm_server"
_DRIVER = Path("/proc/driver/nvidia/version")
#: Beginnings of the names of variables that some part of the stack reads while it is imported, or the interpreter when
#: it starts. A server forks only for those that agree with it on all of these.
_READ_AT_IMPORT = (
    "ARROW_", "CUDA_", "DATASETS_", "HF_", "HOME", "HUGGINGFACE_", "JE_", "KMP_", "LANG", "LC_", "LD_", "MALLOC_",
    "MEGATRON_", "MINITRON_DEVICE", "MKL_", "MPL", "NCCL_", "NEMO_", "NUMBA_", "NUMEXPR_", "NVIDIA_", "NVTE_",
    "OPENBLAS_", "PROTOCOL_BUFFERS_", "PYTHON", "PYTORCH_", "TF_", "TMPDIR", "TORCH", "TQDM_", "TRANSFORMERS_",
    "TRITON_", "TZ", "USE_", "WANDB_", "XDG_",
)  # fmt: skip
#: Of these, those that a server gives to each child after the fork, and those that the imports set themselves.
_NOT_READ = frozenset(
    ("PYTHONPATH", "PYTHONUNBUFFERED", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "PYTORCH_NVML_BASED_CUDA_CHECK",
     "TORCHINDUCTOR_CACHE_DIR")
)  # fmt: skip
#: Beginnings of the names of variables that say which rank of which job a process is: a server is none.
_OF_A_JOB = (
    "GROUP_", "LOCAL_", "MASTER_", "MINITRON_JOB", "MINITRON_LAUNCHER", "RANK", "ROLE_", "SLURM_", "TORCHELASTIC_",
    "WORLD_SIZE",
)  # fmt: skip
#: Of every server. Each keeps a library from starting threads of its own: Arrow's allocator has one in the background,
#: OpenMP and OpenBLAS one for each core. CUDA's driver is not asked whether it is there, since asking initializes it.
_SERVER_ENVIRONMENT = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


@dataclass(frozen=True)
class Level:
    """The modules that a server has imported.

    Attributes:
        modules: the modules, besides those of the level below.
        below: name of the level whose server it is forked from; None for a fresh interpreter.
        stack: whether the CPU layer and torch are loaded.
    """

    modules: tuple[str, ...] = ()
    below: str | None = None
    stack: bool = True


LEVELS: dict[str, Level] = {
    "torch": Level(),
    "megatron": Level(
        (
            "megatron.core.models.gpt.gpt_model",
            "nemo_minitron.runtime.model",
            "nemo_minitron.checkpoints",
            "nemo_minitron.data",
            "transformers.models.auto.tokenization_auto",
        ),
        below="torch",
    ),
    "nemo": Level(("nemo_minitron.distillation.recipe", "nemo.collections.llm"), below="megatron"),
    "aligner": Level(
        tuple(f"nemo_minitron.alignment.{name}" for name in ("session", "dpo", "sft", "reward", "export")), below="nemo"
    ),
}
"""What is imported before a process is forked; more is never wrong, only larger."""


def is_cold() -> bool:
    """Whether the environment asks for cold starts (:data:`COLD_VARIABLE`)."""
    return os.environ.get(COLD_VARIABLE, "0") not in ("", "0")


class WarmPool:
    """The servers of this process, started when they are first needed.

    Some variables of the stack are read at import; for another value of such a variable a second server is started. All
    others are set in each child.

    Args:
        device: "auto" or "cpu"; on "auto" a machine with CUDA gets cold starts.
        levels: of the servers.
    """

    def __init__(self, device: str = "auto", levels: Mapping[str, Level] = LEVELS) -> None:
        self.device, self.levels = device, levels
        self._pid = os.getpid()
        self._folder: Path | None = None
        self._servers: dict[str, WarmServer | None] = {}
        self._opened: list[WarmServer] = []

    def start(
        self, level: str, module: str, args: Sequence[str], *, environment: Mapping[str, str], cwd: Path, output: Path
    ) -> WarmProcess | None:
        """Fork a process that runs ``python -m module args`` from the server of a level.

        Args:
            level: name of one.
            module, args, environment, cwd, output: see :meth:`~nemo_minitron.jobs.warm_client.WarmServer.start`.

        Returns:
            The process, or None if it must start cold. The log states the reason, unless cold starts were asked for or
            the machine allows no others.
        """
        if is_cold() or os.getpid() != self._pid or not self._may_fork():
            return None
        try:
            server = self.server(level, environment)
            if server is None:
                return None
            # A pool that uses another's servers has no folder of its own, which a kill would leave behind.
            folder = os.environ.get(_FOLDER_VARIABLE) if self._folder is None else str(self._folder)
            environment = {**environment, _FOLDER_VARIABLE: folder or str(self._open_folder())}
            return server.start(module, args, environment=environment, cwd=cwd, output=output)
        except WarmUnavailable as error:
            logger.warning("%s starts cold: %s", module, error)
            return None

    def _may_fork(self) -> bool:
        """Whether processes may run on the CPU and fork here: a cheap check, before torch is imported."""
        cpu = self.device == "cpu" or (self.device == "auto" and not _DRIVER.exists())
        return cpu and sys.platform.startswith("linux")

    def server(self, level: str, environment: Mapping[str, str]) -> WarmServer | None:
        """The server of a level for such an environment, started if need be.

        Returns:
            None if it could not be started before, which was logged.

        Raises:
            WarmUnavailable: if it cannot be started.
        """
        name = f"{level}-{_key(environment)}"
        server = self._servers.get(name)
        if server is not None and server.is_alive:
            return server
        if name in self._servers and server is None:
            return None
        if server is not None:  # it died: once more, and if that fails too, never again
            server.close()
        self._servers[name] = None
        self._servers[name] = server = self._open(name, level, environment)
        self._opened.append(server)
        return server

    def _open(self, name: str, level: str, environment: Mapping[str, str]) -> WarmServer:
        """Connect to the server of a level: that of the process that forked this one, or a new one."""
        if _FOLDER_VARIABLE in os.environ:
            shared = Path(os.environ[_FOLDER_VARIABLE]) / f"{name}.sock"
            with contextlib.suppress(WarmUnavailable):
                return WarmServer(shared)
        path = self._open_folder() / f"{name}.sock"
        path.unlink(missing_ok=True)
        environment = {k: v for k, v in environment.items() if not k.startswith(_OF_A_JOB)} | _SERVER_ENVIRONMENT
        wanted = self.levels[level]
        args = [str(path), self.device if wanted.stack else "-", *wanted.modules]
        log = path.with_suffix(".log")
        process: subprocess.Popen[bytes] | WarmProcess
        if wanted.below is not None:
            below = self.server(wanted.below, environment)
            if below is None:
                raise WarmUnavailable(f"there is no server of the level {wanted.below}")
            process = below.start(_MODULE, args, environment=environment, cwd=Path.cwd(), output=log)
        else:
            with log.open("wb") as stream:
                process = subprocess.Popen(
                    [sys.executable, "-m", _MODULE, *args],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    start_new_session=True,
                )
        return WarmServer(path, process)

    def _open_folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="minitron-"))  # 0700: nobody else may ask for processes
        return self._folder

    def close(self) -> None:
        """End the servers and all that they forked."""
        if os.getpid() != self._pid:
            return
        for server in reversed(self._opened):  # each before the one that it was forked from, which counts its time
            server.close()
        self._opened.clear()
        self._servers.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _key(environment: Mapping[str, str]) -> str:
    """A short name of the variables that a server must have been started with."""
    read = sorted(
        item
        for item in (dict(environment) | _SERVER_ENVIRONMENT).items()
        if item[0].startswith(_READ_AT_IMPORT) and item[0] not in _NOT_READ
    )
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()[:12]


_current: WarmPool | None = None


def current_pool() -> WarmPool | None:
    """The pool that is open in this process, if any."""
    return _current


@contextlib.contextmanager
def warm_pool(device: str = "auto") -> Iterator[WarmPool]:
    """Open a pool for the processes that the block starts; an open pool is used instead, and stays open."""
    global _current
    if _current is not None:
        yield _current
        return
    _current = pool = WarmPool(device)
    try:
        yield pool
    finally:
        _current = None
        pool.close()


def keep_pool(device: str = "auto") -> WarmPool:
    """Open a pool for the rest of this process's life, unless one is open."""
    global _current
    if _current is None:
        _current = WarmPool(device)
        atexit.register(_current.close)
    return _current


def reachable_pool() -> WarmPool | None:
    """The pool that is open in this process, or one that uses the servers of the process that forked this one."""
    return keep_pool() if _current is None and _FOLDER_VARIABLE in os.environ else _current
