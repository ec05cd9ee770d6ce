"""``python .ci/skips.py JUNIT.xml ...``: print every skipped test with its reason; exit 1 if one is not on the list."""

from __future__ import annotations

import fnmatch
import os
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

LIST = Path(__file__).with_name("skips.txt")
#: Conditions that a line of the list may name: it counts only where the condition holds.
CONDITIONS = {
    "always": lambda: True,
    "no-system-packages": lambda: os.geteuid() != 0 or shutil.which("apt-get") is None,
}


def allowed() -> list[tuple[str, str]]:
    """``(pattern of the test, pattern of the reason)`` of the lines whose condition holds."""
    patterns = []
    for line in LIST.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        condition, test, reason = (part.strip() for part in line.split("|"))
        if CONDITIONS[condition]():
            patterns.append((test, reason))
    return patterns


def skips(path: Path) -> list[tuple[str, str]]:
    """``(test, reason)`` of the skipped tests of a junit file."""
    # Written by pytest in this very run.
    cases = ElementTree.parse(path).getroot().iter("testcase")  # noqa: S314
    return [
        (f"{case.get('classname')}::{case.get('name')}", skipped.get("message") or "")
        for case in cases
        for skipped in case.findall("skipped")
    ]


def main(paths: list[str]) -> int:
    """Print and judge.

    Returns:
        0 where every skip is on the list.
    """
    patterns, unlisted = allowed(), 0
    for path in paths:
        entries = skips(Path(path))
        print(f"{path}: {len(entries)} skipped")
        for test, reason in entries:
            listed = any(fnmatch.fnmatch(test, t) and fnmatch.fnmatch(reason, r) for t, r in patterns)
            unlisted += not listed
            print(f"  {'' if listed else 'NOT ON THE LIST: '}{test}: {reason}")
    if not paths:
        print("no test reports: nothing ran")
        return 1
    if unlisted:
        print(f"{unlisted} skips are not on {LIST.name}: install what the test needs, or list it with its reason")
    return 1 if unlisted else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
