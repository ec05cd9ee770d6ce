"""Containers of records: each is told by its content and read record by record; damage and foreign files are named."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import pickle
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_minitron import accounting
from nemo_minitron.data import json_records
from nemo_minitron.data.containers import look
from nemo_minitron.data.records import Record, open_records
from nemo_minitron.errors import DataError

EACH = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# ------------------------------------------------------------------------------------------------------------- writers


def compressed(content: bytes, compression: str) -> bytes:
    if compression == "gzip":
        return gzip.compress(content)
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def dumped(records: list[Any], **options: Any) -> str:
    return "".join(json.dumps(record, **options) + "\n" for record in records)


def arrow_bytes(table: pyarrow.Table, *, stream: bool) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue().to_pybytes()


def parquet_bytes(table: pyarrow.Table) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, row_group_size=3)
    return sink.getvalue().to_pybytes()


#: Containers of JSON -> the content, and the word of their places.
JSON: dict[str, tuple[Callable[[list[Any]], str], str]] = {
    "lines": (lambda records: dumped(records), "line"),
    "lines in UTF-8": (lambda records: dumped(records, ensure_ascii=False), "line"),
    "lines with a byte order mark": (lambda records: "\ufeff" + dumped(records), "line"),
    "array": (lambda records: json.dumps(records), "item"),
    "array over several lines": (lambda records: "\n" + json.dumps(records, indent=2, ensure_ascii=False), "item"),
    "array, an object a line": (lambda records: "[" + ",\n".join(map(json.dumps, records)) + "]\n", "item"),
    "objects": (lambda records: "".join(json.dumps(record, indent=1) + "\n" for record in records), "item"),
}
TABLES: dict[str, Callable[[pyarrow.Table], bytes]] = {
    "parquet": parquet_bytes,
    "arrow file": lambda table: arrow_bytes(table, stream=False),
    "arrow stream": lambda table: arrow_bytes(table, stream=True),
}
NAMES = (".jsonl", ".json", ".jsonl.gz", ".json.zst", ".parquet", ".arrow", ".txt", "", ".bin")

# -------------------------------------------------------------------------------------------------------------- records

LETTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FIELDS = st.text(st.sampled_from("abcxyz"), min_size=1, max_size=3)
SCALARS: list[tuple[pyarrow.DataType, st.SearchStrategy[Any]]] = [
    (pyarrow.string(), LETTERS),
    (pyarrow.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pyarrow.float64(), st.floats(allow_nan=False, allow_infinity=False)),
    (pyarrow.bool_(), st.booleans()),
]


def types(depth: int) -> st.SearchStrategy[tuple[pyarrow.DataType, st.SearchStrategy[Any]]]:
    """A type of Arrow, and values of it in JSON."""
    scalar = st.sampled_from(SCALARS)
    if depth == 0:
        return scalar
    inner = types(depth - 1)
    listed = inner.map(lambda one: (pyarrow.list_(one[0]), st.lists(one[1], max_size=3)))
    fields = st.dictionaries(FIELDS, inner, min_size=1, max_size=3)
    struct = fields.map(
        lambda held: (
            pyarrow.struct([(name, kind) for name, (kind, _) in held.items()]),
            st.fixed_dictionaries({}, optional={name: st.none() | values for name, (_, values) in held.items()}),
        )
    )
    return scalar | listed | struct


@st.composite
def tables(draw: st.DrawFn) -> tuple[pyarrow.Schema, list[dict[str, Any]]]:
    """Records whose fields have a type each, are null, or are missing."""
    kinds = draw(st.dictionaries(FIELDS, types(2), min_size=1, max_size=4))
    schema = pyarrow.schema([(name, kind) for name, (kind, _) in kinds.items()])
    optional = {name: st.none() | values for name, (_, values) in kinds.items()}
    return schema, draw(st.lists(st.fixed_dictionaries({}, optional=optional), max_size=8))


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def read(path: Path) -> list[Record]:
    return list(open_records(path).read())


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.getLogger("nemo_minitron.accounting").setLevel(logging.ERROR)
    yield
    logging.getLogger("nemo_minitron.accounting").setLevel(logging.NOTSET)


@EACH
@given(drawn=tables(), name=st.sampled_from(NAMES), compression=st.sampled_from([None, "gzip", "zstd"]),
       block=st.sampled_from([3, 16, 1 << 20]))  # fmt: skip
def test_the_same_records_come_out_of_every_container(
    drawn: tuple[pyarrow.Schema, list[dict[str, Any]]],
    name: str,
    compression: str | None,
    block: int,
    tmp_path: Path,
    quiet: None,
) -> None:
    schema, records = drawn
    path = tmp_path / f"a{name}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "BLOCK", block)
        for kind, (write, word) in JSON.items():
            if kind == "objects" and not all(records):
                continue  # an empty object is a line
            if not records and not kind.startswith("array"):
                continue  # an empty file
            content = write(records).encode()
            path.write_bytes(compressed(content, compression) if compression else content)
            got = read(path)
            assert [record.value for record in got] == records, kind
            assert [record.place for record in got] == [f"{word} {n}" for n in range(1, len(records) + 1)], kind
    table = pyarrow.Table.from_pylist(records, schema)
    for kind, write_table in TABLES.items():
        path.write_bytes(write_table(table))
        got = read(path)
        assert [record.value for record in got] == without_nulls(records), kind
        assert [record.place for record in got] == [f"row {n}" for n in range(1, len(records) + 1)], kind


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=tables())
def test_datasets_of_hugging_face(drawn: tuple[pyarrow.Schema, list[dict[str, Any]]], tmp_path: Path) -> None:
    import datasets

    schema, records = drawn
    if not records:
        return
    datasets.disable_progress_bars()
    folder = tmp_path / "set"
    shutil.rmtree(folder, ignore_errors=True)
    rows = datasets.Dataset(pyarrow.Table.from_pylist(records, schema))
    rows.save_to_disk(folder)
    assert [record.value for record in read(folder)] == without_nulls(records)
    order = list(range(len(records)))[::-1]
    shutil.rmtree(folder)
    datasets.DatasetDict({"train": rows.select(order)}).save_to_disk(folder)  # one split, its rows in another order
    assert [record.value for record in read(folder)] == without_nulls(records)[::-1]
    datasets.DatasetDict({"test": rows}).save_to_disk(folder)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["test", "train"]}))
    with pytest.raises(DataError, match=r"set: holds the splits test, train; name the directory of one, .*set/test"):
        read(folder)
    assert [record.value for record in read(folder / "test")] == without_nulls(records)


def test_a_name_that_says_something_else_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting, "_warned", set())
    table = pyarrow.table({"a": [1, 2]})
    cases = {
        "a.jsonl": (b'[{"a": 1},\n {"a": 2}]', "is named .jsonl, and holds a JSON array; it is read as that"),
        "b.parquet": (b'{"a": 1}\n{"a": 2}\n', "is named .parquet, and holds JSON lines; it is read as that"),
        "c.jsonl": (parquet_bytes(table), "is named .jsonl, and holds Parquet; it is read as that"),
        "d.jsonl.gz": (b'{"a": 1}\n{"a": 2}\n', "is named .gz, and is not compressed; it is read as that"),
        "e.jsonl.gz": (compressed(b'{"a": 1}\n{"a": 2}\n', "zstd"), "is named .gz, and is zstd; it is read as that"),
        "f.parquet": (
            arrow_bytes(table, stream=True),
            "is named .parquet, and holds an Arrow stream; it is read as that",
        ),
        "g.txt": (b'{"a": 1}\n{"a": 2}\n', "is named .txt, and holds JSON lines; it is read as that"),
        "h.json": (b'{"a": 1}\n{"a": 2}\n', None),
        "i.json": (b'{\n"a": 1}\n{"a":\n 2}\n', None),
        "j": (gzip.compress(b'{"a": 1}\n{"a": 2}\n'), None),
    }
    for name, (content, warning) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        caplog.clear()
        for _ in range(2):
            assert [record.value for record in read(path)] == [{"a": 1}, {"a": 2}], name
        assert [message.split(": ", 1)[1] for message in caplog.messages] == ([warning] if warning else []), name


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'["x"]\n{"a": 1}\n', "lines"),
        (b"[1, 2]\n", "array"),
        (b'{"a": 1', "lines"),
        (b'{"a": 1\n{"a": 2}\n', "lines"),
        (b'{"a":\n1}', "objects"),
        (b'{"a": "' + b"x" * 400_000 + b'"}\n{"a": 1}\n', "lines"),
        (b'[{"a": "' + b"x" * 400_000 + b'"}]', "array"),
        (b'{\n"a": ["' + b'x",\n"' * 100_000 + b'x"]}\n', "objects"),
        (b"\n" * 10_000 + b'{"a": 1}\n', "lines"),
        (b" \n\t ", "empty"),
        (b"once upon a time", "text"),
    ],
)
def test_kinds_of_json(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert look(path).kind == kind
    if kind == "lines" and b"xxx" not in content:
        assert [record.value for record in read(path)][-1:] != []


# ----------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize("kind", ["gzip", "zstd", "parquet", "arrow file", "arrow stream"])
def test_what_is_cut_off_is_refused(tmp_path: Path, kind: str) -> None:
    records = [{"a": f"text {n * 7919}"} for n in range(40)]
    if kind in TABLES:
        content = TABLES[kind](pyarrow.Table.from_pylist(records))
    else:
        content = compressed(dumped(records).encode(), kind)
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert len(read(path)) == 40
    for cut in sorted({*range(8, len(content), max(1, len(content) // 60)), *range(len(content) - 12, len(content))}):
        path.write_bytes(content[:cut])
        with pytest.raises(DataError, match=r"a.jsonl: (is damaged|is cut off|not a readable|is .*no known table)"):
            read(path)


def test_damage_within_is_refused(tmp_path: Path) -> None:
    """A checksum says so, which zstd files need not have."""
    records = [{"a": f"text {n * 7919}"} for n in range(4000)]
    path = tmp_path / "a.jsonl"
    content = bytearray(gzip.compress(dumped(records).encode()))
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.jsonl: is damaged or cut off"):
        read(path)
    path.write_bytes(gzip.compress(gzip.compress(b"{}")))
    with pytest.raises(DataError, match="is compressed twice"):
        read(path)
    path.write_bytes(gzip.compress(parquet_bytes(pyarrow.table({"a": [1]}))))
    with pytest.raises(DataError, match="is gzip around Parquet, which is read in any order; decompress it"):
        read(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "is a PNG image"),
        (pickle.dumps({"messages": []}), "is a pickle, which nothing here opens"),
        (b"PK\x03\x04" + bytes(40), "is a zip archive"),
        (b"\x93NUMPY\x01\x00", "is a NumPy array"),
        (b"BZh91AY", "is compressed by bzip2; decompress it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
        (b"<!DOCTYPE html>\n<html>", "is an HTML page"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16 text; convert it to UTF-8"),
        (b"\x07\0\0\0\0\0\0\0{}     ", "is no text and no known table"),
        (b"once upon a time", r"begins with neither \{ nor \["),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, content: bytes, what: str) -> None:
    for name in ("a.bin", "a.txt") if b"once" not in content and b"html" not in content else ("a.bin",):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: {what}.*What is read: JSONL, a JSON array.*Parquet"):
            read(path)
        path.write_bytes(gzip.compress(content))
        with pytest.raises(DataError, match=what.removeprefix("is ")):
            read(path)


BEGINNINGS = (
    b"", b"[", b"{", b"\xef\xbb\xbf", b"\x1f\x8b", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"PAR1", b"ARROW1\0\0",
    b"\xff\xff\xff\xff",
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.builds(lambda start, rest, end: start + rest + end, st.sampled_from(BEGINNINGS), st.binary(),
                         st.sampled_from((b"", b"PAR1", b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"))),
       name=st.sampled_from(NAMES))  # fmt: skip
def test_any_bytes_are_read_or_refused(content: bytes, name: str, tmp_path: Path, quiet: None) -> None:
    path = tmp_path / f"a{name}"
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        assert all(record.fault or record.place for record in read(path))


def test_directories_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a directory without a dataset; give JSONL, .* save_to_disk"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read \(No such file or directory\); correct the path"):
        read(tmp_path / "none.jsonl")
    for name in ("a.parquet", "a.jsonl.gz", "a.arrow"):
        (tmp_path / name).touch()
        with pytest.raises(DataError, match="holds nothing, not even the beginning of such a file"):
            read(tmp_path / name)
    for name in ("a.jsonl", "a.txt", "a"):
        (tmp_path / name).write_text("\n ")
        assert read(tmp_path / name) == []


def test_faults_of_single_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"a": 1}\n{"a": \xff}\n{oops\n\n{"a": "\\ud800"}\n' + b"[" * 100_000 + b"\n" + b"9" * 5000 + b"\n{}\n"
    )
    got = read(path)
    assert [record.place for record in got] == ["line 1", "line 2", "line 3", "line 5", "line 6", "line 7", "line 8"]
    for record, fault in zip(
        got, ["", "not UTF-8 (invalid start byte)", "not JSON (Expecting property name", "is no text (surrogates",
              "not JSON (more than 100 lists and objects", "not JSON (Exceeds the limit", ""], strict=True,
    ):  # fmt: skip
        assert record.fault.startswith(fault) and bool(record.fault) == bool(fault), record
    table = pyarrow.table({"a": pyarrow.array([b"fine", b"\xff"], pyarrow.binary()).view(pyarrow.string())})
    path.write_bytes(parquet_bytes(table))
    assert read(path) == [Record("row 1", {"a": "fine"}), Record("row 2", None, "not UTF-8 (invalid start byte)")]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('[{"a": 1}, {"a": 2}', r"not JSON \(the array is cut off after item 2\); write it anew"),
        ('[{"a": 1}, {"a": ', r"not JSON \(cut off within item 2\)"),
        ('[{"a": 1}, {"a": "x', r"not JSON \(cut off within item 2\)"),
        (
            '[{"a": 1},\n\n {"a" 2}, {"a": 3}' + " " * 50 + "]",
            r"line 3: not JSON \(Expecting ':' delimiter, in item 2\)",
        ),
        ('[{"a": 1}\n {"a": 2}]', r"line 2: not JSON \(a comma was due after item 1\)"),
        ('[{"a": 1},\n]', r"line 2: not JSON \(Expecting value, in item 2\)"),
        ('[{"a": 1}\n]\n{"a": 2}', r"line 3: something follows the array"),
        ('[\n"\\ud800", nul', r"not JSON \(cut off within item 2\)|line 2: not JSON"),
        ("[\n" + "[" * 100_000, r"line 2: not JSON \(nested too deeply, in item 1\)"),
        ('{"a":\n1}\n{"a" 2}' + " " * 20, r"line 3: not JSON \(Expecting ':' delimiter, in item 2\)"),
    ],
)
def test_arrays_that_are_no_json_are_refused(tmp_path: Path, content: str, fault: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    for block in (2, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_records, "BLOCK", block)
            with pytest.raises(DataError, match=f"a.json(: |, ){fault}"):
                read(path)
    path.write_bytes(b'[{"a": 1},\n{"a": "\xff"}]')
    with pytest.raises(DataError, match=r"a.json, line 2: not UTF-8 \(invalid start byte\)"):
        read(path)


def test_scalars_of_an_array_are_whole(tmp_path: Path) -> None:
    """A number that a block cuts is one number."""
    path = tmp_path / "a.json"
    path.write_text('[12345, 1.5e10, "ab\\u00e4", true, null, {"a": 12}]')
    for block in range(1, 12):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_records, "BLOCK", block)
            assert [record.value for record in read(path)] == [12345, 1.5e10, "ab\u00e4", True, None, {"a": 12}]


@pytest.mark.parametrize("kind", ["array", "objects", "array over several lines"])
def test_json_is_streamed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(JSON[kind][0]([{"text": f"{n} " + "word " * 8000} for n in range(500)]))
    tracemalloc.start()
    try:
        assert sum(len(record.value["text"]) for record in open_records(path).read()) > 19_000_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8_000_000  # of 20 MB: some blocks of a million characters


def test_columns_are_chosen(tmp_path: Path) -> None:
    table = pyarrow.table({"a": [1, 2], "b": ["x", None]})
    for kind, write in TABLES.items():
        (tmp_path / "t").write_bytes(write(table))
        records = open_records(tmp_path / "t")
        assert records.columns == ("a", "b"), kind
        assert [record.value for record in records.read(["b"])] == [{"b": "x"}, {}]
        assert [record.value for record in records.read()] == [{"a": 1, "b": "x"}, {"a": 2}]


def test_maps_are_objects(tmp_path: Path) -> None:
    kind = pyarrow.map_(pyarrow.string(), pyarrow.int64())
    table = pyarrow.table({"a": pyarrow.array([[("x", 1), ("y", 2)], []], kind)})
    (tmp_path / "t").write_bytes(parquet_bytes(table))
    assert [record.value for record in read(tmp_path / "t")] == [{"a": {"x": 1, "y": 2}}, {"a": []}]


# ---------------------------------------------------------------------------------------------------------------- doors

CHATS = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}],
     "attributes": {"verbosity": n % 5}}
    for n in range(6)
]  # fmt: skip
PAIRS = [{"prompt": f"q{n}", "chosen": f"a{n}", "rejected": "no", "score_chosen": 2.5, "score_rejected": 1.0}
         for n in range(6)]  # fmt: skip
QUESTIONS = [{"prompt": f"q{n}", "choices": ["a", "b"], "answer": n % 2} for n in range(6)]


def texts_of(path: str) -> Any:
    from nemo_minitron.config import SourceConfig
    from nemo_minitron.data import read_source

    return [document.text for document in read_source(SourceConfig(name="a", path=path, text_key="prompt"), "cache")]


def blocks_of(path: str) -> Any:
    """Conversations as text to train on."""
    from nemo_minitron.config import SourceConfig
    from nemo_minitron.data.sources import source_files
    from nemo_minitron.data.streams import _chats, source_state

    source = SourceConfig(name="a", chat=path)
    assert len(source_files(source)) == 1 and source_state(source, "cache")
    return [chat.record() for chat in _chats(source, skip=False)]


def prompts_of(path: str) -> Any:
    from nemo_minitron.config import PromptsConfig
    from nemo_minitron.generation.prompts import read_prompts

    return [chat.messages for chat in read_prompts(PromptsConfig(path=path))]


def chats_of(path: str) -> Any:
    from nemo_minitron.config import ChatDataConfig
    from nemo_minitron.stages.shared.chats import load_chats

    return [[chat.record() for chat in part] for part in load_chats(ChatDataConfig(path=path, validation=path))]


def pairs_of(path: str) -> Any:
    from nemo_minitron.config import ChatDataConfig
    from nemo_minitron.stages.shared.chats import load_preferences

    parts = load_preferences(ChatDataConfig(validation=path), path)
    return [[(pair.prompt, pair.chosen, pair.rejected, pair.chosen_reward) for pair in part] for part in parts]


def labelled_of(path: str) -> Any:
    from nemo_minitron.config import AttributesConfig, ChatDataConfig
    from nemo_minitron.data.chat.labelled import labelled_chats

    found = labelled_chats(ChatDataConfig(path=path), AttributesConfig(), pairs=False)
    return [[chat.record() for chat in part] for part in (found.train, found.held_out)]


def labelled_pairs_of(path: str) -> Any:
    from nemo_minitron.config import AttributesConfig, ChatDataConfig
    from nemo_minitron.data.chat.labelled import labelled_chats

    found = labelled_chats(ChatDataConfig(path=path), AttributesConfig(derive=True), pairs=True)
    return [[chat.record() for chat in part] for part in (found.train, found.held_out)]


def questions_of(path: str) -> Any:
    from nemo_minitron.config import TaskConfig
    from nemo_minitron.data.tasks import read_task

    return read_task(TaskConfig(path=path), cache_dir="cache", seed=1)


#: Every reader of data, with records that it takes.
DOORS: list[tuple[Callable[[str], Any], list[dict[str, Any]]]] = [
    (texts_of, QUESTIONS), (blocks_of, CHATS), (prompts_of, CHATS), (prompts_of, PAIRS), (chats_of, CHATS),
    (pairs_of, PAIRS), (labelled_of, CHATS), (labelled_pairs_of, PAIRS), (questions_of, QUESTIONS),
]  # fmt: skip


@pytest.mark.parametrize(("door", "records"), DOORS)
def test_every_door_takes_every_container(
    door: Callable[[str], Any],
    records: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quiet: None,
) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    (tmp_path / "a.jsonl").write_text(dumped(records))
    wanted = door("a.jsonl")
    assert wanted
    table = pyarrow.Table.from_pylist(records)
    contents = {kind: write(records).encode() for kind, (write, _) in JSON.items()}
    contents |= {"gzip": gzip.compress(contents["array"]), "zstd": compressed(contents["lines"], "zstd")}
    contents |= {kind: write(table) for kind, write in TABLES.items()}
    for kind, content in contents.items():
        (tmp_path / "b.json").write_bytes(content)
        assert door("b.json") == wanted, kind
    datasets.Dataset(table).save_to_disk("set")
    assert door("set") == wanted
    (tmp_path / "b.json").write_bytes(contents["gzip"][:-9])
    (tmp_path / "none").mkdir()
    for path, fault in (("b.json", "is damaged or cut off"), ("none", "is a directory without a dataset")):
        with pytest.raises(DataError, match=f"{path}: {fault}"):
            door(path)


def test_plain_text_may_begin_with_a_bracket(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_minitron.config import SourceConfig
    from nemo_minitron.data import read_source

    monkeypatch.setattr(accounting, "_warned", set())
    for name, content, warned in (
        ("a.md", "[A link](https://x.y) and\nmore.", False),
        ("b.txt", "{\\bf bold}", False),
        ("c.txt", '{"text": "a"}\n{"text": "b"}', True),
        ("d.txt.gz", "plain", False),
    ):
        path = tmp_path / name
        path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
        caplog.clear()
        (document,) = read_source(SourceConfig(name="mine", path=str(path)), tmp_path)
        assert document.text == content
        assert caplog.messages == (
            [f"{path}: is named .txt, and looks like JSON lines; it is read as plain text: name it .jsonl for records"]
            if warned else []
        )  # fmt: skip
