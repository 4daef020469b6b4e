"""Files of a corpus: found by globs, told apart by size and modification time, read with errors that name them."""

import glob
import os
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
"""Folders below the standard library that are installed packages, or tests with deliberately broken text."""


def find_files(patterns: Sequence[str], override: str) -> list[Path]:
    """The files that the globs match, absolute, each once, in order of their path. ValueError where a glob has none."""
    found: set[Path] = set()
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        # A name with brackets in it is first of all a name.
        matches = [expanded] if os.path.lexists(expanded) else glob.glob(expanded, recursive=True)
        files = [Path(match).absolute() for match in matches if not os.path.isdir(match)]
        if not files:
            hint = (
                f"it is a folder: say {pattern.rstrip('/')}/**"
                if os.path.isdir(expanded)
                else f"looked from {os.getcwd()}"
            )
            raise ValueError(f"{override}={pattern}: no file matches ({hint})")
        found.update(files)
    return sorted(found)


def library_files() -> list[Path]:
    """The ``*.py`` files of the interpreter's own standard library, without tests, in order of their path."""
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_LIBRARY]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    files = sorted(path for path in found if path.is_file())  # a distribution may leave dangling links
    if not files:
        raise ValueError(
            f"data.source=stdlib: no *.py files under {root}; give text of your own, data.source=text data.paths=[…]"
        )
    return files


def stamps(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Path, size in bytes and modification time in ns of each file: what decides whether it is still the same."""
    stamps = []
    for path in files:
        with reading(path):
            status = path.stat()
        stamps.append((str(path), status.st_size, status.st_mtime_ns))
    return stamps


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn an OSError into a ValueError that names the file; one that comes from elsewhere is the cache folder's."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"data.paths or data.valid_paths: cannot read {path}: {error.strerror or error}") from error


def checked_utf8(text: bytes, where: str, offset: int = 0) -> bytes:
    """`text` itself. ValueError if it is not UTF-8, with the position in bytes, counted from `offset`."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data.paths or data.valid_paths: {where} is not UTF-8: byte 0x{text[error.start]:02x} at byte offset "
            f"{offset + error.start} ({error.reason}); convert it, for example with iconv -t utf-8"
        ) from error
    return text
