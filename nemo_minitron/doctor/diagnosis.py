"""From the facts of a machine to what works on it, and a remedy for each problem. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from nemo_minitron.doctor.cuda import driver_needed, oldest_gpu
from nemo_minitron.doctor.facts import Facts
from nemo_minitron.runtime.requirements import PARTS
from nemo_minitron.runtime.versions import PAIRS, PINNED, SUPPORTED, WITH_NEMO_1, pair_of

__all__ = ["Ability", "Diagnosis", "Problem", "diagnose"]

GIB = 2**30
#: A core stage loads the stack in this much memory, whatever the model.
MEMORY_NEEDED = 3 * GIB
DISK_NEEDED = 2 * GIB
SHM_NEEDED = 1 * GIB
FILES_NEEDED = 1024
FILES_WANTED = 4096
STACK_NEEDED = 8 * 2**20


@dataclass(frozen=True)
class Problem:
    """A problem of the machine.

    Attributes:
        what: the problem, in one line.
        remedy: what to do about it, in one line.
        affects: names of the abilities that it concerns; empty for all.
        blocks: whether they do not work at all; otherwise they work with limits.
    """

    what: str
    remedy: str
    affects: tuple[str, ...] = ()
    blocks: bool = False


@dataclass(frozen=True)
class Ability:
    """A group of stages, and whether it works here.

    Attributes:
        name: of the group.
        stages: of the command line.
        core: whether the suite as a whole needs it.
        state: "works", "limited" or "no".
        reason: why it does not work, or the limits.
    """

    name: str
    stages: str
    core: bool
    state: str = "works"
    reason: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The result of :func:`diagnose`."""

    problems: tuple[Problem, ...]
    abilities: tuple[Ability, ...]

    @property
    def sound(self) -> bool:
        """Whether all core stages work, possibly with limits."""
        return all(ability.state != "no" for ability in self.abilities if ability.core)


#: Name, stages, core, packages without which it does not work.
_ABILITIES: tuple[tuple[str, str, bool, tuple[str, ...]], ...] = (
    ("conversion", "import, export", True, ("torch", "megatron", "transformers")),
    ("pruning", "score, depth, tokens, prune, iterate, search", True, ("torch", "megatron", "transformers")),
    (
        "distillation",
        "distill, correct, cache",
        True,
        ("torch", "megatron", "nemo", "lightning", "modelopt", "nemo_run", "transformers"),
    ),
    ("evaluation", "evaluate, generate, report", True, ("torch", "megatron", "transformers")),
    ("task accuracy", "evaluate (harness)", False, ("torch", "megatron", "transformers", "lm_eval")),
    (
        "alignment",
        "sft, dpo, reward, label, steerlm, steerlm2",
        False,
        ("torch", "megatron", "nemo", "lightning", "aligner", "transformers"),
    ),
    ("reinforcement", "reinforce", False, ("torch", "megatron", "nemo", "lightning", "aligner", "transformers")),
    ("several processes", "parallel.*", True, ("torch", "nemo_run")),
    ("Slurm", "run --slurm, doctor --run --slurm", False, ("nemo_run",)),
)
#: By the names that facts have for them: for people, the distribution, and the key of ``runtime.requirements.PARTS``.
_PACKAGES: dict[str, tuple[str, str, str | None]] = {
    "torch": ("torch", "torch", "torch"),
    "megatron": ("Megatron-core", "megatron-core", "megatron"),
    "nemo": ("NeMo", "nemo-toolkit", "nemo"),
    "lightning": ("Lightning", "lightning", "lightning"),
    "modelopt": ("nvidia-modelopt", "nvidia-modelopt", None),
    "transformers": ("transformers", "transformers", "transformers"),
    "nemo_run": ("nemo_run", "nemo-run", "nemo_run"),
    "aligner": ("NeMo-Aligner", "nemo-aligner", "nemo_aligner"),
    "lm_eval": ("lm-eval", "lm-eval", "lm_eval"),
}
_COMPUTING = ("conversion", "pruning", "distillation", "evaluation", "task accuracy", "alignment", "reinforcement")
_TRAINING = ("distillation", "alignment", "reinforcement")


