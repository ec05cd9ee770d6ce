"""Reading the ``.metadata`` pickle of a PyTorch distributed checkpoint without giving it the power to run anything.

``torch.distributed.checkpoint`` and Megatron read that file with plain ``pickle.load``, which runs whatever the file
names. Here an unpickler builds only the record classes of the format and refuses every other name.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from nemo_minitron.errors import CheckpointError, first_line

__all__ = ["read_metadata"]

ALLOWED: dict[str, frozenset[str]] = {
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch": frozenset(
        {
            "Size",
            "bfloat16",
            "bool",
            "float16",
            "float32",
            "float64",
            "float8_e4m3fn",
            "float8_e5m2",
            "int16",
            "int32",
            "int64",
            "int8",
            "strided",
            "uint8",
        }
    ),
    "torch.serialization": frozenset({"_get_layout"}),  # a table look-up by name
    "pathlib": frozenset({"Path", "PosixPath", "PurePath", "PurePosixPath"}),
    "collections": frozenset({"OrderedDict"}),
}


UNUSED: dict[str, frozenset[str]] = {
    # Megatron keeps its save plans in the metadata for its own caching; nothing of them is needed to read tensors
    "megatron.core.dist_checkpointing.strategies.torch": frozenset({"MCoreSavePlan"}),
    "torch.distributed.checkpoint.planner": frozenset(
        {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"}
    ),
}


class _Unused:
    """Stands in for an object that is skipped; takes whatever state it had and does nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in UNUSED.get(module, frozenset()):
            return _Unused
        if name not in ALLOWED.get(module, frozenset()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of the format")
        return super().find_class(module, name)


def read_metadata(directory: Path, open_file: Callable[[str], BinaryIO]) -> Any:
    """The ``torch.distributed.checkpoint.metadata.Metadata`` of a checkpoint.

    Args:
        directory: names the checkpoint in messages.
        open_file: opens one of its files by name; ``FileNotFoundError`` where there is none.

    Raises:
        CheckpointError: if the file is missing, truncated, or names anything but the format's own record classes.
    """
    path = directory / ".metadata"
    try:
        with open_file(".metadata") as file:
            metadata = _Unpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: this is no finished distributed checkpoint (a save writes that file last)"
        ) from None
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} was refused: {first_line(error)}; restore the file") from error
    except (IndexError, KeyError, UnicodeDecodeError, OverflowError, MemoryError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged ({first_line(error)}); restore the file") from error
    if not hasattr(metadata, "state_dict_metadata") or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path} is not the metadata of a distributed checkpoint; restore the file")
    return metadata
