"""JSON and YAML of a few bytes that would end a reader or keep it for minutes are refused at once, at every door."""

from __future__ import annotations

import json
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nemo_minitron.config import load
from nemo_minitron.errors import ConfigError, first_line
from nemo_minitron.parsing import NESTED, compose_yaml, parse_json, parse_yaml

LISTS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}\n" for level in range(1, 12)
)
WIDE = f"a: &a [{', '.join(['1'] * 200)}]\nb: [{', '.join(['*a'] * 200)}]\n"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("abc: -[{&*'\"\n#é", max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4),
)


@given(VALUES)
def test_values_come_back(value):
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value).encode()) == value
    text = yaml.safe_dump(value, allow_unicode=True)
    assert parse_yaml(text) == yaml.safe_load(text) == value


@pytest.mark.parametrize("depth", [NESTED, NESTED + 1, 500, 100_000])
def test_nested_json(depth):
    pairs, odd = divmod(depth, 2)
    text = '[{"a":' * pairs + ("[]" if odd else "1") + "}]" * pairs
    if depth == NESTED:
        assert isinstance(parse_json(text), list)
        return
    with pytest.raises(json.JSONDecodeError, match=f"more than {NESTED} lists and objects within each other"):
        parse_json(text)


def test_wide_json_is_not_deep():
    assert len(parse_json(json.dumps([[[]]] * 1000))) == 1000


@pytest.mark.parametrize("text", [LISTS, MERGES, WIDE])
def test_aliases_that_stand_for_very_much(text):
    started = time.monotonic()
    with pytest.raises(yaml.YAMLError, match="its aliases stand for more than 10,000 values"):
        parse_yaml(text)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &a [*a]", "an alias stands for itself"),
        ("a: &a {b: *a}", "an alias stands for itself"),
        ("[" * (NESTED + 2) + "]" * (NESTED + 2), "more than 100 lists and mappings within each other"),
        ("[" * 5000, "more than 100 lists and mappings within each other"),
        ("- " * 3000, "more than 100 lists and mappings within each other"),
    ],
)
def test_yaml_that_does_not_end(text, reason):
    with pytest.raises(yaml.YAMLError, match=reason):
        compose_yaml(text)


def test_aliases_of_everyday():
    text = "base: &base {a: 1, b: [2, 3]}\none: {<<: *base, a: 4}\ntwo: *base\n"
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (LISTS.encode(), "line 5: not valid YAML: its aliases stand for more than 10,000 values"),
        (MERGES.encode(), "line 5: not valid YAML: its aliases stand for more than 10,000 values"),
        (b"a: &a [*a]", "line 1: not valid YAML: an alias stands for itself"),
        (b"[" * 5000, "not valid YAML: more than 100 lists and mappings within each other"),
        (b"? [a]\n: 1\n", "line 1: not valid YAML: a key must be a text"),
        (b"model: " + b"1" * 9999, "not valid YAML: Exceeds the limit"),
        (b"model: 2026-99-99", "month must be in 1..12|model"),
        (b"\xff\xfe\x00", "cannot be read: 'utf-8' codec"),
        (b"model: \x00", "not valid YAML"),
        (b"!!python/object/apply:os.system [ls]", "must be a mapping|could not determine a constructor"),
        (b"model: !!python/name:os.system", "could not determine a constructor"),
    ],
)
def test_configurations(tmp_path, content, reason):
    file = tmp_path / "score.yaml"
    file.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=reason) as caught:
        load("score", file)
    assert time.monotonic() - started < 4
    assert str(file) in str(caught.value)


def test_what_an_error_says():
    assert first_line(ValueError("\n  what went wrong,\nand so on")) == "what went wrong"
    assert first_line(KeyError()) == "KeyError"