def diagnose(facts: Facts) -> Diagnosis:
    """Judge a machine by its facts."""
    problems = tuple(_problems(facts))
    return Diagnosis(problems, tuple(_ability(facts, problems, *row) for row in _ABILITIES))


def _ability(
    facts: Facts, problems: tuple[Problem, ...], name: str, stages: str, core: bool, packages: tuple[str, ...]
) -> Ability:
    lacking = [_PACKAGES[package][0] for package in packages if facts.versions.get(package) is None]
    if lacking:
        return Ability(name, stages, core, "no", f"{', '.join(lacking)} not installed")
    if name == "Slurm" and facts.slurm is None:
        return Ability(name, stages, core, "limited", "sbatch is not here; only to a login node by SSH (host:)")
    if name == "Slurm" and facts.slurm_trouble:
        return Ability(name, stages, core, "limited", f"no cluster answers here: {facts.slurm_trouble}")
    concerning = [problem for problem in problems if not problem.affects or name in problem.affects]
    blocking = [problem.what for problem in concerning if problem.blocks]
    if blocking:
        return Ability(name, stages, core, "no", "; ".join(blocking))
    limits = [problem.what for problem in concerning]
    if name == "several processes" and not limits:
        how = f"NCCL {facts.nccl or ''}, {len(facts.gpus)} GPUs".replace("  ", " ") if _on_gpu(facts) else "gloo"
        return Ability(name, stages, core, "works", how)
    if name in _COMPUTING and not _on_gpu(facts):
        limits.insert(0, "on the CPU: small models")
    return Ability(name, stages, core, "limited" if limits else "works", "; ".join(limits))


def _on_gpu(facts: Facts) -> bool:
    """Whether stages run on GPUs: the machine has some, and torch is built for them."""
    return bool(facts.gpus) and facts.torch_cuda is not None


def _problems(facts: Facts) -> Iterator[Problem]:
    yield from _python_problems(facts)
    yield from _package_problems(facts)
    yield from _gpu_problems(facts)
    yield from _room_problems(facts)
    yield from _system_problems(facts)


def _python_problems(facts: Facts) -> Iterator[Problem]:
    if facts.requires_python and not SpecifierSet(facts.requires_python).contains(facts.python, prereleases=True):
        yield Problem(
            f"Python {facts.python}",
            f"use Python {facts.requires_python}: the stack does not install on others",
            blocks=True,
        )


def _package_problems(facts: Facts) -> Iterator[Problem]:
    missing: dict[str, list[str]] = {}
    for name in _PACKAGES:
        if facts.versions.get(name) is None:
            missing.setdefault(_remedy(name), []).append(name)
    for remedy, names in missing.items():
        yield Problem(f"not installed: {', '.join(_PACKAGES[name][0] for name in names)}", remedy, _users(*names))
    for name, (title, distribution, _) in _PACKAGES.items():
        version, wanted = _version(facts, name), SUPPORTED.get(distribution)
        if version is not None and wanted and not SpecifierSet(wanted).contains(version, prereleases=True):
            yield Problem(f"{title} {version}, where {wanted} is needed", _remedy(name), _users(name), blocks=True)
    nemo, megatron = _version(facts, "nemo"), _version(facts, "megatron")
    if nemo is not None and not SpecifierSet(WITH_NEMO_1).contains(nemo, prereleases=True):
        yield Problem(
            f"NeMo {nemo} lacks the models of NeMo 1, which NeMo-Aligner trains",
            f"for alignment use NeMo {PINNED.nemo} with Megatron-core {PINNED.megatron}",
            ("alignment", "reinforcement"),
            blocks=True,
        )
    if nemo is not None and megatron is not None and pair_of(nemo, megatron) is None:
        known = ", ".join(f"{pair.nemo} with {pair.megatron}" for pair in PAIRS)
        yield Problem(
            f"NeMo {nemo} with Megatron-core {megatron} is not a pair that is tested",
            f"`minitron doctor --run` tells whether it works; tested: {known}",
            _COMPUTING,
        )


def _users(*packages: str) -> tuple[str, ...]:
    """The abilities that need one of these packages."""
    return tuple(name for name, _, _, needed in _ABILITIES if set(needed) & set(packages))


def _remedy(package: str) -> str:
    key = _PACKAGES[package][2]
    return PARTS["nemo" if key is None else key].remedy


