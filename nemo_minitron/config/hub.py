"""Models by their name on the Hugging Face Hub, as far as they are in the cache of this machine. Nothing is fetched.

The cache's layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["cached_model", "dataset_hint", "download_hint", "hub_cache", "hub_name"]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads: ``HF_HUB_CACHE``, else ``hub`` in ``HF_HOME``."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{caches}/huggingface").expanduser() / "hub"


def cached_model(name: str) -> Path | None:
    """The snapshot of ``org/name`` in the cache, of its branch ``main`` or the only one.

    None where there is no such model, or its configuration or weights were not downloaded.
    """
    if not _NAME.fullmatch(name):
        return None
    folder = hub_cache() / f"models--{name.replace('/', '--')}"
    branch = folder / "refs" / "main"
    if branch.is_file():
        found = [folder / "snapshots" / branch.read_text(encoding="utf-8").strip()]
    else:
        found = list((folder / "snapshots").glob("*"))
    if len(found) != 1 or not (found[0] / "config.json").is_file():
        return None
    weights = (file for pattern in ("*.safetensors", "*.bin") for file in found[0].glob(pattern))
    return found[0] if any(file.is_file() for file in weights) else None


def hub_name(path: str | Path) -> str | None:
    """The name on the Hub of a snapshot in a cache; None for any other path."""
    folder = Path(path).parent.parent
    if Path(path).parent.name != "snapshots" or not folder.name.startswith("models--"):
        return None
    return folder.name.removeprefix("models--").replace("--", "/", 1)


def download_hint(path: str | Path) -> str:
    """What to do about a missing path that may be a name on the Hub, to add to a message; else empty.

    Where the folder ``org`` is here, ``org/name`` is meant as a path.
    """
    name = str(path)
    if not _NAME.fullmatch(name) or Path(name).parent.exists():
        return ""
    return (
        f"; if it is a model on the Hugging Face Hub, it is not (or not whole) in {hub_cache()}, and minitron "
        f"downloads nothing by itself: huggingface-cli download {name}"
    )


def dataset_hint(path: str | Path) -> str:
    """As :func:`download_hint`, of a text."""
    name = str(path)
    if not download_hint(name) or "*" in name:
        return ""
    return f"; if it is a dataset on the Hugging Face Hub, give dataset: {name} and dataset_split instead of path"
