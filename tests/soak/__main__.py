"""``python tests/soak --minutes N --seed S``: faults at random, until the time is over.

Every case has a number, and is drawn from the seed and its number alone: ``--seed S --first 17 --cases 1`` repeats it.
Exit code 1 if anything was lost or false.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def main() -> int:
    """Parse the words and run."""
    from soak.driver import soak
    from soak.kinds import KINDS

    parser = argparse.ArgumentParser(prog="python tests/soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="no case begins after these")
    parser.add_argument("--seed", default=os.environ.get("MINITRON_SOAK_SEED"), help="any word; drawn if left out")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=None, help="end after so many")
    parser.add_argument("--kinds", nargs="*", choices=sorted(KINDS), default=None, help="these alone")
    parser.add_argument("--folder", type=Path, default=None, help="for the runs; those with a fault stay")
    words = parser.parse_args()
    return soak(words.minutes, words.seed, words.first, words.cases, words.kinds, words.folder)


if __name__ == "__main__":
    sys.exit(main())
