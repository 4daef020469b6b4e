"""Where a run's numbers go: files of JSON lines, and TensorBoard.

Threads: `JsonLines` belongs to the training thread, since a line must be in the file before a checkpoint that counts on
it. `Background` is one thread for all that may lag behind. No logger ever stops the training: one that fails says so,
once.
"""

import errno
import json
import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Record = dict[str, Any]
log = logging.getLogger(__name__)


class JsonLines:
    """A file of one JSON object a line, each with a ``step``; a line is in the file when `append` returns.

    Floats keep all their digits. NaN and infinities, which JSON lacks, are the strings ``"NaN"``, ``"Infinity"`` and
    ``"-Infinity"``, which `float` reads. While the file cannot be written (a full disk) lines wait in memory, in order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""
        self._told = False
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._size_bytes = os.fstat(self._file).st_size

    def append(self, record: Record) -> None:
        self._waiting += (json.dumps({key: _valid(value) for key, value in record.items()}) + "\n").encode()
        try:
            self._write()
        except OSError as error:
            if not self._told:
                log.warning("%s cannot be written: %s; training goes on, lines wait in memory", self.path, error)
            self._told = True

    def _write(self) -> None:
        """All that waits, or nothing of it: half a line would be taken for the trace of a kill."""
        written = os.write(self._file, self._waiting)
        if written < len(self._waiting):
            os.ftruncate(self._file, self._size_bytes)
            raise OSError(errno.ENOSPC, "not all bytes could be written", str(self.path))
        self._size_bytes += written
        self._waiting, self._told = b"", False

    def close(self) -> None:
        """Give lines that wait a last chance, and say how many are lost."""
        try:
            if self._waiting:
                self._write()
        except OSError as error:
            log.warning("%s lacks its last %d lines: %s", self.path, self._waiting.count(b"\n"), error)
        finally:
            os.close(self._file)


def read_lines(path: Path) -> list[Record]:
    """The records of a `JsonLines` file; empty if there is none. A line torn by a kill is left out."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def keep_steps(path: Path, before: int) -> int:
    """Drop records of step `before` and later, and torn lines; atomic. Returns how many are left."""
    if not path.exists():
        return 0
    kept = [record for record in read_lines(path) if record["step"] < before]
    replace_file(path, "".join(json.dumps(record) + "\n" for record in kept))
    return len(kept)


def replace_file(path: Path, text: str) -> None:
    """Write a whole file so that, whenever the machine stops, it holds its old or its new content."""
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _valid(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class TensorBoard:
    """Scalars as TensorBoard event files. It imports TensorBoard at the first `write`, hence runs in the background."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """first_step: what earlier event files say of this step and later ones is hidden."""
        self._folder, self._first_step = folder, first_step
        self._writer: Any = None

    def write(self, group: str, step: int, record: Record) -> None:
        """Every number of `record` as ``<group>/<key>``."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # flush often: what a kill leaves unwritten is missing from the curves for good
            self._writer = SummaryWriter(str(self._folder), purge_step=self._first_step, flush_secs=10)
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"{group}/{key}", value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Background:
    """One thread that does what training need not wait for, in order. A kind of work that raises is given up, aloud."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="run-folder")
        self._given_up: set[str] = set()

    def do(self, kind: str, work: Callable[..., None], *args: Any) -> None:
        """Queue ``work(*args)``; `kind` names it to the user."""
        if kind not in self._given_up:
            self._thread.submit(self._try, kind, work, args)

    def _try(self, kind: str, work: Callable[..., None], args: tuple[Any, ...]) -> None:
        if kind in self._given_up:
            return
        try:
            work(*args)
        except Exception as error:
            self._given_up.add(kind)
            log.warning("%s is given up for this run: %s: %s; training goes on", kind, type(error).__name__, error)

    def close(self) -> None:
        """Wait for what is queued."""
        self._thread.shutdown()
