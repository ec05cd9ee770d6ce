"""Facts of this machine, read from files, package metadata and ``nvidia-smi``: torch and NeMo are not imported."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import locale
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

from nemo_minitron.runtime.memory import host_memory

__all__ = ["PACKAGES", "Facts", "Gpu", "gather"]

T = TypeVar("T")

PACKAGES = {
    "torch": ("torch",),
    "nemo": ("nemo-toolkit",),
    "megatron": ("megatron-core",),
    "aligner": ("nemo-aligner",),
    "transformer_engine": ("transformer-engine", "transformer-engine-torch"),
    "apex": ("apex",),
    "nemo_run": ("nemo-run",),
    "modelopt": ("nvidia-modelopt",),
    "transformers": ("transformers",),
    "lightning": ("lightning",),
    "lm_eval": ("lm-eval",),
    "numpy": ("numpy",),
    "minitron": ("nemo-minitron",),
}
"""Distributions by the name that they have in :class:`Facts`."""
_NCCL = ("nvidia-nccl-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu11")
#: Of the environment: what changes how the stack behaves.
_VARIABLES = (
    "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_VISIBLE_DEVICES", "MINITRON_LAYER_SPEC", "MINITRON_TRITON",
    "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "SLURM_JOB_ID", "SLURM_NTASKS",
    "SLURM_STEP_ID", "PYTHONPATH",
)  # fmt: skip
SECONDS = 1.5
"""That a program, or the resolver, may take."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, as ``nvidia-smi`` reports it; the compute capability ("9.0") is None if it is not reported."""

    name: str
    memory_bytes: int
    free_bytes: int
    driver: str
    compute: str | None


