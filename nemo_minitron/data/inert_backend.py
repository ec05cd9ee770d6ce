"""A build backend that runs no code of the archive that it is given.

``pip download`` of a source archive asks the archive for its metadata, and the default backend answers by running the
archive's ``setup.py``. :mod:`nemo_minitron.data.packages` puts a copy of this file in place of
``setuptools.build_meta`` for the length of one download: it answers from ``PKG-INFO``, which is text.

The hooks and their arguments are those of PEP 517. This file must stay free of imports from this project.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


class InertBackend:
    """The three PEP 517 hooks that ``pip download`` calls."""

    def get_requires_for_build_wheel(self, config_settings: dict[str, Any] | None = None) -> list[str]:
        """Nothing is needed to read a text file."""
        return []

    def prepare_metadata_for_build_wheel(
        self, metadata_directory: str, config_settings: dict[str, Any] | None = None
    ) -> str:
        """Write name and version, as ``PKG-INFO`` in the working directory gives them; return the directory's name."""
        text = Path("PKG-INFO").read_text(encoding="utf-8")
        fields = dict(re.findall(r"^(Name|Version): (\S+)\s*$", text, flags=re.MULTILINE))
        directory = f"{fields['Name'].replace('-', '_')}-{fields['Version']}.dist-info"
        target = Path(metadata_directory, directory)
        target.mkdir()
        (target / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {fields['Name']}\nVersion: {fields['Version']}\n",
            encoding="utf-8",
        )
        return directory

    def build_wheel(self, *_: Any, **__: Any) -> str:
        """Refused: this backend exists to download, not to build."""
        raise RuntimeError("packages are fetched for their data and never built")


# pip asks for `setuptools.build_meta:__legacy__` where an archive names no backend of its own.
__legacy__ = InertBackend()
get_requires_for_build_wheel = __legacy__.get_requires_for_build_wheel
prepare_metadata_for_build_wheel = __legacy__.prepare_metadata_for_build_wheel
build_wheel = __legacy__.build_wheel
