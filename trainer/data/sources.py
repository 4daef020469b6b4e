"""Where documents come from: text, JSON lines and the standard library (`trainer.data.arrow` has the rest).

A source is read as a stream, one document (or part of a long one) in memory at a time, and always in the same order.
All text is UTF-8, checked here; every error is a ValueError that names the file and the place in it.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import decode_source
from itertools import chain
from pathlib import Path

from trainer.data.arrow import dataset_source, read_parquet
from trainer.data.files import checked_utf8, find_files, library_files, reading, stamps
from trainer.data.passages import Passage, Source
from trainer.options import DataOptions

LONG_FILE_BYTES = 256 << 10
"""A text file longer than this is a collection rather than a document: it is read in parts, each held out or not."""
PART_BYTES = 8 << 10


def open_source(options: DataOptions, *, valid: bool = False) -> Source:
    """The documents of ``data.paths``, without the files that ``data.valid_paths`` names; or, if `valid`, those alone.

    With ``data.source=stdlib`` the files of ``data.valid_paths`` are text.
    """
    kind = "text" if valid and options.source == "stdlib" else options.source
    if kind == "datasets":
        return dataset_source(options.valid_paths if valid else options.paths, options.column, valid)
    files = _valid_files(options) if valid else _train_files(options)
    read = _reader(kind, options.column)
    return Source([kind, options.column, stamps(files)], lambda: chain.from_iterable(map(read, files)))


def _reader(kind: str, column: str) -> Callable[[Path], Iterator[Passage]]:
    if kind == "parquet":
        return partial(read_parquet, column=column)
    if kind == "jsonl":
        return partial(read_jsonl, column=column)
    return {"stdlib": read_library, "text": read_text}[kind]


def _valid_files(options: DataOptions) -> list[Path]:
    return find_files(options.valid_paths, "data.valid_paths")


def _train_files(options: DataOptions) -> list[Path]:
    found = library_files() if options.source == "stdlib" else find_files(options.paths, "data.paths")
    held_out = set(_valid_files(options))
    files = [path for path in found if path not in held_out]
    if not files:
        raise ValueError(f"data.valid_paths={options.valid_paths} takes every file of data.paths={options.paths}")
    return files


def read_library(path: Path) -> Iterator[Passage]:
    """A Python source file, in whatever encoding it declares (PEP 263)."""
    try:
        with reading(path):
            text = decode_source(path.read_bytes())
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"data.source=stdlib: {path} is not in the encoding it declares: {error}") from error
    yield Passage(text.encode())


def read_text(path: Path) -> Iterator[Passage]:
    """A file as one document; a long one in parts of at most `PART_BYTES`, cut at ends of lines where there are any."""
    with reading(path), path.open("rb") as file:
        size = path.stat().st_size
        if size <= LONG_FILE_BYTES:
            yield Passage(checked_utf8(file.read(), str(path)))
            return
        offset, rest = 0, b""
        while block := rest + file.read(PART_BYTES - len(rest)):
            part = block[: _cut(block)] if len(block) == PART_BYTES else block
            checked_utf8(part, str(path), offset)
            offset, rest = offset + len(part), block[len(part) :]
            yield Passage(part, continues=offset < size)


def _cut(block: bytes) -> int:
    """Where to cut a block that goes on: after its last line, else its last word, else before its last character."""
    for separator in (b"\n", b" "):
        if end := block.rfind(separator) + 1:
            return end
    start = len(block) - 1
    while start > len(block) - 4 and block[start] & 0xC0 == 0x80:  # a continuation byte
        start -= 1
    return start


def read_jsonl(path: Path, column: str) -> Iterator[Passage]:
    """The field `column` of the object on each line; blank lines are passed over, null is an empty document."""
    offset = 0
    with reading(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if line.strip():
                yield Passage(_field(checked_utf8(line, where, offset), column, where))
            offset += len(line)


def _field(line: bytes, column: str, where: str) -> bytes:
    try:
        row = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"data.paths or data.valid_paths: {where} is not JSON: {error.msg} at column {error.colno}"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"data.column={column}: {where} is a JSON {type(row).__name__}, not an object with that field")
    if column not in row:
        raise ValueError(f"data.column={column}: {where} has no such field; it has {', '.join(row) or 'none'}")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"data.column={column}: at {where} it is {type(text).__name__}, not a string")
    try:
        return (text or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"data.column={column}: {where} holds half a surrogate pair, which is no text") from error