def _version(facts: Facts, package: str) -> Version | None:
    """A pre-release build of NVIDIA's ("2.7.0a0+79aa17489c.nv25.04") counts as its release (2.7.0)."""
    try:
        return Version(Version(facts.versions.get(package) or "").base_version)
    except InvalidVersion:
        return None


def _gpu_problems(facts: Facts) -> Iterator[Problem]:
    if facts.versions.get("torch") is None:
        return
    if facts.torch_hip is not None:
        yield Problem(
            f"torch is built for ROCm {facts.torch_hip}",
            "set runtime.device=cpu; Megatron, NeMo and this suite run on NVIDIA's GPUs and on the CPU",
            _COMPUTING,
        )
        return
    if facts.gpu_trouble:
        yield Problem(
            f"no GPU answers ({facts.gpu_trouble})",
            "look at `nvidia-smi`; stages run on the CPU until then",
            _COMPUTING,
        )
    if not facts.gpus:
        return
    count = f"{len(facts.gpus)} {'GPU' if len(facts.gpus) == 1 else 'GPUs'}"
    if facts.torch_cuda is None:
        yield Problem(
            f"{count}, but torch is built for the CPU alone",
            "install torch's CUDA build: pip install --force-reinstall torch (from PyPI, or NVIDIA's container)",
            _COMPUTING,
        )
        return
    needed, driver = driver_needed(facts.torch_cuda), facts.gpus[0].driver
    if needed is not None and _numbers(driver) < _numbers(needed):
        yield Problem(
            f"driver {driver} is older than CUDA {facts.torch_cuda} of torch needs ({needed})",
            f"update the driver to {needed} or newer, or install a torch for an older CUDA",
            (*_COMPUTING, "several processes"),
            blocks=True,
        )
    oldest = oldest_gpu(facts.torch_cuda)
    known = [(gpu, _numbers(gpu.compute)) for gpu in facts.gpus if gpu.compute is not None]
    old = [gpu for gpu, compute in known if oldest is not None and compute < _numbers(oldest)]
    if old:
        yield Problem(
            f"{old[0].name} (compute capability {old[0].compute}) is too old for CUDA {facts.torch_cuda}",
            "install a torch for an older CUDA, or set runtime.device=cpu",
            _COMPUTING,
            blocks=True,
        )
    if any(compute < (8, 0) for _, compute in known):
        yield Problem(
            "the GPU has no bfloat16 of its own (compute capability below 8.0)",
            "train with precision=32, measure with runtime.dtype=float32",
            _COMPUTING,
        )
    if facts.versions.get("transformer_engine") is None:
        yield Problem(
            "Transformer Engine is not installed",
            "Megatron-core's own layers are used, which are slower: pip install transformer-engine[pytorch], or "
            "NVIDIA's container",
            _COMPUTING,
        )
    if facts.versions.get("apex") is None and facts.versions.get("transformer_engine") is None:
        yield Problem(
            "neither Apex nor Transformer Engine has fused norms and optimizers here",
            "trainings are slower; NVIDIA's container has both",
            _TRAINING,
        )
    if len(facts.gpus) > 1 and facts.nccl is None:
        yield Problem(
            "NCCL was not found", "pip install nvidia-nccl-cu12, or take torch's own wheel", ("several processes",)
        )
    if len(facts.gpus) > 1 and len({gpu.name for gpu in facts.gpus}) > 1:
        yield Problem(
            "the GPUs differ",
            "choose equal ones by CUDA_VISIBLE_DEVICES: the slowest sets the pace",
            ("several processes",),
        )
    busy = [gpu for gpu in facts.gpus if gpu.memory_bytes and gpu.free_bytes < 0.5 * gpu.memory_bytes]
    if busy:
        yield Problem(
            f"{len(busy)} of {count} have less than half of their memory free",
            "see `nvidia-smi` for who uses it, or choose others by CUDA_VISIBLE_DEVICES",
            _COMPUTING,
        )
    if len(facts.gpus) > 1 and facts.environment.get("CUDA_DEVICE_MAX_CONNECTIONS") not in (None, "1"):
        yield Problem(
            f"CUDA_DEVICE_MAX_CONNECTIONS={facts.environment['CUDA_DEVICE_MAX_CONNECTIONS']}",
            "unset it or set it to 1, which Megatron demands for tensor and sequence parallelism",
            ("several processes",),
        )