@dataclass(frozen=True)
class Facts:
    """Facts of a machine. Data only, so tests can construct it.

    Attributes:
        python, executable: of this process.
        requires_python: versions of Python that this suite supports, from its metadata.
        system: kernel and architecture.
        versions: by the names of :data:`PACKAGES`; None where a package is not installed.
        torch_cuda, torch_hip: versions of CUDA and HIP that torch is built for, or None.
        gpus: GPUs of the machine that ``CUDA_VISIBLE_DEVICES`` shows.
        gpu_trouble: why there are no GPUs, if a driver is installed.
        nccl: version, or None.
        slurm: version of ``sbatch``, or None if it is not installed. slurm_trouble: why it does not answer.
        disk_free, temporary_free: bytes in the working directory and for temporary files.
        memory_total, memory_free: bytes, within what the container allows.
        cores: that this process may use.
        processor: its name.
        bf16: the processor's instructions for bfloat16 ("amx", "avx512"), or None.
        shm_total, shm_free: bytes of ``/dev/shm``; None where there is none.
        encoding: of text files; locale: as set.
        host, address: the machine's name, and the address that it resolves to, or None.
        open_files, locked_memory, stack: soft limits; -1 for no limit. hard_open_files: the hard limit.
        container: whether this process runs in one.
        environment: variables that matter.
    """

    python: str
    executable: str = sys.executable
    requires_python: str = ""
    system: str = ""
    versions: dict[str, str | None] = field(default_factory=dict)
    torch_cuda: str | None = None
    torch_hip: str | None = None
    gpus: tuple[Gpu, ...] = ()
    gpu_trouble: str = ""
    nccl: str | None = None
    slurm: str | None = None
    slurm_trouble: str = ""
    disk_free: int = 0
    temporary_free: int = 0
    memory_total: int = 0
    memory_free: int = 0
    cores: int = 1
    processor: str = ""
    bf16: str | None = None
    shm_total: int | None = None
    shm_free: int | None = None
    encoding: str = "utf-8"
    locale: str = ""
    host: str = ""
    address: str | None = None
    open_files: int = -1
    hard_open_files: int = -1
    locked_memory: int = -1
    stack: int = -1
    container: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def gather() -> Facts:
    """The facts of this machine. Takes about a second; a program that hangs is given up after :data:`SECONDS`."""
    host = socket.gethostname()
    # What may be slow, all at once.
    asked: list[_Asked[Any]] = [_Asked(_gpus), _Asked(_slurm), _Asked(lambda: socket.gethostbyname(host))]
    cuda, hip = _torch_build()
    total, free = host_memory()
    shm = _usage(Path("/dev/shm")) if Path("/dev/shm").is_dir() else None  # noqa: S108 - only looked at
    processor, bf16 = _processor()
    versions = {name: _version(candidates, name) for name, candidates in PACKAGES.items()}
    gpus, trouble = asked[0].answer() or ((), "nvidia-smi gives no answer")
    slurm, slurm_trouble = asked[1].answer() or (None, "")
    return Facts(
        python=platform.python_version(),
        requires_python=_requires_python(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions=versions,
        torch_cuda=cuda,
        torch_hip=hip,
        gpus=gpus,
        gpu_trouble=trouble,
        nccl=_nccl(),
        slurm=slurm,
        slurm_trouble=slurm_trouble,
        disk_free=_usage(Path.cwd())[1],
        temporary_free=_usage(Path(os.environ.get("TMPDIR", "/tmp")))[1],  # noqa: S108
        memory_total=total,
        memory_free=free,
        cores=len(os.sched_getaffinity(0)),
        processor=processor,
        bf16=bf16,
        shm_total=shm and shm[0],
        shm_free=shm and shm[1],
        encoding=locale.getpreferredencoding(False).lower(),
        locale=os.environ.get("LC_ALL") or os.environ.get("LC_CTYPE") or os.environ.get("LANG") or "C",
        host=host,
        address=asked[2].answer(),
        open_files=_limit(resource.RLIMIT_NOFILE),
        hard_open_files=_limit(resource.RLIMIT_NOFILE, hard=True),
        locked_memory=_limit(resource.RLIMIT_MEMLOCK),
        stack=_limit(resource.RLIMIT_STACK),
        container=any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv"))
        or "NVIDIA_PYTORCH_VERSION" in os.environ,
        environment={name: os.environ[name] for name in _VARIABLES if name in os.environ},
    )


def _version(distributions: Iterable[str], module: str) -> str | None:
    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    # Containers have some that were installed without metadata.
    with contextlib.suppress(ImportError, ValueError):
        if module in ("apex", "transformer_engine") and importlib.util.find_spec(module) is not None:
            return "unknown version"
    return None


def _requires_python() -> str:
    try:
        return str(metadata.metadata("nemo-minitron")["Requires-Python"] or "")
    except (metadata.PackageNotFoundError, KeyError):
        return ""


def _torch_build() -> tuple[str | None, str | None]:
    """CUDA and HIP version of torch's build, from its ``version.py``."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None, None
    path = Path(spec.origin).with_name("version.py")
    text = path.read_text(errors="replace") if path.is_file() else ""
    versions = [re.search(rf"^{name}\b.*?=\s*'([^']+)'", text, re.M) for name in ("cuda", "hip")]
    cuda, hip = (match[1] if match else None for match in versions)
    return cuda, hip


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    """NVIDIA's GPUs, and why there are none if a driver is installed."""
    program = shutil.which("nvidia-smi")
    if program is None:
        there = Path("/proc/driver/nvidia/version").exists()
        return (), "a driver is loaded, but nvidia-smi is not installed" if there else ""
    fields = "name,memory.total,memory.free,driver_version"
    code, out = _output([program, f"--query-gpu={fields},compute_cap", "--format=csv,noheader,nounits"])
    if code:  # programs of older drivers do not know the last field
        code, out = _output([program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
    if code:
        return (), (out.splitlines() or ["nvidia-smi gives no answer"])[0]
    gpus = []
    for line in out.splitlines():
        name, memory, free, driver, *compute = (part.strip() for part in line.split(","))
        known = bool(compute) and compute[0][:1].isdigit()
        gpus.append(Gpu(name, _mebibytes(memory), _mebibytes(free), driver, compute[0] if known else None))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip():
        return (), "CUDA_VISIBLE_DEVICES is empty"
    if visible is not None and all(part.strip().isdigit() for part in visible.split(",")):
        gpus = [gpus[int(part)] for part in visible.split(",") if int(part) < len(gpus)]
    return tuple(gpus), ""


def _mebibytes(text: str) -> int:
    return int(text) * 2**20 if text.isdigit() else 0


def _nccl() -> str | None:
    """Version of NCCL: of torch's wheel, or of the system's library."""
    if (version := _version(_NCCL, "nccl")) is not None:
        return version
    with contextlib.suppress(OSError, AttributeError):
        number = ctypes.c_int()
        ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(number))
        major, remainder = divmod(number.value, 10_000)
        return f"{major}.{remainder // 100}.{remainder % 100}"
    return None


def _slurm() -> tuple[str | None, str]:
    """Version of ``sbatch``, and why it does not answer."""
    program = shutil.which("sbatch")
    if program is None:
        return None, ""
    code, out = _output([program, "--version"])
    if code:
        return "unknown version", (out.splitlines() or ["sbatch gives no answer"])[0]
    return out.strip().removeprefix("slurm-wlm ").removeprefix("slurm "), ""


def _output(command: list[str]) -> tuple[int, str]:
    """Exit code and output of a program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 1, f"{Path(command[0]).name} did not answer within {SECONDS:g} s"
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr


def _usage(path: Path) -> tuple[int, int]:
    """Total and free bytes of the disk that a path is on."""
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return 0, 0
    return usage.total, usage.free


def _processor() -> tuple[str, str | None]:
    """Name of the processor, and its instructions for bfloat16."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor(), None
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.M)
    flags = re.search(r"^flags\s*:\s*(.*)$", text, re.M)
    known = set(flags[1].split()) if flags else set()
    bf16 = "amx" if "amx_bf16" in known else "avx512" if "avx512_bf16" in known else None
    return (name[1] if name else platform.machine()), bf16


def _limit(which: int, *, hard: bool = False) -> int:
    value = resource.getrlimit(which)[1 if hard else 0]
    return -1 if value == resource.RLIM_INFINITY else value


class _Asked(Generic[T]):
    """A question that a thread answers: a resolver or a program that does not answer takes many seconds."""

    def __init__(self, question: Callable[[], T]) -> None:
        self._found: list[T] = []
        self._question = question
        self._deadline = time.monotonic() + SECONDS + 0.3
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._found.append(self._question())

    def answer(self) -> T | None:
        """The answer, or None if there is none, or none in time."""
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        return self._found[0] if self._found else None
