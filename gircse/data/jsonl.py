"""Lines of a JSONL file: plain or gzip, read once from front to back, every mistake with its line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast

from gircse.data.errors import DataError, Problems

MAX_LINE_BYTES = 64 * 2**20  # a line beyond it is a mistake, and would otherwise be read into memory whole
BOM = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """A line that is not blank: its number (from 1), where it starts in the unpacked file, its bytes as they stand."""

    number: int
    offset: int
    content: bytes


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(items)
    if len(record) != len(items):
        names = [name for name, _ in items]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"the key {json.dumps(twice[:60])} occurs more than once")
    return record


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_no_duplicates)


def parse_line(line: bytes) -> object:
    """The JSON value of a line. Raises ValueError with the reason."""
    line = line.strip()
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}") from None
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if text[error.pos : error.pos + 1] == "\ufeff":
            what = "a byte order mark, as if two files had been joined without a line break between them,"
        else:
            what = error.msg.removesuffix(" at")  # some of the messages end with it
        raise ValueError(f"invalid JSON: {what} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("invalid JSON: nested too deeply") from None


def check_unicode(text: str, field: str) -> str:
    """The text. Raises ValueError where JSON's escapes left half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{field} has a lone surrogate at character {error.start}, which is no Unicode text") from None
    return text


@contextmanager
def open_jsonl(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(the bytes, unpacked if they are gzip; the file itself). Gzip is told by the content, because names lie.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    try:
        raw = open(path, "rb")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        raise DataError([f"{path}: no such file"]) from None
    except IsADirectoryError:
        raise DataError([f"{path}: is a directory, expected a JSONL file"]) from None
    except (OSError, ValueError) as error:
        raise DataError([f"{str(path)!r}: cannot be read: {getattr(error, 'strerror', None) or error}"]) from None
    with raw:
        try:
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
        except OSError as error:
            raise DataError([f"{path}: cannot be read: {error.strerror or error}"]) from None
        if packed:
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield cast(BinaryIO, unpacked), raw
        else:
            yield raw, raw


def read_lines(
    file: BinaryIO, path: Path, problems: Problems, *, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[Line]:
    """The lines of a file that are not blank, without a byte order mark (of joined files, later lines may begin with
    one, too); what is wrong goes to `problems`.

    A line that is too long is passed over without being kept; a file that breaks off ends there.
    """
    number, offset = 0, 0
    while True:
        try:
            line = file.readline(max_line_bytes + 1)
            length = len(line)
            too_long = length > max_line_bytes and not line.endswith(b"\n")
            while too_long and line and not line.endswith(b"\n"):
                line = file.readline(max_line_bytes)
                length += len(line)
        except (EOFError, OSError, zlib.error) as error:  # what was read so far may be good: the file is not
            problems.add(f"{path}:{number + 1}", f"cannot be read on from here: {str(error) or 'broken file'}")
            return
        if not length:
            return
        number += 1
        if too_long:
            problems.add(f"{path}:{number}", f"the line is longer than {max_line_bytes:,} bytes")
        else:
            content = line.removeprefix(BOM)
            if content.strip():
                yield Line(number, offset + length - len(content), content)
        offset += length
