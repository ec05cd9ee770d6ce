"""Records of JSON: lines, an array, or objects one after the other. All are streamed.

Memory: a line; of an array, a block of :data:`BLOCK` characters and the item that begins in it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from nemo_minitron.errors import DataError
from nemo_minitron.parsing import parse_json

__all__ = ["Record", "decoded", "items", "lines", "text_lines"]

BLOCK = 1 << 20

_BLANK = re.compile(r"[ \t\n\r]*")
_UNFINISHED = 16  # an error so near the end of what was read may be no error
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # half of a character that JSON spells by two


class Record(NamedTuple):
    """One record of a container.

    Attributes:
        place: in the container: "line 7", "row 7" or "item 7", counted from 1.
        value: the record; where it cannot be decoded, what stands there as text.
        fault: why it cannot be decoded.
    """

    place: str
    value: Any
    fault: str = ""


def decoded(place: str, text: str) -> Record:
    """A text as JSON."""
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        return Record(place, text, f"not JSON ({error.msg} at column {error.colno})")
    except ValueError as error:  # a number of thousands of digits
        return Record(place, text, f"not JSON ({error})")
    return Record(place, value, _half(text, value))


def _half(text: str, value: Any) -> str:
    """The fault of a record with half a character, which no file of text can hold."""
    if _HALF.search(text) is None:
        return ""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"is no text ({error.reason})"
    return ""


def text_lines(stream: IO[bytes]) -> Iterator[tuple[int, str, str]]:
    """``(number, line, fault)``: lines from 1, without line ends and byte order marks; not UTF-8 is a fault."""
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield number, line.decode("utf-8", errors="backslashreplace"), f"not UTF-8 ({error.reason})"
        else:
            yield number, text.removeprefix("\ufeff").rstrip("\r\n"), ""


def lines(stream: IO[bytes]) -> Iterator[Record]:
    """A record of each line that is not blank."""
    for number, text, fault in text_lines(stream):
        if fault:
            yield Record(f"line {number}", text, fault)
        elif text.strip():
            yield decoded(f"line {number}", text)


def items(stream: IO[bytes], title: str, *, array: bool) -> Iterator[Record]:
    """The items of an array, or objects one after the other.

    Args:
        stream: of the file.
        title: of the file, for messages.
        array: the objects stand in an array.

    Raises:
        DataError: where the text is no JSON: what follows cannot be told apart, so none of it can be left out.
    """
    text = _Text(stream, title)
    if array:
        text.take("[")
    number = 0
    while True:
        following = text.peek()
        if array and following == "]" and (number == 0 or not text.comma):
            text.take("]")
            if text.peek():
                raise DataError(f"{title}, line {text.line}: something follows the array; remove it")
            return
        if not following:
            if array:
                raise DataError(f"{title}: not JSON (the array is cut off after item {number}); write it anew")
            return
        number += 1
        value, given = text.value(number)
        yield Record(f"item {number}", value, _half(given, value))
        if array:
            text.comma = text.peek() == ","
            if text.comma:
                text.take(",")
            elif text.peek() not in ("]", ""):
                raise DataError(
                    f"{title}, line {text.line}: not JSON (a comma was due after item {number}); correct the file"
                )


class _Text:
    """A text that is read in blocks and decoded in values.

    Attributes:
        comma: a comma was taken last.
    """

    def __init__(self, stream: IO[bytes], title: str) -> None:
        self._stream, self._title = stream, title
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._lines, self._ended = "", 0, 1, False
        self.comma = False

    @property
    def line(self) -> int:
        """Where decoding stands, from 1."""
        return self._lines + self._text.count("\n", 0, self._at)

    def _more(self, size: int | None = None) -> bool:
        """Read on; what was decoded is forgotten."""
        if self._ended:
            return False
        block = self._stream.read(BLOCK if size is None else size)
        try:
            text = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            lines = self._lines + self._text.count("\n") + block[: max(0, error.start)].count(b"\n")
            raise DataError(f"{self._title}, line {lines}: not UTF-8 ({error.reason}); convert the file") from None
        self._lines += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :] + text, 0
        self._ended = not block
        return True

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            if match := _BLANK.match(self._text, self._at):
                self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        """Pass over the next character, which is this one."""
        assert self.peek() == character
        self._at += 1

    def value(self, number: int) -> tuple[Any, str]:
        """The next value, and its text.

        Raises:
            DataError: if there is none.
        """
        size = BLOCK
        while True:
            try:
                value, stop = _decode(self._text, self._at)
            except json.JSONDecodeError as error:
                in_string = error.msg.startswith("Unterminated string")
                if (in_string or error.pos >= len(self._text) - _UNFINISHED) and self._more(size):
                    size *= 2  # a large item is not tried again at each block
                    continue
                if in_string or error.pos >= len(self._text.rstrip()):
                    raise DataError(f"{self._title}: not JSON (cut off within item {number}); write it anew") from None
                line = self._lines + self._text.count("\n", 0, error.pos)
                raise DataError(
                    f"{self._title}, line {line}: not JSON ({error.msg}, in item {number}); correct the file"
                ) from None
            except (RecursionError, ValueError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                raise DataError(
                    f"{self._title}, line {self.line}: not JSON ({reason}, in item {number}); correct the file"
                ) from None
            if self._text[stop - 1] not in '}]"' and stop > len(self._text) - _UNFINISHED and self._more(size):
                continue  # a number may go on
            given, self._at = self._text[self._at : stop], stop
            return value, given


def _decode(text: str, at: int) -> tuple[Any, int]:
    return json.JSONDecoder().raw_decode(text, at)
