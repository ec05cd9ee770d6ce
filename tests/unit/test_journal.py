"""The journal of a long job: what it keeps, what it refuses, and that files of earlier releases open."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_minitron.errors import ConfigError
from nemo_minitron.importance.depth_scores import Measurement, depth_journal
from nemo_minitron.runtime.journal import PLAIN, Journal
from nemo_minitron.search import by_candidate, search_journal


def test_journal_of_something_else_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "j.jsonl"
    journal = Journal(path, {"a": 1}, PLAIN)
    assert journal.read() == []
    journal.append([{"x": 1}, {"x": 2}])
    assert Journal(path, {"a": 1}, PLAIN).read() == [{"x": 1}, {"x": 2}]
    with path.open("a") as stream:
        stream.write('{"x": 3')
    assert Journal.entries(path) == 2
    assert journal.read() == [{"x": 1}, {"x": 2}]
    assert path.read_text().endswith('{"x": 2}\n')
    assert Journal(path, {"a": 2}, PLAIN).read() == []
    assert Journal.entries(path) == 0
    journal.close()
    assert not path.exists()


def test_a_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    search_journal(tmp_path, {"model": "a", "samples": 4}).read()
    before = (tmp_path / "candidates.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"made with other settings \(samples\); pass --overwrite"):
        search_journal(tmp_path, {"model": "a", "samples": 5}).read()
    assert (tmp_path / "candidates.jsonl").read_bytes() == before
    (tmp_path / "candidates.jsonl").write_text("[1]\n")
    with pytest.raises(ConfigError, match="not a journal"):
        search_journal(tmp_path, {}).read()


def test_a_line_that_is_no_entry_ends_a_journal(tmp_path: Path) -> None:
    """So do the lines after it: they may depend on what it said."""
    journal = search_journal(tmp_path, {})
    journal.read()
    journal.append([("a", {"loss": 1.0})])
    whole = journal.path.read_bytes()
    with journal.path.open("a") as stream:
        stream.write('{"loss": 2.0}\n{"name": "b", "loss": 3.0}\n')
    assert journal.read() == [("a", {"loss": 1.0})]
    assert journal.path.read_bytes() == whole


#: Files as release 0.1 wrote them, byte by byte.
DEPTH = b"""{"format_version": 1, "samples": 2, "task": null}
{"layers": [], "loss": 3.25}
{"layers": [0, 1], "loss": 3.5, "accuracy": 0.25}
"""
SEARCH = b"""{"format_version": 1, "model": "runs/m", "samples": 2}
{"name": "unpruned", "loss": 3.25}
{"name": "l2-h32", "prefill": 0.5, "decode": 0.25}
{"name": "l2-h32", "loss": 3.5, "prefill": 0.75}
"""


def test_files_of_earlier_releases_open_and_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "depth").write_bytes(DEPTH)
    depth = depth_journal(tmp_path / "depth", {"task": None, "samples": 2})
    measured = [((), Measurement(3.25)), ((0, 1), Measurement(3.5, 0.25))]
    assert depth.read() == measured
    assert depth.resumed == 2
    (tmp_path / "candidates.jsonl").write_bytes(SEARCH)
    search = search_journal(tmp_path, {"samples": 2, "model": Path("runs/m")})
    findings = search.read()
    assert by_candidate(findings) == {
        "unpruned": {"loss": 3.25},
        "l2-h32": {"prefill": 0.75, "decode": 0.25, "loss": 3.5},
    }
    assert (tmp_path / "depth").read_bytes() == DEPTH
    assert search.path.read_bytes() == SEARCH
    # and what is written now is the same
    again = depth_journal(tmp_path / "again", {"task": None, "samples": 2})
    again.read()
    again.append(measured)
    assert again.path.read_bytes() == DEPTH
    search.path.unlink()
    search.read()
    search.append(findings)
    assert search.path.read_bytes() == SEARCH