def _room_problems(facts: Facts) -> Iterator[Problem]:
    if facts.memory_free < MEMORY_NEEDED:
        yield Problem(
            f"{_size(facts.memory_free)} of memory are free; a process of the stack takes {_size(MEMORY_NEEDED)}",
            "free some, or give the container more; choose fewer processes (parallel.*)",
            (*_COMPUTING, "several processes"),
            blocks=facts.memory_free < MEMORY_NEEDED // 2,
        )
    if facts.disk_free < DISK_NEEDED:
        yield Problem(
            f"{_size(facts.disk_free)} are free on the working directory's disk",
            "free some, or set output= to another disk",
            _COMPUTING,
            blocks=facts.disk_free < DISK_NEEDED // 8,
        )
    if facts.temporary_free < DISK_NEEDED // 4:
        yield Problem(
            f"{_size(facts.temporary_free)} are free for temporary files", "set TMPDIR to another disk", ("conversion",)
        )
    if facts.shm_total is None:
        yield Problem(
            "there is no /dev/shm",
            "give the container one (docker run --shm-size=16g): NCCL and data workers need it",
            ("several processes",),
            blocks=len(facts.gpus) > 1,
        )
    elif facts.shm_total < SHM_NEEDED:
        yield Problem(
            f"shared memory (/dev/shm) has {_size(facts.shm_total)}",
            "start the container with --ipc=host or --shm-size=16g: NCCL and data workers need it",
            ("several processes",),
        )
    elif facts.shm_free is not None and facts.shm_free < SHM_NEEDED // 4:
        yield Problem(
            f"shared memory (/dev/shm) has {_size(facts.shm_free)} left",
            "remove what stale processes left there (ls -l /dev/shm)",
            ("several processes",),
        )


def _system_problems(facts: Facts) -> Iterator[Problem]:
    if facts.encoding.replace("-", "").replace("_", "") != "utf8":
        yield Problem(
            f"text is read as {facts.encoding} (locale {facts.locale})",
            "export LC_ALL=C.UTF-8, or PYTHONUTF8=1",
            (*_COMPUTING, "Slurm"),
        )
    if facts.address is None:
        yield Problem(
            f"this machine's own name, {facts.host}, does not resolve",
            f"add it to /etc/hosts (127.0.1.1 {facts.host}); on a cluster, mend the name service",
            ("several processes",),
        )
    if 0 <= facts.open_files < FILES_NEEDED:
        yield Problem(
            f"{facts.open_files} open files are allowed",
            f"ulimit -n {FILES_WANTED}",
            (*_COMPUTING, "several processes"),
        )
    elif 0 <= facts.open_files < FILES_WANTED and len(facts.gpus) > 1:
        yield Problem(f"{facts.open_files} open files are allowed", "ulimit -n 65536", ("several processes",))
    if len(facts.gpus) > 1 and 0 <= facts.locked_memory < 2**30:
        yield Problem(
            f"{_size(facts.locked_memory)} of memory may be locked",
            "ulimit -l unlimited (docker run --ulimit memlock=-1): InfiniBand needs it",
            ("several processes",),
        )
    if 0 <= facts.stack < STACK_NEEDED:
        yield Problem(
            f"the stack is limited to {_size(facts.stack)}",
            "ulimit -s 8192 or more (docker run --ulimit stack=67108864)",
            _COMPUTING,
        )
    if int(facts.environment.get("SLURM_NTASKS", "1") or 1) > 1 and "SLURM_STEP_ID" not in facts.environment:
        yield Problem(
            f"this shell is inside a Slurm job of {facts.environment['SLURM_NTASKS']} tasks, without srun",
            "submit with --slurm, or unset SLURM_NTASKS: libraries may take this process for one of its ranks",
            _TRAINING,
        )


def _numbers(version: str) -> tuple[int, ...]:
    """``"2.13.0+cu130"`` -> ``(2, 13, 0)``."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])) or (0,)


def _size(count: int) -> str:
    """In MiB below a GiB, else in GiB."""
    return f"{count / 2**20:.0f} MiB" if count < GIB else f"{count / GIB:.1f} GiB"
